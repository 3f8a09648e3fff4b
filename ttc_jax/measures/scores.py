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
import functools

import jax
import numpy as np
from scipy import stats

from ttc_jax import importance

SITE = "fc2"
SCORES = ("random", "l2", "taylor", "taylor_abs", "taylor_square", "block")
SIZES = (100, 250, 500)


def measure(trained):
  """Returns {score: {"correlation", "overlap", "energy", ...}}."""
  sums = _Sums(trained)
  return {name: _agreement(name, sums) for name in SCORES}


class _Sums:
  """What scores are made of, summed over parts of the images in random order.

  Attributes:
    half, count: where the second half begins; number of images.
    sizes: those of `SIZES` that are smaller than all.
  """

  def __init__(self, trained):
    split = trained.train
    images, labels = np.asarray(split.images[:]), split.labels
    order = np.random.default_rng(trained.seed).permutation(len(labels))
    self.trained, self.count = trained, len(order)
    self.half = -(-len(order) // 2)
    self.sizes = [n for n in SIZES if n < len(order)]
    # Parts, so that no image is seen twice for a score.
    ends = sorted({*self.sizes, self.half, self.count})
    of = (trained.model, trained.params, trained.buffers)
    self._parts = {name: {end: importance.total(
        name, *of, images[rows], labels[rows], (SITE,))
        for end, rows in zip(ends, np.split(order, ends[:-1]), strict=True)}
        for name in SCORES if name != "random"}

  def _of(self, name, begin, end):
    return [part for at, part in self._parts[name].items()
            if begin < at <= end]

  def scores(self, name, begin, end):
    """Scores (D,) of each block, from the images of an interval."""
    if name == "random":
      rng = np.random.default_rng((self.trained.seed, begin, end))
      return [rng.random(len(s)) for s in self.squares]
    summed = jax.tree.map(lambda *x: np.sum(x, 0), *self._of(name, begin, end))
    return importance.of_total(name, summed, self.trained.model,
                               self.trained.params, (SITE,))[SITE]

  @functools.cached_property
  def squares(self):
    """G^2 (D, D) of each block, from the second half."""
    return [np.square(np.sum(g, 0)) for g in zip(*(
        part[SITE] for part in self._of("block", self.half, self.count)),
        strict=True)]


def _agreement(name, sums):
  """What is measured of one score."""
  one, two = (sums.scores(name, *at) for at in (
      (0, sums.half), (sums.half, sums.count)))
  everything, squares = sums.scores(name, 0, sums.count), sums.squares
  width = len(squares[0])
  k = width // 8
  return {
      "correlation": [float(stats.spearmanr(a, b)[0])
                      for a, b in zip(one, two, strict=True)],
      "overlap": _overlap(one, two, k),
      "negative": float(np.mean([a < 0 for a in one])),
      "k": k,
      "energy": {str(n): float(np.mean([
          energy(g, importance.top_k(a, n))
          for g, a in zip(squares, one, strict=True)]))
          for n in _sizes_of_sets(width)},
      "sizes": {str(n): float(np.mean(_overlap(
          sums.scores(name, 0, n), everything, k))) for n in sums.sizes}}


def _sizes_of_sets(width):
  """K from D / 96 to D / 2, those of experiments/selection.py for D = 192."""
  return [max(1, width // n) for n in (96, 24, 8, 4, 2)]


def _overlap(one, two, k):
  return [np.intersect1d(importance.top_k(a, k), importance.top_k(b, k)).size
          / k for a, b in zip(one, two, strict=True)]


def energy(squares: np.ndarray, channels: np.ndarray) -> float:
  """Returns the share of the sum of (D, D) squares that a set's block has."""
  return float(squares[np.ix_(channels, channels)].sum() / squares.sum())
