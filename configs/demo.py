"""The demo: three methods on a rendered and a real task, without downloads.

The backbone is the small ViT of `checkpoints/`. LayerNorm and TTC use the
learning rate, of 2e-3 and 6e-3, that is better on val200 (train on 800) for
both methods and both tasks; the test set chose nothing.
"""
import os

import ml_collections

from ttc_jax.config import default, parse_arg, variants

WEIGHTS = os.path.join(os.path.dirname(__file__), os.pardir, "checkpoints",
                       "vit_ti16_64.safetensors")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = parse_arg(arg, task=("sprites_location", "digits"))
  config = default()
  config.tasks = arg.task
  config.backbone, config.weights = "vit_ti16", os.path.normpath(WEIGHTS)
  config.image_size, config.normalisation = 64, "half"
  config.epochs, config.warmup_epochs = 8, 1.0
  config.lr = 6e-3
  config.variants = variants(
      linear=dict(method="linear", epochs=50, lr=1e-2),
      layernorm=dict(method="layernorm"),
      ttc=dict(method="ttc"))
  return config
