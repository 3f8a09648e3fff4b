"""Times programs in turns, so that a slow moment of the machine hits them all.
"""
import itertools
import statistics
import time
from typing import Any, NamedTuple

import jax.numpy as jnp

from ttc_jax import hardware, parallel
from ttc_jax.bench import programs as programs_lib
from ttc_jax.bench.programs import Program

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
    {"machine", "versions", "settings", "rows", ...}. The ceiling is in FLOP/s,
    of the faster library's product, and, like a row's share of it, the median
    over the turns. `faster` names the other library's faster way, and
    `times_as_fast` compares with it; `left_out` says why one of its ways is
    missing. A number that cannot be measured is None.
  """
  backbone = programs_lib.make_backbone(config)
  # First, since it may lack a library.
  other = _other(backbone, config) if against else _Other()
  ours = programs_lib.of_backbone(backbone, config, steps)
  theirs = {f"stage 2, {name}": Program(
      way.step, ours["stage 2"].work, 1, way.compile_seconds, way.peak_bytes)
            for name, way in other.ways.items()}
  products = programs_lib.products(jnp.dtype(config.dtype)) | other.products
  everything = products | ours | theirs
  times = timings(everything, seconds)
  ceilings = [max(rates) for rates in zip(*(
      _rates(p, times[name]) for name, p in products.items()), strict=True)]
  rows = [_row(name, everything[name], times[name], config.batch_size,
               ceilings) for name in ours | theirs]
  faster = min(theirs, key=lambda name: _median(times[name]), default=None)
  leads = faster and _times_as_fast(times["stage 2"], times[faster])
  return {"machine": hardware.machine(parallel.devices()),
          "versions": versions(against),
          "settings": _settings(config, against, steps),
          "ceiling_by_turn": ceilings, "ceiling": statistics.median(ceilings),
          "rows": rows, "faster": faster, "left_out": other.left_out,
          "times_as_fast_by_turn": leads,
          "times_as_fast": leads and statistics.median(leads)}


class _Other(NamedTuple):
  """The other library's ways and products, and what it lacks."""
  ways: dict[str, Any] = {}
  products: dict[str, Program] = {}
  left_out: str = ""


def _other(backbone, config):
  from ttc_jax.bench import pytorch  # imports an extra
  ways, left_out = pytorch.make_ways(
      backbone, config, programs_lib.CLASSES)
  products = {
      f"product {size}, torch": Program(
          pytorch.make_product(size, config.dtype), 2 * size ** 3)
      for size in programs_lib.product_sizes()}
  return _Other(ways, products, left_out)


def _settings(config, against, steps):
  return config.to_dict() | {"against": against, "steps": steps}


def _rates(program, turns):
  """FLOP/s of the needed work, turn by turn."""
  return [program.work / statistics.median(runs) for runs in turns]


def _median(turns):
  """The median of all runs."""
  return statistics.median(itertools.chain(*turns))


def _times_as_fast(ours, theirs):
  """Their median seconds divided by ours, turn by turn."""
  return [statistics.median(b) / statistics.median(a)
          for a, b in zip(ours, theirs, strict=True)]


def _row(name, program, turns, batch, ceilings):
  runs = list(itertools.chain(*turns))
  median, by_turn = _median(turns), [*map(statistics.median, turns)]
  shares = [r / c for r, c in zip(
      _rates(program, turns), ceilings, strict=True)]
  return {"name": name, "images_per_second": batch / median,
          "median_seconds": median, "min_seconds": min(runs),
          "fastest_turn_seconds": min(by_turn),
          "slowest_turn_seconds": max(by_turn), "runs": len(runs),
          "compile_seconds": program.compile_seconds,
          "temp_bytes": program.temp_bytes,
          "argument_bytes": program.argument_bytes,
          "flops_compiled": program.flops,
          "flops_needed": program.work,
          "share_of_ceiling": statistics.median(shares)}


def versions(against: str) -> dict[str, str]:
  """Returns the versions of the libraries, with the other side's."""
  found = dict(hardware.versions())
  if against:
    from ttc_jax.bench import pytorch  # or one sentence why not
    found["torch"] = pytorch.torch.__version__
  return found
