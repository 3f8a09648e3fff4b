"""What `python -m ttc_jax.report` says, beside what is in the folder."""
import sys

import pytest

from tests.command import run_command
from tests.test_report import row
from ttc_jax.errors import UserError
from ttc_jax.report import __main__ as command_line
from ttc_jax.report import status
from ttc_jax.runs.workdir import Expected, WorkDir

VARIANTS = {"ttc": Expected(2, [0, 1], "select", 3),
            "my-linear": Expected(1, [0, 1], "final", 100)}
AT_WORK = "b-c-my-linear-final-s0-0123abcd"


def times(train, test=None):
  return {"seconds_train": train, "seconds_test": test}


@pytest.fixture
def workdir(tmp_path):
  """Of a plan: 3 runs of TTC on a, one at work, one stopped, one failed."""
  place = WorkDir(tmp_path)
  place.write_plan({"a": VARIANTS, "b/c": VARIANTS},
                   {"gone": "no folder 'gone'"})
  rows = [row("a", "ttc", 0, None, protocol="val", run=f"val{i}", val_top1=50.,
              **times(10.0)) for i in (0, 1)]
  rows += [row("a", "ttc", 0, 60.0, run="final", **times(20.0, 20.0)),
           row("a", "ttc", 7, 60.0, run="of another plan", **times(1.0, 1.0)),
           row("a", "my-linear", 1, 1.0, run="mended", **times(4.0, 1.0))]
  place.write_failure("mended", "a", "my-linear", "it diverged")
  place.write_failure("bad", "b/c", "my-linear", "the loss is NaN")
  for r in rows:
    place.write_row(r)
  for run in (AT_WORK, "b-c-ttc-val-s0-0123abcd", "final"):
    with place.claim(run):
      place.write_curve(run, [
          {"stage": "head", "epoch": 4, "loss": 2.0},
          {"stage": "head", "epoch": 5, "loss": 1.25, "val_top1": 40.0,
           "images_per_second": 1234.5}])
  with place.claim(AT_WORK):
    yield tmp_path


def test_what_is_done_at_work_failed_and_to_do(workdir):
  found = status.gather(str(workdir))
  assert {pair: runs.runs for pair, runs in found.expected.items()} == {
      ("a", "ttc"): 4, ("a", "my-linear"): 2, ("b/c", "ttc"): 4,
      ("b/c", "my-linear"): 2}
  assert {pair: set(runs) for pair, runs in found.done.items()} == {
      ("a", "ttc"): {"val0", "val1", "final"}, ("a", "my-linear"): {"mended"}}
  assert [list(runs) for runs in found.failed.values()] == [["bad"]]
  at_work, = found.running
  assert at_work.pair == ("b/c", "my-linear") and at_work.epochs == 100
  # TTC: 1 + 4 runs of (10 + 10 + 40) / 3 s; my-linear: 1 + 1 of 5 s.
  assert found.seconds_left == pytest.approx(5 * 20 + 2 * 5)


def test_the_text_says_it(workdir):
  text = status.text(status.gather(str(workdir)))
  grid = [line.split("  ") for line in text.split("\n\n")[0].split("\n")]
  grid = [[c.strip() for c in line if c.strip()] for line in grid]
  assert grid == [["ttc", "my-linear"], ["a", "3/4", "1/2"],
                  ["b/c", "0/4", "0/2, 1 running, 1 failed"],
                  ["gone", "missing", "missing"]]
  assert "missing: gone: no folder 'gone'" in text
  assert ("running: b-c-my-linear-final-s0-0123abcd: head 5 of 100, "
          "loss 1.250, val 40.0, 1,234 images/s") in text
  assert "failed: bad: the loss is NaN" in text
  assert text.endswith(
      "4 of 12 runs, 1 running, 1 failed; about 2 min left, one run at a time")


def test_without_a_plan_what_there_is_is_all(workdir):
  (workdir / "plan.json").unlink()
  text = status.text(status.gather(str(workdir)))
  assert text.endswith("5 runs, 1 running, 1 failed")
  assert "gone" not in text


def test_a_new_work_directory(tmp_path):
  assert status.text(status.gather(str(tmp_path))) == "0 runs"
  with pytest.raises(UserError, match="no work directory"):
    status.gather(str(tmp_path / "none"))


def test_durations():
  assert [status.duration(s) for s in (0, 59.4, 59.6, 3599, 7500)] == [
      "0 s", "59 s", "1 min", "1 h 00 min", "2 h 05 min"]


# --- The command --------------------------------------------------------------

def state(folder):
  return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
          for p in folder.rglob("*")}


def test_the_command_only_reads_a_work_directory(workdir, tmp_path_factory):
  out = tmp_path_factory.mktemp("out") / "new"
  before = state(workdir)
  shown = run_command("report", workdir, "--format=markdown", f"--out={out}")
  assert shown.returncode == 0 and "| ttc" in shown.stdout
  assert "| gone |" in shown.stdout and "mean of 3" in shown.stdout
  assert (out / "table.md").read_text() == shown.stdout
  some = run_command("report", workdir, "--tasks=a")
  assert some.stdout.split("\n")[2].split()[:2] == ["a", "module"]
  watched = run_command("report", workdir, "--watch")  # no terminal: once
  assert watched.returncode == 0
  assert watched.stdout.startswith(f"{workdir}\n\n") and (
      "4 of 12 runs" in watched.stdout)
  assert state(workdir) == before


def test_a_mistake_is_one_sentence(workdir):
  failed = run_command("report", workdir, "--published", "--protocol=val")
  assert failed.returncode == 2 and failed.stdout == ""
  assert "--protocol=final" in failed.stderr
  assert failed.stderr.count("\n") == 1


def test_a_terminal_is_drawn_again_until_ctrl_c(workdir, monkeypatch, capsys):
  waits = []

  def sleep(seconds):
    waits.append(seconds)
    if len(waits) == 3:
      raise KeyboardInterrupt
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
  monkeypatch.setattr(command_line.time, "sleep", sleep)
  command_line.watch([str(workdir)], 2.0)
  assert waits == [2.0] * 3
  assert capsys.readouterr().out.count("4 of 12 runs") == 3
