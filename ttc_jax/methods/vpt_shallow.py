"""VPT-Shallow (Jia et al., 2022, Eq. 4 and 5): prompts beside the tokens that
enter.

They stand after [CLS] and registers, or first where there is none; a pooling of
all patches, the mean or attention, leaves them out.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ttc_jax.errors import UserError
from ttc_jax.methods import TUNE_ADAPTER, Method, Stage, options, uniform

OPTIONS = ("vpt",)


def prompts(p, y):
  """(P, D) -> (B, P, D), in training some entries of each example dropped."""
  x = p["prompts"].astype(y.dtype)
  x = jnp.broadcast_to(x, (y.shape[0], *x.shape))
  if "key" in p and "dropout" in p:
    keep = 1 - p["dropout"]
    kept = jax.random.bernoulli(p["key"], keep, x.shape)
    x = jnp.where(kept, x / keep, 0).astype(y.dtype)
  return x


# Cached, since compiled functions are found by their handlers.
@functools.cache
def insert(first: int):
  """The handler that puts prompts before token number `first`."""
  def handler(p, y, x):
    del x
    return jnp.concatenate([y[:, :first], prompts(p, y), y[:, first:]], 1)
  return handler


def leave_out(p, y, x):
  """Only the tokens that the pooling is to see."""
  del x
  return y[:, p["keep"]]


def init(rng, backbone, count):
  """Uniform within sqrt(6 / (3 p^2 + D)), as KMnP/vpt."""
  layer = backbone.sites["embedding"][0]
  bound = (6 / (layer.inputs + layer.width)) ** 0.5
  return {"prompts": uniform(rng, bound, (count, layer.width))}


def last_site(backbone) -> tuple[str, str]:
  """(site, block) of what the pooling reads."""
  return (("norm", "0") if backbone.norms["norm"]
          else ("block", str(backbone.depth - 1)))


def pooling(backbone, count):
  """The buffers that keep prompts out of a pooling of all patches."""
  if backbone.pool in ("cls", "distilled") or not count:
    return {}
  patches = (backbone.image_size // backbone.patch) ** 2
  site, block = last_site(backbone)
  keep = np.delete(np.arange(backbone.prefix + count + patches),
                   np.arange(backbone.prefix, backbone.prefix + count))
  return {site: {block: {"keep": keep}}}


def prepare(context, *, count, dropout):
  backbone, rng = context.model.backbone, np.random.default_rng(context.seed)
  adapter = {"tokens": {"0": init(rng, backbone, count)}}
  buffers = {"tokens": {"0": {"dropout": np.float32(dropout)}}}
  return adapter, buffers | pooling(backbone, count)


def check_takes_prompts(backbone):
  """A method whose prompts are tokens: on Swin it is another idea."""
  if not backbone.takes_prompts:
    raise UserError("prompts are tokens beside the patches, but this "
                    "backbone's windows and mergings take a grid of patches "
                    "alone; choose another method, e.g. lora or ttc")


def check(config, backbone):
  check_takes_prompts(backbone)
  c = config.vpt
  if c.prompts < 1 or not 0 <= c.dropout < 1:
    raise UserError(f"config.vpt has {c.prompts} prompts and dropout "
                    f"{c.dropout}; give 1 or more, and 0 to below 1")


def make(config, backbone) -> Method:
  check(config, backbone)
  first = backbone.prefix
  return Method(
      (Stage("vpt", TUNE_ADAPTER, functools.partial(
          prepare, count=config.vpt.prompts, dropout=config.vpt.dropout)),),
      options=options(config, OPTIONS),
      handlers=(("tokens", insert(first)),
                (last_site(backbone)[0], leave_out)),
      cannot_merge="prompts are tokens, not weights")
