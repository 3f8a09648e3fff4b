"""A folder that Hugging Face's AutoModelForImageClassification loads."""
import json
import os
from typing import Any

import numpy as np
from PIL import Image

from ttc_jax import export, files, weights
from ttc_jax.backbones.swin import Swin
from ttc_jax.backbones.vit import ViT
from ttc_jax.errors import UserError
from ttc_jax.predict import LoadedModel
from ttc_jax.weights import containers, formats

NAME = "hf"
_CODE = """
from transformers import AutoImageProcessor, AutoModelForImageClassification
processor = AutoImageProcessor.from_pretrained("{folder}")
model = AutoModelForImageClassification.from_pretrained("{folder}")
logits = model(**processor(image, return_tensors="pt")).logits
"""
_GELU = {"exact": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}


def write(model: LoadedModel, folder: str) -> None:
  """model.safetensors, config.json and preprocessor_config.json."""
  backbone: Any = model.model.backbone
  classes = model.meta["classes"]
  make = export.of_family(model, NAME, {ViT: _vit, Swin: _swin})
  format_, kind, name, config = make(model, backbone)
  tensors = weights.to_tensors(model.params["backbone"], format_, backbone)
  kernel = np.asarray(model.params["head"]["kernel"])
  if format_ is formats.HF_DINOV2:  # it reads [CLS] beside the patches' mean
    kernel = np.concatenate([kernel, np.zeros_like(kernel)])
  tensors = {f"{kind}.{n}": x for n, x in tensors.items()} | {
      "classifier.weight": np.ascontiguousarray(kernel.T),
      "classifier.bias": np.asarray(model.params["head"]["bias"])}
  config |= {
      "model_type": kind, "architectures": [f"{name}ForImageClassification"],
      "image_size": backbone.image_size, "patch_size": backbone.patch,
      "num_channels": 3, "layer_norm_eps": backbone.epsilon,
      "hidden_act": _GELU[backbone.gelu], "qkv_bias": True,
      "id2label": {str(i): c for i, c in enumerate(classes)},
      "label2id": {c: i for i, c in enumerate(classes)}}
  containers.write_safetensors(os.path.join(folder, "model.safetensors"),
                               tensors, {"format": "pt"})
  for file, value in (("config.json", config),
                      ("preprocessor_config.json", _processor(model))):
    files.write_text(os.path.join(folder, file),
                     json.dumps(value, indent=2) + "\n")


def _processor(model):
  how = export.preprocessing(model.meta)
  return {"image_processor_type": "ViTImageProcessor", "do_resize": True,
          "size": {"height": how["size"], "width": how["size"]},
          "resample": int(Image.Resampling[how["resample"].upper()]),
          "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
          "do_convert_rgb": True,
          "image_mean": how["mean"], "image_std": how["std"]}


def _vit(model, vit):
  export.check_fields(model, NAME, {
      "pool": "cls", "gelu": tuple(_GELU), "epsilon": (vit.epsilon,),
      "final_norm": True, "layer_scale": (False, True), "rope": 0.0,
      "registers": tuple(range(65)) if vit.layer_scale else 0,
      "pre_norm": False, "pool_norm": False})
  config = {"hidden_size": vit.width, "num_hidden_layers": vit.depth,
            "num_attention_heads": vit.heads}
  if not vit.layer_scale:
    return formats.HF_VIT, "vit", "ViT", config | {
        "intermediate_size": vit.hidden}
  if vit.hidden % vit.width:
    raise UserError(f"--to={NAME}: the MLP's width {vit.hidden} is no multiple "
                    f"of {vit.width}, as DINOv2's is")
  config |= {"mlp_ratio": vit.hidden // vit.width, "use_swiglu_ffn": False}
  if not vit.registers:
    return formats.HF_DINOV2, "dinov2", "Dinov2", config
  return (formats.HF_DINOV2, "dinov2_with_registers", "Dinov2WithRegisters",
          config | {"num_register_tokens": vit.registers})


def _swin(model, swin):
  if min(swin.sides) < swin.window:
    raise UserError(
        f"--to={NAME}: at {swin.image_size} px a stage has {min(swin.sides)} "
        f"tokens a side and windows {swin.window}, which Hugging Face's Swin "
        "cannot have; --to=stablehlo holds them")
  return formats.SWIN_HF, "swin", "Swin", {
      "embed_dim": swin.embed, "depths": list(swin.depths),
      "num_heads": [swin.heads * 2 ** s for s in range(len(swin.depths))],
      "window_size": swin.window, "mlp_ratio": 4.0,
      "hidden_size": swin.width, "use_absolute_embeddings": False}


TARGET = export.Target(
    NAME, write, _CODE, merged=True, hub_library="transformers", limits=(
        "transformers 5 resizes with PyTorch instead of Pillow, which moves "
        "the logits a little.",))
