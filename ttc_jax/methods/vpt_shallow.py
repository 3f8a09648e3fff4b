"""VPT-Shallow (Jia et al., 2022, Eq. 4 and 5): prompts beside the tokens that
enter.

Prompts are inserted before the patches: after [CLS] and registers, if there
are any. A pooling over all patches, by mean or attention, leaves them out.
"""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ttc_jax import trees
from ttc_jax.errors import UserError
from ttc_jax.methods import (
  TUNE_ADAPTER,
  Context,
  Method,
  Stage,
  dropout,
  options,
  uniform,
)
from ttc_jax.taps import Handler

OPTIONS = ("vpt",)


def prompts(p: dict[str, jax.Array], y: jax.Array) -> jax.Array:
  """Returns the prompts for every example of y (B, N, D): (B, P, D).

  In training (p has a "key") dropout zeroes entries of each example.
  """
  x = p["prompts"].astype(y.dtype)
  return dropout(p, jnp.broadcast_to(x, (y.shape[0], *x.shape)))


# Cached, since compiled functions are found by their handlers.
@functools.cache
def insert(first: int) -> Handler:
  """Returns the handler that inserts prompts before token number `first`."""
  def handler(p, y, x):
    del x
    return jnp.concatenate([y[:, :first], prompts(p, y), y[:, first:]], 1)
  return handler


def leave_out(p: dict[str, jax.Array], y: jax.Array,
              x: jax.Array) -> jax.Array:
  """Returns the tokens that the pooling reads: (B, N, D) -> (B, len(keep), D).
  """
  del x
  return y[:, p["keep"]]


def init(rng: np.random.Generator, backbone: nn.Module,
         count: int) -> trees.Tree:
  """Draws prompts (P, D), uniform in +-sqrt(6 / (3 p^2 + D)), as KMnP/vpt."""
  layer = backbone.sites["embedding"][0]
  bound = (6 / (layer.inputs + layer.width)) ** 0.5
  return {"prompts": uniform(rng, bound, (count, layer.width))}


def last_site(backbone: nn.Module) -> tuple[str, str]:
  """Returns (site, block) of the tokens that the pooling reads."""
  return (("norm", "0") if backbone.norms["norm"]
          else ("block", str(backbone.depth - 1)))


def pooling(backbone: nn.Module, count: int) -> trees.Tree:
  """Returns the buffers that keep prompts out of a pooling over all patches.

  Empty where tokens before the patches alone are read, or without prompts.
  """
  if backbone.pool in ("cls", "distilled") or not count:
    return {}
  patches = (backbone.image_size // backbone.patch) ** 2
  site, block = last_site(backbone)
  keep = np.delete(np.arange(backbone.prefix + count + patches),
                   np.arange(backbone.prefix, backbone.prefix + count))
  return {site: {block: {"keep": keep}}}


def prepare(context: Context, *, count: int,
            rate: float) -> tuple[trees.Tree, trees.Tree]:
  """Returns prompts at the input, and their dropout rate."""
  backbone, rng = context.model.backbone, np.random.default_rng(context.seed)
  adapter = {"tokens": {"0": init(rng, backbone, count)}}
  buffers = {"tokens": {"0": {"dropout": np.float32(rate)}}}
  return adapter, buffers | pooling(backbone, count)


def check_takes_prompts(backbone: nn.Module) -> None:
  """Raises UserError for a backbone that takes no further tokens (Swin)."""
  if not backbone.takes_prompts:
    raise UserError("prompts are tokens beside the patches, but this "
                    "backbone's windows and mergings take a grid of patches "
                    "alone; choose another method, e.g. lora or ttc")


def check(config: ml_collections.ConfigDict, backbone: nn.Module) -> None:
  """Raises UserError for values of `config.vpt` that cannot be."""
  check_takes_prompts(backbone)
  c = config.vpt
  if c.prompts < 1 or not 0 <= c.dropout < 1:
    raise UserError(f"config.vpt has {c.prompts} prompts and dropout "
                    f"{c.dropout}; give 1 or more, and 0 to below 1")


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Reads `config.vpt`."""
  check(config, backbone)
  first = backbone.prefix
  return Method(
      (Stage("vpt", TUNE_ADAPTER, functools.partial(
          prepare, count=config.vpt.prompts, rate=config.vpt.dropout)),),
      options=options(config, OPTIONS),
      handlers=(("tokens", insert(first)),
                (last_site(backbone)[0], leave_out)),
      cannot_merge="prompts are tokens, not weights")
