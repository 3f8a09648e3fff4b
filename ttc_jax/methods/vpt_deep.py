"""VPT-Deep (Jia et al., 2022, Eq. 7): new prompts in every block.

Those that leave a block are replaced by the next block's.
"""
import functools

import numpy as np

from ttc_jax.methods import TUNE_ADAPTER, Method, Stage, options
from ttc_jax.methods import vpt_shallow

OPTIONS = ("vpt",)


# Cached, since compiled functions are found by their handlers.
@functools.cache
def replace(first: int):
  """The handler that overwrites the tokens from number `first` on."""
  def handler(p, y, x):
    del x
    count = len(p["prompts"])
    return y.at[:, first:first + count].set(vpt_shallow.prompts(p, y))
  return handler


def prepare(context, *, count, dropout):
  backbone, rng = context.model.backbone, np.random.default_rng(context.seed)
  later = [str(i) for i in range(1, backbone.depth)]
  adapter = {
      "tokens": {"0": vpt_shallow.init(rng, backbone, count)},
      "input": {i: vpt_shallow.init(rng, backbone, count) for i in later}}
  rate = {"dropout": np.float32(dropout)}
  buffers = {"tokens": {"0": rate}, "input": {i: rate for i in later}}
  return adapter, buffers | vpt_shallow.pooling(backbone, count)


def make(config, backbone) -> Method:
  vpt_shallow.check(config, backbone)
  first = backbone.prefix
  return Method(
      (Stage("vpt", TUNE_ADAPTER, functools.partial(
          prepare, count=config.vpt.prompts, dropout=config.vpt.dropout)),),
      options=options(config, OPTIONS),
      handlers=(("tokens", vpt_shallow.insert(first)),
                ("input", replace(first)),
                (vpt_shallow.last_site(backbone)[0], vpt_shallow.leave_out)),
      cannot_merge="prompts are tokens, not weights")
