"""timm's VisionTransformer, as `.safetensors` or `.pth`.

The files of DeiT, DINO and DINOv2 are of this format too, and those of the
vision towers of CLIP and SigLIP in timm.
"""
from collections.abc import Mapping
import re
from typing import Any

from ttc_jax.backbones import vit
from ttc_jax.errors import UserError
from ttc_jax.weights.formats import base

_POOL = "MAPHead_0/MultiHeadDotProductAttention_0"
NAMES = {
    "cls": "cls_token",
    "registers": "reg_token",
    "pos_embedding": "pos_embed",
    "embedding": "patch_embed.proj",
    "pre_norm": "norm_pre",
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
    "pool_norm": "fc_norm",
    "MAPHead_0/probe": "attn_pool.latent",
    f"{_POOL}/query": "attn_pool.q",
    f"{_POOL}/key": "attn_pool.kv",
    f"{_POOL}/value": "attn_pool.kv",
    f"{_POOL}/out": "attn_pool.proj",
    "MAPHead_0/LayerNorm_0": "attn_pool.norm",
    "MAPHead_0/MlpBlock_0/Dense_0": "attn_pool.mlp.fc1",
    "MAPHead_0/MlpBlock_0/Dense_1": "attn_pool.mlp.fc2",
}

TIMM = base.Format(
    "timm", names=base.by_table(NAMES), torch=True,
    tokens=("cls_token", "reg_token", "register_tokens", "dist_token"),
    # Its models with registers (DINOv2) keep positions of patches alone.
    positions=lambda cls, registers: int(cls and not registers),
    zero={"embedding/bias": "pre_norm"},
    # The mask token stands for hidden patches; only pretraining hides any.
    ignored=r"(head|head_dist)\.(weight|bias)|mask_token",
    refused={
        r"blocks\.\d+\.attn\.[qk]_norm\..*": "norms of queries and keys",
        r"blocks\.\d+\.attn\.([qkv]_proj\..*|q_bias)":
            "the attention of BEiT or EVA-02",
        r"blocks\.\d+\.attn\.rel_pos_[hw]": "the positions of SAM",
        r"(blocks\.\d+\.attn\.|shared_)rel_pos\..*": "relative positions",
        r"blocks\.\d+\.proj\..*": "the blocks of Hiera",
        r"blocks\.\d+\.mlp\.fc1_[gx]\..*": "a gated MLP",
        r"blocks\.\d+\.mlp\.w\d+\..*": "a gated MLP",
        r"blocks\.\d+\.gamma_\d": "blocks of BEiT or EVA",
        r"patch_embed\.backbone\..*": "a ResNet below the Transformer",
        "storage_tokens": "the layout of DINOv3's authors; timm's and Hugging "
                          "Face's files of it are read",
    })
TIMM_DINOV3 = base.Format(
    "timm_dinov3", torch=True, names=base.by_table(NAMES | {
        f"{vit.ATTENTION}/query/bias": "blocks.{}.attn.q_bias",
        f"{vit.ATTENTION}/key/bias": "blocks.{}.attn.k_bias",
        f"{vit.ATTENTION}/value/bias": "blocks.{}.attn.v_bias",
        f"{vit.BLOCK}/layer_scale_0": "blocks.{}.gamma_1",
        f"{vit.BLOCK}/layer_scale_1": "blocks.{}.gamma_2",
    }), tokens=("cls_token", "reg_token"),
    zero={r".*/key/bias": "rope"}, optional=r".*/(query|value)/bias",
    ignored=r"head\.(weight|bias)", refused={
        r"fc_norm\..*": "rotary positions that are not DINOv3's",
        r"blocks\.\d+\.mlp\.(w\d+|fc1_[gx])\..*": "a gated MLP"})

# Beside the backbone: heads of DINO's and DINOv2's training, a linear head, and
# what OpenCLIP keeps around a timm tower.
_BESIDE = (r"(.*\.)?((dino_head|ibot_head|head)\.(mlp\.\d+|last_layer)\.\w+|"
           r"head\.(weight|bias))|text\..*|logit_(scale|bias)|"
           r"visual\.head\..*")
_GELU = {"gelu": "exact", "gelu_tanh": "tanh", "quick_gelu": "quick"}
_POOLS = {"token": "cls", "avg": "gap", "map": "map"}

# Architectures of config.json whose tensors may look like a ViT's.
_OTHERS = {
    r"eva_.*": "an EVA", r"eva02_.*": "an EVA-02", r"beit.*": "a BEiT",
    r"vit_pe_.*": "a Perception Encoder (PE)", r"aimv2_.*": "an AIMv2",
    r"naflexvit_.*": "a NaFlexVit", r"samvit_.*": "a SAM encoder",
    r"hiera.*": "a Hiera", r"swinv2_.*": "a Swin V2", r"cait_.*": "a CaiT",
    r"swin_s3_.*": "a Swin-S3",
    r"test_vit3": "a ViT whose pooling reads its registers",
    r"vit_.*_rope_.*": "a ViT with rotary positions that are not DINOv3's"}

# Keys of model_args that are read, that tensors show, or that only training
# reads.
_ARGUMENTS = {
    "act_layer", "class_token", "depth", "depths", "drop_path_rate",
    "dynamic_img_size", "embed_dim", "fc_norm", "final_norm", "global_pool",
    "img_size", "init_values", "mlp_ratio", "no_embed_class", "num_classes",
    "num_heads", "num_reg_tokens", "patch_size", "pre_norm", "qkv_bias",
    "reg_tokens", "window_size"}


