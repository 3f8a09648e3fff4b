"""Presets: how the neighbours of TTC trained on VTAB-1K, as published.

The folder is the registry: a file `presets/NAME.py` is the preset NAME. It has
`METHOD`, the method that it was published for, and
`settings(method) -> {key of the configuration: value}`. Its docstring says
what it does not reproduce.

All four run PyTorch's exact GELU, on weights that Google trained with the tanh
approximation; so the presets set `gelu="exact"`, whatever the weights say.

No preset reproduces these:

- They change the learning rate once an epoch; here every step changes it. The
  cosine of SCT, SSF and NOAH (timm's) starts at epoch 0, so it is below its
  maximum where the warm-up ends; here it starts there, as VPT's does.
- SCT, SSF and NOAH report the best epoch on the test set; here the last epoch
  is reported.
"""
import importlib
import pkgutil
from typing import Any

import ml_collections

from ttc_jax.errors import check_known

COMMON: dict[str, Any] = {"gelu": "exact"}  # settings of all presets


def names() -> tuple[str, ...]:
  """Returns the names of all presets, sorted."""
  return tuple(m.name for m in pkgutil.iter_modules(__path__))


def apply(config: ml_collections.ConfigDict, name: str,
          method: str = "") -> None:
  """Writes a preset's settings into a configuration.

  Args:
    config: changed in place.
    name: of the preset.
    method: the method that is trained with them; empty for the preset's own.

  Raises:
    UserError: unknown preset.

  Example:
    c = config.default()
    presets.apply(c, "noah", "lora")
  """
  check_known("preset", name, names())
  preset = importlib.import_module(f"{__name__}.{name}")
  config.method = method or preset.METHOD
  config.update(COMMON | preset.settings(config.method))
