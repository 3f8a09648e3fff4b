"""A folder that `timm.create_model("local-dir:...")` loads."""
import json
import os
from typing import Any

import numpy as np

from ttc_jax import export, files, weights
from ttc_jax.backbones.swin import Swin
from ttc_jax.backbones.vit import ViT
from ttc_jax.errors import UserError
from ttc_jax.predict import LoadedModel
from ttc_jax.weights import containers, formats

NAME = "timm"
_CODE = """
import timm, torch
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
logits = model(timm.data.create_transform(**config)(image)[None])
"""
_POOL = {"cls": "token", "gap": "avg", "map": "map"}
_GELU = {"exact": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu"}


def write(model: LoadedModel, folder: str) -> None:
  """model.safetensors by timm's names, and config.json as on the Hub."""
  backbone: Any = model.model.backbone
  make = export.of_family(model, NAME, {ViT: _vit, Swin: _swin})
  format_, head, architecture, args = make(model, backbone)
  tensors = weights.to_tensors(model.params["backbone"], format_, backbone)
  kernel, bias = (np.asarray(model.params["head"][n])
                  for n in ("kernel", "bias"))
  tensors |= {f"{head}.weight": np.ascontiguousarray(kernel.T),
              f"{head}.bias": bias}
  how, size = export.preprocessing(model.meta), backbone.image_size
  config = {
      "architecture": architecture, "num_classes": len(model.meta["classes"]),
      "num_features": backbone.width, "model_args": args,
      "label_names": model.meta["classes"],
      "pretrained_cfg": {
          "num_classes": len(model.meta["classes"]), "classifier": head,
          "input_size": [3, size, size], "fixed_input_size": True,
          "interpolation": how["resample"], "crop_pct": 1.0,
          "crop_mode": "squash", "mean": how["mean"], "std": how["std"]}}
  containers.write_safetensors(os.path.join(folder, "model.safetensors"),
                               tensors, {"format": "pt"})
  files.write_text(os.path.join(folder, "config.json"),
                   json.dumps(config, indent=2) + "\n")


def _vit(model, vit):
  args = {
      "img_size": vit.image_size, "patch_size": vit.patch,
      "embed_dim": vit.width, "depth": vit.depth, "num_heads": vit.heads,
      "mlp_ratio": vit.hidden / vit.width, "class_token": vit.pool == "cls",
      "global_pool": _POOL[vit.pool]}
  format_, architecture, more = (_dinov3 if vit.rope else _plain)(model, vit)
  return format_, "head", architecture, args | more


def _plain(model, vit):
  export.check_fields(model, NAME, {
      "pool": ("cls", "gap", "map"), "gelu": tuple(_GELU),
      "epsilon": 1e-5 if vit.pre_norm else 1e-6,
      "final_norm": False if vit.pool_norm else (False, True),
      "layer_scale": (False, True), "rope": 0.0,
      "registers": tuple(range(65)), "pre_norm": (False, True),
      "pool_norm": (False, True)})
  clip = "clip_" if vit.pre_norm else ""  # its epsilon is the architecture's
  return formats.TIMM, f"vit_base_patch16_{clip}224", {
      "fc_norm": vit.pool_norm, "final_norm": vit.final_norm or vit.pool_norm,
      "reg_tokens": vit.registers, "no_embed_class": vit.registers > 0,
      "act_layer": _GELU[vit.gelu],
      "init_values": 1e-5 if vit.layer_scale else None}


def _dinov3(model, vit):
  export.check_fields(model, NAME, {
      "pool": ("cls", "gap"), "gelu": "exact", "epsilon": 1e-5, "rope": 100.0,
      "final_norm": True, "layer_scale": True, "registers": tuple(range(1, 65)),
      "pre_norm": False, "pool_norm": False})
  return formats.TIMM_DINOV3, "vit_base_patch16_dinov3_qkvb", {
      "num_reg_tokens": vit.registers}


def _swin(model, swin):
  export.check_fields(model, NAME, {
      "gelu": "exact", "epsilon": 1e-5, "window": tuple(range(65))})
  if swin.pads:  # timm shifts, then pads; we and the authors pad first
    raise UserError(
        f"--to={NAME}: at {swin.image_size} px windows of {swin.window} are "
        "padded, which timm does another way; --to=hf does as the authors")
  if min(swin.sides) < swin.window:
    raise UserError(
        f"--to={NAME}: at {swin.image_size} px a stage has {min(swin.sides)} "
        f"tokens a side and windows {swin.window}, which timm shrinks with "
        "their tables; --to=stablehlo holds them")
  args = {
      "img_size": swin.image_size, "patch_size": swin.patch,
      "embed_dim": swin.embed, "depths": list(swin.depths),
      "num_heads": [swin.heads * 2 ** s for s in range(len(swin.depths))],
      "window_size": swin.window}
  return formats.SWIN_TIMM, "head.fc", "swin_base_patch4_window7_224", args


TARGET = export.Target(
    NAME, write, _CODE, merged=True, hub_library="timm")
