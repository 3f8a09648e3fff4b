"""Does the first order agree with what removing a channel does (Eq. 6, 7)?

At "fc2" of every block, for 16 channels drawn at random: the true change of
the training loss when row i of the kernel is removed, L(0) - L, and the first
order's prediction of it, -S_i with S_i of Eq. 10. Sums over the same 250
images.

  images: number of them
  predicted, true: [[of each channel], of each block]
  spearman: between them, by block; squared: between S_i^2 and the square of
  the true change, as Eq. 6 has it
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from ttc_jax import evaluate, importance, parallel

SITE, CHANNELS, IMAGES = "fc2", 16, 250
ONCE = True


def measure(trained):
  """Returns {"images", "predicted", "true", "spearman", "squared"}."""
  split = trained.train
  rows = np.random.default_rng(trained.seed).permutation(
      len(split.labels))[:IMAGES]
  images, labels = np.asarray(split.images[:])[rows], split.labels[rows]
  scores = importance.score(
      "taylor", trained.model, trained.params, trained.buffers, images, labels,
      (SITE,))[SITE]
  rng = np.random.default_rng(trained.seed)
  drawn = [np.sort(rng.choice(len(s), min(CHANNELS, len(s)), replace=False))
           for s in scores]
  model = trained.model
  whole = _loss(model, trained, images, labels, _ones(scores))
  true = [[_loss(model, trained, images, labels, _without(scores, block, i))
           - whole for i in channels] for block, channels in enumerate(drawn)]
  predicted = [(-s[channels]).tolist()
               for s, channels in zip(scores, drawn, strict=True)]
  return {
      "images": len(labels), "predicted": predicted, "true": true,
      "spearman": [_spearman(p, t) for p, t in zip(predicted, true,
                                                   strict=True)],
      "squared": [_spearman(np.square(p), np.square(t))
                  for p, t in zip(predicted, true, strict=True)]}


def _spearman(a, b):
  return float(stats.spearmanr(a, b)[0])


def _ones(scores):
  return [np.ones(len(s), np.float32) for s in scores]


def _without(scores, block, channel):
  """The mask that removes one row of one block's kernel."""
  mask = _ones(scores)
  mask[block][channel] = 0
  return mask


def _loss(model, trained, images, labels, mask):
  """The cross-entropy summed over images, with a mask on the rows."""
  mask = parallel.replicate({SITE: mask})
  losses = evaluate.over(
      lambda x, y: _losses(model)(
          trained.params, trained.buffers, mask, x, y),
      (images, labels), len(labels))
  return float(np.asarray(losses, np.float64).sum())


@functools.cache
def _losses(model):
  """The pmapped cross-entropy of each image; computed in true float32: what
  a channel changes is small beside what fewer bits do."""
  model = model._replace(backbone=model.backbone.clone(dtype=jnp.float32))

  def fn(params, buffers, mask, images, labels):
    with jax.default_matmul_precision("highest"):
      logits = model.logits(params, images, buffers, mask=mask)
    return -jnp.take_along_axis(
        jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
  return parallel.pmap_rows(fn)
