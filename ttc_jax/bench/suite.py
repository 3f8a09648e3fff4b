"""The benchmark's shapes in both types: bench.json, and the table beside it.

Each result is written when it is there, and a later command measures what is
missing. A result of another machine or other versions is measured again.
"""
from collections.abc import Callable
import itertools
import json
import os
from typing import Any

from ttc_jax import files, hardware, parallel
from ttc_jax.bench import timing
from ttc_jax.errors import UserError
from ttc_jax.report import formats

Result = dict[str, Any]  # of `timing.measure`

# backbone, pixels a side, images a step, steps of an epoch: a second or two
SHAPES = (("vit_ti16", 64, 64, 8), ("vit_s14", 56, 64, 8),
          ("vit_s14", 98, 32, 8), ("vit_b16", 224, 4, 2),
          ("swin_ti", 224, 4, 2))
DTYPES = ("float32", "bfloat16")

_HEADER = ["shape", "type", "images/s", "ms a step", "% of the ceiling",
           "eager", "torch.compile", "times as fast", "from turn to turn"]


def run(path: str, measure: Callable[..., Result],
        options: dict[str, Any]) -> str:
  """Measures what is missing in the file, and returns the table.

  Args:
    path: of the JSON file, {"results": [...]}; the table is written beside it,
      with the ending ".md".
    measure: of the configuration's keys; its result has them in "settings".
    options: of all shapes: frozen_dtype, gelu and against.

  Raises:
    UserError: a file cannot be read or written.
  """
  kept = _read(path)
  machine = hardware.machine(parallel.devices())
  results: list[Result] = []
  for shape, dtype in itertools.product(SHAPES, DTYPES):
    values = _values(shape, dtype) | options
    known = [r for r in kept if values.items() <= r["settings"].items()
             and r["machine"] == machine
             and r["versions"] == timing.versions(options["against"])]
    results.append(known[0] if known else measure(**values))
    write(path, {"results": results + _others(kept, results)})
  text = table(results)
  _write_text(os.path.splitext(path)[0] + ".md", text)
  return text


def _values(shape, dtype):
  backbone, size, batch, steps = shape
  return {"backbone": backbone, "image_size": size, "batch_size": batch,
          "steps": steps, "dtype": dtype}


def _others(kept, results):
  """What the file had and is not measured again yet."""
  done = [r["settings"] for r in results]
  return [r for r in kept if r["settings"] not in done]


def table(results: list[Result]) -> str:
  """Returns Markdown: machine, versions, and a line for each result."""
  first = results[0]
  m, versions = first["machine"], first["versions"]
  left_out = {r["left_out"] for r in results} - {""}
  told = [
      f"{m['devices']} x {m['kind']}, {m['cores']} cores, {m['processor']} "
      f"({', '.join(m['instructions']) or 'instructions not known'}); "
      + ", ".join(f"{name} {v}" for name, v in versions.items()) + ".",
      *(f"With {name}={value}." for name, value in m["limits"].items()),
      "Stage 2; medians of images/s, and of the turns. Within a turn all take "
      "turns in one process.",
      *(f"Without torch.compile: {reason}." for reason in sorted(left_out))]
  return formats.paragraphs(
      "\n".join(told), formats.pipes([_HEADER, *map(_line, results)]))


def _line(result):
  s, rows = result["settings"], {r["name"]: r for r in result["rows"]}
  ours, turns = rows["stage 2"], result["times_as_fast_by_turn"]
  theirs = (rows.get(f"stage 2, {way}") for way in ("torch", "torch.compile"))
  ms = [f"{1e3 * ours[key]:.1f}" for key in (
      "median_seconds", "fastest_turn_seconds", "slowest_turn_seconds")]
  return [
      f"{s['backbone']} at {s['image_size']} px, batch {s['batch_size']}",
      s["dtype"], f"{ours['images_per_second']:.1f}",
      f"{ms[0]} ({ms[1]} to {ms[2]})",
      f"{100 * ours['share_of_ceiling']:.0f}",
      *(f"{row['images_per_second']:.1f}" if row else "-" for row in theirs),
      *([f"{result['times_as_fast']:.2f}",
         f"{min(turns):.2f} to {max(turns):.2f}"] if turns else ["-", "-"])]


def _read(path):
  if not os.path.exists(path):
    return []
  try:
    return files.read_json(path)["results"]
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UserError(f"--json={path} is no file of --suite: {e}") from e


def write(path: str, value: Any) -> None:
  """Writes a JSON file as a whole.

  Raises:
    UserError: it cannot be written.
  """
  _write_text(path, json.dumps(value, indent=2))


def _write_text(path, text):
  try:
    files.write_text(path, text)
  except OSError as e:
    raise UserError(f"--json={path} cannot be written: {e}") from e
