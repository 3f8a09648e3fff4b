"""Adapter (AdaptFormer, Chen et al., 2022): a bottleneck beside the MLP.

Or after a sublayer:

  houlsby   after MHSA and after the MLP (Houlsby et al., 2019, Fig. 2)
  pfeiffer  after the MLP (Pfeiffer et al., 2021)
  parallel  beside the MLP, from its normalised input: AdaptFormer (Chen et
            al., 2022, Eq. 2 and 3; the authors' code leaves that norm out)
  noah      after the MLP and its drop-path, which so never drops the adapter
            (Zhang et al., 2022, as their code has it)

Serial adapters act on a branch's output, before the residual addition.
"""
from collections.abc import Callable
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
  check_rate,
  dropout,
  options,
  rate,
  uniform,
)
from ttc_jax.products import product
from ttc_jax.taps import Handler

OPTIONS = ("adapter",)
# {placement: (sites, what the bottleneck reads there)}.
PLACEMENTS = {
    "houlsby": (("proj", "fc2"), "output"),
    "pfeiffer": (("fc2",), "output"),
    "parallel": (("mlp",), "input"),
    "noah": (("block",), "branch"),
}
# Of an operation that made y of x. At "block", y = x + branch.
READS = {
    "input": lambda y, x: x,
    "output": lambda y, x: y,
    "branch": lambda y, x: y - x,
}
# GELUs are named as a backbone's are: `config.gelu`.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "exact": functools.partial(jax.nn.gelu, approximate=False),
    "tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def bottleneck(p: dict[str, jax.Array], x: jax.Array,
               activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Returns s (drop(activation(x W_down + b_down)) W_up + b_up), (B, N, D).

  drop is the dropout of training, if p has a rate.
  """
  def cast(name):
    return p[name].astype(x.dtype)
  h = dropout(p, activation(product(x, cast("down")) + cast("down_bias")))
  return cast("scale") * (product(h, cast("up")) + cast("up_bias"))


# Cached, since compiled functions are found by their handlers.
@functools.cache
def handler(activation: str, reads: str) -> Handler:
  """Returns `(p, y, x) -> y + bottleneck`.

  Args:
    activation: a key of `ACTIVATIONS`.
    reads: what the bottleneck reads, a key of `READS`.
  """
  def adapt(p, y, x):
    return y + bottleneck(p, READS[reads](y, x), ACTIVATIONS[activation])
  return adapt


def init(rng: np.random.Generator, width: int, inner: int) -> trees.Tree:
  """Initial parameters: `down` as LoRA's a, `up` 0, so the output is 0."""
  return {"down": uniform(rng, width ** -0.5, (width, inner)),
          "down_bias": np.zeros(inner, np.float32),
          "up": np.zeros((inner, width), np.float32),
          "up_bias": np.zeros(width, np.float32)}


def prepare(context: Context, *, sites: tuple[str, ...], width: int,
            scale: float, drop: float) -> tuple[trees.Tree, trees.Tree]:
  """Returns an adapter for every block of the sites; the scale, the dropout."""
  rng = np.random.default_rng(context.seed)
  layers = context.model.backbone.sites["fc2"]
  adapter = {site: {str(i): init(rng, layer.width, width)
                    for i, layer in enumerate(layers)} for site in sites}
  fixed = {"scale": np.float32(scale), **rate(drop)}
  buffers = {site: {i: dict(fixed) for i in adapter[site]} for site in sites}
  return adapter, buffers


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Reads `config.adapter`; a scale of None is the one of its paper."""
  del backbone
  c = config.adapter
  check_known("adapter.placement", c.placement, PLACEMENTS)
  check_known("adapter.activation", c.activation, ACTIVATIONS)
  check_rate("adapter.dropout", c.dropout)
  if c.width < 1:
    raise UserError(f"config.adapter.width is {c.width}; give 1 or more")
  sites, reads = PLACEMENTS[c.placement]
  published = 0.1 if c.placement == "parallel" else 1.0
  scale = published if c.scale is None else c.scale
  return Method(
      (Stage("adapter", TUNE_ADAPTER, functools.partial(
          prepare, sites=sites, width=c.width, scale=scale,
          drop=c.dropout)),),
      options=options(config, OPTIONS, adapter={"scale": scale}),
      handlers=tuple((s, handler(c.activation, reads)) for s in sites),
      cannot_merge="its activation is not linear")
