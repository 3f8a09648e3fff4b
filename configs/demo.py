"""The demo: three methods on rendered and real tasks that need no download.

The backbone is the small ViT of `checkpoints/`. The learning rate of LayerNorm
and TTC is the better of 2e-3 and 6e-3 on val200 (train on 800) for both, on
both tasks; the test set chose nothing.
"""
import os

from ttc_jax.config import default, parse_arg, variants

WEIGHTS = os.path.join(os.path.dirname(__file__), os.pardir, "checkpoints",
                       "vit_ti16_64.safetensors")


def get_config(arg=None):
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
