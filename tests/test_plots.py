"""Pictures show the rows that they are given, and nothing else."""
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from tests.test_report import row
from ttc_jax import plots
from ttc_jax.report import tables
from ttc_jax.runs.workdir import WorkDir


def rows():
  return [row(task, variant, seed, 50.0 + 10 * seed + i, run=f"{task}{i}{seed}",
              module_params=10 ** (3 + i))
          for task in "ab" for i, variant in enumerate(("linear", "noah"))
          for seed in (0, 1)]


def test_a_point_is_the_mean_over_tasks_with_the_deviation_over_seeds():
  axes, = plots.accuracy_against_parameters(rows()).axes
  one, two = axes.containers
  assert one.get_label() == "linear" and two.get_label() == "noah"
  for i, container in enumerate((one, two)):
    line, _, (bar,) = container
    np.testing.assert_allclose(
        line.get_xydata(), [[10 ** (3 + i) + 25, 55.0 + i]])
    low, high = bar.get_segments()[0][:, 1]
    np.testing.assert_allclose((high - low) / 2, np.std([50, 60], ddof=1))


def test_numbers_of_parameters_do_not_overlap():
  figure = plots.accuracy_against_parameters(rows())
  axes, = figure.axes
  figure.canvas.draw()
  boxes = [label.get_window_extent() for label in axes.get_xticklabels()
           if label.get_text() and axes.get_xlim()[0] <= label.get_position(
           )[0] <= axes.get_xlim()[1]]
  assert len(boxes) > 2
  assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))


def test_files_are_whole_and_the_same_for_the_same_rows(tmp_path):
  records = [{"stage": "supernet", "epoch": 1, "loss": 1.0},
             *({"stage": "search", "epoch": i, "val_top1": 40.0 + i,
                "mean_top1": 30.0} for i in (1, 2, 3))]
  workdir = WorkDir(tmp_path)
  workdir.write_curve("a10", records)
  written = plots.write(rows(), workdir)
  assert [p.rsplit("/", 1)[1] for p in written] == [
      "accuracy.png", "accuracy.svg", "search.png", "search.svg"]
  contents = [pathlib.Path(p).read_bytes() for p in written]
  assert contents[0].startswith(b"\x89PNG") and b"</svg>" in contents[1]
  assert plots.write(rows(), workdir) == written
  assert [pathlib.Path(p).read_bytes() for p in written] == contents
  curve = plots.search({"a": records[1:]}).axes[0].lines[0]
  np.testing.assert_array_equal(curve.get_xydata(), [[1, 41], [2, 42], [3, 43]])


def test_a_name_is_no_formula_and_is_in_the_legend():
  named = [row("a$b$", variant, seed, 50.0 + seed)
           for variant in ("_x", "$y^$", "z\x1b") for seed in (0, 1)]
  axes, = plots.by_task(tables.make(named, "final")).axes
  axes.figure.canvas.draw()  # a formula would be parsed, and fail
  assert [t.get_text() for t in axes.get_legend().get_texts()] == [
      " _x", r"\$y^\$", r"z\x1b"]


@pytest.mark.parametrize("interval", [False, True])
def test_a_dot_is_a_cell_and_a_published_one_is_hollow(interval):
  table = tables.make(
      [row(task, variant, seed, 50.0 + 10 * seed)
       for task, variant in (("dtd", "lora"), ("svhn", "lora"), ("x", "lora"),
                             ("dtd", "mine")) for seed in (0, 1)],
      "final", compare=True)
  axes, = plots.by_task(table, interval).axes
  shown = {c.get_label(): c for c in axes.containers}
  # What no run stands beside is in the table alone.
  assert list(shown) == ["lora", "mine", "LoRA (published)"]
  lora, mine, theirs = (c[0] for c in shown.values())
  titles = [label.get_text() for label in axes.get_xticklabels()]
  assert titles == [c.title for c in table.columns] == [
      "dtd", "svhn", "x", "mean of 3"]
  np.testing.assert_allclose(lora.get_xydata()[:, 1], 55.0)
  np.testing.assert_allclose(np.round(mine.get_xydata()), [[0, 55.0]])
  np.testing.assert_allclose(theirs.get_xydata()[:, 1], [69.4, 85.3])
  np.testing.assert_allclose(theirs.get_xydata()[:, 0],
                             lora.get_xydata()[:2, 0])
  assert theirs.get_markerfacecolor() == "none"
  assert theirs.get_color() == lora.get_color() != mine.get_color()
  bar, = shown["lora"][2]
  score = table.lines[0].scores[0]
  low, high = bar.get_segments()[0][:, 1]
  assert (high - low) / 2 == pytest.approx(
      score.interval if interval else score.deviation)


_GLOBALS = """
import matplotlib
before = dict(matplotlib.rcParams)
from ttc_jax import plots
figure, axes = plots.subplots(figsize=(2, 2))
assert not axes.spines["top"].get_visible()
plots.save(figure, "picture")
changed = {k for k, v in matplotlib.rcParams.items() if v != before[k]}
assert changed <= ({"backend"} if inline else set()), changed
print(type(figure.canvas).__name__)
"""


@pytest.mark.parametrize("given", [
    "", "TkAgg", "module://matplotlib_inline.backend_inline"])
def test_matplotlib_s_settings_stay_as_they_are(given, tmp_path):
  """In a notebook, figures are of the notebook's own backend."""
  inline = "inline" in given
  if inline:
    pytest.importorskip("matplotlib_inline")
  done = subprocess.run(
      [sys.executable, "-c", f"inline = {inline}\n{_GLOBALS}"], text=True,
      capture_output=True, cwd=tmp_path, env=os.environ | {
          "MPLBACKEND": given, "PYTHONPATH": os.getcwd()})
  assert done.stdout.startswith("FigureCanvas"), done.stderr
  assert len(os.listdir(tmp_path)) == 2


def test_figures_are_closed_and_can_be_saved(tmp_path, monkeypatch):
  pytest.importorskip("matplotlib_inline")
  monkeypatch.setenv("MPLBACKEND", "inline")
  from matplotlib import pyplot
  figure = plots.accuracy_against_parameters(rows())
  assert not pyplot.get_fignums()
  assert plots.save(figure, str(tmp_path / "a"))
