"""Formats of weights: under which name, how laid out, our parameters are kept.

The folder is the registry: a module with `recognise(tensors, config)` that
returns (format, fields, tensors below the format's root), or None where the
tensors are not of its family. A field that is None is in doubt. `config` is
what a config.json beside the file holds, {} if there is none.

  ttc_jax: safetensors named as our own parameter tree, with the fields of
    the variant in the metadata.
"""
from collections.abc import Mapping
import importlib
import json
import pkgutil
from typing import Any

from ttc_jax.weights.formats.base import Format, Found, count_tokens, is_zero
from ttc_jax.weights.formats.bigvision import BIGVISION
from ttc_jax.weights.formats.hf import (
    HF_CLIP, HF_DINOV2, HF_DINOV3, HF_SIGLIP, HF_VIT)
from ttc_jax.weights.formats.swin import SWIN_HF, SWIN_MS, SWIN_TIMM
from ttc_jax.weights.formats.timm import TIMM, TIMM_DINOV3
from ttc_jax.errors import UserError

OURS = Format("ttc_jax", names=lambda name: (name,))


def recognise(tensors: Mapping[str, Any], metadata: Mapping[str, str],
              config: Mapping[str, Any], path: str) -> Found:
  """Which format tensors are of, by their names.

  Raises:
    UserError: none, or more than one.
  """
  if "ttc_jax" in metadata:
    return OURS, _fields_of_metadata(metadata["ttc_jax"], path), tensors
  modules = [importlib.import_module(f"{__name__}.{m.name}")
             for m in pkgutil.iter_modules(__path__)]
  try:
    found = [f for m in modules if hasattr(m, "recognise")
             if (f := m.recognise(tensors, config))]
  except UserError as error:
    raise UserError(f"weights file '{path}': {error}") from error
  if len(found) == 1:
    return found[0]
  if found:
    raise UserError(f"weights file '{path}' may be of the formats "
                    f"{' and '.join(f[0].name for f in found)}: save the "
                    "tensors of one model alone")
  raise UserError(
      f"weights file '{path}' is of no known format: its first tensors are "
      f"{', '.join(sorted(tensors)[:3]) or 'none'}; expected a ViT as a "
      "vision_transformer or Big Vision .npz, or a ViT or Swin as a timm, "
      "Hugging Face or ttc_jax .safetensors, or as a .pth")


# --- The fields of our own format ---------------------------------------------

_FIELDS = {  # what may stand in the metadata; a type, or the allowed values
    "gelu": ("exact", "tanh", "quick"),
    "epsilon": float,
    "pool": ("cls", "gap", "map"),
    "registers": tuple(range(65)),
    "rope": (0.0, 100.0),
    "pre_norm": (False, True),
    "final_norm": (False, True),
    "pool_norm": (False, True),
    "layer_scale": (False, True),
    "window": tuple(range(1, 65)),
}


def check_fields(fields, where):
  """The shapes betray a wrong pool, not a wrong GELU or epsilon: demand it."""
  for name in ("gelu", "epsilon"):
    if name not in fields:
      raise UserError(f"{where}: the field '{name}' is missing")
  for name, value in fields.items():
    known = _FIELDS.get(name)
    if known is None:
      raise UserError(f"{where}: unknown field {name!r}; known: "
                      f"{', '.join(_FIELDS)}")
    good = (type(value) is float and 0 < value < 1 if known is float else
            type(value) is type(known[0]) and value in known)
    if not good:
      expected = ("a float between 0 and 1" if known is float else
                  " or ".join(map(repr, known)) if len(known) < 5 else
                  f"{known[0]} to {known[-1]}")
      raise UserError(
          f"{where}: the field '{name}' is {value!r}, expected {expected}")
  return dict(fields)


def _fields_of_metadata(text, path):
  where = f"weights file '{path}'"
  try:
    fields = json.loads(text)
  except ValueError as e:
    raise UserError(f"{where}: its metadata is no JSON ({e})") from e
  if not isinstance(fields, dict):
    raise UserError(f"{where}: its metadata is no JSON object")
  return check_fields(fields, where)
