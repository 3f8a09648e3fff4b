"""Rows of finished runs: read, merged from work directories, selected.

Work directories are only read; runs may go on in them.
"""
from collections.abc import Mapping, Sequence
import json
import os
from typing import Any

from absl import logging
import numpy as np

from ttc_jax.errors import UserError, printable
from ttc_jax.runs import workdir as workdir_lib
from ttc_jax.runs.workdir import Row, WorkDir

GROUPS = ("Natural", "Specialized", "Structured", "Other")
SCORE = {"val": "val_top1", "final": "test_top1"}

# The facts of a variant that its task, seed and tuned setting do not change.
_OF_A_VARIANT = ("method", "options", "backbone", "gelu", "window",
                 "weights_sha256", "weights_reading", "image_size",
                 "normalisation", "resample", "dtype", "frozen_dtype",
                 "matmul_precision", "epochs", "optimiser", "batch_size",
                 "limit", "few_shot", "masked_tests")
# How it trains, which a task may have of its own.
TRAINING = ("accumulate", "warmup_epochs", "warmup_lr", "min_lr", "decay_all",
            "clip_norm", "drop_path", "label_smoothing", "head_init",
            "crop_from", "flip", "smallest_crop", "crop_aspect", "augment")
# What older rows do not state is one of these; of all others 0 is as none.
_BEFORE = {"frozen_dtype": "float32", "stage2_lr": 1.0}
# Nobody knows what it was in a row that does not state it.
_UNKNOWN = frozenset({"resample", "gelu", "window", "masked_tests", *TRAINING})
# What is tuned for a variant, by a search or by hand.
SETTING = ("lr", "weight_decay", "stage2_lr", "adapter_lr", "scale", "l2")
_NUMBER = (int, float)
# What every row has, and what it may have, with its type.
_NEEDED: dict[str, Any] = {
    **dict.fromkeys(("task", "group", "method", "variant", "protocol",
                     "backbone", "weights", "weights_sha256"), str),
    **dict.fromkeys(("seed", "image_size", "module_params", "norm_params",
                     "head_params"), int),
    **dict.fromkeys(("lr", "weight_decay"), _NUMBER),
    **dict.fromkeys(("val_top1", "test_top1"), (*_NUMBER, type(None)))}
_OPTIONAL: dict[str, Any] = {
    **dict.fromkeys(("finished", "device", "dtype", "frozen_dtype",
                     "normalisation", "resample", "optimiser", "head_init",
                     "gelu", "data_digest", "weights_reading",
                     "matmul_precision"), (str, type(None))),
    **dict.fromkeys((
        "epochs", "limit", "few_shot", "batch_size", "accumulate",
        "warmup_epochs", "warmup_lr", "min_lr", "clip_norm", "drop_path",
        "label_smoothing", "crop_from", "smallest_crop", "crop_aspect",
        "window", "decay_all", "flip", "masked_tests", "seconds_train",
        *SETTING), (*_NUMBER, type(None))),
    **dict.fromkeys(("options", "versions", "augment"), dict),
    **dict.fromkeys(("stages", "splits"), list),
    "tests": (dict, type(None))}


def read(path: str) -> list[Row]:
  """Reads the rows of a results file; warns of lines that are none."""
  found = workdir_lib.from_lines(path)
  rows = [row for row in found if "run" in row]
  if len(rows) < len(found):
    logging.warning("%s: left out are %d lines that are no rows of runs",
                    printable(path), len(found) - len(rows))
  return rows


def collect(workdirs: Sequence[str]) -> list[Row]:
  """Returns the rows of several work directories, merged (see `merge`).

  Raises:
    UserError: a directory is missing or has no finished run.
  """
  found = {workdir: of(workdir) for workdir in workdirs}
  for workdir, rows in found.items():
    if not rows and WorkDir(workdir).exists() and not WorkDir(workdir).started:
      raise UserError(f"'{workdir}' is no work directory: give what main's "
                      "--workdir was, or what it printed last")
    if not rows:
      raise UserError(f"no finished run in '{workdir}' yet; --watch shows how "
                      "far it is")
  return merge(found)


