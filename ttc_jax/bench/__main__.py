"""How fast a backbone trains, against what the machine could do.

  python -m ttc_jax.bench --backbone=vit_s14 --size=56 --against=torch
  python -m ttc_jax.bench --suite --against=torch

Times the forward pass, the epochs of TTC's two stages as `train` compiles
them (many steps in one dispatch), on random weights and images, and the matrix
products of the same dtype that set the ceiling. All take turns in one process,
and what is compared is compared within a turn, so that a machine which slows
down slows both sides.
The share of the ceiling counts the work that is needed (`flops_needed`), not
what the compiled program does, which is printed beside it.
The other side is the faster of eager PyTorch and torch.compile, with autocast
in bfloat16, and the ceiling is the faster library's product.
--suite times the shapes of `suite.SHAPES` in both types, writes bench.json, or
the file of --json, and the table beside it, and goes on where it was ended.

  python -m ttc_jax.bench --backbone=vit_ti16 --size=64 --pipeline

Times a training set that streams: reading JPEGs alone, stage 2 alone, both.

  python -m ttc_jax.bench --backbone=vit_l16 --size=224 --memory=16,80 \
      --dtype=bfloat16 --frozen_dtype=bfloat16

Compiles stage 2, runs nothing, and prints the largest batch of a device with so
many GB; with --memory=step the bytes of one step of --batch images in
--accumulate parts, with --remat or without.
"""
from absl import flags

from ttc_jax import cli
from ttc_jax.bench import memory, pipeline, programs, suite, text, timing
from ttc_jax.errors import UserError, check_known

_BACKBONE = flags.DEFINE_string("backbone", "vit_s14", "name, as vit_s14")
_SIZE = flags.DEFINE_integer("size", 56, "of the images, pixels a side")
_BATCH = flags.DEFINE_integer("batch", 64, "images a step, on all devices")
_STEPS = flags.DEFINE_integer(
    "steps", 8, "of an epoch, in one dispatch; --suite has its own")
_DTYPE = flags.DEFINE_string("dtype", "float32", "float32 or bfloat16")
_FROZEN = flags.DEFINE_string(
    "frozen_dtype", "float32", "of frozen kernels: float32, bfloat16, int8")
_GELU = flags.DEFINE_string("gelu", "exact", "exact or tanh")
_AGAINST = flags.DEFINE_string(
    "against", "", "torch: also times PyTorch doing the stage-2 step")
_PIPELINE = flags.DEFINE_bool("pipeline", False, "time reading and training")
_WORKERS = flags.DEFINE_integer("workers", 0, "that read; 0: one a core")
_MEMORY = flags.DEFINE_string(
    "memory", "", "of a device in GB, as 16,80; or step: of --batch images")
_REMAT = flags.DEFINE_bool("remat", False, "blocks are computed again")
_ACCUMULATE = flags.DEFINE_integer("accumulate", 1, "parts of a batch")
_SECONDS = flags.DEFINE_float("seconds", 3.0, "of timing for each program")
_JSON = flags.DEFINE_string("json", "", "file to write the numbers to")
_SUITE = flags.DEFINE_bool(
    "suite", False, "all shapes in both types, instead of one in one")


def main(argv: list[str]) -> None:
  cli.check_no_arguments(argv)
  if _AGAINST.value:
    check_known("--against", _AGAINST.value, ("torch",))
  options = {"frozen_dtype": _FROZEN.value, "gelu": _GELU.value,
             "against": _AGAINST.value}
  if _SUITE.value:
    for flag in (_BACKBONE, _SIZE, _BATCH, _STEPS, _DTYPE, _MEMORY, _PIPELINE):
      if flag.present:
        raise UserError(f"--suite has its own shapes: leave --{flag.name} out")
    print(suite.run(_JSON.value or "bench.json", _measure, options), end="")
    return
  values = {"backbone": _BACKBONE.value, "image_size": _SIZE.value,
            "batch_size": _BATCH.value, "dtype": _DTYPE.value}
  result, said = _chosen(values, options)
  print(said)
  if _JSON.value:
    suite.write(_JSON.value, result)


def _chosen(values, options):
  """Returns (numbers, text) of what the flags ask for."""
  if not (_MEMORY.value or _PIPELINE.value):
    result = _measure(**values, **options, steps=_STEPS.value)
    return result, text.table(result)
  config = programs.settings(
      **values, frozen_dtype=_FROZEN.value, gelu=_GELU.value)
  if _MEMORY.value:
    return memory.report(
        config, _MEMORY.value, _REMAT.value, _ACCUMULATE.value)
  result = pipeline.measure(config, _STEPS.value, _WORKERS.value)
  return result, pipeline.text(result)


def _measure(against, steps, **values):
  return timing.measure(
      programs.settings(**values), against, steps, _SECONDS.value)


if __name__ == "__main__":
  cli.run(main)
