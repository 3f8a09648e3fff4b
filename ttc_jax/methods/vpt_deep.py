"""VPT-Deep (Jia et al., 2022, Eq. 7): new prompts in every block.

The next block's prompts replace those that leave a block.
"""
import functools

import flax.linen as nn
import ml_collections
import numpy as np

from ttc_jax import trees
from ttc_jax.methods import (
  TUNE_ADAPTER,
  Context,
  Method,
  Stage,
  options,
  vpt_shallow,
)
from ttc_jax.taps import Handler

OPTIONS = ("vpt",)


# Cached, since compiled functions are found by their handlers.
@functools.cache
def replace(first: int) -> Handler:
  """Returns the handler that overwrites the tokens from number `first` on."""
  def handler(p, y, x):
    del x
    count = len(p["prompts"])
    return y.at[:, first:first + count].set(vpt_shallow.prompts(p, y))
  return handler


def prepare(context: Context, *, count: int,
            rate: float) -> tuple[trees.Tree, trees.Tree]:
  """Returns prompts for every block, and their dropout rate."""
  backbone, rng = context.model.backbone, np.random.default_rng(context.seed)
  later = [str(i) for i in range(1, backbone.depth)]
  adapter = {
      "tokens": {"0": vpt_shallow.init(rng, backbone, count)},
      "input": {i: vpt_shallow.init(rng, backbone, count) for i in later}}
  dropout = {"dropout": np.float32(rate)}
  buffers = {"tokens": {"0": dropout}, "input": {i: dropout for i in later}}
  return adapter, buffers | vpt_shallow.pooling(backbone, count)


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Reads `config.vpt`."""
  vpt_shallow.check(config, backbone)
  first = backbone.prefix
  return Method(
      (Stage("vpt", TUNE_ADAPTER, functools.partial(
          prepare, count=config.vpt.prompts, rate=config.vpt.dropout)),),
      options=options(config, OPTIONS),
      handlers=(("tokens", vpt_shallow.insert(first)),
                ("input", replace(first)),
                (vpt_shallow.last_site(backbone)[0], vpt_shallow.leave_out)),
      cannot_merge="prompts are tokens, not weights")
