"""LayerNorm (Zhao et al., 2023, Eq. 4): TTC's stage 1 alone.

Scale and shift of every LayerNorm, and the head.
"""
import flax.linen as nn
import ml_collections
import numpy as np

from ttc_jax import trees
from ttc_jax.methods import ALIGN, Method

# The linear layers whose input is a norm's output.
READERS = {"norm1": ("q", "k", "v"), "norm2": ("fc1",)}


def merge(params: trees.Tree, buffers: trees.Tree,
          backbone: nn.Module) -> trees.Tree:
  """Folds the blocks' norms into the linear layers that read them, exactly.

  W' = W diag(gamma), b' = b + W beta, gamma' = 1, beta' = 0. The final norm
  stays: no linear layer of the backbone reads it.
  """
  del buffers
  flat = dict(trees.flatten(params["backbone"]))
  for norm, readers in READERS.items():
    for i, path in enumerate(backbone.norms[norm]):
      gamma, beta = (np.asarray(flat[f"{path}/{leaf}"], np.float64)
                     for leaf in ("scale", "bias"))
      for layer in (backbone.sites[site][i] for site in readers):
        kernel, bias = (f"{layer.path}/{leaf}" for leaf in ("kernel", "bias"))
        W = np.asarray(flat[kernel], np.float64).reshape(layer.inputs, -1)
        b = np.asarray(flat[bias], np.float64) + (beta @ W).reshape(
            flat[bias].shape)
        W = (gamma[:, None] * W).reshape(flat[kernel].shape)
        flat[kernel], flat[bias] = W.astype(np.float32), b.astype(np.float32)
      flat[f"{path}/scale"] = np.ones_like(flat[f"{path}/scale"])
      flat[f"{path}/bias"] = np.zeros_like(flat[f"{path}/bias"])
  return trees.unflatten(flat)


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Needs no options."""
  del config
  if backbone.pads:
    return Method((ALIGN,), cannot_merge="windows are padded with zeros after "
                  "the norm, which a folded shift would change")
  return Method((ALIGN,), merge=merge)
