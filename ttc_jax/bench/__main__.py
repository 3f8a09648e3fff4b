"""How fast a backbone trains, against what the machine could do.

  python -m ttc_jax.bench --backbone=vit_s14 --size=56 --against=torch

Times the forward pass, the epochs of TTC's two stages as `train` compiles
them (many steps in one dispatch), on random weights and images, and the matrix
products of the same dtype that set the ceiling. All take turns in one process,
and what is compared is compared within a turn, so that a machine which slows
down slows both sides.
The share of the ceiling counts the work that is needed (`flops_needed`), not
what the compiled program does, which is printed beside it.

  python -m ttc_jax.bench --backbone=vit_ti16 --size=64 --pipeline

Times a training set that streams: reading JPEGs alone, stage 2 alone, both.

  python -m ttc_jax.bench --backbone=vit_l16 --size=224 --memory=16,80 \
      --dtype=bfloat16 --frozen_dtype=bfloat16

Compiles stage 2, runs nothing, and prints the largest batch of a device with so
many GB; with --memory=step the bytes of one step of --batch images in
--accumulate parts, with --remat or without.
"""
import json
from typing import Any

from absl import flags

from ttc_jax import cli
from ttc_jax.bench import memory, pipeline, programs, timing
from ttc_jax.errors import UserError, check_known

_BACKBONE = flags.DEFINE_string("backbone", "vit_s14", "name, as vit_s14")
_SIZE = flags.DEFINE_integer("size", 56, "of the images, pixels a side")
_BATCH = flags.DEFINE_integer("batch", 64, "images a step, on all devices")
_STEPS = flags.DEFINE_integer("steps", 8, "of an epoch, in one dispatch")
_DTYPE = flags.DEFINE_string("dtype", "float32", "float32 or bfloat16")
_FROZEN = flags.DEFINE_string(
    "frozen_dtype", "float32", "of frozen kernels: float32, bfloat16, int8")
_GELU = flags.DEFINE_string("gelu", "exact", "exact or tanh")
_AGAINST = flags.DEFINE_string(
    "against", "", "torch: also times eager PyTorch doing the stage-2 step")
_PIPELINE = flags.DEFINE_bool("pipeline", False, "time reading and training")
_WORKERS = flags.DEFINE_integer("workers", 0, "that read; 0: one a core")
_MEMORY = flags.DEFINE_string(
    "memory", "", "of a device in GB, as 16,80; or step: of --batch images")
_REMAT = flags.DEFINE_bool("remat", False, "blocks are computed again")
_ACCUMULATE = flags.DEFINE_integer("accumulate", 1, "parts of a batch")
_SECONDS = flags.DEFINE_float("seconds", 3.0, "of timing for each program")
_JSON = flags.DEFINE_string("json", "", "file to write the numbers to")

_COLUMNS = (  # title, key, unit, decimals
    ("images/s", "images_per_second", 1, 1),
    ("median ms", "median_seconds", 1e-3, 1),
    ("min ms", "min_seconds", 1e-3, 1),
    ("compile s", "compile_seconds", 1, 1),
    ("temp MiB", "temp_bytes", 2 ** 20, 1),
    ("args MiB", "argument_bytes", 2 ** 20, 1),
    ("GFLOP compiled", "flops_compiled", 1e9, 2),
    ("GFLOP needed", "flops_needed", 1e9, 2),
    ("% of ceiling", "share_of_ceiling", 1e-2, 1),
)


def table(result: dict[str, Any]) -> str:
  """Returns the text that is printed of `timing.measure`'s result."""
  def cell(row, key, unit, decimals):
    value = row[key]
    return "n/a" if value is None else f"{value / unit:.{decimals}f}"
  cells = [["", *(title for title, *_ in _COLUMNS)]]
  cells += [[row["name"], *(cell(row, *column) for _, *column in _COLUMNS)]
            for row in result["rows"]]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = ["  ".join([line[0].ljust(widths[0]), *(
      c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
           for line in cells]
  return "\n".join([*_heading(result), "", *lines, *_verdict(result)])


def _heading(result):
  s, m, turns = (result[k] for k in ("settings", "machine", "ceiling_by_turn"))
  return [
      f"{s['backbone']} at {s['image_size']} px, batch {s['batch_size']}, "
      f"{s['dtype']}, kernels in {s['frozen_dtype']}, {s['gelu']} GELU, "
      f"K = {s['k']}; {m['devices']} x {m['kind']}, {m['cores']} cores",
      f"ceiling: {result['ceiling'] / 1e9:.1f} GFLOP/s, the best matrix "
      f"product; {min(turns) / 1e9:.1f} to {max(turns) / 1e9:.1f} from turn to "
      "turn"]


def _verdict(result):
  if not result["times_as_fast"]:
    return []
  return ["", f"stage 2 is {result['times_as_fast']:.2f} times as fast as "
          f"eager PyTorch {result['versions']['torch']}"]


def main(argv: list[str]) -> None:
  cli.check_no_arguments(argv)
  if _AGAINST.value:
    check_known("--against", _AGAINST.value, ("torch",))
  config = programs.settings(
      backbone=_BACKBONE.value, image_size=_SIZE.value,
      batch_size=_BATCH.value, dtype=_DTYPE.value,
      frozen_dtype=_FROZEN.value, gelu=_GELU.value)
  if _MEMORY.value:
    result, said = memory.report(
        config, _MEMORY.value, _REMAT.value, _ACCUMULATE.value)
  elif _PIPELINE.value:
    result = pipeline.measure(config, _STEPS.value, _WORKERS.value)
    said = pipeline.text(result)
  else:
    result = timing.measure(
        config, _AGAINST.value, _STEPS.value, _SECONDS.value)
    said = table(result)
  print(said)
  if _JSON.value:
    try:
      with open(_JSON.value, "w", encoding="utf-8") as f:
        json.dump(result, f, indent=2)
    except OSError as e:
      raise UserError(f"--json={_JSON.value} cannot be written: {e}") from e


if __name__ == "__main__":
  cli.run(main)
