"""Progress of a work directory, which is only read.

The plan, which `ttc_jax.main` writes, says which runs to expect: {"tasks":
{task: {variant: {"settings": n, "seeds": [n], "protocol": "select" | "val" |
"final", "epochs": n}}}, "missing": {task: sentence}}. Without a plan, the runs
that exist are reported.
"""
from collections.abc import Mapping, Sequence
import json
import os
import re
from typing import Any, NamedTuple

import numpy as np

from ttc_jax import files
from ttc_jax.report import formats
from ttc_jax.report import rows as rows_lib
from ttc_jax.report.rows import Row

Pair = tuple[str, str]  # (task, variant)
_RUN = re.compile(r"(.+)-(val|final)-s(\d+)-[0-9a-f]+")


class Running(NamedTuple):
  """A run that a process works on.

  Attributes:
    run: its name.
    pair: its task and variant; None if the name does not tell.
    record: the last record of its learning curve; empty before the first.
    epochs: epochs of each stage; None if unknown, or during a search.
  """
  run: str
  pair: Pair | None
  record: Mapping[str, Any]
  epochs: int | None


class Status(NamedTuple):
  """The runs of a work directory, finished and expected.

  Attributes:
    expected: {pair: number of runs}; empty without a plan.
    done: {pair: {run: row}}.
    running: runs that a process works on.
    failed: {pair: {run: failure}}.
    missing: {task: why its data cannot be read}.
    seconds_left: estimate for one run at a time; None if unknown.
  """
  expected: dict[Pair, int]
  done: dict[Pair, dict[str, Row]]
  running: list[Running]
  failed: dict[Pair, dict[str, Mapping[str, Any]]]
  missing: Mapping[str, str]
  seconds_left: float | None


def gather(workdir: str) -> Status:
  """Reads the status of a work directory.

  Raises:
    UserError: the directory does not exist.
  """
  rows = rows_lib.of(workdir)
  finished = {r["run"] for r in rows}
  plan = _json(os.path.join(workdir, "plan.json"))
  failures = {f["run"]: f for f in _lines(
      os.path.join(workdir, "failed.jsonl")) if f["run"] not in finished}
  expected = _expected(plan)
  done = _by_pair([r for r in rows if _is_planned(r, plan)])
  failed = _by_pair(failures.values())
  pairs = list(dict.fromkeys([*expected, *done, *failed]))
  running = _running(workdir, plan, pairs, finished)
  at_work = {r.run for r in running}  # some failed before
  failed = {pair: {run: f for run, f in of.items() if run not in at_work}
            for pair, of in failed.items()}
  return Status(expected, done, running, failed, plan.get("missing", {}),
                _seconds_left(expected, done, failed))


def text(status: Status) -> str:
  """Formats a table of tasks and variants, running and failed runs, a sum."""
  at_work = [r.pair for r in status.running]
  pairs = list(dict.fromkeys([*status.expected, *status.done, *status.failed,
                              *filter(None, at_work)]))
  tasks = dict.fromkeys([*(t for t, _ in pairs), *status.missing])
  variants = dict.fromkeys(v for _, v in pairs)
  lines = [["", *variants]] + [
      [task, *(_cell(status, (task, v), at_work) for v in variants)]
      for task in tasks]
  return "\n\n".join("\n".join(part) for part in (
      ["  ".join(x).rstrip() for x in formats.align(lines)] * bool(tasks),
      [f"missing: {task}: {why}" for task, why in status.missing.items()],
      [f"running: {_line(r)}" for r in status.running],
      [f"failed: {run}: {f.get('error', 'no reason given')}"
       for of in status.failed.values() for run, f in of.items()],
      [_sum(status)]) if part)


def _cell(status, pair, at_work):
  """Formats a cell as "3/5, 1 running, 1 failed"."""
  task, _ = pair
  if task in status.missing:
    return "missing"
  done = len(status.done.get(pair, ()))
  parts = [f"{done}/{status.expected[pair]}" if pair in status.expected
           else str(done)]
  for what, number in (("running", at_work.count(pair)),
                       ("failed", len(status.failed.get(pair, ())))):
    if number:
      parts.append(f"{number} {what}")
  return ", ".join(parts)


