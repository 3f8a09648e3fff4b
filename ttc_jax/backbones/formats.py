"""Formats of weights: under which name, how laid out, our parameters are kept.

  bigvision: `.npz` of google-research/vision_transformer (ImageNet-21k,
    AugReg) and of Big Vision; old and new naming, with or without the
    optimiser's state around the tree.
  timm: safetensors of timm's (and DINO's) VisionTransformer, fused qkv.
  swin_timm, swin_ms, swin_hf: Swin as timm, its authors and Hugging Face
    keep it.
  ttc_jax: safetensors named as our own parameter tree, with the fields of
    the variant in the metadata.
"""
from collections.abc import Callable, Mapping
import json
import math
import re
from typing import NamedTuple

import numpy as np

from ttc_jax.backbones import vit
from ttc_jax.errors import UserError


class Format(NamedTuple):
  """How a family of files keeps our parameters.

  Attributes:
    names: our name -> the names it may have there, the likeliest first; none
      where the format has no place for it.
    view: (our name, their array) -> the array in our layout.
    store: (our name, our array) -> the array in their layout; what shares a
      name there is joined along the first axis.
    heads: whether the arrays have our (heads, width / heads) axes.
    cls_position: whether [CLS] has a position of its own.
    ignored: pattern of tensors without a part in the features.
    refused: {pattern: what of the architecture we lack}.
  """
  name: str
  names: Callable[[str], tuple[str, ...]]
  view: Callable[[str, np.ndarray], np.ndarray] = lambda name, array: array
  store: Callable[[str, np.ndarray], np.ndarray] = lambda name, array: array
  heads: bool = True
  cls_position: bool = False
  ignored: str = r"(?!)"
  refused: Mapping[str, str] = {}


# --- The formats --------------------------------------------------------------

OURS = Format("ttc_jax", names=lambda name: (name,))

# The module numbered its layers in the order of calls, dropout included.
_OLD_SPELLING = (("LayerNorm_1/", "LayerNorm_2/"),
                 ("MultiHeadDotProductAttention_0/",
                  "MultiHeadDotProductAttention_1/"),
                 ("MlpBlock_0/", "MlpBlock_3/"))


def _bigvision_names(name):
  if name == "pos_embedding":
    return (name, f"Transformer/{name}", f"Transformer/posembed_input/{name}")
  old = name
  for new_part, old_part in _OLD_SPELLING:
    old = old.replace(new_part, old_part)
  return name, old


BIGVISION = Format(
    "bigvision", names=_bigvision_names, ignored=r"(head|pre_logits)/.*",
    refused={
        r"MAPHead_0/.*|probe": "attention pooling",
        r"(conv_root|block\d+)/.*": "a ResNet below the Transformer",
        r"Transformer/encoderblock/.*": "its blocks stacked in one array",
    })

_TIMM = {  # "{}" is the block's index
    "cls": "cls_token",
    "pos_embedding": "pos_embed",
    "embedding": "patch_embed.proj",
    f"{vit.BLOCK}/LayerNorm_0": "blocks.{}.norm1",
    f"{vit.ATTENTION}/query": "blocks.{}.attn.qkv",
    f"{vit.ATTENTION}/key": "blocks.{}.attn.qkv",
    f"{vit.ATTENTION}/value": "blocks.{}.attn.qkv",
    f"{vit.ATTENTION}/out": "blocks.{}.attn.proj",
    f"{vit.BLOCK}/layer_scale_0": "blocks.{}.ls1.gamma",
    f"{vit.BLOCK}/LayerNorm_1": "blocks.{}.norm2",
    f"{vit.BLOCK}/MlpBlock_0/Dense_0": "blocks.{}.mlp.fc1",
    f"{vit.BLOCK}/MlpBlock_0/Dense_1": "blocks.{}.mlp.fc2",
    f"{vit.BLOCK}/layer_scale_1": "blocks.{}.ls2.gamma",
    "Transformer/encoder_norm": "norm",
}
_TIMM_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def _timm_names(name):
  block = re.search(r"encoderblock_(\d+)", name)
  key = re.sub(r"encoderblock_\d+", "encoderblock_{}", name)
  stem, _, leaf = key.rpartition("/")
  if stem in _TIMM and leaf in _TIMM_LEAF:
    theirs = f"{_TIMM[stem]}.{_TIMM_LEAF[leaf]}"
  else:
    theirs = _TIMM.get(key)
  if theirs is None:
    return ()
  return (theirs.format(block[1]) if block else theirs,)


def _torch_view(name, array):
  """PyTorch keeps (out, in) and (out, in, p, p)."""
  if not name.endswith("/kernel"):
    return array
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _torch_store(name, array):
  """The inverse of `_torch_view`."""
  if not name.endswith("/kernel"):
    return array
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _timm_view(name, array):
  """Takes q, k or v from qkv, too."""
  for i, part in enumerate(("/query/", "/key/", "/value/")):
    if part in name and array.ndim and array.shape[0] % 3 == 0:
      rows = array.shape[0] // 3
      array = array[i * rows:(i + 1) * rows]
  return _torch_view(name, array)


TIMM = Format(
    "timm", names=_timm_names, view=_timm_view, store=_torch_store,
    heads=False, cls_position=True,
    # The mask token stands for hidden patches; only pretraining hides any.
    ignored=r"(head|head_dist)\..*|mask_token",
    refused={
        r"reg(ister)?_tokens?": "register tokens",
        r"dist_token": "a distillation token",
        r"fc_norm\..*": "its norm after the pooling",
        r"attn_pool\..*": "attention pooling",
        r"norm_pre\..*": "a norm before the blocks",
        r"blocks\.\d+\.attn\.[qk]_norm\..*": "norms of queries and keys",
        r"blocks\.\d+\.mlp\.w\d+\..*": "a gated MLP",
    })


