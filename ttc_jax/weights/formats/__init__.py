"""Formats of weights: under which name, how laid out, our parameters are kept.

The folder is the registry: a module with `recognise(tensors, config)` that
returns a `Found`, or None where the tensors are not of its family. `config` is
the object in the config.json beside the file, {} if there is none.

Every tensor of a file is used, known by its name to have no part in the
features, or a reason to refuse the file. What tensors do not show (a pooling, a
GELU, the form of rotary positions) comes from config.json or from the user, and
a contradiction between config.json and the tensors is an error.

  ttc_jax: safetensors named as our own parameter tree, with the fields of
    the variant in the metadata.
"""
from collections.abc import Mapping, Sequence
import importlib
import pkgutil
import re
from types import ModuleType
from typing import Any

from ttc_jax import backbones, files
from ttc_jax import normalisation as pixels
from ttc_jax.backbones.layers import Field
from ttc_jax.errors import UserError
from ttc_jax.weights.formats.base import (
  HALF,
  Format,
  Found,
  Normalisation,
  count_tokens,
  is_zero,
  normalisation,
)
from ttc_jax.weights.formats.bigvision import BIGVISION, TREES
from ttc_jax.weights.formats.hf import (
  HF_CLIP,
  HF_DINOV2,
  HF_DINOV3,
  HF_SIGLIP,
  HF_VIT,
)
from ttc_jax.weights.formats.swin import SWIN_HF, SWIN_MS, SWIN_TIMM
from ttc_jax.weights.formats.timm import TIMM, TIMM_DINOV3

__all__ = (
    "BIGVISION", "HALF", "HF_CLIP", "HF_DINOV2", "HF_DINOV3", "HF_SIGLIP",
    "HF_VIT", "OURS", "SWIN_HF", "SWIN_MS", "SWIN_TIMM", "TIMM", "TIMM_DINOV3",
    "TREES", "UNKNOWN", "Format", "Found", "Normalisation", "check_fields",
    "count_tokens", "is_zero", "normalisation", "recognise")

OURS = Format("ttc_jax", names=lambda name: (name,))


def recognise(tensors: Mapping[str, Any], metadata: Mapping[str, str],
              config: Mapping[str, Any], path: str) -> Found:
  """Returns the format of tensors, by their names; and the fields it implies.

  Raises:
    UserError: they are of no format, or of more than one.
  """
  if "ttc_jax" in metadata:
    return Found(
        OURS, _own_fields(metadata["ttc_jax"], tensors, path), tensors,
        normalisation=_own_normalisation(metadata.get("normalisation"), path))
  _refuse_others(tensors, path)
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
                    f"{' and '.join(f.format.name for f in found)}: save the "
                    "tensors of one model alone")
  named = config.get("model_type") or config.get("architecture")
  called = f" (config.json beside it is of a {named!r})" if named else ""
  raise UserError(
      f"weights file '{path}' is of no known format{called}: its first tensors "
      f"are {', '.join(sorted(tensors)[:3]) or 'none'}; expected a ViT as a "
      "vision_transformer or Big Vision .npz, or a ViT or Swin as a timm, "
      "Hugging Face or ttc_jax .safetensors, or as a .pth")


# Tensors that only one architecture has, whose file has no format here.
_OTHERS = {
    r"embeds\.(proj|cls_token|reg_token|pos_embed).*": "a NaFlexVit",
    r"encoder\.layer\.\d+\.lambda_[12]": "a BEiT or Data2Vec",
    r"embeddings\.rms_norm\.weight|encoder\.layers\.\d+\.rms_norm1\.weight":
        "an AIMv2",
    r"blocks_token_only\..*": "a CaiT",
    r"embeddings\.detection_tokens": "a YOLOS",
    r"vision_encoder\.layers\.\d+\.attn\.rel_pos_[hw]": "a SAM encoder",
}


def _refuse_others(tensors, path):
  for pattern, what in _OTHERS.items():
    for name in filter(re.compile(rf"(.*\.)?({pattern})").fullmatch, tensors):
      raise UserError(f"weights file '{path}' is {what} ({name!r}), which is "
                      "not supported: use a plain ViT or Swin")


# --- The fields of our own format ---------------------------------------------

def check_fields(fields: Mapping[str, Any], where: str,
                 families: Sequence[ModuleType] = ()) -> dict[str, Any]:
  """Returns the fields of a module, as a file or bundle states them, checked.

  A wrong pool shows in the shapes, a wrong GELU or epsilon does not: such
  fields are required.

  Args:
    where: the file, for messages.
    families: whose required fields are demanded; default any family's.

  Raises:
    UserError: a field is unknown, missing or has a value that no family
      allows.
  """
  known: dict[str, list[Field]] = {}
  for family in backbones.families():
    for name, field in family.FIELDS.items():
      known.setdefault(name, []).append(field)
  required = [[name for name, field in family.FIELDS.items() if field.required]
              for family in families or backbones.families()]
  if not any(fields.keys() >= set(names) for names in required):
    name = next(n for names in required for n in names if n not in fields)
    raise UserError(f"{where}: the field '{name}' is missing")
  for name, value in fields.items():
    if name not in known:
      raise UserError(f"{where}: unknown field {name!r}; known: "
                      f"{', '.join(known)}")
    if not any(field.allows(value) for field in known[name]):
      raise UserError(f"{where}: the field '{name}' is {value!r}, expected "
                      f"{' or '.join(dict.fromkeys(map(str, known[name])))}")
  return dict(fields)


UNKNOWN = "unknown"  # of a normalisation, in our own format


def _own_normalisation(text, path):
  """The normalisation in the metadata of our own format.

  Files of before it was kept there, as the embedded backbone, are "half".
  """
  if text is None:
    return HALF
  try:
    return (None if text == UNKNOWN else
            Normalisation(*pixels.mean_and_std(text)))
  except UserError as error:
    raise UserError(f"weights file '{path}': its metadata: {error}") from error


def _own_fields(text, tensors, path):
  where = f"weights file '{path}'"
  try:
    fields = files.from_json(text)
  except ValueError as e:
    raise UserError(f"{where}: its metadata is no JSON ({e})") from e
  if not isinstance(fields, dict):
    raise UserError(f"{where}: its metadata is no JSON object")

  def shape(name):
    return tensors[name].shape if name in tensors else None
  return check_fields(fields, where, [
      f for f in backbones.families() if f.identify(shape)])
