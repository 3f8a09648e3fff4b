"""Big Vision's ViT, also as one of two towers (SigLIP), and that of
vision_transformer.

Both are `.npz`, with or without the optimiser's state beside the parameters.
"""
import re
from typing import Any

from ttc_jax.weights.formats import base

# The module numbered its layers in the order of calls, dropout included.
_OLD_SPELLING = (("LayerNorm_1/", "LayerNorm_2/"),
                 ("MultiHeadDotProductAttention_0/",
                  "MultiHeadDotProductAttention_1/"),
                 ("MlpBlock_0/", "MlpBlock_3/"))
_MOST_BLOCKS = 256  # of a believable file


def _names(name):
  if name == "pos_embedding":
    return (name, f"Transformer/{name}", f"Transformer/posembed_input/{name}")
  if name.startswith("MAPHead_0/"):  # it was part of the model once
    return (name, name.removeprefix("MAPHead_0/"))
  old = name
  for new_part, old_part in _OLD_SPELLING:
    old = old.replace(new_part, old_part)
  return name, old


BIGVISION = base.Format(
    "bigvision", names=_names, tokens=("cls",),
    ignored=r"(head|pre_logits)/.*",
    refused={r"(conv_root|block\d+)/.*": "a ResNet below the Transformer"})


def recognise(tensors, config):
  del config
  for tree in ("", "params/", "target/", "opt/target/"):
    for root in (tree, tree + "img/"):  # one tower of two
      below = {n.removeprefix(root): t for n, t in tensors.items()
               if n.startswith(root)}
      if any(n.startswith(("embedding/", "Transformer/")) for n in below):
        pool = ("map" if below.keys() & {"MAPHead_0/probe", "probe"} else
                "cls" if "cls" in below else "gap")
        return BIGVISION, base.vit_fields(
            pool, pool == "cls", gelu="tanh", epsilon=1e-6), _unstacked(below)
  return None


def _unstacked(tensors):
  """Splits tensors in which nn.scan keeps all blocks, one tensor a block."""
  out: dict[str, Any] = {}
  for name, tensor in tensors.items():
    match = re.fullmatch("Transformer/encoderblock/(.*)", name)
    if match and tensor.shape and tensor.shape[0] <= _MOST_BLOCKS:
      out |= {f"Transformer/encoderblock_{i}/{match[1]}": one
              for i, one in enumerate(tensor.unstacked())}
    else:
      out[name] = tensor
  return out
