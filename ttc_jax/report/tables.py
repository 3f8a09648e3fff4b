"""Turns rows into a table: a line per variant, a column per task, then means.
"""
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
import numpy as np
from scipy import special

from ttc_jax.report import published
from ttc_jax.report import rows as rows_lib
from ttc_jax.report.rows import Row
from ttc_jax.vtab import rows as vtab

PARTS = ("module", "norm", "head")
_WHAT = {
    "final": "Top-1 (%) on the test set, last epoch, trained on train and val",
    "val": "Top-1 (%) on val, last epoch, trained on train, the best setting "
           "of each task and seed"}


# Settings that the notes show where rows differ; the first three always.
_SETTINGS = ("epochs", "limit", "few_shot", "backbone", "weights_sha256",
             "weights_reading", "image_size", "normalisation", "dtype",
             "resample", "frozen_dtype", "matmul_precision", "optimiser",
             "batch_size", *(key for key in rows_lib.TRAINING
                             if key != "warmup_epochs"),  # follows epochs
             "device", "jax")
# Of these, all rows of a table should have the same.
_COMMON = ("limit", "few_shot", "backbone", "weights_sha256",
           "weights_reading", "image_size", "normalisation", "resample",
           "dtype", "matmul_precision")


class Score(NamedTuple):
  """Accuracy of one cell, in percent.

  Attributes:
    mean: mean over the seeds of each task, then over the column's tasks.
    seeds: the mean over the column's tasks for each seed that has them all.
  """
  mean: float
  seeds: tuple[float, ...] = ()

  @property
  def deviation(self) -> float | None:
    """Sample standard deviation over seeds; None with fewer than two."""
    return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else None

  @property
  def interval(self) -> float | None:
    """Half of the two-sided 95 % confidence interval of the mean over seeds.

    t s / sqrt(n), with Student's t of n - 1 degrees of freedom from
    `scipy.special.stdtrit`; None with fewer than two seeds.
    """
    n, deviation = len(self.seeds), self.deviation
    if deviation is None:
      return None
    return deviation * float(special.stdtrit(n - 1, 0.975)) / n ** 0.5


class Column(NamedTuple):
  """A column: one test set of a task, or a mean over tasks.

  Attributes:
    groups: the cell is the mean of these groups' means; the column of one
      task has one group of one name. A name is a task, or "task/test set" for
      every test set after the first.
    heading: the group of a task; None for means.
  """
  title: str
  groups: tuple[tuple[str, ...], ...]
  heading: str | None = None


class Line(NamedTuple):
  """A line of the table.

  Attributes:
    kind: "run", "theirs" (a run of another library's trainer), "published",
      or "difference" (a run minus a published line).
    scores: one score per column; None where a run is missing.
    params: {part: (smallest, largest) number over tasks}, or as published.
    seeds: the smallest and the largest number of seeds of a task.
    rows: the rows that the line was made from.
    beside: names of the run lines that a published line is compared with.
  """
  name: str
  kind: str
  scores: list[Score | None]
  params: Mapping[str, tuple[int, int] | str] = {}
  seeds: tuple[int, int] | None = None
  rows: Sequence[Row] = ()
  beside: Sequence[str] = ()


class Table(NamedTuple):
  """Columns, lines and notes.

  Attributes:
    what: says what the numbers are, without a full stop.
    sources: sentences on what was run, and on where published numbers are
      from.
  """
  what: str
  columns: list[Column]
  lines: list[Line]
  protocol: str
  sources: list[str]


def make(rows: Sequence[Row], protocol: str, compare: bool = False,
         planned: Sequence[str] = ()) -> Table:
  """Returns the table of one protocol.

  Tasks with several test sets have a column for each: the task's own shows
  the first, "task/test set" the others. Only the first enters the means.

  Args:
    rows: rows of one or several work directories.
    protocol: "final" (test sets) or "val" (val200).
    compare: adds the published rows, and the differences of the runs from
      them; a published mean is over the tasks of this table.
    planned: tasks that have a column even without a finished run.

  Raises:
    UserError: no row has that protocol.
  """
  shown = rows_lib.chosen(rows, protocol)
  across = columns({t: _group(t) for t in planned} |
                   {r["task"]: r["group"] for r in shown}, _more_tests(shown))
  lines = [line(variant, [r for r in shown if r["variant"] == variant], across)
           for variant in dict.fromkeys(r["variant"] for r in shown)]
  mixed = _mixed(shown)
  for sentence in mixed:
    logging.warning("%s", sentence)
  table = Table(_WHAT[protocol], across, lines, protocol,
                [*_bases(shown), *_settings(shown), *mixed])
  return _compared(table) if compare else table


def columns(groups: Mapping[str, str],
            more_tests: Mapping[str, Sequence[str]] | None = None
            ) -> list[Column]:
  """Returns the columns, in VTAB's order, then in the order of the rows.

  Args:
    groups: {task: group}.
    more_tests: {task: names of its test sets after the first}.
  """
  order = {name: i for i, name in enumerate(vtab.ROWS)}
  tasks = sorted(groups, key=lambda t: (
      rows_lib.GROUPS.index(groups[t]),
      order.get(vtab.canonical(t), len(order))))
  parts = {g: tuple(t for t in tasks if groups[t] == g)
           for g in rows_lib.GROUPS}
  parts = {g: part for g, part in parts.items() if part}
  found = [Column(name, ((name,),), groups[t]) for t in tasks
           for name in (t, *(f"{t}/{test}"
                             for test in (more_tests or {}).get(t, ())))]
  if len(parts) > 1:
    found += [Column(g, (part,)) for g, part in parts.items() if len(part) > 1]
  if len(tasks) > 1:
    found.append(Column(f"mean of {len(tasks)}", (tuple(tasks),)))
  if len(parts) > 1:
    found.append(Column("mean of groups", tuple(parts.values())))
  return found


