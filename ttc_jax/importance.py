"""Which channels matter to a task: scores and the top K of them.

The score of channel i of a linear layer y = W x + b (Sec. 3.2) is
  S_i = sum_j I(w_ij),  I(w_ij) = dL/dw_ij * w_ij          (Eq. 7 and 10)
with L the cross-entropy summed over the training set. It is the derivative of
L by a factor on row i, at 1: the gradient of the backbone's parameter mask.

  taylor         as printed: the signed sum
  taylor_abs     S_i = sum_j |I(w_ij)|
  taylor_square  S_i = sum_j I(w_ij)^2, the square that Eq. 6 has
  l2             the norm of y_i over all examples and tokens
  random         a seeded draw
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ttc_jax import parallel, taps, trees
from ttc_jax.errors import RunError, check_known
from ttc_jax.model import Model

Scores = dict[str, np.ndarray]


def score(name: str, model: Model, params: trees.Tree, selection: trees.Tree,
          images: np.ndarray, labels: np.ndarray, sites: tuple[str, ...],
          seed: int = 0, batch_size: int = 64) -> Scores:
  """Returns {site: (L, D_out)} float32 over a whole data set, under pmap.

  Args:
    name: of a score above.
    params, selection: on every device, see `parallel.replicate`.
    images: uint8 (N, S, S, 3); labels: (N,).
    seed: of the random score; the others are deterministic.

  Raises:
    UserError: unknown score. RunError: a score that is not finite.
  """
  check_known("score", name, SCORES)
  shapes = {s: model.backbone.sites[s][:2] for s in sites}
  if name == "random":
    rng = np.random.default_rng(seed)
    return {s: rng.random(shape, np.float32) for s, shape in shapes.items()}
  # A bfloat16 sum over a batch would reorder the channels.
  model = model._replace(backbone=model.backbone.clone(dtype=jnp.float32))
  batch_size = parallel.round_up(min(batch_size, len(images)))
  step = _accumulate(SCORES[name], model, sites)
  total = None
  for start in range(0, len(images), batch_size):
    x, y = (a[start:start + batch_size] for a in (images, labels))
    weight = parallel.pad_to(np.ones(len(x), np.float32), batch_size)
    weight[len(x):] = 0
    batch = parallel.shard((parallel.pad_to(x, batch_size),
                            parallel.pad_to(y, batch_size), weight))
    part = step(params, selection, *batch)
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  total = parallel.unreplicate(total)
  scores = _reduce(name, total, model, params, sites)
  for site, value in scores.items():
    if not np.isfinite(value).all():
      raise RunError(
          f"the {name} score of site {site!r} is not finite: the model before "
          "the selection has diverged; lower config.lr")
  return scores


def _sum_loss(model, params, selection, batch, mask=None, tap=None):
  images, labels, weight = batch
  logits = model.logits(params, images, selection, mask=mask, extra_tap=tap)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return (losses * weight).sum()


def _mask_gradient(model, sites, params, selection, batch):
  """dL/dm at m = 1: {site: (L, D_out)}."""
  ones = {s: jnp.ones(model.backbone.sites[s][:2]) for s in sites}
  return jax.grad(
      lambda mask: _sum_loss(model, params, selection, batch, mask))(ones)


def kernel_paths(model: Model, site: str) -> list[str]:
  """Names of the kernels of a site, block by block."""
  blocks, _, path = model.backbone.sites[site]
  return [f"{path.format(i)}/kernel" for i in range(blocks)]


def _kernels(model, params, sites):
  flat = trees.flatten(params["backbone"])
  return {s: [flat[p] for p in kernel_paths(model, s)] for s in sites}


def _kernel_gradient(model, sites, params, selection, batch):
  """dL/dW of the sites: {site: [block's kernel, ...]}."""
  flat = trees.flatten(params["backbone"])

  def loss(kernels):
    new = {p: k for s in sites
           for p, k in zip(kernel_paths(model, s), kernels[s])}
    backbone = trees.unflatten(flat | new)
    return _sum_loss(model, params | {"backbone": backbone}, selection, batch)
  return jax.grad(loss)(_kernels(model, params, sites))


def _square_features(model, sites, params, selection, batch):
  """Sums of y_i^2 over examples and tokens: {site: (L, D_out)}."""
  images, _, weight = batch
  model = model._replace(backbone=model.backbone.clone(every_token=True))
  seen = {}
  model.features(params, images, selection,
                 extra_tap=taps.record(sites, seen))
  return {s: jnp.stack([
      jnp.einsum("b,bnd->d", weight, jnp.square(seen[s, i].astype(jnp.float32)))
      for i in range(model.backbone.sites[s].blocks)]) for s in sites}


SCORES = {
    "taylor": _mask_gradient,
    "taylor_abs": _kernel_gradient,
    "taylor_square": _kernel_gradient,
    "l2": _square_features,
    "random": None,
}


@functools.lru_cache(maxsize=None)
def _accumulate(fn, model, sites):
  def step(params, selection, *batch):
    return parallel.psum(fn(model, sites, params, selection, batch))
  return parallel.pmap(step)


def _reduce(name, total, model, params, sites):
  if name == "taylor":
    return total
  if name == "l2":
    return jax.tree.map(np.sqrt, total)
  weights = _kernels(model, parallel.unreplicate(params), sites)
  power = {"taylor_abs": np.abs, "taylor_square": np.square}[name]
  return {s: np.stack([
      power(g * w).reshape(-1, model.backbone.sites[s].width).sum(0)
      for g, w in zip(total[s], weights[s])]) for s in sites}


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
  """(L, D) -> the indices of the K largest of each row, (L, K), ascending.

  Among equal scores the lower index wins, so a selection never depends on
  the sorting algorithm.
  """
  order = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
  return np.sort(order, axis=-1).astype(np.int32)


def ties(scores: np.ndarray, k: int) -> int:
  """In how many rows an equal score was left out at the cut."""
  ordered = -np.sort(-scores, axis=-1)
  if k >= scores.shape[-1]:
    return 0
  return int((ordered[:, k - 1] == ordered[:, k]).sum())
