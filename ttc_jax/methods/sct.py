"""SCT (Zhao et al., 2023, arXiv 2309.08513): a K x K map on salient channels.

The K channels of the largest norm, on the model as it was pretrained, get a
K x K linear map with a bias. (TTC aligns the norms first and scores by the
loss.) The authors' module starts at random; here it starts at 0, and the model
unchanged, unless `scale_on_x` scales the channels themselves.
"""
import functools

import numpy as np

from ttc_jax import importance
from ttc_jax.errors import UserError, check_known
from ttc_jax.methods import TUNE_ADAPTER, Method, Stage, options, ttc

OPTIONS = ("k", "scale", "sct")
# The authors' sct_attn, sct_mlp and sct_qkv: the residual stream after MHSA,
# the MLP's output, q and v. Each is scored where it acts; their script scores
# sct_mlp on the residual stream after the MLP.
POSITIONS = {"attention": ("attention",), "mlp": ("fc2",), "qv": ("q", "v")}


def adapt_scaled(p, y, x):
  """`scale_on_x`: x'' = s x' + Linear(x')."""
  del x
  c, scale = p["channels"], p["scale"].astype(y.dtype)
  change = y[..., c] @ p["kernel"].astype(y.dtype) + p["bias"].astype(y.dtype)
  return y.at[..., c].set(scale * y[..., c] + change)


def prepare(context, *, sites, score, k, scale):
  # SCT's own score is of any feature map; the others are of linear layers.
  scored = sites if score == "class_l2" else tuple(
      ttc.SCORED_AT.get(s, s) for s in sites)
  scores = importance.score(
      score, context.model, context.params, context.buffers,
      context.images, context.labels, scored, context.seed)
  scores = {s: scores[at] for s, at in zip(sites, scored)}
  adapter = {s: {str(i): {"kernel": np.zeros((k, k), np.float32),
                          "bias": np.zeros(k, np.float32)}
                 for i in range(len(scores[s]))} for s in sites}
  buffers = {s: {str(i): {"channels": importance.top_k(score, k),
                            "scale": np.float32(scale)}
                   for i, score in enumerate(scores[s])} for s in sites}
  return adapter, buffers


def merge_scaled(params, buffers, backbone):
  """s x' + A x' + b = x' + (A + (s - 1) I) x' + b."""
  adapter, plain = {}, {}
  for site, blocks in params["adapter"].items():
    adapter[site], plain[site] = {}, {}
    for block, p in blocks.items():
      chosen = buffers[site][block]
      more = (np.asarray(chosen["scale"], np.float64) - 1) * np.eye(
          len(chosen["channels"]))
      adapter[site][block] = {**p, "kernel": np.asarray(p["kernel"]) + more}
      plain[site][block] = {**chosen, "scale": np.float64(1)}
  return ttc.merge(params | {"adapter": adapter}, plain, backbone)


def make(config, backbone) -> Method:
  c = config.sct
  check_known("sct.position", c.position, POSITIONS)
  check_known("sct.score", c.score, importance.SCORES)
  sites = POSITIONS[c.position]
  width = min(layer.width for layer in backbone.sites["fc2"])
  if not 1 <= config.k <= width:
    raise UserError(f"config.k is {config.k}; it selects among the {width} "
                    f"channels of this backbone, so give 1 to {width}")
  stream = c.position == "attention"
  exact = merge_scaled if c.scale_on_x else ttc.merge
  return Method(
      (Stage("sct", TUNE_ADAPTER, functools.partial(
          prepare, sites=sites, score=c.score, k=config.k,
          scale=config.scale)),),
      options=options(config, OPTIONS),
      handlers=tuple((s, adapt_scaled if c.scale_on_x else ttc.adapt)
                     for s in sites),
      merge=None if stream else exact,
      cannot_merge="it acts on the residual stream, after the addition"
      if stream else "")
