"""A table or a figure of the paper, on any backbone and tasks.

  python -m ttc_jax.main --workdir=DIR --config=configs/paper.py:table3,\
task=dtd10,rsscn7,data=DIR,backbone=vit_s14,weights=FILE,size=56

The name comes first: a file of ttc_jax/experiments/. A method tries the
learning rates of one grid (full tuning smaller ones) on val200 (train on 800),
and up to three more beyond an end while the best one lies there; the best one
trains on 1000 and is tested once for each seed. A variant of a method takes
what was chosen for it (`SETTINGS` of ttc_jax/experiments). Experiments of the
same tasks share a work directory and their runs; `method=linear,layernorm` runs
some of the variants.
`table6` is configs/domain.py, with its arguments.
Without `weights` they are those of `checkpoints/`: the Swin's for table2, the
ViT's for all others.
"""
import os
import runpy

import ml_collections

from ttc_jax import experiments
from ttc_jax.config import default, parse_arg, variants
from ttc_jax.errors import UserError

CHECKPOINTS = os.path.join(os.path.dirname(__file__), os.pardir, "checkpoints")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  name, _, rest = (arg or "").partition(",")
  if not name:
    raise UserError("configs/paper.py needs an experiment, e.g. "
                    "configs/paper.py:table3; there are "
                    f"{', '.join(experiments.names())}")
  if name == "table6":  # with test sets and augmentation of its own
    return runpy.run_path(os.path.join(os.path.dirname(__file__), "domain.py"))[
        "get_config"](rest)
  trains = experiments.trains(name)
  arg = parse_arg(
      rest, task=("digits", "sprites_location"), data="", backbone="",
      weights=os.path.normpath(os.path.join(
          CHECKPOINTS, experiments.weights(name))),
      size=64, normalisation="", epochs=20, method=())
  config = default()
  config.experiment = name
  config.tasks, config.data = arg.task if trains else (), arg.data
  config.backbone, config.weights = arg.backbone, arg.weights
  config.image_size, config.normalisation = arg.size, arg.normalisation
  config.protocol = "select"
  config.grid.lr, config.grid_steps = (6e-3, 2e-2, 6.7e-2), 3
  config.seeds = (0, 1, 2)
  config.epochs = arg.epochs
  chosen = experiments.variants(name, config.get_ref("epochs"))
  config.variants = variants(**experiments.some(chosen, arg.method))
  return config
