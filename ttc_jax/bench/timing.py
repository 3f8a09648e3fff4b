"""Times programs in turns, so that a slow moment of the machine hits them all.
"""
import itertools
import os
import platform
import statistics
import time
from typing import Any

import jax.numpy as jnp

from ttc_jax import parallel
from ttc_jax.bench import programs as programs_lib
from ttc_jax.bench.programs import Program
from ttc_jax.runs import row

TURNS = 6  # each program's seconds are spread over so many turns

Turns = list[list[float]]  # seconds a step of every run, turn by turn


def timings(programs: dict[str, Program], seconds: float) -> dict[str, Turns]:
  """Runs every program for `seconds`; the first run of a turn warms up."""
  times: dict[str, Turns] = {name: [] for name in programs}
  for _ in range(TURNS):
    for name, program in programs.items():
      program.run()
      times[name].append([])
      end = time.perf_counter() + seconds / TURNS
      while not times[name][-1] or time.perf_counter() < end:
        begin = time.perf_counter()
        program.run()
        seconds_run = time.perf_counter() - begin
        times[name][-1].append(seconds_run / program.steps)
  return times


def measure(config: Any, against: str, steps: int,
            seconds: float) -> dict[str, Any]:
  """Times everything and returns what is printed, as JSON.

  Args:
    config: as `programs.settings` returns it; its `k` is set.
    against: "torch", or "" for no comparison.
    steps: of an epoch, in one dispatch.
    seconds: of timing for each program.

  Returns:
    {"machine", "versions", "settings", "rows", ...}. The ceiling is in FLOP/s
    and, like a row's share of it, the median over the turns. A number that
    cannot be measured is None.
  """
  backbone = programs_lib.make_backbone(config)
  # First, since it may lack a library.
  step = _torch_step(backbone, config) if against else None
  ours = programs_lib.of_backbone(backbone, config, steps)
  theirs = {"stage 2, torch": Program(
      step, ours["stage 2"].work)} if step else {}
  products = programs_lib.products(jnp.dtype(config.dtype))
  everything = products | ours | theirs
  times = timings(everything, seconds)
  ceilings = [max(rates) for rates in zip(*(
      _rates(p, times[name]) for name, p in products.items()), strict=True)]
  rows = [_row(name, everything[name], times[name], config.batch_size,
               ceilings) for name in ours | theirs]
  return {"machine": machine(), "versions": _versions(against),
          "settings": config.to_dict() | {"against": against, "steps": steps},
          "ceiling_by_turn": ceilings, "ceiling": statistics.median(ceilings),
          "rows": rows,
          "times_as_fast": _times_as_fast(
              times["stage 2"], times["stage 2, torch"]) if theirs else None}


def _torch_step(backbone, config):
  from ttc_jax.bench import pytorch  # imports an extra
  return pytorch.make_step(backbone, config, programs_lib.CLASSES)


def _rates(program, turns):
  """FLOP/s of the needed work, turn by turn."""
  return [program.work / statistics.median(runs) for runs in turns]


def _times_as_fast(ours, theirs):
  """Median over the turns of their median seconds divided by ours."""
  return statistics.median(
      statistics.median(b) / statistics.median(a)
      for a, b in zip(ours, theirs, strict=True))


def _row(name, program, turns, batch, ceilings):
  runs = list(itertools.chain(*turns))
  median = statistics.median(runs)
  shares = [r / c for r, c in zip(
      _rates(program, turns), ceilings, strict=True)]
  return {"name": name, "images_per_second": batch / median,
          "median_seconds": median, "min_seconds": min(runs),
          "runs": len(runs), "compile_seconds": program.compile_seconds,
          "temp_bytes": program.temp_bytes,
          "argument_bytes": program.argument_bytes,
          "flops_compiled": program.flops,
          "flops_needed": program.work,
          "share_of_ceiling": statistics.median(shares)}


def machine() -> dict[str, Any]:
  """Returns devices and processor, as JSON."""
  device = parallel.devices()[0]
  return {"devices": len(parallel.devices()), "kind": device.device_kind,
          "platform": device.platform, "cores": os.cpu_count(),
          "processor": platform.processor() or platform.machine()}


def _versions(against):
  versions = dict(row.versions())
  if against:
    import torch
    versions["torch"] = torch.__version__
  return versions
