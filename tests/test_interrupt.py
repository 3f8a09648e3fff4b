"""Signals end a command at once, or after the epoch in progress is saved.

A process of its own for each: it must survive nothing.
"""
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from tests.command import ROOT
from ttc_jax import interrupt

# A shell that starts tests in the background has SIGINT ignored.
DEFAULT = "import signal; signal.signal(2, signal.default_int_handler)\n"
START = DEFAULT + """
import gc, os, sys, time
from ttc_jax import cli, interrupt
"""
RUN = "\ncli.run(main)\n"
# An epoch that ends 0.5 s after the signal, and a session that looks then.
TRAINING = START + """
def main(argv):
  interrupt.listen()
  print("ready", flush=True)
  for _ in range(100):
    with interrupt.held():
      time.sleep(0.5)
      print("saved", flush=True)
    interrupt.check()
""" + RUN
# Long, in C, without the interpreter's lock, as XLA is: no handler runs.
C_CODE = "__import__('hashlib').pbkdf2_hmac('sha256', b'', b'', 10 ** 9)"


def start(*args, **options):
  return subprocess.Popen([sys.executable, *args], cwd=ROOT, **{
      "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
      **options})


def end(process, *numbers):
  """Sends signals after the first line; returns (exit code, out, err)."""
  assert process.stdout.readline() == "ready\n", process.communicate()
  for number in numbers:
    process.send_signal(number)
    time.sleep(0.1)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


@pytest.mark.parametrize("number,code,name", [
    (signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 0, "SIGTERM"),
    (signal.SIGHUP, 129, "SIGHUP")])
def test_the_epoch_in_progress_is_saved_first(number, code, name):
  assert end(start("-c", TRAINING), number) == (
      code, "saved\n",
      f"stopped by {name}; start the same command again to go on\n")


def test_a_second_one_ends_at_once():
  code, out, err = end(start("-c", TRAINING), signal.SIGINT, signal.SIGINT)
  assert (code, out) == (130, "") and err.count("\n") == 1


def test_a_second_one_ends_a_computation_at_once():
  code = TRAINING.replace("time.sleep(0.5)", C_CODE)
  code, out, err = end(start("-c", code), signal.SIGINT, signal.SIGINT)
  assert (code, out) == (130, "") and err.startswith("ended by Ctrl-C")


def test_a_request_that_nothing_answers_ends_after_a_while():
  code = TRAINING.replace("with interrupt.held()", "if True").replace(
      "time.sleep(0.5)", C_CODE).replace(
          "interrupt.listen()", "interrupt._GRACE_SECONDS = 0.3; "
          "interrupt.listen()")
  code, out, err = end(start("-c", code), signal.SIGTERM)
  assert (code, out) == (0, "") and err.startswith("ended by SIGTERM")


def test_no_signal_is_lost_in_a_garbage_collection():
  code = START + """
def callback(phase, info):
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(0.05)
def main(argv):
  interrupt.listen()
  print("ready", flush=True)
  gc.callbacks.append(callback)
  gc.collect()
  interrupt.check()
  print("went on")
""" + RUN
  code = code.replace("os.kill", "gc.callbacks.clear(); os.kill")
  process = start("-c", code)
  code, out, err = end(process)
  assert (code, out) == (130, "") and err.startswith("stopped by Ctrl-C")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM,
                                    signal.SIGHUP])
def test_another_command_tidies_up_and_ends(number):
  code = START + """
def main(argv):
  try:
    print("ready", flush=True)
    time.sleep(60)
  finally:
    print("tidied")
""" + RUN
  code, out, err = end(start("-c", code), number)
  assert (code, out) == (128 + number, "tidied\n")
  assert "Traceback" not in err and err.count("\n") <= 1


def test_imports_end_without_a_traceback(tmp_path):
  """`python -m ttc_jax...` sets the handlers before it imports anything big."""
  (tmp_path / "absl.py").write_text(
      "import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
  (tmp_path / "sitecustomize.py").write_text(DEFAULT)
  process = start("-m", "ttc_jax.report",
                  env=os.environ | {"PYTHONPATH": f"{tmp_path}"})
  code, _, err = end(process, signal.SIGINT)
  assert code == 130 and err.count("\n") == 1 and err.startswith("ended by")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_so(number):
  """nohup ignores SIGHUP; a shell SIGINT, for jobs in the background."""
  ignored = f"signal.signal({number:d}, signal.SIG_IGN)\nimport gc"
  code = TRAINING.replace("range(100)", "range(2)").replace(
      "import gc", ignored)
  assert end(start("-c", code), number) == (0, "saved\nsaved\n", "")


def test_a_closed_terminal_saves_too(tmp_path):
  """Whatever is printed after that, tqdm's bar too, goes nowhere."""
  code = TRAINING.replace('print("saved", flush=True)', f"""
      print("saved", flush=True)
      print("bar", file=sys.stderr, flush=True)
      open({str(tmp_path / 'saved')!r}, "w").close()""")
  own = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
  window, terminal = pty.openpty()
  process = start(
      "-c", "import signal; signal.signal(1, signal.SIG_DFL)\n" + own + code,
      stdin=terminal, stdout=terminal, stderr=terminal, text=False,
      start_new_session=True)
  os.close(terminal)
  assert b"ready" in os.read(window, 100)
  os.close(window)
  assert process.wait(timeout=60) == 129
  assert (tmp_path / "saved").exists()


def test_importing_the_package_changes_no_handler():
  code = ("from signal import *; import ttc_jax, ttc_jax.interrupt\n"
          "print(getsignal(SIGINT) is default_int_handler)")
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True,
                        capture_output=True).stdout == "True\n"
  assert interrupt.asked() is False