def of(workdir: str) -> list[Row]:
  """Returns the rows of a work directory, or of a results file of one.

  The list is empty before the first finished run.

  Raises:
    UserError: neither exists, or a row lacks a key or its accuracy, or has
      them in another form.
  """
  place = WorkDir(workdir)
  if not place.exists() and not os.path.isfile(workdir):
    raise UserError(f"no work directory '{workdir}': give what main's "
                    "--workdir was, or what it printed last")
  rows = place.rows() if place.exists() else read(workdir)
  for row in rows:
    if wrong := next(_wrong(row), None):
      raise UserError(
          f"'{workdir}': the row of {row['run']} has no good {wrong!r}, so "
          "this program did not write it; remove it")
  return rows


def _wrong(row):
  """Yields the keys of a row that have not the form they should."""
  for key, kind in (_NEEDED | {
      key: kind for key, kind in _OPTIONAL.items() if key in row}).items():
    if not isinstance(row.get(key, ...), kind):  # a missing one may not be None
      yield key
  if row["group"] not in GROUPS:
    yield "group"
  accuracy = SCORE.get(row["protocol"])
  if accuracy is None:
    yield "protocol"
  elif row[accuracy] is None:
    yield accuracy
  for key, holds in (
      ("tests", lambda x: isinstance(x, dict)
       and isinstance(x.get("top1"), _NUMBER)),
      ("versions", lambda x: isinstance(x, str)),
      ("augment", lambda x: isinstance(x, _NUMBER))):
    if not all(map(holds, (row.get(key) or {}).values())):
      yield key


def merge(found: Mapping[str, Sequence[Row]]) -> list[Row]:
  """Merges the rows of {work directory: rows}.

  A row that several directories hold is kept once. A variant is split into
  "variant (work directory)" if its facts differ between directories (another
  backbone, for example), or on a task how it trains and the settings that it
  is tested with, or if two directories have runs of the same task and seed.
  """
  seen: dict[str, list[Row]] = {}
  placed: list[tuple[str, Row]] = []
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
  """Returns the variants that must be split by work directory."""
  homes: dict[tuple, set[str]] = {}
  facts: dict[tuple, dict[str, set[str]]] = {}
  for workdir, row in placed:
    variant, task, protocol = row["variant"], row["task"], row["protocol"]
    homes.setdefault((variant, task, protocol, row["seed"]), set()).add(workdir)
    mine: dict[tuple, Any] = {
        (variant, key): _fact(row, key) for key in _OF_A_VARIANT
        if _is_known(row, key)}
    mine |= {(variant, key, task): _fact(row, key) for key in TRAINING
             if _is_known(row, key)}
    mine[variant, "data_digest", task, protocol] = _fact(row, "data_digest")
    mine[variant, protocol, task] = [_fact(row, key) for key in SETTING]
    for what, fact in mine.items():
      facts.setdefault(what, {}).setdefault(workdir, set()).add(
          json.dumps(fact, sort_keys=True))

  def differ(what, by_workdir):
    told = [*by_workdir.values()]
    if what[1] == "val" and any(len(tried) > 1 for tried in told):
      return False  # a search tries several settings
    return len(set(map(frozenset, told))) > 1
  return ({what[0] for what, where in homes.items() if len(where) > 1} |
          {what[0] for what, by_workdir in facts.items()
           if differ(what, by_workdir)})


def protocols(rows: Sequence[Row]) -> list[str]:
  """Returns the protocols of the rows, "final" first."""
  return [p for p in ("final", "val") if any(r["protocol"] == p for r in rows)]


def chosen(rows: Sequence[Row], protocol: str) -> list[Row]:
  """Selects one row for each task, variant and seed.

  Protocol "val": the setting with the best accuracy on val200. Protocol
  "final": the latest row; there are several if the data or the order of the
  seeds was changed.

  Raises:
    UserError: no row has that protocol.
  """
  mine = [r for r in rows if r["protocol"] == protocol]
  if not mine:
    raise UserError(f"no finished run of protocol '{protocol}'")
  return best(mine) if protocol == "val" else latest(mine)


