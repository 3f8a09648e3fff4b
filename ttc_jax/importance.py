"""Importance of channels to a task: scores, and the K largest.

The score of channel i of a linear layer y = W x + b (Sec. 3.2) is
  S_i = sum_j I(w_ij),  I(w_ij) = dL/dw_ij * w_ij          (Eq. 7 and 10)
with L the cross-entropy summed over the training set. It is the derivative of
L with respect to a factor on row i, at 1: the gradient of the backbone's mask.

  taylor         as printed: the signed sum
  taylor_abs     S_i = sum_j |I(w_ij)|
  taylor_square  S_i = sum_j I(w_ij)^2, the square that Eq. 6 has
  l2             the norm of y_i over all examples and tokens
  class_l2       that norm over the patch tokens of a class, averaged over the
                 classes (SCT's; of any site, not only of linear layers)
  block          rank in the order in which `peel` keeps channels: the K last
                 ones carry the most of the gradient that stage 2 can use
  random         a seeded draw

`block` is ours. With a full map M at the insertion point, x + x M, the gradient
G = dL/dM at M = 0 has, up to the bias, the Taylor score as its diagonal:
G_ij = sum over examples and tokens of x_i dL/dx_j. Stage 2 trains the K x K
block of M on the selected channels, so a set S is worth sum_{i,j in S} G_ij^2.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ttc_jax import parallel, quantisation, taps, trees
from ttc_jax.errors import RunError, check_known
from ttc_jax.model import Model
from ttc_jax.products import product
from ttc_jax.tasks.images import Images

Scores = dict[str, list[np.ndarray]]


def score(name: str, model: Model, params: trees.Tree, buffers: trees.Tree,
          images: Images, labels: np.ndarray, sites: tuple[str, ...],
          seed: int = 0, batch_size: int = 64) -> Scores:
  """Returns the scores {site: [(D_out,) of each block]}, float32.

  Args:
    name: a key of `SCORES`.
    params, buffers: on every device, see `parallel.replicate`.
    images: uint8 (N, S, S, 3).
    labels: (N,).
    seed: of the random score; the others are deterministic.
    batch_size: changes the memory needed, and the scores by rounding only.

  Raises:
    UserError: unknown score.
    RunError: a score that is not finite.

  Example:
    scores = importance.score(
        "taylor", model, parallel.replicate(params), {}, images, labels,
        sites=("fc2",))
    channels = importance.top_k(scores["fc2"][0], 96)
  """
  check_known("score", name, SCORES)
  if name == "random":
    rng = np.random.default_rng(seed)
    return {s: [rng.random(layer.width, np.float32)
                for layer in model.backbone.sites[s]] for s in sites}
  return of_total(name, total(name, model, params, buffers, images, labels,
                              sites, batch_size), model, params, sites)


def total(name: str, model: Model, params: trees.Tree, buffers: trees.Tree,
          images: Images, labels: np.ndarray, sites: tuple[str, ...],
          batch_size: int = 64) -> trees.Tree:
  """Returns the sum over images of which `of_total` makes a score.

  Sums of parts of a set add up to that of the set. Arguments as of `score`;
  "random" has none.
  """
  return _sum(SCORES[name], model, params, buffers, images, labels, sites,
              batch_size)


def of_total(name: str, summed: trees.Tree, model: Model, params: trees.Tree,
             sites: tuple[str, ...]) -> Scores:
  """Returns the scores that a sum over images stands for, as `score`."""
  scores = _reduce(name, summed, model, params, sites)
  for site, values in scores.items():
    if not all(np.isfinite(value).all() for value in values):
      raise RunError(
          f"the {name} score of site {site!r} is not finite: the model before "
          "the selection has diverged; lower config.lr")
  return scores


def map_gradient(model: Model, params: trees.Tree, buffers: trees.Tree,
                 images: Images, labels: np.ndarray,
                 sites: tuple[str, ...], batch_size: int = 64) -> Scores:
  """Returns G = dL/dM at M = 0 of y + y M: {site: [(D, D) of each block]}.

  Arguments as of `score`. The diagonal is the Taylor score, up to the bias.
  """
  return _sum(_map_gradient, model, params, buffers, images, labels, sites,
              batch_size)


def _sum(fn, model, params, buffers, images, labels, sites, batch_size):
  """The sum of `fn` over all images and devices, on the host."""
  # A bfloat16 sum over a batch would reorder the channels; so could products
  # in fewer bits, which are the default of accelerators.
  model = model._replace(
      backbone=model.backbone.clone(dtype=jnp.float32, drop_path=0.0))
  batch_size = parallel.round_up(min(batch_size, len(images)))
  step = _accumulate(fn, model, sites)
  total = None
  for start in range(0, len(images), batch_size):
    batch = (parallel.shard_rows(x, start, batch_size)
             for x in (images, labels))
    inside = np.arange(start, start + batch_size) < len(images)
    part = step(params, buffers, *batch,
                parallel.shard(inside.astype(np.float32)))
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  return parallel.unreplicate(total)


def _sum_loss(model, params, buffers, batch, mask=None, tap=None):
  images, labels, weight = batch
  logits = model.logits(
      params, images, buffers, mask=mask, extra_tap=tap, train=True)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return (losses * weight).sum()


def _mask_gradient(model, sites, params, buffers, batch):
  """dL/dm at m = 1."""
  ones = {s: [jnp.ones(layer.width) for layer in model.backbone.sites[s]]
          for s in sites}
  return jax.grad(
      lambda mask: _sum_loss(model, params, buffers, batch, mask))(ones)


def kernel_paths(model: Model, site: str) -> list[str]:
  """Returns the names of a site's kernels, one for each block."""
  return [f"{layer.path}/kernel" for layer in model.backbone.sites[site]]


