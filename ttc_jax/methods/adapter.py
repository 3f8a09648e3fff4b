"""Adapter (AdaptFormer, Chen et al., 2022): a bottleneck beside the MLP.

Or after a sublayer:

  houlsby   after MHSA and after the MLP (Houlsby et al., 2019, Fig. 2)
  pfeiffer  after the MLP (Pfeiffer et al., 2021)
  parallel  beside the MLP, from its normalised input: AdaptFormer (Chen et
            al., 2022, Eq. 2 and 3; the authors' code leaves that norm out)

Serial adapters act on a branch's output, before the residual addition.
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
from ttc_jax.taps import Handler

OPTIONS = ("adapter",)
PLACEMENTS = {"houlsby": ("proj", "fc2"), "pfeiffer": ("fc2",),
              "parallel": ("mlp",)}
ACTIVATIONS = {
    "relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x)}


def bottleneck(p: dict[str, jax.Array], x: jax.Array,
               activation) -> jax.Array:
  """Returns s (activation(x W_down + b_down) W_up + b_up), (B, N, D)."""
  def cast(name):
    return p[name].astype(x.dtype)
  h = activation(x @ cast("down") + cast("down_bias"))
  return cast("scale") * (h @ cast("up") + cast("up_bias"))


# Cached, since compiled functions are found by their handlers.
@functools.cache
def handler(activation: str, parallel: bool) -> Handler:
  """Returns `(p, y, x) -> y + bottleneck(x or y)`.

  Args:
    activation: one of `ACTIVATIONS`.
    parallel: True: the bottleneck reads the input x of the operation; False:
      its output y.
  """
  def adapt(p, y, x):
    return y + bottleneck(p, x if parallel else y, ACTIVATIONS[activation])
  return adapt


def init(rng: np.random.Generator, width: int, inner: int) -> trees.Tree:
  """Initial parameters: `down` as LoRA's a, `up` 0, so the output is 0."""
  return {"down": uniform(rng, width ** -0.5, (width, inner)),
          "down_bias": np.zeros(inner, np.float32),
          "up": np.zeros((inner, width), np.float32),
          "up_bias": np.zeros(width, np.float32)}


def prepare(context: Context, *, sites: tuple[str, ...], width: int,
            scale: float) -> tuple[trees.Tree, trees.Tree]:
  """Returns an adapter for every block of the sites, and the scale s."""
  rng = np.random.default_rng(context.seed)
  layers = context.model.backbone.sites["fc2"]
  adapter = {site: {str(i): init(rng, layer.width, width)
                    for i, layer in enumerate(layers)} for site in sites}
  buffers = {site: {str(i): {"scale": np.float32(scale)}
                    for i in range(len(layers))} for site in sites}
  return adapter, buffers


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Reads `config.adapter`; a scale of None is the one of its paper."""
  del backbone
  c = config.adapter
  check_known("adapter.placement", c.placement, PLACEMENTS)
  check_known("adapter.activation", c.activation, ACTIVATIONS)
  if c.width < 1:
    raise UserError(f"config.adapter.width is {c.width}; give 1 or more")
  sites, parallel = PLACEMENTS[c.placement], c.placement == "parallel"
  scale = c.scale if c.scale is not None else 0.1 if parallel else 1.0
  return Method(
      (Stage("adapter", TUNE_ADAPTER, functools.partial(
          prepare, sites=sites, width=c.width, scale=scale)),),
      options=options(config, OPTIONS, adapter={"scale": scale}),
      handlers=tuple((s, handler(c.activation, parallel)) for s in sites),
      cannot_merge="its activation is not linear")
