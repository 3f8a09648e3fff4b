"""results.jsonl -> the table."""
from collections.abc import Iterable, Sequence
import json
import os
from typing import Any

from absl import logging
import numpy as np

from ttc_jax.errors import UserError

Row = dict[str, Any]
GROUPS = ("Natural", "Specialized", "Structured", "Other")
_SCORE = {"val": "val_top1", "final": "test_top1"}


def read(path: str) -> list[Row]:
  """Reads the rows of a results file; a line cut short is left out, aloud."""
  if not os.path.exists(path):
    return []
  rows = []
  with open(path, encoding="utf-8") as f:
    for number, line in enumerate(f, 1):
      try:
        row = json.loads(line)
        row["run"]  # every row names its run
        rows.append(row)
      except (json.JSONDecodeError, KeyError, TypeError):
        logging.warning("%s:%d is not a whole row; its run will be done "
                        "again", path, number)
  return rows


def append(path: str, row: Row) -> None:
  """Adds a row and waits until the disk has it."""
  line = json.dumps(row).encode() + b"\n"
  with open(path, "ab+") as f:
    if f.tell():
      f.seek(-1, os.SEEK_END)
      if f.read(1) != b"\n":  # the line before was cut short
        line = b"\n" + line
    f.write(line)
    f.flush()
    os.fsync(f.fileno())


def table(rows: Sequence[Row], protocol: str) -> str:
  """The Markdown table of one protocol: variants down, tasks across.

  Accuracies in percent, mean +- standard deviation over seeds; then the mean
  over tasks and, where there are several, the mean of the groups' means.
  """
  rows = [r for r in rows if r["protocol"] == protocol]
  if not rows:
    raise UserError(f"no finished run of protocol '{protocol}'")
  tasks = list(dict.fromkeys(r["task"] for r in rows))
  groups = {r["task"]: r["group"] for r in rows}
  some_groups = [g for g in GROUPS if g in groups.values()]
  header = ["", *tasks, *([f"mean of {len(tasks)}"] if len(tasks) > 1 else []),
            *(["mean of groups"] if len(some_groups) > 1 else []),
            "module", "norm", "head", "seeds"]
  lines = [header]
  for variant in dict.fromkeys(r["variant"] for r in rows):
    mine = [r for r in rows if r["variant"] == variant]
    scores = {t: [r[_SCORE[protocol]] for r in mine if r["task"] == t]
              for t in tasks}
    line = [variant, *(_cell(scores[t]) for t in tasks)]
    whole = all(scores.values())
    means = {t: np.mean(s) for t, s in scores.items() if s}
    if len(tasks) > 1:
      line.append(f"{np.mean(list(means.values())):.1f}" if whole else "-")
    if len(some_groups) > 1:
      of_groups = [np.mean([m for t, m in means.items() if groups[t] == g])
                   for g in some_groups] if whole else []
      line.append(f"{np.mean(of_groups):.1f}" if whole else "-")
    line += [_range(r[f"{part}_params"] for r in mine)
             for part in ("module", "norm", "head")]
    lines.append([*line, _seeds(scores.values())])
  return _align(lines)


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

    def mean(key, unit=1.0, form=",.0f", rows=mine):
      return f"{np.mean([r[key] for r in rows]) / unit:{form}}"

    def largest(key, unit, rows=mine):
      known = [r[key] for r in rows if r[key]]
      return f"{max(known) / unit:,.0f}" if known else "-"
    lines.append([
        variant, _cell(by_seed(rows, variant)),
        *(_range(r[f"{part}_params"] for r in mine)
          for part in ("module", "norm", "head")),
        mean("flops", 1e6), mean("flops_merged", 1e6),
        mean("images_per_second"), mean("test_images_per_second"),
        largest("step_memory_bytes", 2 ** 20), largest("bundle_bytes", 1024)])
  return _align(lines)


def by_seed(rows: Sequence[Row], variant: str) -> list[float]:
  """A variant's mean test accuracy over all tasks of the rows, for each seed
  that has every one of them."""
  tasks, scores = {r["task"] for r in rows}, {}
  for r in [r for r in rows if r["variant"] == variant]:
    scores.setdefault(r["seed"], {})[r["task"]] = r["test_top1"]
  return [float(np.mean(list(s.values()))) for s in scores.values()
          if len(s) == len(tasks)]


def _cell(scores):
  if not scores:
    return "-"
  if len(scores) == 1:
    return f"{scores[0]:.1f}"
  return f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}"


def _range(counts: Iterable[int]) -> str:
  low, *rest = sorted(set(counts))
  return f"{low:,}" if not rest else f"{low:,} to {rest[-1]:,}"


def _seeds(scores) -> str:
  return _range(len(s) for s in scores)


def _align(lines):
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

  def text(line):
    first, *rest = (c.ljust(w) if i == 0 else c.rjust(w)
                    for i, (c, w) in enumerate(zip(line, widths)))
    return "| " + " | ".join([first, *rest]) + " |"
  rule = "|" + "|".join(
      "-" * (w + 2) if i == 0 else "-" * (w + 1) + ":"
      for i, w in enumerate(widths)) + "|"
  return "\n".join([text(lines[0]), rule, *map(text, lines[1:])])


def summary(rows: Sequence[Row]) -> str:
  """All that one needs to read beside the numbers, in Markdown."""
  parts = []
  for protocol, what in (
      ("final", "Top-1 on the test set, last epoch, trained on train800val200"),
      ("val", "Top-1 on val200, last epoch, trained on train800")):
    mine = [r for r in rows if r["protocol"] == protocol]
    if not mine:
      continue
    # Of several settings tried on val200, the table shows the best of each.
    shown = best(mine) if protocol == "val" else mine
    parts.append(f"{what}.\n\n{table(shown, protocol)}\n")
    if protocol == "final" and len({r["variant"] for r in mine}) > 1:
      parts.append("What they cost: MFLOPs of an image at inference, then "
                   f"after merging where that is exact.\n\n{costs(mine)}\n")
    if protocol == "val":
      parts[-1] += "\nThe best setting of each, see results.jsonl for all.\n"
  first = rows[0]
  parts.append(
      f"Backbone {first['backbone']} at {first['image_size']} px, weights "
      f"{first['weights']} (sha256 {first['weights_sha256'][:12]}). Columns "
      "module, norm, head: tuned parameters.\n")
  return "\n".join(parts)


def best(rows: Sequence[Row]) -> list[Row]:
  """Per task, variant and seed the best val200 row; ties go to the smaller
  learning rate, then weight decay, then scale."""
  chosen = {}
  for row in sorted(rows, key=lambda r: (
      -r["val_top1"], r["lr"], r["weight_decay"], r.get("scale") or 0)):
    chosen.setdefault((row["task"], row["variant"], row["seed"]), row)
  order = dict.fromkeys((r["task"], r["variant"], r["seed"]) for r in rows)
  return [chosen[key] for key in order]