def of_timm(config: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns a config.json of timm, {} if it states no model.

  Raises:
    UserError: it is of a model that is not supported, or not of timm.
  """
  architecture = config.get("architecture")
  if architecture is None:
    if "model_type" in config:
      raise UserError(
          f"config.json beside it is of a {config['model_type']!r}, which is "
          "not supported (the tensors are named as in timm): use a plain ViT "
          "or Swin, or move config.json away if it belongs to another file")
    return {}
  for pattern, what in _OTHERS.items():
    if re.fullmatch(pattern, str(architecture)):
      raise UserError(f"it is {what}, by the architecture {architecture!r} in "
                      "config.json, which is not supported: use a plain ViT or "
                      "Swin")
  unknown = sorted(_arguments(config).keys() - _ARGUMENTS)
  if unknown:
    raise UserError(f"config.json has the model_args {', '.join(unknown)}, "
                    "which may change the features and are not supported")
  return config


def _arguments(config):
  arguments = config.get("model_args")
  return arguments if isinstance(arguments, dict) else {}


def normalisation(config: Mapping[str, Any]) -> base.Normalisation | None:
  """Returns mean and deviation of a config.json of timm, None if unknown."""
  inner = config.get("pretrained_cfg")
  given = inner if isinstance(inner, dict) else config
  return base.normalisation(given.get("mean"), given.get("std"))


def _sizes(config):
  arguments, inner = _arguments(config), config.get("pretrained_cfg")
  given = inner if isinstance(inner, dict) else config
  size = given.get("input_size")
  if size is not None and not (isinstance(size, list) and len(size) == 3):
    raise UserError(f"config.json has the input_size {size!r}; expected "
                    "[3, height, width]")
  return base.sizes(
      {"img_size": size[1:] if size else None, **arguments},
      {"width": "embed_dim", "depth": "depth", "heads": "num_heads",
       "patch": "patch_size", "image_size": "img_size"})


def _gelu(config, clip, map_):
  """None where the tensors' names leave it open."""
  architecture = str(config.get("architecture", ""))
  layer = _arguments(config).get("act_layer")
  if layer:
    if not isinstance(layer, str) or layer not in _GELU:
      raise UserError(f"config.json has the act_layer {layer!r}; known: "
                      f"{', '.join(_GELU)}")
    return _GELU[layer]
  if "quickgelu" in architecture:
    return "quick"
  # CLIP's and SigLIP's were trained with others than timm's default.
  return None if clip or map_ else "exact"


def _pool(config, found, has, doubtful):
  """None where neither tensors nor the configuration show it."""
  if "dist_token" in found:  # timm's class averages both
    return "distilled"
  stated = _arguments(config).get("global_pool", config.get("global_pool"))
  if stated and stated not in _POOLS:
    raise UserError(f"config.json has the global_pool {stated!r}; known: "
                    f"{', '.join(_POOLS)}")
  if has("attn_pool."):
    if "reg_token" in found and not config:  # it may read them or not
      return None
    shown = "map"
  elif has("fc_norm.") or not has("cls_token"):
    shown = "gap"
  elif stated:
    return _POOLS[stated]
  else:
    return None if doubtful else "cls"
  if stated and _POOLS[stated] != shown:
    raise UserError(f"config.json has the global_pool {stated!r}, but the "
                    f"tensors are of a model with the pool {shown!r}")
  return shown


def recognise(tensors, config):
  found = base.below(tensors, "patch_embed.proj.weight") or tensors
  if any(n.startswith("layers.") for n in found) or not any(
      re.match(r"blocks\.\d+\.|patch_embed\.", n) for n in found):
    return None
  # In chunks, as DINOv2's own training saves them; numbers go on through them.
  found = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", n): t
           for n, t in found.items()}
  config = of_timm(config)

  def has(start):
    return any(n.startswith(start) for n in found)
  # EVA's and BEiT's have positions, be it of a token alone.
  dinov3 = not {"blocks.0.gamma_1", "reg_token"} - found.keys() and not any(
      re.search("pos_embed|rel_pos|attn.rope", n) for n in found)
  stated = "dinov3" in str(config.get("architecture", ""))
  # No tensor shows rotary positions: so look a DINOv3 and other ViTs, or a
  # Perception Encoder and a CLIP with another pooling, alike.
  encoder = has("norm_pre.") and (has("attn_pool.") or not has("norm."))
  rope = ((100.0 if stated else None) if dinov3 else
          None if encoder and not config else 0.0)
  fields = base.vit_fields(
      _pool(config, found, has, dinov3),
      base.count_tokens(found, TIMM.tokens),
      pre_norm=has("norm_pre."), final_norm=has("norm."),
      pool_norm=has("fc_norm."),
      layer_scale=dinov3 or any(".ls1." in n for n in found),
      gelu=_gelu(config, has("norm_pre."), has("attn_pool.")),
      epsilon=1e-5 if has("norm_pre.") or dinov3 else 1e-6, rope=rope)
  return base.Found(
      TIMM_DINOV3 if dinov3 else TIMM, fields, found, beside=_BESIDE,
      sizes=_sizes(config), positioned=_positioned(found, config),
      normalisation=normalisation(config))


def _positioned(found, config):
  """How many tokens may have a position, see `base.Found`.

  A class token without one is told from a grid that is not square, such as
  14 x 16 + 1 = 15 x 15, by the configuration only.
  """
  tokens = base.count_tokens(found, TIMM.tokens)
  stated = "image_size" in _sizes(config) or str(
      config.get("architecture")).startswith(("deit3_", "flexivit_"))
  if "register_tokens" in found or tokens == 1 and not (
      stated or "reg_token" in found):
    return (1,)
  if "dist_token" in found:
    return (tokens,)
  return tuple({0, tokens})
