"""Runs a command line of the package in this process.

A process of its own takes seconds to import JAX and compiles everything anew;
here a command shares both with the tests. Use a process where the process is
what is tested: signals, kills, what an import brings, exit at the end.
"""
from collections.abc import Iterator
import contextlib
import io
import pathlib
import runpy
import signal
import subprocess
import sys
import traceback
import warnings

from absl import app, flags, logging
from absl.testing import flagsaver

ROOT = pathlib.Path(__file__).parent.parent
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP")
            if hasattr(signal, name)]


def run_command(module: str, *args: object, cwd: str | pathlib.Path = ROOT
                ) -> subprocess.CompletedProcess[str]:
  """Runs `python -m ttc_jax.MODULE ARGS`, as `__main__`, with fresh flags.

  Args:
    module: "main", "report", "weights", ...
    *args: flags and arguments; each is turned into a string.
    cwd: working directory while the command runs.

  Returns:
    What `subprocess.run(..., capture_output=True, text=True)` returns:
    `returncode`, `stdout`, `stderr`. An error that no one catches is a
    traceback in `stderr` and exit code 1, as in the interpreter.
  """
  argv = ["", *map(str, args)]
  out, err = _text(), _text()
  with (contextlib.chdir(cwd), _replaced(sys, "argv", argv), fresh_flags(),
        _kept_signals(), _logs_to(err), warnings.catch_warnings(),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
    # Warnings stay errors, but for two: a test may have imported the module
    # under its own name, and ml_collections loads configurations the old way.
    warnings.filterwarnings("ignore", ".*found in sys.modules after import",
                            RuntimeWarning)
    warnings.filterwarnings("ignore", ".*load_module", DeprecationWarning)
    code = _code(lambda: runpy.run_module(
        f"ttc_jax.{module}", run_name="__main__", alter_sys=True))
  return subprocess.CompletedProcess(argv, code, _read(out), _read(err))


def start_command(module: str, *args: object, before: str = ""
                  ) -> subprocess.Popen[str]:
  """Starts the command in a process of its own, with its streams as pipes.

  Args:
    module: "main", "report", "weights", ...
    *args: flags and arguments; each is turned into a string.
    before: Python code to run first in the process.
  """
  argv = [module, *map(str, args)]
  code = f"""{before}
import runpy, sys
sys.argv = {argv!r}
runpy.run_module("ttc_jax.{module}", run_name="__main__", alter_sys=True)
"""
  return subprocess.Popen(
      [sys.executable, "-c", code], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _code(run) -> int:
  """Exit code of the interpreter after `run`."""
  try:
    run()
    return 0
  except SystemExit as end:
    if end.code is None or isinstance(end.code, int):
      return end.code or 0
    print(end.code, file=sys.stderr)
    return 1
  except Exception:
    traceback.print_exc()
    return 1


def _text():
  """Of bytes, as the streams of a process are."""
  return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def _read(stream):
  stream.flush()
  return stream.buffer.getvalue().decode()


@contextlib.contextmanager
def _replaced(owner, name, value) -> Iterator[None]:
  before = getattr(owner, name)
  setattr(owner, name, value)
  try:
    yield
  finally:
    setattr(owner, name, before)


@contextlib.contextmanager
def fresh_flags() -> Iterator[None]:
  """absl's flags as in a new process: none of this package, none parsed."""
  state = vars(flags.FLAGS)
  kept, values = dict(state), flagsaver.save_flag_values()
  ours = {flag.name for module, defined in flags.FLAGS.flags_by_module_dict(
  ).items() if module.startswith("ttc_jax") for flag in defined}
  state["__flags"] = {name: flag for name, flag in kept["__flags"].items()
                      if flag.name not in ours}
  for key in ("__flags_by_module", "__flags_by_module_id",
              "__key_flags_by_module"):
    state[key] = {module: [f for f in defined if f.name not in ours]
                  for module, defined in kept[key].items()}
  # absl defines --help and its like once in a process.
  app._define_help_flags_called = False
  app._register_and_parse_flags_with_usage.done = False
  app._run_init.done = False
  try:
    yield
  finally:
    state.clear()
    state.update(kept)
    flagsaver.restore_flag_values(values)


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
  handlers = {number: signal.getsignal(number) for number in _SIGNALS}
  try:
    yield
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def _logs_to(stream) -> Iterator[None]:
  """absl's log goes there, and it is not left behind on the root logger."""
  handler, root = logging.get_absl_handler(), logging.logging.getLogger()
  had, before = handler in root.handlers, handler.python_handler.stream
  handler.python_handler.setStream(stream)
  try:
    yield
  finally:
    handler.python_handler.setStream(before)
    if not had:
      root.removeHandler(handler)
