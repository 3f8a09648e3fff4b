"""Runs of Big Vision's own trainer, as lines of a table.

Its `train.py` writes big_vision_metrics.txt, a JSON object a line (google-
research/big_vision, utils.py, `BigVisionMetricWriter`): the step, and under
names such as "test/prec@1" what was measured at it, shares from 0 to 1. Beside
it is config.json, the configuration; what examples/big_vision/vtab.py writes
there says which task and method it was. Nothing in the files is executed.
"""
from collections.abc import Mapping, Sequence
import math
import os
from typing import Any, NamedTuple

import numpy as np

from ttc_jax import files
from ttc_jax.errors import UserError, check_known
from ttc_jax.report.rows import SCORE
from ttc_jax.report.tables import Line, Score, Table, mean

FILE = "big_vision_metrics.txt"
# Of `SCORE`'s protocols: the metric of the classification evaluator.
METRIC = {"val": "val/prec@1", "final": "test/prec@1"}


class Found(NamedTuple):
  """One number of a metrics file.

  Attributes:
    method: "full", "linear", "fewshot_lsr", ..., or "" if unknown.
    top1: percent.
    source: a sentence on where it was read and what was run.
  """
  task: str
  method: str
  top1: float
  source: str


def add(table: Table, given: Sequence[str]) -> Table:
  """Returns a table with a line for each method of some metrics files.

  Args:
    given: FILE or TASK=FILE each, or the folder of the file; several files of
      one task and method are its seeds. Without TASK it is config.json's task,
      or the table's only one.

  Raises:
    UserError: a file that cannot be read, is not finished, is of another task,
      or has no accuracy of the table's protocol.
  """
  tasks = [c.title for c in table.columns if c.heading]
  found = [f for one in given for f in read(one, tasks, table.protocol)]
  by_method: dict[str, dict[str, list[float]]] = {}
  for f in found:
    by_method.setdefault(f.method, {}).setdefault(f.task, []).append(f.top1)
  lines = [_line(method, top1, table) for method, top1 in by_method.items()]
  own = [i for i, line in enumerate(table.lines) if line.kind == "run"]
  after = own[-1] + 1 if own else 0
  return table._replace(
      lines=[*table.lines[:after], *lines, *table.lines[after:]],
      sources=[*table.sources, *(f.source for f in found)])


def _line(method, top1, table):
  means = {task: float(np.mean(values)) for task, values in top1.items()}

  def score(column):
    whole = mean(column.groups, means)
    return None if whole is None else Score(
        whole, tuple(top1[column.title]) if column.heading else ())
  counts = [len(values) for values in top1.values()]
  return Line(f"{method} (Big Vision)".lstrip(), "theirs",
              [score(c) for c in table.columns],
              seeds=(min(counts), max(counts)))


def read(given: str, tasks: Sequence[str], protocol: str) -> list[Found]:
  """Reads the accuracies of one run; arguments as of `add`."""
  task, path = _split(given)
  steps, config = _steps(path), _config(path)
  task = task or _text(config, "task")
  if not task and len(tasks) == 1:
    task = tasks[0]
  if not task:
    raise UserError(f"'{path}' does not say its task, and the table has "
                    f"{len(tasks)}: give --big_vision=TASK=FILE")
  check_known("task of --big_vision", task, tasks)
  last = _last(path, steps, METRIC[protocol], config)
  said = _said(path, last, config)
  found = [Found(task, _text(config, "method"),
                 _percent(path, last, METRIC[protocol]),
                 f"{said}, {METRIC[protocol]}.")]
  if protocol == "final":
    found += [Found(task, "fewshot_lsr", _percent(path, last, name),
                    f"{said}, {name}.")
              for name in last if name.startswith("fewshot/")]
  return found


def _split(given):
  """(task or "", path of the file) of "TASK=FILE" or "FILE"."""
  head, equals, tail = given.partition("=")
  task, path = (head, tail) if equals and not os.path.exists(given) else (
      "", given)
  path = os.path.expanduser(path)
  return task, os.path.join(path, FILE) if os.path.isdir(path) else path


# --- The file -----------------------------------------------------------------

def _steps(path: str) -> list[dict[str, Any]]:
  """The objects of the file; a last line without an end is still written."""
  try:
    with open(path, encoding="utf-8") as file:
      lines = file.read().split("\n")
  except FileNotFoundError as error:
    raise UserError(f"metrics file '{path}' does not exist; give the {FILE} "
                    "of Big Vision's --workdir") from error
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"metrics file '{path}' cannot be read: {error}; give the "
                    f"{FILE} of Big Vision's --workdir") from error
  return [_object(path, number, line)
          for number, line in enumerate(lines[:-1], 1)]


def _object(path, number, line):
  try:
    value = files.from_json(line)
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
      raise ValueError("no object with a step")
    return value
  except ValueError as error:
    raise UserError(
        f"metrics file '{path}', line {number}: {error}; give the {FILE} that "
        "Big Vision's train.py wrote") from error


def _config(path: str) -> Mapping[str, Any]:
  """The configuration beside the file; empty where there is none."""
  beside = os.path.join(os.path.dirname(path), "config.json")
  try:
    value = files.read_json(beside)
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise UserError(f"'{beside}', beside the metrics, cannot be read "
                    f"({error}): mend it or move it away") from error
  return value if isinstance(value, dict) else {}


def _last(path, steps, metric, config):
  """The last object that has the metric, which must be of the last step."""
  having = [step for step in steps if metric in step]
  if not having:
    seen = sorted({name for step in steps for name in step if "/prec" in name})
    raise UserError(f"metrics file '{path}' has no {metric!r}; it has "
                    f"{', '.join(map(repr, seen)) or 'no accuracy'}: choose "
                    f"--protocol={' or '.join(SCORE)}, or the file of another "
                    "run")
  total = config.get("total_steps")
  if isinstance(total, int) and having[-1]["step"] < total:
    raise UserError(f"metrics file '{path}': its last {metric!r} is of step "
                    f"{having[-1]['step']} of {total}; wait for the run's end")
  return having[-1]


def _percent(path, step, metric):
  value = step[metric]
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not (
      math.isfinite(value) and 0 <= value <= 1):
    raise UserError(f"metrics file '{path}', step {step['step']}: {metric!r} "
                    f"is {str(value)[:40]}; expected a share from 0 to 1")
  return 100.0 * value


def _text(config, key):
  value = config.get(key)
  return value if isinstance(value, str) else ""


def _said(path, last, config):
  """What was run, as far as config.json says it."""
  rate = config.get("lr")
  parts = [f"step {last['step']}",
           f"lr {rate:g}" if isinstance(rate, (int, float)) else "",
           _text(config, "model_init")]
  return f"(Big Vision): '{path}', {', '.join(filter(None, parts))}"
