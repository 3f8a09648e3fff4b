"""LoRA (Hu et al., 2022, Eq. 3): W + (alpha / r) B A for linear layers.

The paper adapts q and v; here any of q, k, v, proj, fc1, fc2. `lora.shared`
gives q, k and v of a block one A and a B each, as NOAH's code does (Zhang et
al., 2022).
"""
import functools

import flax.linen as nn
import ml_collections
import numpy as np

from ttc_jax import trees
from ttc_jax.errors import UserError, check_known
from ttc_jax.methods import (
  TUNE_ADAPTER,
  Context,
  Method,
  Stage,
  check_rate,
  dropout,
  options,
  rate,
  uniform,
)
from ttc_jax.products import product
from ttc_jax.taps import Handler, Shared

OPTIONS = ("lora",)
SITES = ("q", "k", "v", "proj", "fc1", "fc2")
SHARE = ("q", "k", "v")  # linear layers of one input


# Cached, since compiled functions are found by their handlers.
@functools.cache
def low_rank(up: str) -> Handler:
  """Returns `(p, y, x) -> y + s (drop(x) a) b`.

  a is (D_in, r), b (r, D_out), s the scale; drop is the dropout of training,
  if p has a rate. b starts at 0, so the model starts unchanged.

  Args:
    up: the name of b in p.
  """
  def handler(p, y, x):
    h = product(dropout(p, x), p["a"].astype(y.dtype))
    return y + p["scale"].astype(y.dtype) * product(h, p[up].astype(y.dtype))
  return handler


def shared(sites: tuple[str, ...]) -> tuple[tuple[str, Handler | Shared], ...]:
  """Returns handlers of sites that share a: b is called b_q at site q.

  The parameters belong to the first site.
  """
  first, *others = sites
  return ((first, low_rank(f"b_{first}")),
          *((s, Shared(first, low_rank(f"b_{s}"))) for s in others))


def init(rng: np.random.Generator, inputs: int, width: int,
         rank: int) -> trees.Tree:
  """As Microsoft's loralib: a uniform in +-1 / sqrt(D_in), b 0."""
  return {"a": uniform(rng, inputs ** -0.5, (inputs, rank)),
          "b": np.zeros((rank, width), np.float32)}


def init_shared(rng: np.random.Generator, inputs: int, widths: dict[str, int],
                rank: int) -> trees.Tree:
  """As `init`, with one a for the sites of {site: D_out}."""
  return {"a": uniform(rng, inputs ** -0.5, (inputs, rank)),
          **{f"b_{site}": np.zeros((rank, width), np.float32)
             for site, width in widths.items()}}


def prepare(context: Context, *, sites: tuple[str, ...], rank: int,
            alpha: float, drop: float,
            share: bool) -> tuple[trees.Tree, trees.Tree]:
  """Returns a and b for every block of the sites; s = alpha / r, the dropout.
  """
  rng = np.random.default_rng(context.seed)
  layers = context.model.backbone.sites
  if share:
    adapter = {sites[0]: {
        str(i): init_shared(rng, layer.inputs,
                            {s: layers[s][i].width for s in sites}, rank)
        for i, layer in enumerate(layers[sites[0]])}}
  else:
    adapter = {s: {str(i): init(rng, layer.inputs, layer.width, rank)
                   for i, layer in enumerate(layers[s])} for s in sites}
  fixed = {"scale": np.float32(alpha / rank), **rate(drop)}
  buffers = {s: {i: dict(fixed) for i in blocks}
             for s, blocks in adapter.items()}
  return adapter, buffers


def merge(params: trees.Tree, buffers: trees.Tree,
          backbone: nn.Module) -> trees.Tree:
  """Returns the backbone with W' = W + s a b, exactly."""
  flat = dict(trees.flatten(params["backbone"]))
  for owner, blocks in params["adapter"].items():
    for block, p in blocks.items():
      for leaf in (leaf for leaf in p if leaf != "a"):
        site = leaf.removeprefix("b_") if leaf != "b" else owner
        name = f"{backbone.sites[site][int(block)].path}/kernel"
        change = (np.asarray(p["a"], np.float64)
                  @ np.asarray(p[leaf], np.float64))
        scale = np.asarray(buffers[owner][block]["scale"])
        value = np.asarray(flat[name], np.float64)
        flat[name] = (value + scale * change.reshape(value.shape)
                      ).astype(np.float32)
  return trees.unflatten(flat)


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Reads `config.lora`."""
  del backbone
  c = config.lora
  sites = tuple(c.sites)
  for site in sites:
    check_known("lora.sites", site, SITES)
  if c.rank < 1 or not sites:
    raise UserError(f"config.lora has rank {c.rank} and sites {sites}; give "
                    "a rank of 1 or more and at least one site")
  if c.shared and not {*sites} <= {*SHARE}:
    raise UserError(f"config.lora.shared needs sites with one input, of q, k, "
                    f"v; config.lora.sites is {sites}")
  check_rate("lora.dropout", c.dropout)
  return Method(
      (Stage("lora", TUNE_ADAPTER, functools.partial(
          prepare, sites=sites, rank=c.rank, alpha=c.alpha, drop=c.dropout,
          share=c.shared)),),
      options=options(config, OPTIONS),
      handlers=shared(sites) if c.shared else tuple(
          (site, low_rank("b")) for site in sites), merge=merge)
