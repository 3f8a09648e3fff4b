"""Draws finished runs and tables as PNG and SVG."""
from collections.abc import Mapping, Sequence
import os
from typing import Any

import numpy as np

from ttc_jax import files, report
from ttc_jax.errors import UserError, printable
from ttc_jax.report import tables
from ttc_jax.runs.workdir import WorkDir

try:
  import matplotlib
except ImportError as e:
  raise UserError("plots need matplotlib: pip install -e '.[plots]', or "
                  "leave config.plots off") from e
from matplotlib import ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Of our figures alone: matplotlib's own settings stay as they are.
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "ttc_jax",  # the same rows give the same bytes
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3,
    "font.size": 9}
_MARKERS = "osD^vP*X"


def subplots(*args: int, figsize: tuple[float, float],
             **options: Any) -> tuple[Figure, Any]:
  """Returns (figure, axes) in our style, arguments as of pyplot's `subplots`.

  The figure has no window. In Jupyter, which names its own backend in
  MPLBACKEND, it is shown below a cell that returns it.
  """
  with matplotlib.rc_context(_STYLE):
    if "inline" not in os.environ.get("MPLBACKEND", ""):
      figure = Figure(figsize=figsize, layout="constrained")
      FigureCanvasAgg(figure)
      return figure, figure.subplots(*args, **options)
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(*args, figsize=figsize,
                                   layout="constrained", **options)
    pyplot.close(figure)  # else a notebook would draw it a second time
    return figure, axes


def write(rows: Sequence[report.Row], workdir: WorkDir) -> list[str]:
  """Writes the pictures of a work directory's rows; returns their paths.

  accuracy.*: accuracy by tuned parameters, if there are final runs.
  search.*: NOAH's searches, if there were any.
  """
  final = [r for r in rows if r["protocol"] == "final"]
  curves = {r["run"]: found for r in final or rows
            if (found := _search(workdir, r))}
  with workdir.output() as scratch:
    if final:
      save(accuracy_against_parameters(final),
           os.path.join(scratch, "accuracy"))
    if curves:
      save(search(curves), os.path.join(scratch, "search"))
    return [workdir.store.place(file) for file in sorted(os.listdir(scratch))]


def accuracy_against_parameters(rows: Sequence[report.Row]) -> Figure:
  """Draws each variant's test accuracy over its number of tuned parameters.

  Both are means over tasks; the head is included; error bars are the standard
  deviation over seeds.
  """
  figure, axes = subplots(figsize=(7, 4.5))
  for i, variant in enumerate(dict.fromkeys(r["variant"] for r in rows)):
    mine = [r for r in rows if r["variant"] == variant]
    scores = report.by_seed(rows, variant)
    if not scores:
      continue
    count = np.mean([sum(r[f"{part}_params"] for part in (
        "module", "norm", "head")) for r in mine])
    spread = np.std(scores, ddof=1) if len(scores) > 1 else None
    axes.errorbar(count, np.mean(scores), yerr=spread, capsize=2,
                  label=label(variant), linestyle="none", **_mark(i))
  axes.set_xscale("log")
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))  # 20k, 5M
  axes.xaxis.set_minor_formatter(ticker.NullFormatter())
  axes.set_xlabel("tuned parameters, head included")
  tasks = len({r["task"] for r in rows})
  axes.set_ylabel(f"test top-1, mean of {tasks} tasks (%)"
                  if tasks > 1 else "test top-1 (%)")
  axes.legend(fontsize=8, frameon=False, loc="center left",
              bbox_to_anchor=(1, 0.5))
  return figure


def by_task(table: tables.Table, interval: bool = False) -> Figure:
  """Draws the lines of a table as dots, a place on the x axis per column.

  Error bars are the standard deviation over seeds, or with `interval` half of
  the 95 % interval. A published line is drawn with hollow dots, at the place
  and in the colour of the first run line that it is compared with; published
  lines without such a run are left out.
  """
  places = {x.name: i for i, x in enumerate(
      x for x in table.lines if x.kind in ("run", "theirs"))}
  across = range(len(table.columns))
  figure, axes = subplots(figsize=(max(7, 0.55 * len(across) + 3), 5))
  for line in table.lines:
    place = places.get((*line.beside, line.name)[0])
    if place is not None:
      offset = 0.7 * ((place + 0.5) / len(places) - 0.5)
      _dots(axes, line, offset, interval,
            **_mark(place, hollow=line.kind == "published"))
  headings = [c.heading or "means" for c in table.columns]
  for heading in dict.fromkeys(headings):
    first = headings.index(heading)
    middle = first + (headings.count(heading) - 1) / 2
    axes.text(middle, 1.01, heading, ha="center",
              transform=axes.get_xaxis_transform())
    if first:
      axes.axvline(first - 0.5, color="0.6", linewidth=0.8)
  axes.set_xticks(across, [label(c.title) for c in table.columns],
                  rotation=45, ha="right", rotation_mode="anchor")
  axes.set_xlim(-0.6, len(across) - 0.4)
  axes.grid(axis="x", visible=False)
  axes.set_ylabel("top-1 (%)")
  axes.legend(fontsize=8, frameon=False, loc="center left",
              bbox_to_anchor=(1, 0.5))
  return figure


def _dots(axes, line, offset, interval, **look):
  known = [(x, s) for x, s in enumerate(line.scores) if s]
  spreads = [s.interval if interval else s.deviation for _, s in known]
  axes.errorbar(
      [x + offset for x, _ in known], [s.mean for _, s in known],
      yerr=[s or 0.0 for s in spreads] if any(spreads) else None,
      label=label(line.name), linestyle="none", elinewidth=1, **look)


def label(name: str) -> str:
  """Escapes a name: "$" begins a formula, "_" in front hides from legends."""
  return " " * name.startswith("_") + printable(name).replace("$", r"\$")


def colour(share: float) -> tuple[float, ...]:
  """Returns the colour (R, G, B, A) of a share in [0, 1]."""
  return matplotlib.colormaps["viridis"](share)


def _mark(i, hollow=False):
  """Returns colour and marker of the i-th series."""
  return {"color": f"C{i % 10}", "marker": _MARKERS[i // 10 % len(_MARKERS)],
          **({"markerfacecolor": "none", "markersize": 9} if hollow else {})}


def search(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
  """Draws NOAH's searches: best and mean accuracy on val200 by generation.

  Args:
    curves: {run: records of the search}.
  """
  figure, axes = subplots(figsize=(7, 4.5))
  for i, (run, records) in enumerate(curves.items()):
    at = [r["epoch"] for r in records]
    axes.plot(at, [r["val_top1"] for r in records], color=f"C{i % 10}",
              label=label(run))
    axes.plot(at, [r["mean_top1"] for r in records], color=f"C{i % 10}",
              alpha=0.4, linestyle="--")
  axes.set_xlabel("generation")
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.set_ylabel("val200 top-1 (%): best so far, and the mean (dashed)")
  if len(curves) <= 10:
    axes.legend(fontsize=7, frameon=False)
  return figure


def _search(workdir, row):
  """Returns the records of a run's search; [] if it had none."""
  return [r for r in workdir.curve(row["run"]) if r["stage"] == "search"]


def save(figure: Figure, stem: str) -> list[str]:
  """Writes STEM.png and STEM.svg; returns the paths."""
  paths = [f"{stem}.png", f"{stem}.svg"]
  for path in paths:
    with files.replacing(path) as temporary, matplotlib.rc_context(_STYLE):
      figure.savefig(temporary, format=path[-3:], dpi=150,
                     bbox_inches="tight",
                     metadata={"Date": None} if path[-3:] == "svg" else None)
  return paths
