"""Two-stage TTC-Tuning of vision transformers, and what it is compared with.

  result = ttc_jax.fit(paths, labels, weights="ViT-B_16.npz")
  result.classify(["cat.jpg"])
  result.save("pets.safetensors")

  tuned = ttc_jax.predict.load("pets.safetensors", weights="ViT-B_16.npz")
  model = ttc_jax.serve.load("ViT-B_16.npz")       # one base, many tasks
  module, params = ttc_jax.load("vit_b16", weights="ViT-B_16.npz",
                                image_size=224)    # the backbone alone
"""
import importlib
import sys

__version__ = "0.1.0"
__all__ = ["__version__", "fit", "load", "predict", "serve"]

if sys.argv[:1] == ["-m"]:  # python -m ttc_jax.COMMAND, before its imports
  from ttc_jax import files, interrupt
  interrupt.starting()
  files.use_utf8_names()

_FUNCTIONS = {"fit": "fitting", "load": "backbones"}
_MODULES = ("backbones", "bundles", "predict", "serve", "tasks")


def __getattr__(name):
  """Imports a part when it is first named, so that importing us is quick."""
  if name in _FUNCTIONS:
    module = importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}")
    return getattr(module, name)
  if name in _MODULES:
    return importlib.import_module(f"{__name__}.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
  return sorted([*globals(), *_FUNCTIONS, *_MODULES])
