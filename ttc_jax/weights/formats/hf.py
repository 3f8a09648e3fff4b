"""Hugging Face's ViT (and DeiT), DINOv2, and vision towers of CLIP and SigLIP.

As `save_pretrained` writes them: safetensors with a config.json beside, which
has the epsilon and the GELU.
"""
from collections.abc import Mapping
from typing import Any, NamedTuple

from ttc_jax.backbones import vit
from ttc_jax.errors import UserError
from ttc_jax.weights.formats import base

_POOL = "MAPHead_0/MultiHeadDotProductAttention_0"
_OLDER = {  # of ViT and DINOv2
    "cls": "embeddings.cls_token",
    "registers": "embeddings.register_tokens",
    "pos_embedding": "embeddings.position_embeddings",
    "embedding": "embeddings.patch_embeddings.projection",
    f"{vit.ATTENTION}/query": "encoder.layer.{}.attention.attention.query",
    f"{vit.ATTENTION}/key": "encoder.layer.{}.attention.attention.key",
    f"{vit.ATTENTION}/value": "encoder.layer.{}.attention.attention.value",
    f"{vit.ATTENTION}/out": "encoder.layer.{}.attention.output.dense",
    "Transformer/encoder_norm": "layernorm",
}
_NEWER = {  # of CLIP and SigLIP
    "pos_embedding": "embeddings.position_embedding.weight",
    "embedding": "embeddings.patch_embedding",
    f"{vit.BLOCK}/LayerNorm_0": "encoder.layers.{}.layer_norm1",
    f"{vit.ATTENTION}/query": "encoder.layers.{}.self_attn.q_proj",
    f"{vit.ATTENTION}/key": "encoder.layers.{}.self_attn.k_proj",
    f"{vit.ATTENTION}/value": "encoder.layers.{}.self_attn.v_proj",
    f"{vit.ATTENTION}/out": "encoder.layers.{}.self_attn.out_proj",
    f"{vit.BLOCK}/LayerNorm_1": "encoder.layers.{}.layer_norm2",
    f"{vit.BLOCK}/MlpBlock_0/Dense_0": "encoder.layers.{}.mlp.fc1",
    f"{vit.BLOCK}/MlpBlock_0/Dense_1": "encoder.layers.{}.mlp.fc2",
    "Transformer/encoder_norm": "post_layernorm",
}
_VIT = _OLDER | {
    f"{vit.BLOCK}/LayerNorm_0": "encoder.layer.{}.layernorm_before",
    f"{vit.BLOCK}/LayerNorm_1": "encoder.layer.{}.layernorm_after",
    f"{vit.BLOCK}/MlpBlock_0/Dense_0": "encoder.layer.{}.intermediate.dense",
    f"{vit.BLOCK}/MlpBlock_0/Dense_1": "encoder.layer.{}.output.dense",
}
_DINOV2 = _OLDER | {
    f"{vit.BLOCK}/LayerNorm_0": "encoder.layer.{}.norm1",
    f"{vit.BLOCK}/layer_scale_0": "encoder.layer.{}.layer_scale1.lambda1",
    f"{vit.BLOCK}/LayerNorm_1": "encoder.layer.{}.norm2",
    f"{vit.BLOCK}/MlpBlock_0/Dense_0": "encoder.layer.{}.mlp.fc1",
    f"{vit.BLOCK}/MlpBlock_0/Dense_1": "encoder.layer.{}.mlp.fc2",
    f"{vit.BLOCK}/layer_scale_1": "encoder.layer.{}.layer_scale2.lambda1",
}
_CLIP = _NEWER | {
    "cls": "embeddings.class_embedding",
    "pre_norm": "pre_layrnorm",  # sic
}
_SIGLIP = _NEWER | {
    "MAPHead_0/probe": "head.probe",
    **{f"{_POOL}/{x}/{ours}": f"head.attention.in_proj_{theirs}"
       for x in ("query", "key", "value")
       for ours, theirs in (("kernel", "weight"), ("bias", "bias"))},
    f"{_POOL}/out": "head.attention.out_proj",
    "MAPHead_0/LayerNorm_0": "head.layernorm",
    "MAPHead_0/MlpBlock_0/Dense_0": "head.mlp.fc1",
    "MAPHead_0/MlpBlock_0/Dense_1": "head.mlp.fc2",
}
_DINOV3 = {
    "cls": "embeddings.cls_token",
    "registers": "embeddings.register_tokens",
    "embedding": "embeddings.patch_embeddings",
    f"{vit.BLOCK}/LayerNorm_0": "layer.{}.norm1",
    f"{vit.ATTENTION}/query": "layer.{}.attention.q_proj",
    f"{vit.ATTENTION}/key": "layer.{}.attention.k_proj",
    f"{vit.ATTENTION}/value": "layer.{}.attention.v_proj",
    f"{vit.ATTENTION}/out": "layer.{}.attention.o_proj",
    f"{vit.BLOCK}/layer_scale_0": "layer.{}.layer_scale1.lambda1",
    f"{vit.BLOCK}/LayerNorm_1": "layer.{}.norm2",
    f"{vit.BLOCK}/MlpBlock_0/Dense_0": "layer.{}.mlp.up_proj",
    f"{vit.BLOCK}/MlpBlock_0/Dense_1": "layer.{}.mlp.down_proj",
    f"{vit.BLOCK}/layer_scale_1": "layer.{}.layer_scale2.lambda1",
    "Transformer/encoder_norm": "norm",
}

