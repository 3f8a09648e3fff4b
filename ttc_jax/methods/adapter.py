"""Adapter (AdaptFormer, Chen et al., 2022): a bottleneck beside the MLP.

Or after a sublayer:

  houlsby   after MHSA and after the MLP (Houlsby et al., 2019, Fig. 2)
  pfeiffer  after the MLP (Pfeiffer et al., 2021)
  parallel  beside the MLP, from its normalised input: AdaptFormer (Chen et
            al., 2022, Eq. 2 and 3; the authors' code leaves that norm out)

Serial adapters act on a branch's output, before the residual addition.
"""
import functools

import jax
import numpy as np

from ttc_jax.errors import UserError, check_known
from ttc_jax.methods import TUNE_ADAPTER, Method, Stage, options, uniform

OPTIONS = ("adapter",)
PLACEMENTS = {"houlsby": ("proj", "fc2"), "pfeiffer": ("fc2",),
              "parallel": ("mlp",)}
ACTIVATIONS = {
    "relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x)}


def bottleneck(p, x, activation):
  """s up(activation(down(x)))."""
  cast = lambda name: p[name].astype(x.dtype)
  h = activation(x @ cast("down") + cast("down_bias"))
  return cast("scale") * (h @ cast("up") + cast("up_bias"))


# Cached, since compiled functions are found by their handlers.
@functools.cache
def handler(activation: str, parallel: bool):
  """`(p, y, x) -> y + bottleneck`, of x beside a layer or of y after it."""
  def adapt(p, y, x):
    return y + bottleneck(p, x if parallel else y, ACTIVATIONS[activation])
  return adapt


def init(rng, width, inner):
  """down as LoRA's, up 0: the adapter starts as nothing."""
  return {"down": uniform(rng, width ** -0.5, (width, inner)),
          "down_bias": np.zeros(inner, np.float32),
          "up": np.zeros((inner, width), np.float32),
          "up_bias": np.zeros(width, np.float32)}


def prepare(context, *, sites, width, scale):
  rng = np.random.default_rng(context.seed)
  layers = context.model.backbone.sites["fc2"]
  adapter = {site: {str(i): init(rng, layer.width, width)
                    for i, layer in enumerate(layers)} for site in sites}
  buffers = {site: {str(i): {"scale": np.float32(scale)}
                      for i in range(len(layers))} for site in sites}
  return adapter, buffers


def make(config, backbone) -> Method:
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
      options=options(config, OPTIONS),
      handlers=tuple((s, handler(c.activation, parallel)) for s in sites),
      cannot_merge="its activation is no linear map")