# --- Swin ---------------------------------------------------------------------

# Ours, below a block -> theirs, below "layers.{s}.blocks.{i}".
_SWIN_FUSED = {
    "LayerNorm_0": "norm1", "LayerNorm_1": "norm2",
    "attention/query": "attn.qkv", "attention/key": "attn.qkv",
    "attention/value": "attn.qkv", "attention/out": "attn.proj",
    "attention/relative_position_bias": "attn.relative_position_bias_table",
    "mlp/Dense_0": "mlp.fc1", "mlp/Dense_1": "mlp.fc2"}
_SWIN_HF = {
    "LayerNorm_0": "layernorm_before", "LayerNorm_1": "layernorm_after",
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention/relative_position_bias":
        "attention.self.relative_position_bias_table",
    "mlp/Dense_0": "intermediate.dense", "mlp/Dense_1": "output.dense"}
_SWIN_ENDS = {"embedding": "patch_embed.proj",
              "embedding_norm": "patch_embed.norm", "norm": "norm"}
_SWIN_ENDS_HF = {"embedding": "embeddings.patch_embeddings.projection",
                 "embedding_norm": "embeddings.norm", "norm": "layernorm"}


def _swin_names(of_block, ends, layers, merged_before):
  """Args:
    layers: the prefix of stages.
    merged_before: 1 where a merging belongs to the stage that it leads to.
  """
  def names(name):
    if name.endswith("/relative_position_bias"):
      stem, leaf = name, ""
    else:
      stem, _, leaf = name.rpartition("/")
      leaf = "." + _TIMM_LEAF[leaf]
    if match := re.match(r"stage_(\d+)_block_(\d+)/(.*)", stem):
      stage, block, part = match.groups()
      return (f"{layers}.{stage}.blocks.{block}.{of_block[part]}{leaf}",)
    if match := re.match(r"merge_(\d+)/(.*)", stem):
      stage = int(match[1]) + merged_before
      return (f"{layers}.{stage}.downsample.{match[2]}{leaf}",)
    return (ends[stem] + leaf,) if stem in ends else ()
  return names


def _swin_format(name, view, *naming):
  # Indices and masks are computed; heads are not part of the features.
  return Format(
      name, names=_swin_names(*naming), view=view, store=_torch_store,
      heads=False,
      ignored=r"(head|classifier)\..*|.*\.(relative_position_index|attn_mask)",
      refused={
          r"absolute_pos_embed|.*position_embeddings": "absolute positions",
          r".*\.(logit_scale|cpb_mlp\..*|continuous_position_bias.*)":
              "the attention of Swin V2"})


SWIN_MS = _swin_format(
    "swin_ms", _timm_view, _SWIN_FUSED, _SWIN_ENDS, "layers", 0)
SWIN_TIMM = _swin_format(
    "swin_timm", _timm_view, _SWIN_FUSED, _SWIN_ENDS, "layers", 1)
SWIN_HF = _swin_format(
    "swin_hf", _torch_view, _SWIN_HF, _SWIN_ENDS_HF, "encoder.layers", 0)


def _recognise_swin(tensors):
  """-> (format, fields, tensors below the root), None if it is no Swin."""
  below = {n.removeprefix("swin."): t for n, t in tensors.items()}
  format_ = (
      SWIN_HF if any(n.startswith("encoder.layers.") for n in below) else
      SWIN_MS if any(n.startswith("layers.0.downsample.") for n in below) else
      SWIN_TIMM)
  table, = format_.names("stage_0_block_0/attention/relative_position_bias")
  if table not in below:
    return None
  shape = below[table].shape
  side = math.isqrt(shape[0]) if shape else 0
  return format_, {"gelu": "exact", "epsilon": 1e-5,
                   "window": (side + 1) // 2}, below


# --- Which it is --------------------------------------------------------------

def recognise(tensors, metadata, path):
  """-> (format, fields, tensors below the format's root)."""
  if "ttc_jax" in metadata:
    return OURS, _fields_of_metadata(metadata["ttc_jax"], path), tensors
  if found := _recognise_swin(tensors):
    return found
  if any(re.match(r"blocks\.\d+\.|patch_embed\.", n) for n in tensors):
    return TIMM, {
        "gelu": "exact", "epsilon": 1e-6,
        "pool": "cls" if "cls_token" in tensors else "gap",
        "final_norm": any(n.startswith("norm.") for n in tensors),
        "layer_scale": any(".ls1." in n for n in tensors)}, tensors
  for tree in ("", "params/", "target/", "opt/target/"):
    for root in (tree, tree + "img/"):  # one tower of two
      below = {n.removeprefix(root): t for n, t in tensors.items()
               if n.startswith(root)}
      if any(n.startswith(("embedding/", "Transformer/")) for n in below):
        return BIGVISION, {
            "gelu": "tanh", "epsilon": 1e-6,
            "pool": "cls" if "cls" in below else "gap",
            "final_norm": True, "layer_scale": False}, below
  raise UserError(
      f"weights file '{path}' is of no known format: its first tensors are "
      f"{', '.join(sorted(tensors)[:3]) or 'none'}; expected a ViT as a "
      "vision_transformer or Big Vision .npz, or a ViT or Swin as a timm, "
      "Hugging Face (Swin) or ttc_jax .safetensors")


# --- The fields of our own format ---------------------------------------------

_FIELDS = {  # what may stand in the metadata; a type, or the allowed values
    "gelu": ("exact", "tanh"),
    "epsilon": float,
    "pool": ("cls", "gap"),
    "final_norm": (False, True),
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


