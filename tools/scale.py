"""What Table 1 costs: VTAB-1K's 19 tasks, every method with its whole grid.

Computed from the plan that configs/compare.py makes and from FLOP counts, not
measured: hours are those at a share of the chips' peak in bfloat16.

  python tools/scale.py                      # the tables of docs/scale.md
  python tools/scale.py --share=0.5 --epochs=100
"""
from collections.abc import Iterator, Sequence
import os
import runpy
from typing import Any, NamedTuple

from absl import flags

from ttc_jax import backbones, cli, methods
from ttc_jax.bench import programs
from ttc_jax.report import grid
from ttc_jax.runs import plan
from ttc_jax.vtab import rows as vtab

_EPOCHS = flags.DEFINE_integer("epochs", 50, "of a stage")
_SHARE = flags.DEFINE_float("share", 0.4, "of the peak that is reached")

COMPARE = os.path.join(os.path.dirname(__file__), os.pardir, "configs",
                       "compare.py")
# name: (chips, peak of one in bfloat16 without sparsity, 10^12 FLOP/s, as the
# makers say).
MACHINES = {
    "TPU v5e-8": (8, 197.0),
    "TPU v5p-32 (16 chips)": (16, 459.0),
    "8 x H200": (8, 989.0),
}
SIZES = ("vit_ti16", "vit_s16", "vit_b16", "vit_l16")
TRAIN, VAL, TRAINVAL = 800, 200, 1000  # images, see `vtab.rows`


class Images(NamedTuple):
  """Images of all tasks together that a row of the table needs.

  Attributes:
    seen: with a forward pass alone: tests, scores, cached features.
    trained: with a step.
  """
  seen: int
  trained: int


def images(config: Any, method: methods.Method) -> Images:
  """Returns the images of a variant on the 19 tasks.

  A setting trains on 800 and is validated on 200 at its end; a seed trains on
  1000 and is tested. A stage whose features are cached sees each image once.
  """
  settings = len(plan.settings(config))
  runs = [(TRAIN, VAL)] * settings
  total = Images(0, 0)
  for row in vtab.ROWS.values():
    for train, test in runs + [(TRAINVAL, row.test_count)] * len(config.seeds):
      seen, trained = test, 0
      for stage in method.stages:
        seen += train if stage.prepare else 0
        if config.method == "linear":
          seen += train
        else:
          trained += config.epochs * train
      total = Images(total.seen + seen, total.trained + trained)
  return total


def flops(name: str, config: Any, backbone: Any) -> float:
  """Returns the FLOPs of a variant; full tuning's step is thrice a forward
  pass, the others' have no gradient of a frozen weight."""
  method = methods.load(config.method, config, backbone)
  needed = programs.flops_needed(backbone, backbone.default_k, 100)
  step = (3 * needed["forward"] if config.method == "full"
          else needed["stage 2"])
  count = images(config, method)
  return count.seen * needed["forward"] + count.trained * step


def variants() -> dict[str, Any]:
  """Returns {name: configuration} of Table 1."""
  config = runpy.run_path(COMPARE)["get_config"](
      f"task=vtab,backbone=vit_b16,size=224,epochs={_EPOCHS.value}")
  return plan.variants(config)


def table1(sizes: Sequence[str] = SIZES) -> grid.Grid:
  """Returns the table: a line per method, a column per backbone, 10^18 FLOPs;
  then the sums, and the hours of the machines."""
  found = variants()
  modules = {size: backbones.make(size, 224) for size in sizes}
  work = {name: [flops(name, config, modules[size]) for size in sizes]
          for name, config in found.items()}
  total = [sum(column) for column in zip(*work.values(), strict=True)]
  lines = [[name, *(f"{x / 1e18:.2f}" for x in row)]
           for name, row in work.items()]
  lines.append(["all, EFLOPs", *(f"{x / 1e18:.1f}" for x in total)])
  lines += [[f"hours, {machine}", *(
      f"{x / (chips * peak * 1e12 * _SHARE.value) / 3600:.1f}" for x in total)]
            for machine, (chips, peak) in MACHINES.items()]
  return grid.Grid(
      "Table 1 with its whole grid, computed", ["", *sizes], lines,
      [f"Images of 224 px, {_EPOCHS.value} epochs a stage, three learning "
       f"rates on val200, three seeds, bfloat16 at {_SHARE.value:.0%} of the "
       "peak; without decoding, compilation and NOAH's search."])


def growth() -> grid.Grid:
  """Returns the FLOPs of an image, forward and step, by size and pixels."""
  def lines() -> Iterator[list[str]]:
    for size in SIZES:
      for pixels in (96, 224, 384):
        module: Any = backbones.make(size, pixels)
        needed = programs.flops_needed(module, module.default_k, 100)
        yield [size, f"{pixels}", *(f"{needed[key] / 1e9:.1f}" for key in (
            "forward", "stage 1", "stage 2")),
               f"{3 * needed['forward'] / 1e9:.1f}"]
  return grid.Grid(
      "GFLOPs of an image", ["", "px", "forward", "step of stage 1",
                             "step of stage 2", "step of full tuning"],
      list(lines()), [])


def main(argv: list[str]) -> None:
  cli.check_no_arguments(argv)
  for table in (table1(), growth()):
    print(grid.markdown(table))


if __name__ == "__main__":
  cli.run(main)
