"""Rows -> a table of numbers: variants down, tasks across, then the means."""
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from ttc_jax.report import published, rows as rows_lib
from ttc_jax.report.rows import Row
from ttc_jax.vtab import rows as vtab

GROUPS = ("Natural", "Specialized", "Structured", "Other")
PARTS = ("module", "norm", "head")
_WHAT = {
    "final": "Top-1 (%) on the test set, last epoch, trained on train800val200",
    "val": "Top-1 (%) on val200, last epoch, trained on train800, the best "
           "setting of each task and seed"}


class Score(NamedTuple):
  """Accuracies in percent.

  Attributes:
    mean: over seeds of each task, then over what the column averages.
    seeds: the same for each seed that has all that the column averages.
  """
  mean: float
  seeds: tuple[float, ...] = ()

  @property
  def deviation(self) -> float | None:
    """Sample standard deviation over seeds; None with fewer than two."""
    return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else None

  @property
  def interval(self) -> float | None:
    """Half of the two-sided 95 % interval of the mean over seeds.

    t s / sqrt(n), with Student's t of n - 1 degrees of freedom from
    `scipy.special.stdtrit`; None with fewer than two seeds.
    """
    n = len(self.seeds)
    if n < 2:
      return None
    return self.deviation * float(special.stdtrit(n - 1, 0.975)) / n ** 0.5


class Column(NamedTuple):
  """A mean of groups' means; of a task, of one group with one task.

  Attributes:
    heading: the group of a task, None of what averages several.
  """
  title: str
  groups: tuple[tuple[str, ...], ...]
  heading: str | None = None


class Line(NamedTuple):
  """What stands beside one name.

  Attributes:
    kind: "run", "published", or "difference", of a run's and a published one.
    scores: one a column; None where something is missing.
    params: {part: (smallest, largest) number over tasks}, or as published.
    seeds: the smallest and the largest number of seeds that a task has.
    rows: that it was made of.
    beside: names of the runs' lines that a published one is compared with.
  """
  name: str
  kind: str
  scores: list[Score | None]
  params: Mapping[str, tuple[int, int] | str] = {}
  seeds: tuple[int, int] | None = None
  rows: Sequence[Row] = ()
  beside: Sequence[str] = ()


class Table(NamedTuple):
  """Columns, lines and what to say about them.

  Attributes:
    what: the numbers are, without a full stop.
    sources: sentences on what was run, and where the rest was printed.
  """
  what: str
  columns: list[Column]
  lines: list[Line]
  protocol: str
  sources: list[str]


def make(rows: Sequence[Row], protocol: str, compare: bool = False,
         planned: Sequence[str] = ()) -> Table:
  """The table of one protocol.

  Args:
    planned: tasks that have a column even if no run of theirs is finished.
    compare: adds the published rows and how far the runs are from them; a
      published mean is over the tasks of this table.

  Raises:
    UserError: no row of that protocol.
  """
  shown = rows_lib.chosen(rows, protocol)
  across = columns({t: _group(t) for t in planned} |
                   {r["task"]: r["group"] for r in shown})
  lines = [line(variant, [r for r in shown if r["variant"] == variant], across)
           for variant in dict.fromkeys(r["variant"] for r in shown)]
  table = Table(_WHAT[protocol], across, lines, protocol, _bases(shown))
  return _compared(table) if compare else table


def columns(groups: Mapping[str, str]) -> list[Column]:
  """Of {task: group}: VTAB's order within a group, then that of the rows."""
  order = {name: i for i, name in enumerate(vtab.ROWS)}
  tasks = sorted(groups, key=lambda t: (
      GROUPS.index(groups[t]), order.get(vtab.canonical(t), len(order))))
  parts = {g: tuple(t for t in tasks if groups[t] == g) for g in GROUPS}
  parts = {g: part for g, part in parts.items() if part}
  found = [Column(t, ((t,),), groups[t]) for t in tasks]
  if len(parts) > 1:
    found += [Column(g, (part,)) for g, part in parts.items() if len(part) > 1]
  if len(tasks) > 1:
    found.append(Column(f"mean of {len(tasks)}", (tuple(tasks),)))
  if len(parts) > 1:
    found.append(Column("mean of groups", tuple(parts.values())))
  return found


def _group(task):
  row = vtab.ROWS.get(vtab.canonical(task))
  return row.group if row else "Other"


def mean(groups: Sequence[Sequence[str]],
         top1: Mapping[str, float]) -> float | None:
  """The mean of the groups' means; None where a task is missing."""
  if any(task not in top1 for group in groups for task in group):
    return None
  return float(np.mean([np.mean([top1[t] for t in g]) for g in groups]))


def line(name: str, rows: Sequence[Row], across: Sequence[Column]) -> Line:
  """A variant's."""
  by_task, by_seed = {}, {}
  for r in rows:
    top1 = r[rows_lib.SCORE[r["protocol"]]]
    by_task.setdefault(r["task"], []).append(top1)
    by_seed.setdefault(r["seed"], {})[r["task"]] = top1
  means = {task: np.mean(top1) for task, top1 in by_task.items()}

  def score(groups):
    seeds = [mean(groups, top1) for top1 in by_seed.values()]
    whole = mean(groups, means)
    return None if whole is None else Score(
        whole, tuple(s for s in seeds if s is not None))
  return Line(
      name, "run", [score(c.groups) for c in across],
      {part: extent(r[f"{part}_params"] for r in rows) for part in PARTS},
      extent(map(len, by_task.values())), rows)


def extent(numbers: Iterable[int]) -> tuple[int, int]:
  """The smallest and the largest."""
  numbers = list(numbers)
  return min(numbers), max(numbers)


def _bases(rows):
  """What the runs started from."""
  bases = dict.fromkeys(
      f"{r['backbone']} at {r['image_size']} px, weights {r['weights']} "
      f"(sha256 {r['weights_sha256'][:12]})" for r in rows)
  return [f"Backbone {'; '.join(bases)}. Columns module, norm, head: tuned "
          "parameters."]


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
             [_minus(*pair) for pair in zip(ours.scores, scores)])
        for ours in same]
  return table._replace(
      lines=[*table.lines, *theirs, *differences],
      sources=[*table.sources, *published.sources(sources)])


def _score(number):
  return None if number is None else Score(number)


def _minus(ours, theirs):
  return Score(ours.mean - theirs.mean) if ours and theirs else None
