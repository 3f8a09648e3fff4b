"""A command in this process ends as it does in a process of its own."""
import signal
import subprocess
import sys

from absl import flags
import pytest

from tests.command import ROOT, run_command


def test_the_same_as_a_process(tmp_path):
  args = ["report", str(tmp_path / "none")]
  alone = subprocess.run([sys.executable, "-m", f"ttc_jax.{args[0]}", args[1]],
                         cwd=ROOT, capture_output=True, text=True)
  here = run_command(*args)
  assert (here.returncode, here.stdout, here.stderr) == (
      alone.returncode, alone.stdout, alone.stderr)
  assert here.returncode == 2 and here.stderr.startswith("error: ")


def test_the_process_is_left_as_it_was():
  def state():
    return (sorted(flags.FLAGS), flags.FLAGS.is_parsed(), sys.argv,
            sys.modules["__main__"], signal.getsignal(signal.SIGTERM))
  before = state()
  for _ in range(2):  # flags are defined anew
    failed = run_command("main", "--config=configs/vtab.py", "--config.lrr=1")
    assert failed.returncode == 2 and "lrr" in failed.stderr
  assert state() == before


@pytest.mark.parametrize("error,code,message", [
    (ValueError("a bug"), 1, "ValueError: a bug"), (SystemExit(3), 3, ""),
    (SystemExit("so"), 1, "so"), (SystemExit(), 0, "")])
def test_exit_codes_are_those_of_the_interpreter(
    monkeypatch, error, code, message):
  def fail(main):
    raise error
  monkeypatch.setattr("ttc_jax.cli.run", fail)
  done = run_command("report")
  assert done.returncode == code and message in done.stderr