def best(rows: Sequence[Row]) -> list[Row]:
  """Returns the best val200 row of each task, variant and seed.

  Ties go to the smaller learning rate, then weight decay, then scale, then
  rate of the adapter, then that of stage 2, then l2.
  """
  best_of: dict[tuple, Row] = {}
  for row in sorted(rows, key=lambda r: (
      -r["val_top1"], r["lr"], r["weight_decay"], r.get("scale") or 0,
      r.get("adapter_lr") or 0, r.get("stage2_lr", 1) or 0, r.get("l2") or 0)):
    best_of.setdefault(_key(row), row)
  return [best_of[key] for key in dict.fromkeys(map(_key, rows))]


def latest(rows: Sequence[Row]) -> list[Row]:
  """Returns the latest row of each task, variant and seed."""
  found: dict[tuple, Row] = {}
  for row in rows:
    if _key(row) in found:
      logging.warning("%s is left out: a later run has its task, variant and "
                      "seed", found[_key(row)]["run"])
    found[_key(row)] = row
  return list(found.values())


def of_one_setting(rows: Sequence[Row], searched: bool = False) -> list[Row]:
  """Returns the rows that can be compared; warns of those left out.

  The newest row of a task that tells it says which images count (among those
  that read the same splits at the same size), and the newest one of a task and
  variant which settings.

  Args:
    rows: of one protocol, the newest last.
    searched: their settings are what a search tries, so they may differ.
  """
  for kind, keys in ((_reads, ("data_digest",)),
                     (lambda row: (row["task"], row["variant"]),
                      (*_OF_A_VARIANT, *TRAINING,
                       *(() if searched else SETTING)))):
    newest = {(kind(r), key): r for r in rows for key in keys
              if _is_known(r, key)}
    kept = []
    for row in rows:
      others = {key: newest[kind(row), key] for key in keys
                if _is_known(row, key)}
      if apart := [key for key, other in others.items()
                   if _fact(row, key) != _fact(other, key)]:
        logging.warning("%s is left out: %s has another %s", row["run"],
                        others[apart[0]]["run"], apart[0])
      else:
        kept.append(row)
    rows = kept
  return [*rows]


def _reads(row):
  """What of a task a run reads, of which its digest is: NOAH's search reads the
  parts of the training images too."""
  apart = ("train" in row["splits"] if "splits" in row
           else "supernet" in row.get("stages", ()))  # in older rows
  return row["task"], row["image_size"], apart


def _is_known(row, key):
  """Whether a row tells a fact, by itself or by not stating it."""
  return key in row or key not in _UNKNOWN


def _fact(row, key):
  """A fact of a row, also of one that was written before rows stated it; the
  options without what is tuned, which is a fact of its own."""
  value = row.get(key)
  if key == "options":
    value = {k: v for k, v in (value or {}).items() if k not in SETTING}
  return _BEFORE.get(key) if value is None or (
      not value and key not in _BEFORE) else value


def _key(row):
  return row["task"], row["variant"], row["seed"]


def by_seed(rows: Sequence[Row], variant: str) -> list[float]:
  """Returns a variant's test accuracy for each seed, in percent.

  It is the mean over all tasks of `rows`; seeds that lack a task are left out.
  """
  tasks = {r["task"] for r in rows}
  scores: dict[int, dict[str, float]] = {}
  for r in [r for r in rows if r["variant"] == variant]:
    scores.setdefault(r["seed"], {})[r["task"]] = r["test_top1"]
  return [float(np.mean(list(s.values()))) for s in scores.values()
          if len(s) == len(tasks)]


def augmentation(row: Row) -> str:
  """Says what `config.augment` was: "mixup 0.8, cutmix 1"; "" for nothing, and
  of older rows, which do not state it."""
  return ", ".join(f"{name} {x:g}"
                   for name, x in row.get("augment", {}).items() if x)


def test_sets(row: Row) -> dict[str, float]:
  """Returns {test set: top-1 in percent}; the first one is `test_top1`."""
  return {name: found["top1"]
          for name, found in (row.get("tests") or {}).items()} or {
              "test": row["test_top1"]}
