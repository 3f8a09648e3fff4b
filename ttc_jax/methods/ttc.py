"""TTC (Zhao et al., 2023, arXiv 2303.07910): align the norms, then adapt the
channels that matter to the task.

Stage 1 aligns the backbone to the task: the LayerNorms and the head (Eq. 4).
Then the Taylor score selects the K channels that matter (Eq. 6-10).
Stage 2 adapts them: a K x K linear map on the selected channels (Eq. 11).

Variants of the paper's tables, by configuration:
  joint one-stage (Table 3)      stage1=none, tune_norm=True
  without stage 1 (Table 3)      stage1=linear or none, tune_norm=False
  weight tuning (Table 7)        tune=rows: the selected rows of the kernel
  other scores (Table 5a)        score=random, l2, ...
"""
import functools

from absl import logging
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ttc_jax import importance, trees
from ttc_jax.errors import UserError, check_known
from ttc_jax.methods import (
  ALIGN,
  TUNE_ADAPTER,
  TUNE_HEAD,
  Context,
  Method,
  Stage,
  options,
)
from ttc_jax.optim import NORM
from ttc_jax.products import product

# Position of the map (Table 5c): the output of a branch, before the residual
# addition, where it folds into the linear layer; or the residual stream after
# the addition.
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

OPTIONS = ("k", "position", "blocks", "score", "scale", "bias", "stage1",
           "tune_norm", "tune", "adapter_lr", "stage2_lr")


def adapt(p: dict[str, jax.Array], y: jax.Array, x: jax.Array) -> jax.Array:
  """Eq. 11: x'' = x' + s Linear(x') takes the place of x' = y[channels].

  Args:
    p: kernel (K, K), channels (K,), scale s; bias (K,) or none.
    y: (B, N, D).
  """
  del x
  selected = jnp.take(y, p["channels"], axis=-1)
  change = product(selected, p["kernel"].astype(y.dtype))
  if "bias" in p:
    change = change + p["bias"].astype(y.dtype)
  scale = p["scale"].astype(y.dtype)
  return y.at[..., p["channels"]].add(scale * change)


def adapt_rows(p: dict[str, jax.Array], y: jax.Array,
               x: jax.Array) -> jax.Array:
  """Table 7: the rows w_i of the selected channels change by `kernel`.

  Args:
    p: kernel (D_in, K), channels (K,), scale s; bias (K,) or none.
    y: (B, N, D_out), the linear layer's output; x: (B, N, D_in), its input.
  """
  change = product(x, p["kernel"].astype(y.dtype))
  if "bias" in p:
    change = change + p["bias"].astype(y.dtype)
  return y.at[..., p["channels"]].add(p["scale"].astype(y.dtype) * change)


def select_channels(
    context: Context, *, sites: tuple[str, ...], score: str, k: int,
    blocks: int, scale: float, bias: bool,
    rows: bool) -> tuple[trees.Tree, trees.Tree]:
  """Returns maps that start at 0, and the K channels with the largest scores.

  Both for every site in the last `blocks` blocks. Raises RunError for a score
  that is not finite.
  """
  layers = context.model.backbone.sites
  # Stage 2's map acts on the insertion point itself, and so does `block`.
  scored = (sites if score == "block"
            else tuple(SCORED_AT[s] for s in sites))
  scores = importance.score(
      score, context.model, context.params, context.buffers,
      context.images, context.labels, scored, context.seed,
      context.batch_size)
  context.keep(scores)
  adapter: trees.Tree = {}
  buffers: trees.Tree = {}
  for site, at in zip(sites, scored, strict=True):
    adapter[site], buffers[site] = {}, {}
    depth = len(scores[at])
    for i in range(depth - blocks, depth):
      if importance.tied(scores[at][i], k):
        logging.warning("equal %s scores at the cut in block %d of '%s': the "
                        "lower index was taken", score, i, at)
      inputs = layers[site][i].inputs if rows else k
      adapter[site][str(i)] = {"kernel": np.zeros((inputs, k), np.float32)}
      if bias:
        adapter[site][str(i)]["bias"] = np.zeros(k, np.float32)
      buffers[site][str(i)] = {
          "channels": importance.top_k(scores[at][i], k),
          "scale": np.float32(scale)}
  return adapter, buffers


