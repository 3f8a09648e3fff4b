"""Gain (an example, 2026): a factor on every channel of the MLP's output.

Copied to `ttc_jax/methods/gain.py` this file is the method "gain".
"""
import flax.linen as nn
import jax
import ml_collections
import numpy as np

from ttc_jax import trees
from ttc_jax.methods import TUNE_ADAPTER, Context, Method, Stage

SITE = "fc2"  # the last linear layer of an MLP


def multiply(p: dict[str, jax.Array], y: jax.Array, x: jax.Array) -> jax.Array:
  """The handler: y = fc2(x) becomes y * gain."""
  del x
  return y * p["gain"].astype(y.dtype)


def prepare(context: Context) -> tuple[trees.Tree, trees.Tree]:
  """Factors of 1, so that the model starts unchanged; no buffers."""
  layers = context.model.backbone.sites[SITE]
  return {SITE: {str(i): {"gain": np.ones(layer.width, np.float32)}
                 for i, layer in enumerate(layers)}}, {}


def merge(params: trees.Tree, buffers: trees.Tree,
          backbone: nn.Module) -> trees.Tree:
  """Folds the factors into the layer before them: W' = W diag(g), b' = g b."""
  del buffers
  flat = dict(trees.flatten(params["backbone"]))
  for block, p in params["adapter"][SITE].items():
    layer = backbone.sites[SITE][int(block)]
    for leaf in ("kernel", "bias"):
      name = f"{layer.path}/{leaf}"
      flat[name] = np.asarray(flat[name]) * np.asarray(p["gain"])
  return trees.unflatten(flat)


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Needs no options."""
  del config, backbone
  return Method((Stage("gain", TUNE_ADAPTER, prepare),),
                handlers=((SITE, multiply),), merge=merge)