HF_VIT = base.Format(
    "hf_vit", names=base.by_table(_VIT), torch=True,
    positions=lambda cls, registers: int(cls),
    tokens=("embeddings.cls_token", "embeddings.distillation_token",
            "embeddings.register_tokens"),
    ignored=r"pooler\.dense\.(weight|bias)|embeddings\.mask_token")
HF_DINOV2 = HF_VIT._replace(
    name="hf_dinov2", names=base.by_table(_DINOV2),
    refused={r"encoder\.layer\.\d+\.mlp\.weights_(in|out)\..*": "a gated MLP"})
_SQUEEZED = {"embeddings.position_embedding.weight": 1}
HF_CLIP = base.Format(
    "hf_clip", names=base.by_table(_CLIP), torch=True,
    tokens=("embeddings.class_embedding",),
    positions=lambda cls, registers: int(cls),
    squeezed=_SQUEEZED | {"embeddings.class_embedding": 2},
    zero={"embedding/bias": "pre_norm"}, ignored=r"embeddings\.position_ids")
HF_SIGLIP = base.Format(
    "hf_siglip", names=base.by_table(_SIGLIP), torch=True, tokens=(),
    squeezed=_SQUEEZED, ignored=r"embeddings\.position_ids")
HF_DINOV3 = base.Format(
    "hf_dinov3", names=base.by_table(_DINOV3), torch=True,
    tokens=("embeddings.cls_token", "embeddings.register_tokens"),
    zero={r".*/key/bias": "rope"}, optional=r".*/(query|value)/bias",
    ignored=r"embeddings\.mask_token",
    refused={r"layer\.\d+\.mlp\.gate_proj\..*": "a gated MLP"})


class _Kind(NamedTuple):
  """A format, the models that have it, and their defaults.

  Attributes:
    format: see above.
    marks: tensors that distinguish it from the others.
    models: `model_type` of config.json.
    act, epsilon, heads: the model's where config.json does not state them, for
      it holds what differs from the defaults.
    act_alone: without a config.json.
  """
  format: base.Format
  marks: tuple[str, str]
  models: tuple[str, ...]
  act: str
  epsilon: float
  act_alone: str | None
  heads: int = 12


_KINDS = (
    _Kind(HF_VIT, ("embeddings.patch_embeddings.projection.weight",
                   "encoder.layer.0.layernorm_before.weight"),
          ("vit", "deit", "vit_msn", "vit_mae"), "gelu", 1e-12, "gelu"),
    _Kind(HF_DINOV2, ("embeddings.patch_embeddings.projection.weight",
                      "encoder.layer.0.norm1.weight"),
          ("dinov2", "dinov2_with_registers"), "gelu", 1e-6, "gelu"),
    # OpenAI's were trained with quick_gelu, those of others with gelu.
    _Kind(HF_CLIP, ("embeddings.patch_embedding.weight",
                    "pre_layrnorm.weight"),
          ("clip", "clip_vision_model"), "quick_gelu", 1e-5, None),
    _Kind(HF_SIGLIP, ("embeddings.patch_embedding.weight",
                      "embeddings.patch_embedding.bias"),
          ("siglip", "siglip_vision_model"), "gelu_pytorch_tanh", 1e-6,
          "gelu_pytorch_tanh"),
    _Kind(HF_DINOV3, ("embeddings.patch_embeddings.weight",
                      "layer.0.norm1.weight"), ("dinov3_vit",), "gelu", 1e-5,
          "gelu", heads=6),
)
# Heads, the other tower and what pretraining needs, by their whole names.
_BESIDE = (r"(.*\.)?(classifier|cls_classifier|distillation_classifier|"
           r"visual_projection|text_projection|pooler\.dense)\.(weight|bias)|"
           r"(text_model|decoder)\..*|logit_scale|logit_bias")
