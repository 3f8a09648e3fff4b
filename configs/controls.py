"""Compares TTC with controls that the paper lacks, with one grid for all.

Every variant tries the same learning rates on val200 (train on 800); the best
one trains on 1000 and is tested once for each seed:

  linear         the head alone, on cached features
  layernorm      stage 1 alone
  layernorm_2x   LayerNorm for as many epochs as both stages: equal compute
  ttc            the paper's method
  ttc_random     TTC with random channels in place of the Taylor score's

  python -m ttc_jax.main --config=configs/controls.py:\
task=digits,sprites_location --workdir=DIR

epochs= are those of one stage. Other arguments: data, backbone, weights, size,
normalisation.
"""
import os

import ml_collections

from ttc_jax import experiments
from ttc_jax.config import default, parse_arg, variants

WEIGHTS = os.path.join(os.path.dirname(__file__), os.pardir, "checkpoints",
                       "vit_ti16_64.safetensors")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = parse_arg(
      arg, task=("digits", "sprites_location"), data="", backbone="vit_ti16",
      weights=os.path.normpath(WEIGHTS), size=64, normalisation="",
      epochs=6)
  config = default()
  config.tasks, config.data = arg.task, arg.data
  config.backbone, config.weights = arg.backbone, arg.weights
  config.image_size, config.normalisation = arg.size, arg.normalisation
  config.protocol = "select"
  config.grid.lr = (6e-3, 2e-2)
  config.seeds = (0, 1, 2)
  config.epochs, config.warmup_epochs = arg.epochs, 1.0
  known = experiments.settled(experiments.VARIANTS, config.get_ref("epochs"))
  config.variants = variants(**{name: known[name] for name in (
      "linear", "layernorm", "layernorm_2x", "ttc", "ttc_random")})
  return config
