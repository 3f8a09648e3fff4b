"""Command lines whose errors are one sentence and an exit code.

2: the user can fix it (`UserError`, a wrong flag). 1: a run cannot go on.
128 + n: ended by signal n, 130 for Ctrl-C.
"""
from collections.abc import Callable
import errno
import io
import logging as logs
import os
import re
import sys
from typing import Any

from absl import app, flags, logging

from ttc_jax import config_file, interrupt
from ttc_jax.errors import RunError, Stopped, UserError, printable

flags.disclaim_key_flags()  # flags defined here belong to the calling command

# The disk is full, over quota, read-only, ...: not a fault of this program.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM,
         errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_HELP = ("-h", "-help", "--help", "-?", "--helpshort")


def run(main: Callable[[list[str]], int | None]) -> None:
  """Runs a command: `absl.app.run` with errors as above.

    if __name__ == "__main__":
      cli.run(main)

  Signals raise in the main thread, so that nothing half-written stays;
  training calls `interrupt.listen`.
  """
  interrupt.ending()
  for stream in (sys.stdout, sys.stderr):  # an ASCII terminal is no error
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")
  try:
    app.run(main, flags_parser=_parse)
  except UserError as error:
    _exit(error, 2)
  except RunError as error:
    _exit(error, 1)
  except Stopped as stop:
    _exit(f"{stop}; start the same command again to go on",
          interrupt.exit_code(), "")
  except BrokenPipeError:  # the reader has seen enough: `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  except OSError as error:
    if error.errno not in _DISK:
      raise
    _exit(f"{error.filename or 'a file'}: {error.strerror}; mend that and "
          "start the same command again, nothing finished is lost", 2)
  except RuntimeError as error:  # JAX's is one
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    _exit("the device has too little memory for this batch: lower "
          "config.batch_size", 1)
  except KeyboardInterrupt:
    _exit("interrupted; start the same command again to go on", 130)


def check_no_arguments(argv: list[str]) -> None:
  """Raises UserError if there is an argument that is no flag."""
  if argv[1:]:
    raise UserError(f"unexpected argument {argv[1]!r}: this command takes "
                    "--flags alone; --help lists them")


class _Plain(logs.Formatter):
  """"warning: ..." as errors are printed, without time and source."""

  def format(self, record: logs.LogRecord) -> str:
    return f"{record.levelname.lower()}: {super().format(record)}"


def _exit(message, code, kind="error: "):
  lines = str(message).split("\n")
  print(kind + "\n".join(map(printable, lines)), file=sys.stderr)
  sys.exit(code)


def _parse(argv: list[str]) -> list[str]:
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_handler().setFormatter(_Plain())
  if any(arg in _HELP for arg in argv[1:]):
    app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
  argv, overrides = _take_overrides(argv)
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    text = " ".join(str(error).split())
    missing = re.fullmatch(r"flag --(\w+)=None: .* other than None\.", text)
    if missing:
      text = f"--{missing[1]} is missing"
      if missing[1] == "config":
        text += (": give a file, or one of "
                 f"{', '.join(config_file.packaged())}")
    raise UserError(text) from error
  for path, text in overrides.items():
    config_file.override(flags.FLAGS.config, path, text)
  if "config" in flags.FLAGS and flags.FLAGS.config is not None:
    flags.FLAGS.config.lock()
  return rest


# --- Configurations -----------------------------------------------------------

class _ConfigFlag(flags.Flag):
  """A flag whose value is the configuration of FILE[:key=value,...].

  Attributes:
    config_filename: FILE.
  """
  config_filename = ""

  def _parse(self, argument: str) -> Any:
    self.config_filename, arg = config_file.split(argument)
    return config_file.load(self.config_filename, arg)


def define_config() -> flags.FlagHolder:
  """Defines --config=FILE[:key=value,...] and --config.KEY=VALUE.

    _CONFIG = cli.define_config()
    def main(argv):
      config = _CONFIG.value  # ConfigDict, locked
  """
  return flags.DEFINE_flag(_ConfigFlag(
      flags.ArgumentParser(), flags.ArgumentSerializer(), "config", None,
      "configuration, FILE[:key=value,...]; --config.KEY=VALUE sets a key"))


def config_filename() -> str:
  """Returns the file of --config."""
  flag = flags.FLAGS["config"]
  return flag.config_filename if isinstance(flag, _ConfigFlag) else ""


def _take_overrides(argv):
  """Returns (argv without --config.KEY=VALUE, {key: value})."""
  if "config" not in flags.FLAGS:
    return argv, {}
  rest, found, args = [], {}, iter(argv)
  for arg in args:
    match = re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", arg, re.DOTALL)
    if arg == "--" or not match:
      rest.append(arg)
      if arg == "--":
        break
      continue
    no, path, value = match.groups()
    switch = config_file.is_switch(path)
    if no and (value is not None or not switch):
      raise UserError(f"{arg}: only a key that is true or false takes 'no', "
                      "as --noconfig.flip")
    if value is None:
      value = str(not no) if switch else next(args, None)
    if value is None:
      raise UserError(f"{arg} has no value: give {arg}=VALUE")
    found[path] = value
  return [*rest, *args], found