def _more_tests(rows):
  """Returns {task: names of its test sets after the first}."""
  found: dict[str, dict[str, None]] = {}
  for r in rows:
    if r["protocol"] == "final":
      found.setdefault(r["task"], {}).update(
          dict.fromkeys([*rows_lib.test_sets(r)][1:]))
  return found


def _group(task):
  row = vtab.ROWS.get(vtab.canonical(task))
  return row.group if row else "Other"


def mean(groups: Sequence[Sequence[str]],
         top1: Mapping[str, float]) -> float | None:
  """Returns the mean of the groups' means; None if a task is missing."""
  if any(task not in top1 for group in groups for task in group):
    return None
  return float(np.mean([np.mean([top1[t] for t in g]) for g in groups]))


def line(name: str, rows: Sequence[Row], across: Sequence[Column]) -> Line:
  """Returns the line of a variant."""
  by_key: dict[str, list[float]] = {}
  by_seed: dict[int, dict[str, float]] = {}
  for r in rows:
    for key, top1 in _accuracies(r).items():
      by_key.setdefault(key, []).append(top1)
      by_seed.setdefault(r["seed"], {})[key] = top1
  means = {key: float(np.mean(top1)) for key, top1 in by_key.items()}

  def score(groups):
    seeds = [mean(groups, top1) for top1 in by_seed.values()]
    whole = mean(groups, means)
    return None if whole is None else Score(
        whole, tuple(s for s in seeds if s is not None))
  return Line(
      name, "run", [score(c.groups) for c in across],
      {part: extent(r[f"{part}_params"] for r in rows) for part in PARTS},
      extent(len(by_key[t]) for t in {r["task"] for r in rows}), rows)


def _accuracies(row):
  """Returns {task or "task/test set": top-1 in percent} of a row."""
  task = row["task"]
  found = {task: row[rows_lib.SCORE[row["protocol"]]]}
  if row["protocol"] == "final":
    _, *more = rows_lib.test_sets(row).items()
    found |= {f"{task}/{name}": top1 for name, top1 in more}
  return found


def extent(numbers: Iterable[int]) -> tuple[int, int]:
  """Returns (smallest, largest)."""
  numbers = list(numbers)
  return min(numbers), max(numbers)


def _bases(rows):
  """Returns the sentence on the backbones and weights of the runs."""
  bases = dict.fromkeys(
      f"{r['backbone']} at {r['image_size']} px, weights {r['weights']} "
      f"(sha256 {r['weights_sha256'][:12]})" for r in rows)
  return [f"Backbone {'; '.join(bases)}. Columns module, norm, head: tuned "
          "parameters."]


def _setting(row, key):
  if key == "jax":
    return row.get("versions", {}).get("jax")
  value = row.get(key)
  if key == "augment" and value is not None:
    return rows_lib.augmentation(row) or "no"
  return value[:12] if key == "weights_sha256" else value


def _settings(rows):
  """Returns a sentence on epochs, limit and settings that differ, or none."""
  parts = []
  for key in _SETTINGS:
    of_value: dict[Any, dict[str, None]] = {}
    for r in rows:
      if (value := _setting(r, key)) is not None:
        of_value.setdefault(value, {})[r["variant"]] = None
    if len(of_value) > 1:
      parts.append(f"{key} " + ", ".join(
          f"{value} ({', '.join(names)})" for value, names in of_value.items()))
    elif key in _SETTINGS[:3] and any(of_value):  # a limit of 0 is none
      parts.append(f"{key} {next(iter(of_value))}")
  return [f"Settings: {'; '.join(parts)}."] if parts else []


def _mixed(rows):
  """Returns sentences on rows that should not be in one table or one mean."""
  def differ(part, keys):
    return [key for key in keys
            if len({_setting(r, key) for r in part} - {None}) > 1]
  found = []
  if keys := differ(rows, _COMMON):
    found.append("Mixed in this table, so its lines cannot be compared: "
                 f"{', '.join(keys)}.")
  cells: dict[tuple[str, str], list[Row]] = {}
  for r in rows:
    cells.setdefault((r["variant"], r["task"]), []).append(r)
  for (variant, task), part in cells.items():
    if keys := differ(part, (
        "epochs", "optimiser", "batch_size", *rows_lib.TRAINING,
        *(rows_lib.SETTING if part[0]["protocol"] == "final" else ()))):
      found.append(f"Seeds of {variant} on {task} differ in more than the "
                   f"seed: {', '.join(keys)}.")
  return found


def _compared(table):
  names = {vtab.canonical(name) for c in table.columns for group in c.groups
           for name in group}
  if not names & vtab.ROWS.keys():
    return table._replace(sources=[
        *table.sources,
        "No published number: none of these tasks is one of VTAB's 19."])
  theirs, differences, sources = [], [], []
  for known in published.ROWS:
    scores = [_score(known.mean(c.groups)) for c in table.columns]
    if not any(scores):
      continue
    same = [x for x in table.lines if all(map(known.is_of, x.rows))]
    theirs.append(Line(f"{known.name} (published)", "published", scores,
                       {"module": known.params}, beside=[x.name for x in same]))
    sources.append(known)
    differences += [
        Line(f"{ours.name} - {known.name}", "difference",
             [_minus(*pair) for pair in zip(ours.scores, scores, strict=True)])
        for ours in same]
  return table._replace(
      lines=[*table.lines, *theirs, *differences],
      sources=[*table.sources, *published.sources(sources)])


def _score(number):
  return None if number is None else Score(number)


def _minus(ours, theirs):
  return Score(ours.mean - theirs.mean) if ours and theirs else None
