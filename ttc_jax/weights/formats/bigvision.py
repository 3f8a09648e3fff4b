"""Big Vision's ViT, also as one of two towers (SigLIP), and that of
vision_transformer.

Both are `.npz`, with or without the optimiser's state beside the parameters.
"""
import re
from typing import Any

from ttc_jax.errors import UserError
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
    ignored=r"(head|pre_logits)/(kernel|bias)",
    refused={r"(conv_root|block\d+)/.*": "a ResNet below the Transformer"})


# Where a file has the tree, with the optimiser beside or without.
TREES = ("", "params/", "target/", "opt/target/")
# The tree itself, or one of two towers.
_ROOTS = tuple(tree + tower for tower in ("", "img/") for tree in TREES)
# The other tower, its temperature and bias, and the state of the training.
_BESIDE = (r"((params|opt/target|target)/)?(txt/.*|t|b)|"
           r"(opt|extra|state|chrono)/.*|step|rng")


def recognise(tensors, config):
  del config
  roots = [root for root in _ROOTS if any(
      n.startswith((f"{root}embedding/", f"{root}Transformer/"))
      for n in tensors)]
  if not roots:
    return None
  if len(roots) > 1:
    raise UserError(f"the weights hold {len(roots)} vision models, below "
                    f"{' and '.join(map(repr, roots))}: save one alone")
  below = {n.removeprefix(roots[0]): t for n, t in tensors.items()
           if n.startswith(roots[0])}
  pool = ("map" if below.keys() & {"MAPHead_0/probe", "probe"} else
          "cls" if "cls" in below else "gap")
  # vision_transformer's position embedding covers the class token, Big Vision's
  # is added before it is inserted.
  of_all = "Transformer/posembed_input/pos_embedding" in below
  return base.Found(
      BIGVISION, base.vit_fields(pool, pool == "cls", gelu="tanh",
                                 epsilon=1e-6),
      _unstacked(below) if roots[0] else _without(_unstacked(below)),
      beside=_BESIDE, positioned=(int(of_all and pool == "cls"),),
      normalisation=base.HALF)


def _without(tensors):
  """Without what is beside a tree that has no root of its own."""
  return {n: t for n, t in tensors.items() if not re.fullmatch(_BESIDE, n)}


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
