import io
import sys

from ttc_jax.runs import progress as progress_lib
from ttc_jax.runs.progress import Progress


def update(progress):
  progress.expect(4)
  for epoch in (1, 2):
    progress.update("align", epoch, 2, {
        "epoch": epoch, "loss": 0.5, "images_per_second": 12.0,
        "val_top1": 70.0})


def test_quiet_without_a_terminal_and_the_curve_is_written_whole(capfd):
  written = []
  with Progress("run", lambda curve: written.append([*curve])) as progress:
    update(progress)
  assert capfd.readouterr() == ("", "")
  assert [[(r["stage"], r["epoch"]) for r in curve] for curve in written] == [
      [("align", 1)], [("align", 1), ("align", 2)]]


def test_a_log_has_a_line_a_minute(capfd, monkeypatch):
  monkeypatch.setattr(progress_lib, "LINE_SECONDS", 0.0)
  with Progress("pets-ttc-s0", lambda curve: None) as progress:
    update(progress)
  lines = capfd.readouterr().err.splitlines()
  assert lines[-1] == ("pets-ttc-s0: align 2/2, loss 0.500, images/s 12, "
                       "val 70.0")
  assert len(lines) == 2
  with Progress("quiet", lambda curve: None, show=False) as progress:
    update(progress)
  assert capfd.readouterr().err == ""


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_terminal_sees_stage_epoch_loss_accuracy_and_time_left(
    monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  with Progress("run", lambda curve: None) as progress:
    update(progress)
  seen = terminal.getvalue()
  for part in ("align 2/2", "2/4", "loss=0.500", "images/s=12", "val=70.0"):
    assert part in seen, seen
