"""results.jsonl -> rows -> tables.

  rows.py       reading, merging and choosing rows
  tables.py     rows -> numbers: columns, lines, means, intervals
  formats.py    those as text, Markdown, LaTeX, CSV, JSON
  published.py  the numbers that papers printed
  status.py     how far a work directory is
  __main__.py   the command line

Here: the summary that `ttc_jax.main` prints.
"""
from collections.abc import Sequence

import numpy as np

from ttc_jax.report import formats, tables
from ttc_jax.report.rows import Row, append, best, by_seed
from ttc_jax.report.rows import chosen, collect, protocols, read
from ttc_jax.report.tables import Score

__all__ = ["Row", "append", "best", "by_seed", "chosen", "collect", "costs",
           "protocols", "read", "summary"]


def summary(rows: Sequence[Row], planned: Sequence[str] = ()) -> str:
  """All that one needs to read beside the numbers, in Markdown.

  Args:
    planned: tasks that have a column even if no run of theirs is finished.
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
  """The Markdown table of what the variants of final runs cost.

  Tuned parameters; FLOPs of an image at inference, after merging where that
  is exact; images/s; memory of a training step; size of a bundle. Over tasks
  and seeds the mean, but of memory and size the largest.
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
