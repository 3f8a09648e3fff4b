"""The one error a user can mend: a sentence that names the fix."""
from collections.abc import Iterable
import difflib
import unicodedata


class UserError(Exception):
  """Bad input. `str(error)` is one sentence: what, where, what was expected.

  The command lines print it without a traceback and exit with code 2. It is
  no ValueError: libraries that wrap those would bury the sentence.
  """


class DataError(UserError):
  """A file of a task's images is missing or damaged; other tasks can go on."""


class RunError(RuntimeError):
  """A run that started well and cannot go on: it diverged.

  The command lines print it without a traceback and exit with code 1.
  """


class Stopped(Exception):
  """The process was asked to end, and what can be saved is saved."""


class Busy(Exception):
  """Another process does this already."""


def check_known(kind: str, name: str, known: Iterable[str]) -> str:
  """Returns `name` if it is one of `known`, else raises with the nearest."""
  known = sorted(known)
  if name in known:
    return name
  near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
  hint = f"did you mean {' or '.join(near)}? " if near else ""
  raise UserError(
      f"unknown {kind} {name!r}: {hint}known: {', '.join(known) or 'none'}")


# They turn the reading direction of the text around them.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e"
                  "\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
  """Returns `text` with everything escaped that would act on a terminal.

  Escaped are control characters, line separators, bidirectional overrides and
  lone surrogates (bytes of a file name that are not UTF-8).

    printable("a\x1b[31m") == "a\\x1b[31m"
  """
  return "".join(
      c.encode("unicode_escape").decode()
      if c in _BIDI or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
      else c for c in text)
