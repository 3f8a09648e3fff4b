"""Errors that a user can correct: one sentence that names the fix."""
from collections.abc import Iterable
import difflib
import unicodedata


class UserError(Exception):
  """Bad input: a flag, a configuration, a file.

  `str(error)` is one sentence: what is wrong, where, and what was expected.
  The command lines print it without a traceback and exit with code 2. This is
  not a ValueError, because libraries wrap those in messages of their own.
  """


class DataError(UserError):
  """A file of a task's images is missing or damaged; other tasks go on."""


class RunError(RuntimeError):
  """A run cannot go on after a correct start: it diverged, or what it shall be
  measured by is not there.

  The command lines print it without a traceback and exit with code 1.
  """


class Stopped(Exception):
  """The process was asked to end; everything finished is saved."""


class Busy(Exception):
  """Another process holds a lock."""


def check_known(kind: str, name: str, known: Iterable[str]) -> str:
  """Returns `name` if it is known.

  Args:
    kind: what is named, for the message: "method", "task", ...
    name: the user's input.
    known: all names.

  Raises:
    UserError: `name` is unknown; the message has the nearest known names.
  """
  known = sorted(known)
  if name in known:
    return name
  near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
  hint = f"did you mean {' or '.join(near)}? " if near else ""
  shown = " ".join(repr(name).split())  # a ConfigDict's has many lines
  raise UserError(
      f"unknown {kind} {shown}: {hint}known: "
      f"{', '.join(word or 'nothing' for word in known) or 'none'}")


# They turn the order of what follows: "gpj.exe" could read as "exe.jpg".
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e"
                  "\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
  """Returns text from a file with what would act on a terminal escaped.

  Control characters (newline, tab and ESC too), line separators, marks that
  override the direction of writing, and lone surrogates become "\\x1b",
  "\\u202e", ...; everything else stays as it is.

  Example:
    printable("cat\\n\\x1b[2J")  # 'cat\\\\n\\\\x1b[2J'
  """
  def acts(c):
    return c in _BIDI or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
  return "".join(c.encode("unicode_escape").decode() if acts(c) else c
                 for c in text)
