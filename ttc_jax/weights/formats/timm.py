"""timm's VisionTransformer, as `.safetensors` or `.pth`.

So are the files of DeiT, DINO and DINOv2, and the vision towers of CLIP and
SigLIP that timm keeps.
"""
import re

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
    ignored=r"(head|head_dist)\..*|mask_token",
    refused={
        r"blocks\.\d+\.attn\.[qk]_norm\..*": "norms of queries and keys",
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
    ignored=r"head\..*", refused={
        r"blocks\.\d+\.mlp\.(w\d+|fc1_[gx])\..*": "a gated MLP"})

_GELU = {"gelu": "exact", "gelu_tanh": "tanh", "quick_gelu": "quick"}


def _gelu(config, clip, map_):
  """None where the tensors' names leave a doubt."""
  architecture = str(config.get("architecture", ""))
  arguments = config.get("model_args")
  layer = isinstance(arguments, dict) and arguments.get("act_layer")
  if layer:
    if not isinstance(layer, str) or layer not in _GELU:
      raise UserError(f"config.json has the act_layer {layer!r}; known: "
                      f"{', '.join(_GELU)}")
    return _GELU[layer]
  if "quickgelu" in architecture:
    return "quick"
  # CLIP's and SigLIP's were trained with others than timm's default.
  return None if clip or map_ else "exact"


def recognise(tensors, config):
  found = base.below(tensors, "patch_embed.proj.weight") or tensors
  if any(n.startswith("layers.") for n in found) or not any(
      re.match(r"blocks\.\d+\.|patch_embed\.", n) for n in found):
    return None
  # In chunks, as DINOv2's own training saves them; numbers go on through them.
  found = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", n): t
           for n, t in found.items()}
  config = config if "architecture" in config else {}

  def has(start):
    return any(n.startswith(start) for n in found)
  pool = ("map" if has("attn_pool.") else
          "cls" if has("cls_token") and not has("fc_norm.")
          and config.get("global_pool") != "avg" else "gap")
  # EVA's and BEiT's have positions, be it of a token alone.
  rope = not {"blocks.0.gamma_1", "reg_token"} - found.keys() and not any(
      re.search("pos_embed|rel_pos|attn.rope", n) for n in found)
  fields = base.vit_fields(
      pool, base.count_tokens(found, TIMM.tokens),
      pre_norm=has("norm_pre."), final_norm=has("norm."),
      pool_norm=has("fc_norm."), layer_scale=any(".ls1." in n for n in found),
      gelu=_gelu(config, has("norm_pre."), pool == "map"),
      epsilon=1e-5 if has("norm_pre.") or rope else 1e-6)
  if rope:
    return TIMM_DINOV3, fields | {"rope": 100.0, "layer_scale": True}, found
  return TIMM, fields, found
