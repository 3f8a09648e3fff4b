"""Tables of finished runs.

  rows.py       reads, merges and selects rows
  tables.py     rows -> numbers: columns, lines, means, intervals
  formats.py    a table as text, Markdown, LaTeX, CSV or JSON
  published.py  numbers from the papers
  big_vision.py numbers of Big Vision's own trainer
  status.py     progress of a work directory
  __main__.py   the command line

This file has the summary that `ttc_jax.main` prints.
"""
from collections.abc import Sequence

import numpy as np

from ttc_jax.report import formats, tables
from ttc_jax.report.rows import (
  Row,
  best,
  by_seed,
  chosen,
  collect,
  protocols,
  read,
)
from ttc_jax.report.tables import Score

__all__ = ["Row", "best", "by_seed", "chosen", "collect", "costs",
           "protocols", "read", "summary"]


def summary(rows: Sequence[Row], planned: Sequence[str] = ()) -> str:
  """Returns the tables of all protocols and of costs, in Markdown.

  Args:
    rows: rows of one work directory.
    planned: tasks that have a column even without a finished run.
  """
  parts = []
  for protocol in protocols(rows):
    shown = chosen(rows, protocol)
    parts.append(formats.markdown(
        tables.make(shown, protocol, planned=planned)))
    if protocol == "final" and len({r["variant"] for r in shown}) > 1:
      parts.append("What they cost: MFLOPs of an image at inference, then "
                   f"after merging where that is exact.\n\n{costs(shown)}\n")
  return "\n".join(parts)


def costs(rows: Sequence[Row]) -> str:
  """Returns a Markdown table of the costs of final runs, a line per variant.

  Columns: tuned parameters; FLOPs of an image at inference, before and after
  merging; images/s; memory of a training step (MiB); size of a bundle (KiB).
  Memory and size are the largest over tasks and seeds, the others the mean.
  """
  lines = [["", "mean", "module", "norm", "head", "MFLOPs", "merged",
            "train images/s", "test images/s", "step MiB", "bundle KiB"]]
  for variant in dict.fromkeys(r["variant"] for r in rows):
    mine = [r for r in rows if r["variant"] == variant]
    scores = by_seed(rows, variant)

    def mean(key, unit=1.0, rows=mine):
      return f"{np.mean([r[key] for r in rows]) / unit:,.0f}"

    def largest(key, unit, rows=mine):
      known = [r[key] for r in rows if r[key]]
      return f"{max(known) / unit:,.0f}" if known else "-"
    lines.append([
        variant, formats.number(
            Score(float(np.mean(scores)), tuple(scores)) if scores else None),
        *formats.counts(mine), mean("flops", 1e6), mean("flops_merged", 1e6),
        mean("images_per_second"), mean("test_images_per_second"),
        largest("step_memory_bytes", 2 ** 20), largest("bundle_bytes", 1024)])
  return formats.pipes(lines)