def _kernels(model, params, sites):
  """The sites' kernels, float32 however they are kept."""
  flat = trees.flatten(quantisation.restore(params["backbone"]))
  return {s: [flat[p] for p in kernel_paths(model, s)] for s in sites}


def _kernel_gradient(model, sites, params, buffers, batch):
  """dL/dW of the sites: {site: [block's kernel, ...]}."""
  flat = trees.flatten(params["backbone"])

  def loss(kernels):
    new = {p: k for s in sites
           for p, k in zip(kernel_paths(model, s), kernels[s], strict=True)}
    backbone = trees.unflatten(flat | new)
    return _sum_loss(model, params | {"backbone": backbone}, buffers, batch)
  return jax.grad(loss)(_kernels(model, params, sites))


def _features(model, sites, params, buffers, images):
  """{site: [(B, N, D) of each block]}, float32."""
  model = model._replace(backbone=model.backbone.clone(every_token=True))
  seen: dict[tuple[str, int], jax.Array] = {}
  model.features(params, images, buffers, extra_tap=taps.record(sites, seen))
  return {s: [y.astype(jnp.float32) for (site, _), y in sorted(seen.items())
              if site == s] for s in sites}


def _map_gradient(model, sites, params, buffers, batch):
  """G = dL/dM at M = 0 of y + y M: {site: [(D, D) of each block]}."""
  shapes = jax.eval_shape(
      lambda images: _recorded(model, sites, params, buffers, images), batch[0])
  zeros = {at: jnp.zeros((y.shape[-1],) * 2) for at, y in shapes.items()}

  def loss(maps):
    def tap(site, block, y, x):
      del x
      at = f"{site}/{block}"
      return y + product(y, maps[at]) if at in maps else y
    return _sum_loss(model, params, buffers, batch, tap=tap)
  gradient = jax.grad(loss)(zeros)
  return {s: [gradient[f"{s}/{i}"] for i in range(model.backbone.depth)]
          for s in sites}


def _recorded(model, sites, params, buffers, images):
  seen: dict[tuple[str, int], jax.Array] = {}
  model.features(params, images, buffers, extra_tap=taps.record(sites, seen))
  return {f"{site}/{block}": y for (site, block), y in seen.items()}


def _squares(model, sites, params, buffers, batch):
  """Sums of y_i^2 over examples and tokens: (D,) each."""
  images, _, weight = batch
  features = _features(model, sites, params, buffers, images)
  return jax.tree.map(
      lambda y: jnp.einsum("b,bnd->d", weight, jnp.square(y)), features)


def _class_squares(model, sites, params, buffers, batch):
  """Sums of y_i^2 over the patch tokens of each class: (C, D) each."""
  images, labels, weight = batch
  classes = params["head"]["bias"].shape[-1]
  members = jax.nn.one_hot(labels, classes) * weight[:, None]
  first = model.backbone.prefix
  features = _features(model, sites, params, buffers, images)
  return jax.tree.map(
      lambda y: jnp.einsum("bc,bnd->cd", members, jnp.square(y[:, first:])),
      features)


SCORES = {
    "taylor": _mask_gradient,
    "taylor_abs": _kernel_gradient,
    "taylor_square": _kernel_gradient,
    "l2": _squares,
    "class_l2": _class_squares,
    "block": _map_gradient,
    "random": None,
}


@functools.cache
def _accumulate(fn, model, sites):
  def step(params, buffers, *batch):
    with jax.default_matmul_precision("highest"):
      return parallel.psum(fn(model, sites, params, buffers, batch))
  return parallel.pmap(step)


def _reduce(name, total, model, params, sites):
  if name == "taylor":
    return total
  if name == "block":
    return jax.tree.map(lambda g: peel(np.square(g)), total)
  if name == "l2":
    return jax.tree.map(np.sqrt, total)
  if name == "class_l2":
    return jax.tree.map(lambda x: np.sqrt(x[x.any(1)]).mean(0), total)
  weights = _kernels(model, parallel.unreplicate(params), sites)
  power = {"taylor_abs": np.abs, "taylor_square": np.square}[name]
  return {s: [
      power(g * w).reshape(-1, layer.width).sum(0)
      for g, w, layer in zip(total[s], weights[s], model.backbone.sites[s],
                             strict=True)]
      for s in sites}


def peel(energy: np.ndarray) -> np.ndarray:
  """Returns ranks (D,), float32: the K highest are a set with much energy.

  The energy of a set S is sum_{i,j in S} of `energy`. Starting from all
  channels, the one without which the rest keeps the most is dropped: the one
  with the least sum of its row and column among what is left. The first to go
  has rank 0. Of equal channels the higher index goes first.

  Args:
    energy: (D, D), not negative.
  """
  energy = np.asarray(energy, np.float64)
  diagonal = energy.diagonal()
  loss = energy.sum(0) + energy.sum(1) - diagonal
  ranks = np.empty(len(energy), np.float32)
  for rank in range(len(energy)):
    last = len(loss) - 1 - int(np.argmin(loss[::-1]))
    ranks[last] = rank
    loss -= energy[last] + energy[:, last]
    loss[last] = np.inf
  return ranks


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
  """Returns the indices of the K largest of (D,) scores: int32 (K,), ascending.

  Among equal scores the lower index wins, so the result does not depend on the
  sorting algorithm.
  """
  return np.sort(np.argsort(-scores, kind="stable")[:k]).astype(np.int32)


def tied(scores: np.ndarray, k: int) -> bool:
  """Returns whether a score equal to the K-th largest was left out."""
  ordered = -np.sort(-scores)
  return k < len(scores) and ordered[k - 1] == ordered[k]
