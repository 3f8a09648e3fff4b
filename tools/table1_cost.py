"""What Table 1 (VTAB-1K's 19 tasks) costs, computed: FLOPs, hours, disk.

A training step takes `--step` times the FLOPs of a forward pass: 2 if no frozen
weight has a gradient (tests/test_bench.py), 3 for full tuning. Hours are those
at the given rate, the same for all of the work.

  python tools/table1_cost.py --backbone=vit_b16 --epochs=100 --stages=2 \
--settings=8 --seeds=3 --tflops=100
"""
from absl import flags
import jax

from ttc_jax import backbones, cli, cost
from ttc_jax.model import Model, init_head
from ttc_jax.vtab import rows as vtab

_BACKBONE = flags.DEFINE_string("backbone", "vit_b16", "at --size")
_SIZE = flags.DEFINE_integer("size", 224, "pixels")
_EPOCHS = flags.DEFINE_integer("epochs", 100, "of a stage")
_STAGES = flags.DEFINE_integer("stages", 2, "of the method")
_SETTINGS = flags.DEFINE_integer("settings", 8, "tried on val200")
_SEEDS = flags.DEFINE_integer("seeds", 3, "final runs of a task")
_STEP = flags.DEFINE_float("step", 2.0, "FLOPs of a step over a forward pass's")
_TFLOPS = flags.DEFINE_float("tflops", 100.0, "10^12 FLOPs a second, all chips")
_CACHE_GIB = flags.DEFINE_float(
    "cache_gib", 8.0, "limit of a split's cache, as config.cache_gib")


def forward_flops(name, size):
  """Returns the FLOPs of the logits of one image, 100 classes."""
  module = backbones.make(name, size)
  params = {"backbone": backbones.shapes(module), "adapter": {},
            "head": jax.eval_shape(lambda: init_head(module.width, 100, 0))}
  return cost.flops(Model(module, "half"), params, {})


def main(argv):
  del argv
  rows = vtab.ROWS.values()
  forward = forward_flops(_BACKBONE.value, _SIZE.value)
  trained = len(rows) * _STAGES.value * _EPOCHS.value * (
      800 * _SETTINGS.value + 1000 * _SEEDS.value)
  tested = (_SEEDS.value * sum(row.test_count for row in rows)
            + 200 * _SETTINGS.value * len(rows))
  flops = forward * (_STEP.value * trained + tested)
  splits = [count for row in rows for count in (800, 200, 1000, row.test_count)]
  image = 3 * _SIZE.value ** 2
  cached = sum(n * image for n in splits if n * image
               <= _CACHE_GIB.value * 2 ** 30)
  print(f"forward: {forward / 1e9:.1f} GFLOPs an image\n"
        f"trained: {trained / 1e6:.2f} million images, tested: "
        f"{tested / 1e6:.2f} million\n"
        f"work: {flops / 1e18:.2f} EFLOPs = "
        f"{flops / _TFLOPS.value / 1e12 / 3600:.1f} hours at "
        f"{_TFLOPS.value:g} TFLOP/s\n"
        f"cache of decoded images: {cached / 2 ** 30:.0f} GiB")


if __name__ == "__main__":
  cli.run(main)
