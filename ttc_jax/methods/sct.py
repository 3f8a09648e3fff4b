"""SCT (Zhao et al., 2023, arXiv 2309.08513): a K x K map on salient channels.

The K channels with the largest norm in the pretrained model get a K x K linear
map with a bias. (TTC aligns the norms first, and scores by the loss.) All
blocks of a ViT are adapted, of a Swin the last half of stage 3 (of Swin-B 9
blocks) and stage 4, as in the authors' code.

What differs from their code (showlab/SCT at 384cecb): its module starts at
random (deviation 0.02), here at 0, so that the model starts unchanged unless
`scale_on_x` scales the channels themselves. Its ViT ignores `scale` and
`scale_on_x`, which the paper and their Swin have: it computes what
`config.scale=1.0`, `config.sct.scale_on_x=False` compute here.
"""
import functools

import flax.linen as nn
import jax
import ml_collections
import numpy as np

from ttc_jax import importance, trees
from ttc_jax.errors import check_known
from ttc_jax.methods import TUNE_ADAPTER, Context, Method, Stage, options, ttc
from ttc_jax.products import product

OPTIONS = ("k", "blocks", "scale", "sct")
# The authors' sct_attn, sct_mlp and sct_qkv: the residual stream after MHSA,
# the MLP's output, q and v. Each is scored where it acts; their script scores
# sct_mlp on the residual stream after the MLP.
POSITIONS = {"attention": ("attention",), "mlp": ("fc2",), "qv": ("q", "v")}


def adapt_scaled(p: dict[str, jax.Array], y: jax.Array,
                 x: jax.Array) -> jax.Array:
  """`scale_on_x`: x'' = s x' + Linear(x') takes the place of x' = y[channels].
  """
  del x
  c, scale = p["channels"], p["scale"].astype(y.dtype)
  change = (product(y[..., c], p["kernel"].astype(y.dtype))
            + p["bias"].astype(y.dtype))
  return y.at[..., c].set(scale * y[..., c] + change)


def prepare(context: Context, *, sites: tuple[str, ...], score: str, k: int,
            blocks: int, scale: float) -> tuple[trees.Tree, trees.Tree]:
  """Returns maps that start at 0, and the K channels with the largest scores.

  Both for every site in the last `blocks` blocks.
  """
  # class_l2 and block are scores of what the map acts on; the others are of
  # the linear layer before it.
  scored = sites if score in ("class_l2", "block") else tuple(
      ttc.SCORED_AT.get(s, s) for s in sites)
  scores = importance.score(
      score, context.model, context.params, context.buffers,
      context.images, context.labels, scored, context.seed,
      context.batch_size)
  context.keep(scores)
  scores = {s: scores[at] for s, at in zip(sites, scored, strict=True)}
  last = {s: list(enumerate(scores[s]))[-blocks:] for s in sites}
  adapter = {s: {str(i): {"kernel": np.zeros((k, k), np.float32),
                          "bias": np.zeros(k, np.float32)}
                 for i, _ in last[s]} for s in sites}
  buffers = {s: {str(i): {"channels": importance.top_k(values, k),
                          "scale": np.float32(scale)}
                 for i, values in last[s]} for s in sites}
  return adapter, buffers


def merge_scaled(params: trees.Tree, buffers: trees.Tree,
                 backbone: nn.Module) -> trees.Tree:
  """Folds `adapt_scaled`: s x' + A x' + b = x' + (A + (s - 1) I) x' + b."""
  adapter: trees.Tree = {}
  plain: trees.Tree = {}
  for site, blocks in params["adapter"].items():
    adapter[site], plain[site] = {}, {}
    for block, p in blocks.items():
      fixed = buffers[site][block]
      more = (np.asarray(fixed["scale"], np.float64) - 1) * np.eye(
          len(fixed["channels"]))
      adapter[site][block] = {**p, "kernel": np.asarray(p["kernel"]) + more}
      plain[site][block] = {**fixed, "scale": np.float64(1)}
  return ttc.merge(params | {"adapter": adapter}, plain, backbone)


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Reads `config.sct`, `config.k`, `config.blocks` and `config.scale`."""
  c = config.sct
  check_known("sct.position", c.position, POSITIONS)
  check_known("sct.score", c.score, importance.SCORES)
  sites = POSITIONS[c.position]
  layers = backbone.sites["fc2"]
  blocks = ttc.resolve_blocks(config, backbone, len(layers))
  k = ttc.resolve_k(config, backbone, [x.width for x in layers[-blocks:]])
  stream = c.position == "attention"
  exact = merge_scaled if c.scale_on_x else ttc.merge
  return Method(
      (Stage("sct", TUNE_ADAPTER, functools.partial(
          prepare, sites=sites, score=c.score, k=k, blocks=blocks,
          scale=config.scale)),),
      options=options(config, OPTIONS, k=k, blocks=blocks),
      handlers=tuple((s, adapt_scaled if c.scale_on_x else ttc.adapt)
                     for s in sites),
      merge=None if stream else exact,
      cannot_merge="it acts on the residual stream, after the addition"
      if stream else "")
