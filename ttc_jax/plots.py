"""Pictures of finished runs, as PNG and SVG."""
from collections.abc import Sequence
import json
import os

import numpy as np

from ttc_jax import files, report
from ttc_jax.errors import UserError

try:
  import matplotlib
except ImportError as e:
  raise UserError("plots need matplotlib: pip install -e '.[plots]', or "
                  "leave config.plots off") from e
matplotlib.use("Agg")
# After the choice of the backend.
from matplotlib import pyplot as plt, ticker

matplotlib.rcParams.update({
    "svg.hashsalt": "ttc_jax",  # the same runs give the same file
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "font.size": 9})


def write(rows: Sequence[report.Row], workdir: str) -> list[str]:
  """Writes all that the rows give into a work directory; returns the files."""
  written = []
  final = [r for r in rows if r["protocol"] == "final"]
  if final:
    written += _save(accuracy_against_parameters(final),
                     os.path.join(workdir, "accuracy"))
  curves = {r["run"]: found for r in final or rows
            if (found := _search(workdir, r))}
  if curves:
    written += _save(search(curves), os.path.join(workdir, "search"))
  return written


def accuracy_against_parameters(rows: Sequence[report.Row]):
  """Mean test accuracy of each variant, with the deviation over seeds, over
  all its tuned parameters, head included; the mean over tasks."""
  figure, axes = plt.subplots(figsize=(7, 4.5))
  markers = "osD^vP*X"
  for i, variant in enumerate(dict.fromkeys(r["variant"] for r in rows)):
    mine = [r for r in rows if r["variant"] == variant]
    scores = report.by_seed(rows, variant)
    if not scores:
      continue
    count = np.mean([sum(r[f"{part}_params"] for part in (
        "module", "norm", "head")) for r in mine])
    spread = np.std(scores, ddof=1) if len(scores) > 1 else None
    axes.errorbar(count, np.mean(scores), yerr=spread, capsize=2,
                  marker=markers[i // 10 % len(markers)], color=f"C{i % 10}",
                  label=variant, linestyle="none")
  axes.set_xscale("log")
  axes.set_xlabel("tuned parameters, head included")
  tasks = len({r["task"] for r in rows})
  axes.set_ylabel(f"test top-1, mean of {tasks} tasks (%)"
                  if tasks > 1 else "test top-1 (%)")
  axes.legend(fontsize=8, frameon=False, loc="center left",
              bbox_to_anchor=(1, 0.5))
  return figure


def search(curves: dict[str, list[dict]]):
  """NOAH's searches: best and mean accuracy on val200 by generation."""
  figure, axes = plt.subplots(figsize=(7, 4.5))
  for i, (run, records) in enumerate(curves.items()):
    at = [r["epoch"] for r in records]
    axes.plot(at, [r["val_top1"] for r in records], color=f"C{i % 10}",
              label=run)
    axes.plot(at, [r["mean_top1"] for r in records], color=f"C{i % 10}",
              alpha=0.4, linestyle="--")
  axes.set_xlabel("generation")
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.set_ylabel("val200 top-1 (%): best so far, and the mean (dashed)")
  if len(curves) <= 10:
    axes.legend(fontsize=7, frameon=False)
  return figure


def _search(workdir, row):
  """The records of a run's search, if it had one."""
  path = os.path.join(workdir, "runs", row["run"], "metrics.jsonl")
  if not os.path.exists(path):
    return []
  with open(path, encoding="utf-8") as f:
    records = map(json.loads, f)
    return [r for r in records if r["stage"] == "search"]


def _save(figure, stem):
  paths = [f"{stem}.png", f"{stem}.svg"]
  for path in paths:
    with files.replacing(path) as temporary:
      figure.savefig(temporary, format=path[-3:], dpi=150,
                     bbox_inches="tight",
                     metadata={"Date": None} if path[-3:] == "svg" else None)
  plt.close(figure)
  return paths
