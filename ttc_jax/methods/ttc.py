"""TTC-Tuning (Zhao et al., 2023, arXiv 2303.07910).

Stage 1 aligns the backbone to the task: the LayerNorms and the head (Eq. 4).
In between, the Taylor score picks the K channels that matter (Eq. 6-10).
Stage 2 adapts them: a K x K linear map on the selected channels (Eq. 11).
"""
import functools

from absl import logging
import jax.numpy as jnp
import numpy as np

from ttc_jax import importance, trees
from ttc_jax.errors import UserError, check_known
from ttc_jax.methods import ALIGN, TUNE_HEAD, Method, Stage
from ttc_jax.optim import ADAPTER, FREEZE, HEAD, NORM

# Where the map acts, as in Table 5c: on the output of a branch, before the
# residual addition (then it folds into the linear layer before it), or on the
# residual stream after it.
POSITIONS = {
    "mlp": ("fc2",),
    "mhsa": ("proj",),
    "both": ("proj", "fc2"),
    "stream_mlp": ("block",),
    "stream_mhsa": ("attention",),
}
# The linear layer that last wrote to the feature map at a site.
SCORED_AT = {"fc2": "fc2", "proj": "proj", "block": "fc2", "attention": "proj"}

STAGE_1 = {"norm": (ALIGN,), "linear": (TUNE_HEAD,), "none": ()}

# Keys of the configuration that this method reads.
OPTIONS = ("k", "position", "blocks", "score", "scale", "bias", "stage1",
           "tune_norm")


def adapt(p, y, x):
  """Eq. 11: x'' = x' + s Linear(x') takes the place of x' = y[channels]."""
  del x
  picked = jnp.take(y, p["channels"], axis=-1)
  change = picked @ p["kernel"].astype(y.dtype)
  if "bias" in p:
    change = change + p["bias"].astype(y.dtype)
  scale = p["scale"].astype(y.dtype)
  return y.at[..., p["channels"]].add(scale * change)


def select_channels(context, *, sites, score, k, blocks, scale, bias):
  """The top K channels of every insertion point, and maps that start at 0."""
  scored = tuple(SCORED_AT[s] for s in sites)
  scores = importance.score(
      score, context.model, context.params, context.selection,
      context.images, context.labels, scored, context.seed)
  adapter, selection = {}, {}
  for site, at in zip(sites, scored):
    tied = importance.ties(scores[at], k)
    if tied:
      logging.warning(
          "equal %s scores at the cut in %d blocks of '%s': the lower index "
          "was taken", score, tied, at)
    channels = importance.top_k(scores[at], k)[-blocks:]
    selection[site] = {"channels": channels,
                       "scale": np.full(blocks, scale, np.float32)}
    adapter[site] = {"kernel": np.zeros((blocks, k, k), np.float32)}
    if bias:
      adapter[site]["bias"] = np.zeros((blocks, k), np.float32)
  return adapter, selection


def merge(params, selection, backbone):
  """Folds the maps into the linear layers before them, exactly.

  W' = (I + s P^T A P) W and b' = (I + s P^T A P) b + s P^T c, with P the
  K x D selection and c the map's own bias; here W is a Flax kernel, the
  transpose of the paper's.
  """
  flat = dict(trees.flatten(params["backbone"]))
  for site, adapter in params["adapter"].items():
    blocks, width, path = backbone.sites[site]
    stacked = len(adapter["kernel"])
    for i in range(stacked):
      channels = selection[site]["channels"][i]
      scale = selection[site]["scale"][i]
      name = path.format(blocks - stacked + i)
      for leaf in ("kernel", "bias"):
        value = np.asarray(flat[f"{name}/{leaf}"], np.float64)
        rows = value.reshape(-1, width)
        change = rows[:, channels] @ np.asarray(adapter["kernel"][i], float)
        if leaf == "bias" and "bias" in adapter:
          change = change + adapter["bias"][i]
        rows = rows.copy()
        rows[:, channels] += scale * change
        flat[f"{name}/{leaf}"] = rows.reshape(value.shape).astype(np.float32)
  return trees.unflatten(flat)


def make(config, backbone) -> Method:
  """Reads the keys of `OPTIONS`; `config.py` explains them."""
  check_known("position", config.position, POSITIONS)
  check_known("score", config.score, importance.SCORES)
  check_known("stage1", config.stage1, STAGE_1)
  sites = POSITIONS[config.position]
  at = backbone.sites[SCORED_AT[sites[0]]]
  k, depth, width = config.k, at.blocks, at.width
  blocks = config.blocks or depth
  if not 1 <= k <= width:
    raise UserError(f"config.k is {k}; it selects among the {width} channels "
                    f"of this backbone, so give 1 to {width}")
  if not 1 <= blocks <= depth:
    raise UserError(f"config.blocks is {blocks}; this backbone has {depth} "
                    f"blocks, so give 1 to {depth}, or 0 for all")
  prepare = functools.partial(
      select_channels, sites=sites, score=config.score, k=k, blocks=blocks,
      scale=config.scale, bias=config.bias)
  tuned = (ADAPTER, NORM, HEAD) if config.tune_norm else (ADAPTER, HEAD)
  adapt_stage = Stage("adapt", (*tuned, FREEZE), prepare)
  stream = config.position.startswith("stream")
  return Method(
      (*STAGE_1[config.stage1], adapt_stage),
      options={key: config[key] for key in OPTIONS},
      handlers=tuple((site, adapt) for site in sites),
      merge=None if stream else merge,
      cannot_merge="it acts on the residual stream, after the addition"
      if stream else "")
