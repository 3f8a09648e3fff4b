"""The rows of finished runs: results.jsonl, of one work directory or several.

Only `append` writes; all else may be called while runs go on.
"""
from collections.abc import Mapping, Sequence
import json
import os
from typing import Any

from absl import logging
import numpy as np

from ttc_jax import files
from ttc_jax.errors import UserError

Row = dict[str, Any]
SCORE = {"val": "val_top1", "final": "test_top1"}

# What a variant is, whatever its task, seed and tuned setting.
_OF_A_VARIANT = ("method", "options", "backbone", "weights_sha256",
                 "image_size", "normalisation", "dtype", "epochs",
                 "batch_size")
_NEEDED = ("task", "group", "method", "variant", "protocol", "seed", "lr",
           "weight_decay", "val_top1", "test_top1", "module_params",
           "norm_params", "head_params", "backbone", "image_size", "weights",
           "weights_sha256")


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
        if not line.endswith("\n"):  # perhaps just being written
          continue
        logging.warning("%s:%d is not a whole row; its run will be done "
                        "again", path, number)
  return rows


def append(path: str, row: Row) -> None:
  """Adds a row and waits until the disk has it; processes take turns."""
  line = json.dumps(row).encode() + b"\n"
  folder, name = os.path.split(path)
  with files.lock(os.path.join(folder, f".{name}.lock"), wait=True), open(
      path, "ab+") as f:
    if f.tell():
      f.seek(-1, os.SEEK_END)
      if f.read(1) != b"\n":  # the line before was cut short
        line = b"\n" + line
    f.write(line)
    f.flush()
    os.fsync(f.fileno())


def collect(workdirs: Sequence[str]) -> list[Row]:
  """The rows of work directories, merged (see `merge`).

  Raises:
    UserError: a directory is missing or has no finished run.
  """
  found = {workdir: of(workdir) for workdir in workdirs}
  for workdir, rows in found.items():
    if not rows:
      raise UserError(f"no finished run in '{workdir}' yet; --watch shows how "
                      "far it is")
  return merge(found)


def of(workdir: str) -> list[Row]:
  """The rows of a work directory, perhaps none yet.

  Raises:
    UserError: there is no such directory, or a row is none of ours.
  """
  if not os.path.isdir(workdir):
    raise UserError(f"no work directory '{workdir}': give what main's "
                    "--workdir was, or what it printed last")
  rows = read(os.path.join(workdir, "results.jsonl"))
  for row in rows:
    if lacking := [key for key in _NEEDED if key not in row]:
      raise UserError(
          f"'{workdir}': the row of {row['run']} has no {lacking[0]!r}, it is "
          "no row of ours; remove it from results.jsonl")
  return rows


def merge(found: Mapping[str, Sequence[Row]]) -> list[Row]:
  """The rows of {work directory: rows} as those of one.

  The same row in several is one row. A variant that differs between
  directories (another backbone, say), or that has runs of the same task and
  seed in several, is several: "variant (work directory)".
  """
  seen, placed = {}, []
  for workdir, rows in found.items():
    for row in rows:
      known = seen.setdefault(row["run"], [])
      if row not in known:
        known.append(row)
        placed.append((workdir, row))
  apart = _apart(placed)
  return [row | {"variant": f"{row['variant']} ({workdir})"}
          if row["variant"] in apart else row for workdir, row in placed]


def _apart(placed):
  """The variants that are not the same in all work directories."""
  homes, facts = {}, {}
  for workdir, row in placed:
    variant, task = row["variant"], row["task"]
    homes.setdefault((variant, task, row["protocol"], row["seed"]),
                     set()).add(workdir)
    for what, keys in ((None, _OF_A_VARIANT), (task, ("data_digest",))):
      facts.setdefault((variant, what), {}).setdefault(workdir, set()).add(
          json.dumps([row.get(key) for key in keys], sort_keys=True))
  return ({key[0] for key, where in homes.items() if len(where) > 1} |
          {key[0] for key, by_workdir in facts.items()
           if len(set(map(frozenset, by_workdir.values()))) > 1})


def protocols(rows: Sequence[Row]) -> list[str]:
  """Those that there are, the test set's first."""
  return [p for p in ("final", "val") if any(r["protocol"] == p for r in rows)]


def chosen(rows: Sequence[Row], protocol: str) -> list[Row]:
  """The row of each task, variant and seed that a table shows.

  Of several settings tried on val200 the best; of several final runs, after
  the data or the order of the seeds was changed, the latest.

  Raises:
    UserError: there is none of that protocol.
  """
  mine = [r for r in rows if r["protocol"] == protocol]
  if not mine:
    raise UserError(f"no finished run of protocol '{protocol}'")
  return best(mine) if protocol == "val" else _latest(mine)


def best(rows: Sequence[Row]) -> list[Row]:
  """Per task, variant and seed the best val200 row; ties go to the smaller
  learning rate, then weight decay, then scale."""
  best_of = {}
  for row in sorted(rows, key=lambda r: (
      -r["val_top1"], r["lr"], r["weight_decay"], r.get("scale") or 0)):
    best_of.setdefault(_key(row), row)
  return [best_of[key] for key in dict.fromkeys(map(_key, rows))]


def _latest(rows):
  latest = {}
  for row in rows:
    if _key(row) in latest:
      logging.warning("%s is left out: a later run has its task, variant and "
                      "seed", latest[_key(row)]["run"])
    latest[_key(row)] = row
  return list(latest.values())


def _key(row):
  return row["task"], row["variant"], row["seed"]


def by_seed(rows: Sequence[Row], variant: str) -> list[float]:
  """A variant's mean test accuracy over all tasks of the rows, for each seed
  that has every one of them."""
  tasks, scores = {r["task"] for r in rows}, {}
  for r in [r for r in rows if r["variant"] == variant]:
    scores.setdefault(r["seed"], {})[r["task"]] = r["test_top1"]
  return [float(np.mean(list(s.values()))) for s in scores.values()
          if len(s) == len(tasks)]
