"""How far a work directory is; it may be at work, and is only read.

What to expect is in plan.json, which `ttc_jax.main` writes: {"tasks": {task:
{variant: {"settings": n, "seeds": [n], "protocol": "select" | "val" | "final",
"epochs": n}}}, "missing": {task: sentence}}. Without it, what there is is all.
"""
from collections.abc import Mapping, Sequence
import json
import os
import re
from typing import Any, NamedTuple

import numpy as np

from ttc_jax import files
from ttc_jax.report import formats, rows as rows_lib
from ttc_jax.report.rows import Row

Pair = tuple[str, str]  # (task, variant)
_RUN = re.compile(r"(.+)-(val|final)-s(\d+)-[0-9a-f]+")


class Running(NamedTuple):
  """A run at work.

  Attributes:
    record: the last of its learning curve, empty before there is one.
    epochs: of each stage; None if unknown, or if what goes on is no training
      (a search).
  """
  run: str
  pair: Pair | None
  record: Mapping[str, Any]
  epochs: int | None


class Status(NamedTuple):
  """What a work directory holds, beside what it should.

  Attributes:
    expected: {pair: runs}; empty without a plan.
    done, failed: {pair: {run: row}}, {pair: {run: failure}}.
    missing: {task: sentence}: its data is not there.
    seconds_left: at one run at a time; None if nothing tells.
  """
  expected: dict[Pair, int]
  done: dict[Pair, dict[str, Row]]
  running: list[Running]
  failed: dict[Pair, dict[str, Mapping[str, Any]]]
  missing: Mapping[str, str]
  seconds_left: float | None


def gather(workdir: str) -> Status:
  """Looks at a work directory.

  Raises:
    UserError: there is no such directory.
  """
  rows = rows_lib.of(workdir)
  finished = {r["run"] for r in rows}
  plan = _json(os.path.join(workdir, "plan.json"))
  failures = {f["run"]: f for f in _lines(
      os.path.join(workdir, "failed.jsonl")) if f["run"] not in finished}
  expected = _expected(plan)
  done = _by_pair([r for r in rows if _is_planned(r, plan)])
  failed = _by_pair(failures.values())
  pairs = dict.fromkeys([*expected, *done, *failed])
  running = _running(workdir, plan, pairs, finished)
  at_work = {r.run for r in running}  # again, after it failed
  failed = {pair: {run: f for run, f in of.items() if run not in at_work}
            for pair, of in failed.items()}
  return Status(expected, done, running, failed, plan.get("missing", {}),
                _seconds_left(expected, done, failed))


def text(status: Status) -> str:
  """A table of tasks and variants, the runs at work, the failures, a sum."""
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
  """"3/5, 1 running, 1 failed"."""
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
  """"2 h 05 min", "4 min", "30 s"."""
  if seconds < 59.5:
    return f"{seconds:.0f} s"
  hours, minutes = divmod(round(seconds / 60), 60)
  return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


# --- What there is ------------------------------------------------------------

def planned(workdir: str) -> list[str]:
  """The tasks of the plan, with those whose data is missing; [] without."""
  plan = _json(os.path.join(workdir, "plan.json"))
  return list(dict.fromkeys([*plan.get("tasks", ()), *plan.get("missing", ())]))


def _json(path):
  try:
    with open(path, encoding="utf-8") as f:
      return json.load(f)
  except (OSError, json.JSONDecodeError):  # none, or just being written
    return {}


def _lines(path):
  """The whole objects of a JSON-lines file; the last may be being written."""
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
  """{pair: runs}: with `select` every setting on val200 and then the seeds."""
  return {(task, label): len(v["seeds"]) + (
      v["settings"] if v["protocol"] == "select" else 0)
          for task, of_task in plan.get("tasks", {}).items()
          for label, v in of_task.items()}


def _is_planned(row, plan):
  """Not a run of seeds or tasks that an earlier start asked for."""
  if not plan:
    return True
  variant = plan["tasks"].get(row["task"], {}).get(row["variant"])
  if variant is None:
    return False
  if row["protocol"] == "val" and variant["protocol"] == "select":
    return row["seed"] == variant["seeds"][0]
  return row["seed"] in variant["seeds"]


def _by_pair(objects):
  found = {}
  for x in objects:
    found.setdefault((x["task"], x["variant"]), {})[x["run"]] = x
  return found


def _running(workdir, plan, pairs: Sequence[Pair], finished):
  """The runs without a row that some process holds."""
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
  """By the mean time of a variant's finished runs, else of all."""
  times = {}
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
