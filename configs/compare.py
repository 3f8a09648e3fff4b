"""Compares all methods on the same tasks, with equal training and search.

Training: methods of one stage train for as many epochs as the two stages of
others together. Two exceptions: Linear has 100 epochs, on cached features;
NOAH's winner trains in the second stage only, after the search. Search: every
method tries the learning rates of one grid on val200 (train on 800); the best
one trains on 1000 and is tested once for each seed. Full tuning has its own
grid, whose values are ten times lower or more.

  python -m ttc_jax.main --config=configs/compare.py:\
task=dtd10,rsscn7,data=DIR --workdir=DIR

epochs= are those of one stage. Other arguments: backbone, weights, size,
normalisation; method= takes some of the methods.
"""
import os

import ml_collections

from ttc_jax import experiments
from ttc_jax.config import default, parse_arg, variants

WEIGHTS = os.path.join(os.path.dirname(__file__), os.pardir, "checkpoints",
                       "vit_ti16_64.safetensors")
GRID = (6e-3, 2e-2, 6e-2)
GRID_FULL = (2e-4, 6e-4, 2e-3)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = parse_arg(
      arg, task=("digits", "sprites_location"), data="", backbone="vit_ti16",
      weights=os.path.normpath(WEIGHTS), size=64, normalisation="",
      epochs=4, method=())
  config = default()
  config.tasks, config.data = arg.task, arg.data
  config.backbone, config.weights = arg.backbone, arg.weights
  config.image_size, config.normalisation = arg.size, arg.normalisation
  config.protocol = "select"
  config.grid.lr = GRID
  config.seeds = (0, 1, 2)
  config.epochs, config.warmup_epochs = arg.epochs, min(1.0, arg.epochs / 2)
  known = experiments.settled(experiments.VARIANTS, config.get_ref("epochs"))
  everything = {name: known[name] for name in (
      "linear", "full", "bias", "layernorm_2x", "adapter", "lora",
      "vpt_shallow", "vpt_deep", "ssf", "sct", "noah", "ttc", "ttc_joint",
      "ttc_on_linear", "ttc_rows", "ttc_random")}
  # The names of earlier work directories.
  everything = {{"layernorm_2x": "layernorm", "ttc_on_linear": "ttc_no_align"
                 }.get(name, name): values
                for name, values in everything.items()}
  everything["full"]["grid"] = dict(lr=GRID_FULL)
  everything["noah"]["noah"] = dict(
      population=16, generations=5, parents=4, mutations=8, crossovers=4)
  config.variants = variants(**experiments.some(everything, arg.method))
  return config