def _line(running):
  r = running.record
  if not r:
    return f"{running.run}: reading its images"
  parts = [f"{r['stage']} {r['epoch']}" + (
      f" of {running.epochs}" if running.epochs else "")]
  for key, form in (("loss", "loss {:.3f}"), ("val_top1", "val {:.1f}"),
                    ("images_per_second", "{:,.0f} images/s")):
    if key in r:
      parts.append(form.format(r[key]))
  return f"{running.run}: {', '.join(parts)}"


def _sum(status):
  done, failed = (sum(map(len, of.values()))
                  for of in (status.done, status.failed))
  total = sum(status.expected.values())
  line = f"{done} of {total} runs" if total else f"{done} runs"
  line += "".join(f", {number} {what}" for what, number in (
      ("running", len(status.running)), ("failed", failed)) if number)
  if status.seconds_left:
    line += (f"; about {duration(status.seconds_left)} left, "
             "one run at a time")
  return line


def duration(seconds: float) -> str:
  """Formats a duration as "2 h 05 min", "4 min" or "30 s"."""
  if seconds < 59.5:
    return f"{seconds:.0f} s"
  hours, minutes = divmod(round(seconds / 60), 60)
  return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


# --- Reading ------------------------------------------------------------------

def planned(workdir: str) -> list[str]:
  """Returns the tasks of the plan, missing ones too; [] without a plan."""
  plan = _json(os.path.join(workdir, "plan.json"))
  return list(dict.fromkeys([*plan.get("tasks", ()), *plan.get("missing", ())]))


def _json(path):
  try:
    with open(path, encoding="utf-8") as f:
      return json.load(f)
  except (OSError, json.JSONDecodeError):  # absent
    return {}


def _lines(path):
  """Reads a JSON-lines file; skips lines that are not whole."""
  found = []
  if os.path.exists(path):
    with open(path, encoding="utf-8") as f:
      for line in f:
        try:
          found.append(dict(json.loads(line)))
        except (json.JSONDecodeError, TypeError, ValueError):
          continue
  return found


def _expected(plan):
  """Returns {pair: number of runs}; `select` runs every setting, then seeds."""
  return {(task, label): len(v["seeds"]) + (
      v["settings"] if v["protocol"] == "select" else 0)
          for task, of_task in plan.get("tasks", {}).items()
          for label, v in of_task.items()}


def _is_planned(row, plan):
  """Returns False for seeds and tasks that only an earlier start had."""
  if not plan:
    return True
  variant = plan["tasks"].get(row["task"], {}).get(row["variant"])
  if variant is None:
    return False
  if row["protocol"] == "val" and variant["protocol"] == "select":
    return row["seed"] == variant["seeds"][0]
  return row["seed"] in variant["seeds"]


def _by_pair(objects):
  found: dict[Pair, dict[str, Any]] = {}
  for x in objects:
    found.setdefault((x["task"], x["variant"]), {})[x["run"]] = x
  return found


def _running(workdir, plan, pairs: Sequence[Pair], finished):
  """Returns the unfinished runs that a process holds."""
  folder = os.path.join(workdir, "runs")
  by_stem = {f"{task.replace('/', '-')}-{variant}": (task, variant)
             for task, variant in pairs}
  found = []
  for run in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
    if run in finished or not files.is_locked(
        os.path.join(folder, run, ".lock")):
      continue
    records = _lines(os.path.join(folder, run, "metrics.jsonl")) or [{}]
    stem = _RUN.fullmatch(run)
    pair = by_stem.get(stem[1]) if stem else None
    epochs = None
    if pair and "loss" in records[-1]:
      epochs = plan.get("tasks", {}).get(pair[0], {}).get(
          pair[1], {}).get("epochs")
    found.append(Running(run, pair, records[-1], epochs))
  return found


def _seconds_left(expected, done, failed):
  """Estimates by the mean time of a variant's finished runs, else of all."""
  times: dict[str, list[float]] = {}
  for (_, variant), rows in done.items():
    times.setdefault(variant, []).extend(
        r["seconds_train"] + (r["seconds_test"] or 0) for r in rows.values())
  if not expected or not times:
    return None
  overall = np.mean(sum(times.values(), []))
  left = 0.0
  for pair, number in expected.items():
    todo = number - len(done.get(pair, ())) - len(failed.get(pair, ()))
    left += max(0, todo) * float(np.mean(times.get(pair[1], overall)))
  return left
