"""Two-stage TTC-Tuning of vision transformers, and what it is compared with.

  module, params = ttc_jax.backbones.load("vit_s14", weights=PATH,
                                          image_size=70)
  tuned = ttc_jax.predict.load("WORKDIR/runs/RUN/bundle")
"""
import importlib
import sys

if sys.argv[:1] == ["-m"]:  # python -m ttc_jax.COMMAND, before its imports
  from ttc_jax import files, interrupt
  interrupt.starting()
  files.use_utf8_names()


def __getattr__(name):
  """Imports a part when it is first named, so that importing us is quick."""
  if name in ("backbones", "bundles", "predict", "serve", "tasks"):
    return importlib.import_module(f"{__name__}.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
