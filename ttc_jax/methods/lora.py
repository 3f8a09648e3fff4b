"""LoRA (Hu et al., 2022, Eq. 3): W + (alpha / r) B A for linear layers.

The paper adapts q and v; here any of q, k, v, proj, fc1, fc2.
"""
import functools

import flax.linen as nn
import jax
import ml_collections
import numpy as np

from ttc_jax import trees
from ttc_jax.errors import UserError, check_known
from ttc_jax.methods import (
  TUNE_ADAPTER,
  Context,
  Method,
  Stage,
  options,
  uniform,
)

OPTIONS = ("lora",)
SITES = ("q", "k", "v", "proj", "fc1", "fc2")


def low_rank(p: dict[str, jax.Array], y: jax.Array,
             x: jax.Array) -> jax.Array:
  """Returns y + s (x a) b, (B, N, D_out); a is (D_in, r), b (r, D_out).

  b starts at 0, so the model starts unchanged.
  """
  change = (x @ p["a"].astype(y.dtype)) @ p["b"].astype(y.dtype)
  return y + p["scale"].astype(y.dtype) * change


def init(rng: np.random.Generator, inputs: int, width: int,
         rank: int) -> trees.Tree:
  """As Microsoft's loralib: a uniform in +-1 / sqrt(D_in), b 0."""
  return {"a": uniform(rng, inputs ** -0.5, (inputs, rank)),
          "b": np.zeros((rank, width), np.float32)}


def prepare(context: Context, *, sites: tuple[str, ...], rank: int,
            alpha: float) -> tuple[trees.Tree, trees.Tree]:
  """Returns a and b for every block of the sites, and s = alpha / r."""
  rng = np.random.default_rng(context.seed)
  layers = context.model.backbone.sites
  adapter = {s: {str(i): init(rng, layer.inputs, layer.width, rank)
                 for i, layer in enumerate(layers[s])} for s in sites}
  buffers = {s: {i: {"scale": np.float32(alpha / rank)} for i in blocks}
             for s, blocks in adapter.items()}
  return adapter, buffers


def merge(params: trees.Tree, buffers: trees.Tree,
          backbone: nn.Module) -> trees.Tree:
  """Returns the backbone with W' = W + s a b, exactly."""
  flat = dict(trees.flatten(params["backbone"]))
  for site, blocks in params["adapter"].items():
    for block, p in blocks.items():
      name = f"{backbone.sites[site][int(block)].path}/kernel"
      change = np.asarray(p["a"], np.float64) @ np.asarray(p["b"], np.float64)
      scale = np.asarray(buffers[site][block]["scale"])
      value = np.asarray(flat[name], np.float64)
      flat[name] = (value + scale * change.reshape(value.shape)
                    ).astype(np.float32)
  return trees.unflatten(flat)


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Reads `config.lora`."""
  del backbone
  c = config.lora
  for site in c.sites:
    check_known("lora.sites", site, SITES)
  if c.rank < 1 or not c.sites:
    raise UserError(f"config.lora has rank {c.rank} and sites {c.sites}; give "
                    "a rank of 1 or more and at least one site")
  return Method(
      (Stage("lora", TUNE_ADAPTER, functools.partial(
          prepare, sites=tuple(c.sites), rank=c.rank, alpha=c.alpha)),),
      options=options(config, OPTIONS),
      handlers=tuple((site, low_rank) for site in c.sites), merge=merge)
