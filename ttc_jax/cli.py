"""Command lines whose errors are one sentence and an exit code.

2: the user can mend it (`UserError`, a wrong flag). 1: a run cannot go on.
"""
from collections.abc import Callable
import errno
import os
import signal
import sys

from absl import app, flags, logging
import jax

from ttc_jax.errors import RunError, UserError

# A disk that is full, over quota, read-only or forbidden is no bug of ours.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM,
         errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def _parse(argv: list[str]) -> list[str]:
  logging.set_verbosity(logging.WARNING)
  _check_config_files(argv)
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, OSError, TypeError) as error:
    raise UserError(_sentence(error)) from error


def _check_config_files(argv):
  """config_flags reports a missing file in ten lines; one is enough."""
  for name in argv[1:]:
    if name.startswith(("--config=", "-config=")):
      file = name.partition("=")[2].partition(":")[0]
      if not os.path.isfile(file):
        raise UserError(f"configuration '{file}' does not exist")


def _sentence(error):
  text = " ".join(str(error).replace("\\n", " ").split())
  if isinstance(error, AttributeError):  # of a ConfigDict
    return "unknown key of config: " + text.replace("\\", "").strip("'\"")
  return text


def run(main: Callable[[list[str]], int | None]) -> None:
  """`absl.app.run` with errors as above.

  SIGTERM ends like Ctrl-C, so that nothing half-written stays; `main` of
  training listens to it itself.
  """
  signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
  try:
    app.run(main, flags_parser=_parse)
  except UserError as error:
    _exit(error, 2)
  except RunError as error:
    _exit(error, 1)
  except BrokenPipeError:  # whoever read has seen enough: `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  except OSError as error:
    if error.errno not in _DISK:
      raise
    _exit(f"{error.filename or 'a file'}: {error.strerror}; mend that and "
          "start the same command again, nothing finished is lost", 2)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    _exit("the device has too little memory for this batch: lower "
          "config.batch_size", 1)
  except KeyboardInterrupt:
    _exit("interrupted; start the same command again to go on", 1)


def _exit(message, code):
  print(f"error: {message}", file=sys.stderr)
  sys.exit(code)
