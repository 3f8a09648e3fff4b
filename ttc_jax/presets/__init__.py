"""Presets: how the neighbours of TTC trained on VTAB-1K, as published.

The folder is the registry: `presets/NAME.py` with `METHOD`, the method that it
was published for, and `settings(method) -> {key of the configuration: value}`
is the preset NAME. Each says in its docstring what it does not reproduce. Of
none is reproduced:

- They move the learning rate once an epoch; here every step does. The cosine
  of SCT, SSF and NOAH (timm's) counts from epoch 0, so that it is below its
  top where the warm-up ends; here it begins there, as VPT's.
- SCT, SSF and NOAH keep the epoch that is best on the test set; here the last
  one is reported.
"""
import importlib
import pkgutil

import ml_collections

from ttc_jax.errors import check_known


def names() -> tuple[str, ...]:
  """Every preset there is."""
  return tuple(m.name for m in pkgutil.iter_modules(__path__))


def apply(config: ml_collections.ConfigDict, name: str,
          method: str = "") -> None:
  """Makes a preset's settings those of a configuration.

  Args:
    method: what is trained by them; empty: the preset's own method.
  """
  check_known("preset", name, names())
  preset = importlib.import_module(f"{__name__}.{name}")
  config.method = method or preset.METHOD
  config.update(preset.settings(config.method))
