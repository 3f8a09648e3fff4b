"""Progress of a work directory, which is only read.

Its plan says which runs to expect. Without a plan, the runs that exist are
reported.
"""
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ttc_jax.errors import UserError, printable
from ttc_jax.report import formats
from ttc_jax.report import rows as rows_lib
from ttc_jax.runs.workdir import Expected, Row, WorkDir, parts_of, stem

Pair = tuple[str, str]  # (task, variant)


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
    expected: {pair: runs of the plan}; empty without a plan.
    done: {pair: {run: row}}.
    running: runs that a process works on.
    failed: {pair: {run: failure}}.
    missing: {task: why its data cannot be read}.
    seconds_left: estimate for one run at a time; None if unknown.
  """
  expected: dict[Pair, Expected]
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
  place = WorkDir(workdir)
  if not place.exists():
    raise UserError(f"no work directory '{workdir}': --watch takes what main's "
                    "--workdir was, or what it printed last")
  rows = rows_lib.of(workdir)
  expected = place.expected()
  done = _by_pair([r for r in rows if _is_planned(r, expected)])
  at_work = place.running()
  again = {*(r["run"] for r in rows), *at_work}
  failed = _by_pair([f for f in place.failures() if f["run"] not in again])
  pairs = list(dict.fromkeys([*expected, *done, *failed]))
  running = [_running(place, run, pairs, expected) for run in at_work]
  return Status(expected, done, running, failed, place.plan()["missing"],
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
  parts = [
      ["  ".join(x).rstrip() for x in formats.align(lines)] * bool(tasks),
      [f"missing: {task}: {why}" for task, why in status.missing.items()],
      [f"running: {_line(r)}" for r in status.running],
      [f"failed: {run}: {f.get('error', 'no reason given')}"
       for of in status.failed.values() for run, f in of.items()],
      [_sum(status)]]
  return "\n\n".join("\n".join(map(printable, p)) for p in parts if p)


def _cell(status, pair, at_work):
  """Formats a cell as "3/5, 1 running, 1 failed"."""
  task, _ = pair
  if task in status.missing:
    return "missing"
  done = len(status.done.get(pair, ()))
  parts = [f"{done}/{status.expected[pair].runs}"
           if pair in status.expected else str(done)]
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
  total = sum(expected.runs for expected in status.expected.values())
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
  plan = WorkDir(workdir).plan()
  return list(dict.fromkeys([*plan["tasks"], *plan["missing"]]))


def _is_planned(row, expected):
  """Returns False for seeds and tasks that only an earlier start had."""
  pair = row["task"], row["variant"]
  return not expected or pair in expected and expected[pair].includes(row)


def _by_pair(objects):
  found: dict[Pair, dict[str, Any]] = {}
  for x in objects:
    found.setdefault((x["task"], x["variant"]), {})[x["run"]] = x
  return found


def _running(place, run, pairs: Sequence[Pair], expected):
  """Returns what is known of a run that a process holds."""
  by_stem = {stem(task, variant): (task, variant)
             for task, variant in pairs}
  record = (place.curve(run) or [{}])[-1]
  parts = parts_of(run)
  pair = by_stem.get(parts[0]) if parts else None
  epochs = expected[pair].epochs if pair in expected and "loss" in record else (
      None)
  return Running(run, pair, record, epochs)


def _seconds_left(expected, done, failed):
  """Estimates by the mean time of a variant's finished runs, else of all."""
  times: dict[str, list[float]] = {}
  for (_, variant), rows in done.items():
    times.setdefault(variant, []).extend(
        r["seconds_train"] + (r.get("seconds_test") or 0)
        for r in rows.values() if "seconds_train" in r)
  if not expected or not any(times.values()):
    return None
  overall = np.mean(sum(times.values(), []))
  left = 0.0
  for pair, runs in expected.items():
    todo = runs.runs - len(done.get(pair, ())) - len(failed.get(pair, ()))
    left += max(0, todo) * float(np.mean(times.get(pair[1]) or overall))
  return left
