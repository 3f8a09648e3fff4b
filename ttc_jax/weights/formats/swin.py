"""Swin as timm, its authors and Hugging Face keep it."""
import math
import re

from ttc_jax.errors import UserError
from ttc_jax.weights.formats import base, hf, timm

_BLOCK = "stage_{}_block_{}"
_FUSED = {
    "LayerNorm_0": "norm1", "LayerNorm_1": "norm2",
    "attention/query": "attn.qkv", "attention/key": "attn.qkv",
    "attention/value": "attn.qkv", "attention/out": "attn.proj",
    "attention/relative_position_bias": "attn.relative_position_bias_table",
    "mlp/Dense_0": "mlp.fc1", "mlp/Dense_1": "mlp.fc2"}
_SPLIT = {
    "LayerNorm_0": "layernorm_before", "LayerNorm_1": "layernorm_after",
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention/relative_position_bias":
        "attention.self.relative_position_bias_table",
    "mlp/Dense_0": "intermediate.dense", "mlp/Dense_1": "output.dense"}
_ENDS = {"embedding": "patch_embed.proj",
         "embedding_norm": "patch_embed.norm", "norm": "norm"}
_ENDS_HF = {"embedding": "embeddings.patch_embeddings.projection",
            "embedding_norm": "embeddings.norm", "norm": "layernorm"}


def _format(name, of_block, ends, layers, merge):
  """`merge`: the stage that a merging is named after, its own or the next."""
  table = ends | {
      f"{_BLOCK}/{ours}": f"{layers}.{{}}.blocks.{{}}.{theirs}"
      for ours, theirs in of_block.items()} | {
      f"merge_{{}}/{part}": f"{layers}.{merge}.downsample.{part}"
      for part in ("norm", "reduction")}
  return base.Format(
      name, names=base.by_table(table), torch=True, tokens=(),
      # Indices and masks are computed; heads are not part of the features.
      ignored=r"(head(\.fc)?|classifier)\.(weight|bias)|embeddings\.mask_token|"
              r".*\.(relative_position_index|attn_mask)",
      refused={
          r"absolute_pos_embed|.*position_embeddings": "absolute positions",
          r".*\.(logit_scale|cpb_mlp\..*|continuous_position_bias.*)":
              "the attention of Swin V2"})


SWIN_MS = _format("swin_ms", _FUSED, _ENDS, "layers", "{}")
SWIN_TIMM = _format("swin_timm", _FUSED, _ENDS, "layers", "{next}")
SWIN_HF = _format("swin_hf", _SPLIT, _ENDS_HF, "encoder.layers", "{}")


def recognise(tensors, config):
  found = (base.below(tensors, "patch_embed.proj.weight")
           or base.below(tensors, "embeddings.patch_embeddings.projection."
                         "weight") or tensors)
  if not any(re.match(r"(encoder\.)?layers\.\d+\.blocks\.", n) for n in found):
    return None
  format_ = (
      SWIN_HF if any(n.startswith("encoder.layers.") for n in found) else
      SWIN_MS if any(n.startswith("layers.0.downsample.") for n in found) else
      SWIN_TIMM)
  table, = format_.names("stage_0_block_0/attention/relative_position_bias")
  windows = {_window(found[n].shape) for n in found
             if n.endswith(table.rpartition(".")[2])}
  if len(windows) > 1:
    raise UserError(f"its windows have the sides {sorted(windows)}, as in a "
                    "Swin-S3: only Swins with one window size are supported")
  fields: base.Fields = {"window": windows.pop()} if windows else {}
  if format_ is SWIN_HF:
    config = hf.of_model(config, ("swin",))
    return base.Found(
        format_, fields | hf.settings(config, "gelu", 1e-5, "gelu"), found,
        beside=_BESIDE, sizes=_sizes_hf(config))
  return base.Found(
      format_, fields | {"gelu": "exact", "epsilon": 1e-5}, found,
      normalisation=timm.normalisation(timm.of_timm(config)))


def _window(shape):
  return (math.isqrt(shape[0]) + 1) // 2 if shape else 0


# Heads of classifiers and of masked image modelling.
_BESIDE = r"classifier\.(weight|bias)|decoder\..*"


def _sizes_hf(config):
  if not config:
    return {}
  heads = config.get("num_heads", [3])
  ratio = config.get("mlp_ratio", 4.0)
  if ratio != 4:
    raise UserError(f"config.json has the mlp_ratio {ratio!r}; expected 4.0")
  return base.sizes(
      {**config, "heads": heads[0] if isinstance(heads, list) and heads
       else heads}, {"width": "embed_dim", "heads": "heads",
                     "patch": "patch_size"})
