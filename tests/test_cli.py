"""What is printed survives any terminal; errors are one sentence and a code."""
import errno
import io
import subprocess
import sys

from absl import flags
from absl.testing import flagsaver
import pytest

from tests.command import ROOT, run_command
from ttc_jax import cli, interrupt
from ttc_jax.errors import RunError, Stopped, UserError

NAME = "金魚 Käfer \udcff"


def run(main, monkeypatch, encoding="utf-8"):
  """Runs a command here; returns (exit code, stdout, stderr) as bytes."""
  streams = [io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
             for _ in range(2)]
  monkeypatch.setattr(sys, "argv", ["command"])
  monkeypatch.setattr(sys, "stdout", streams[0])
  monkeypatch.setattr(sys, "stderr", streams[1])
  monkeypatch.setattr(interrupt, "ending", lambda: None)
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as end:
    cli.run(main)
  return end.value.code, *(s.buffer.getvalue() for s in streams)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp437"])
def test_output_never_fails_on_the_encoding(monkeypatch, encoding):
  def main(argv):
    print(NAME)
    raise UserError(f"no task {NAME}")
  code, out, err = run(main, monkeypatch, encoding)
  assert code == 2
  assert out.decode(encoding).rstrip() == NAME.encode(
      encoding, "backslashreplace").decode(encoding)
  assert err.startswith(b"error: no task ") and err.endswith(b"\\udcff\n")


@pytest.mark.parametrize("error,code,message", [
    (UserError("wrong"), 2, "error: wrong"),
    (RunError("diverged"), 1, "error: diverged"),
    (Stopped("stopped"), 0, "stopped; start the same command again to go on"),
    (KeyboardInterrupt(), 130, "interrupted; start the same command again"),
    (OSError(errno.ENOSPC, "full", "/x"), 2, "error: /x: full; mend that"),
    (RuntimeError("RESOURCE_EXHAUSTED: 3 GB"), 1, "config.batch_size"),
    (UserError("a\x1b[2Jb\u202e"), 2, r"error: a\x1b[2Jb\u202e"),
    (UserError("two\nlines"), 2, "error: two\nlines"),
])
def test_errors_are_a_sentence_and_a_code(monkeypatch, error, code, message):
  def main(argv):
    raise error
  got, out, err = run(main, monkeypatch)
  assert (got, out) == (code, b"") and message in err.decode()


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("bug"),
                                   OSError(errno.EIO, "broken")])
def test_a_fault_of_ours_is_a_traceback(monkeypatch, error):
  def main(argv):
    raise error
  monkeypatch.setattr(sys, "argv", ["command"])
  monkeypatch.setattr(interrupt, "ending", lambda: None)
  with flagsaver.flagsaver(), pytest.raises(type(error)):
    cli.run(main)


def test_a_warning_is_a_sentence_too():
  code = ("from absl import logging; from ttc_jax import cli; "
          "cli.run(lambda argv: logging.warning('%s is left out', 'x'))")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                        text=True, cwd=ROOT, check=True)
  assert done.stderr == "warning: x is left out\n"


def test_a_command_without_a_configuration_has_no_overrides(monkeypatch):
  monkeypatch.setattr(cli.flags, "FLAGS", flags.FlagValues())
  assert cli._take_overrides(["x", "--config.lr=1"]) == (
      ["x", "--config.lr=1"], {})


def test_report_needs_no_jax():
  """It looks at a run that goes on, often: its start must be quick."""
  code = ("import sys, ttc_jax.report.__main__\n"
          "print({'jax', 'tensorflow', 'torch'} & {*sys.modules})")
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True,
                        capture_output=True).stdout == "set()\n"


@pytest.mark.parametrize("module", ["methods", "bench", "main"])
def test_an_unexpected_argument_is_not_dropped(module):
  config = ["--config=configs/vtab.py"] if module == "main" else []
  done = run_command(module, *config, "ttc")
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith("error: unexpected argument 'ttc'")
  assert len(done.stderr.splitlines()) == 1


def test_export_knows_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  done = run_command("export", "--bundle=~/none", "--to=timm")
  assert done.returncode == 2
  assert f"bundle '{tmp_path}/none' does not exist" in done.stderr


# --- What --help costs --------------------------------------------------------

HEAVY = ("jax", "orbax", "tensorflow", "tensorflow_datasets", "sklearn",
         "scipy", "matplotlib", "torch")


@pytest.mark.parametrize("module, arguments", [
    ("ttc_jax.main", ["--help"]), ("ttc_jax", ["--help"]),
    ("ttc_jax", ["train", "--help"])])
def test_help_imports_nothing_heavy(module, arguments):
  """By a process that lists what it has imported at its end."""
  code = f"""
import atexit, runpy, sys
sys.argv[1:] = {arguments}
atexit.register(lambda: print(
    [name for name in {HEAVY} if name in sys.modules], file=sys.stderr))
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True,
                        capture_output=True)
  assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr
  assert "--config" in done.stdout or "COMMAND" in done.stdout