def merge(params: trees.Tree, buffers: trees.Tree, backbone: nn.Module,
          rows: bool = False) -> trees.Tree:
  """Folds the maps into the linear layers before them, exactly.

  W' = (I + s P^T A P) W and b' = (I + s P^T A P) b + s P^T c, with P the
  K x D selection matrix and c the map's own bias. Here W is a Flax kernel,
  the transpose of the paper's. Tuned rows: W' = W + s P^T A.
  """
  flat = dict(trees.flatten(params["backbone"]))
  for site, blocks in params["adapter"].items():
    for block, p in blocks.items():
      layer = backbone.sites[site][int(block)]
      fixed = buffers[site][block]
      channels = np.asarray(fixed["channels"])
      for leaf in ("kernel", "bias"):
        name = f"{layer.path}/{leaf}"
        value = np.asarray(flat[name], np.float64).reshape(-1, layer.width)
        change = np.asarray(p["kernel"], np.float64)
        if not rows:
          change = value[:, channels] @ change
        elif leaf == "bias":
          change = np.zeros(())
        if leaf == "bias":
          change = change + p.get("bias", 0)
        value = value.copy()
        value[:, channels] += fixed["scale"] * change
        flat[name] = value.reshape(flat[name].shape).astype(np.float32)
  return trees.unflatten(flat)


def resolve_k(config: ml_collections.ConfigDict, backbone: nn.Module,
              widths: list[int]) -> int:
  """Returns K, the paper's for config.k = 0: D / 8 of a ViT.

  Args:
    widths: D_out of the layers where K channels are selected.

  Raises:
    UserError: fewer channels than K.
  """
  k, width = config.k or backbone.default_k, min(widths)
  if not 1 <= k <= width:
    raise UserError(f"config.k is {k}; it selects among the {width} channels "
                    f"of this backbone, so give 1 to {width}, or 0 for the "
                    "paper's")
  return k


def resolve_blocks(config: ml_collections.ConfigDict, backbone: nn.Module,
                   depth: int) -> int:
  """Returns how many of the last blocks are adapted, the paper's for 0.

  Raises:
    UserError: the backbone has fewer blocks, `depth`.
  """
  blocks = config.blocks or backbone.default_blocks
  if not 1 <= blocks <= depth:
    raise UserError(f"config.blocks is {blocks}; this backbone has {depth} "
                    f"blocks, so give 1 to {depth}, or 0 for the paper's")
  return blocks


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Reads the keys of `OPTIONS`; `config.py` explains them."""
  check_known("position", config.position, POSITIONS)
  check_known("score", config.score, importance.SCORES)
  check_known("stage1", config.stage1, STAGE_1)
  check_known("tune", config.tune, ("channels", "rows"))
  sites = POSITIONS[config.position]
  layers = backbone.sites[SCORED_AT[sites[0]]]
  blocks = resolve_blocks(config, backbone, len(layers))
  k = resolve_k(config, backbone, [x.width for x in layers[-blocks:]])
  stream, rows = config.position.startswith("stream"), config.tune == "rows"
  if stream and rows:
    raise UserError("config.tune=rows changes a linear layer, but "
                    f"config.position={config.position} is the residual "
                    "stream; choose mlp, mhsa or both")
  prepare = functools.partial(
      select_channels, sites=sites, score=config.score, k=k, blocks=blocks,
      scale=config.scale, bias=config.bias, rows=rows)
  rules = ((NORM,) if config.tune_norm else ()) + TUNE_ADAPTER
  adapt_stage = Stage("adapt", rules, prepare, lr=config.stage2_lr)
  return Method(
      (*STAGE_1[config.stage1], adapt_stage),
      options=options(config, OPTIONS, k=k, blocks=blocks),
      handlers=tuple((site, adapt_rows if rows else adapt) for site in sites),
      merge=None if stream else functools.partial(merge, rows=rows),
      cannot_merge="it acts on the residual stream, after the addition"
      if stream else "")