_NAMES = {"width": "hidden_size", "depth": "num_hidden_layers",
          "heads": "num_attention_heads", "hidden": "intermediate_size",
          "patch": "patch_size", "image_size": "image_size"}
_GELU = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh",
         "quick_gelu": "quick"}


def of_model(config: Mapping[str, Any],
             models: tuple[str, ...]) -> Mapping[str, Any]:
  """Returns a config.json, or its part on vision; {} if it is not Hugging
  Face's.

  Raises:
    UserError: it is of another model.
  """
  kind = config.get("model_type")
  kind = config.get("architecture") if kind is None else kind
  if kind is None:
    return {}
  if kind not in models:
    raise UserError(
        f"config.json beside it is of a {kind!r}, which is not supported (the "
        f"tensors are named as in {' or '.join(models)}): use a plain ViT or "
        "Swin, or move config.json away if it belongs to another file")
  if isinstance(config.get("vision_config"), dict):  # of two towers
    return {"model_type": kind, **config["vision_config"]}
  return config


def settings(config: Mapping[str, Any], act: str, epsilon: float,
             act_alone: str | None) -> base.Fields:
  """Returns GELU (None if not known) and epsilon.

  Args:
    config: see `of_model`.
    act, epsilon, act_alone: see `_Kind`.
  """
  if not config:
    return {"gelu": act_alone and _GELU[act_alone], "epsilon": epsilon}
  act = config.get("hidden_act", act)
  epsilon = config.get("layer_norm_eps", epsilon)
  if not isinstance(act, str) or act not in _GELU:
    raise UserError(f"config.json has the hidden_act {act!r}; known: "
                    f"{', '.join(_GELU)}")
  if not isinstance(epsilon, float) or not 0 < epsilon < 1:
    raise UserError(f"config.json has the layer_norm_eps {epsilon!r}; expected "
                    "a number between 0 and 1")
  return {"gelu": _GELU[act], "epsilon": epsilon}


def _rope(kind, config):
  if kind.format is not HF_DINOV3:
    return 0.0
  given = config.get("rope_parameters")
  rope = config.get("rope_theta", (given or {}).get("rope_theta", 100.0)
                    if isinstance(given, dict | None) else given)
  if rope != 100:
    raise UserError(f"config.json has the rope_theta {rope!r}; expected 100.0")
  return 100.0


def recognise(tensors, config):
  for kind in _KINDS:
    found = base.below(tensors, kind.marks[0])
    if found and kind.marks[1] in found:
      config = of_model(config, kind.models)
      tokens = base.count_tokens(found, kind.format.tokens)
      cls = bool(found.keys() & {"embeddings.cls_token",
                                 "embeddings.class_embedding"})
      fields = base.vit_fields(
          _pool(kind, found, tensors), tokens,
          pre_norm="pre_layrnorm.weight" in found,
          layer_scale=any(".layer_scale1." in n for n in found),
          rope=_rope(kind, config),
          **settings(config, kind.act, kind.epsilon, kind.act_alone))
      return base.Found(
          kind.format, fields, found, beside=_BESIDE,
          sizes=_sizes(kind, config),
          positioned=(cls + ("embeddings.distillation_token" in found),))
  return None


def _pool(kind, found, tensors):
  if "head.probe" in found:
    return "map"
  # The class with a teacher averages the logits of both tokens, the others
  # read [CLS] alone.
  if any(n.startswith("distillation_classifier.") for n in tensors):
    return "distilled"
  return "gap" if kind.format is HF_SIGLIP else "cls"


def _sizes(kind, config):
  if not config:
    return {}
  out = {"heads": kind.heads} | base.sizes(config, _NAMES)
  if kind.format is HF_DINOV2:  # it has an mlp_ratio
    out.pop("hidden", None)
  return out
