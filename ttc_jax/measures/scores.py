"""How far scores depend on the images (Eq. 6 to 10), at "fc2".

The training images are cut into two halves at random. For each score:

  correlation  Spearman's, between the halves, by block
  overlap      share of the top D / 8 channels that both halves select
  energy       {K: share of G's energy on the second half that lies in the
               block of the K channels selected on the first}; G = dL/dM, see
               `importance`, the mean over blocks
  negative     share of negative scores
  k            D / 8
  sizes        {N: overlap of the selection from N images with that from all}

Taken of a run without an adapter (linear, layernorm): the model before the
selection. "random" shows what chance gives.
"""
import jax
import numpy as np
from scipy import stats

from ttc_jax import importance

SITE = "fc2"
SCORES = ("random", "l2", "taylor", "taylor_abs", "taylor_square", "block")
SIZES = (100, 250, 500)


def measure(trained):
  """Returns {score: {"correlation", "overlap", "energy", ...}}."""
  split = trained.train
  images, labels = np.asarray(split.images[:]), split.labels
  order = np.random.default_rng(trained.seed).permutation(len(labels))
  half = -(-len(order) // 2)
  sizes = [n for n in SIZES if n < len(order)]
  # Sums over parts, so that no image is seen twice for a score.
  ends = sorted({*sizes, half, len(order)})
  of = (trained.model, trained.params, trained.buffers)
  sums = {name: {end: importance.total(
      name, *of, images[rows], labels[rows], (SITE,))
      for end, rows in zip(ends, np.split(order, ends[:-1]), strict=True)}
      for name in SCORES if name != "random"}

  def scores(name, begin, end):
    if name == "random":
      rng = np.random.default_rng((trained.seed, begin, end))
      return [rng.random(width) for _ in squares]
    parts = [part for at, part in sums[name].items() if begin < at <= end]
    summed = jax.tree.map(lambda *x: np.sum(x, 0), *parts)
    return importance.of_total(
        name, summed, trained.model, trained.params, (SITE,))[SITE]
  squares = [np.square(np.sum(g, 0)) for g in zip(
      *(part[SITE] for at, part in sums["block"].items() if at > half),
      strict=True)]
  width = len(squares[0])
  found = {}
  for name in SCORES:
    one, two = scores(name, 0, half), scores(name, half, len(order))
    everything = scores(name, 0, len(order))
    found[name] = {
        "correlation": [float(stats.spearmanr(a, b)[0])
                        for a, b in zip(one, two, strict=True)],
        "overlap": _overlap(one, two, width // 8),
        "negative": float(np.mean([a < 0 for a in one])),
        "k": width // 8,
        "energy": {str(k): float(np.mean([
            energy(g, importance.top_k(a, k))
            for g, a in zip(squares, one, strict=True)]))
            for k in _sizes_of_sets(width)},
        "sizes": {str(n): float(np.mean(_overlap(
            scores(name, 0, n), everything, width // 8)))
            for n in sizes}}
  return found


def _sizes_of_sets(width):
  """K from D / 96 to D / 2, those of experiments/selection.py for D = 192."""
  return [max(1, width // n) for n in (96, 24, 8, 4, 2)]


def _overlap(one, two, k):
  return [np.intersect1d(importance.top_k(a, k), importance.top_k(b, k)).size
          / k for a, b in zip(one, two, strict=True)]


def energy(squares: np.ndarray, channels: np.ndarray) -> float:
  """Returns the share of the sum of (D, D) squares that a set's block has."""
  return float(squares[np.ix_(channels, channels)].sum() / squares.sum())
