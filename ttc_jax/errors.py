"""The one error a user can mend: a sentence that names the fix."""
import difflib
from collections.abc import Iterable


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
