"""Classes and probabilities of images, from a bundle and its base weights.

  tuned = ttc_jax.predict.load("WORKDIR/runs/RUN/bundle")
  probabilities = tuned.predict(images)        # uint8 (N, S, S, 3) -> (N, C)

  base.py       the base weights of a bundle: which file, the right one, loaded
  loaded.py     a bundle on its base: checked, merged where that is exact
  __main__.py   the command
"""
from typing import Any, NamedTuple

import numpy as np
import scipy.special

from ttc_jax import bundles, evaluate, parallel, trees
from ttc_jax.model import Model
from ttc_jax.predict import base
from ttc_jax.predict.loaded import LoadedModel, attach
from ttc_jax.tasks import images as images_lib
from ttc_jax.weights import open_source

__all__ = ["LoadedModel", "Tuned", "attach", "base", "load", "on_base"]


class Tuned(NamedTuple):
  """A tuned model: `tuned.predict(images)`.

  Attributes:
    params, buffers: on every device.
    meta: the bundle's metadata, among others `classes`, `image_size`,
      `resample`.
  """
  model: Model
  params: trees.Tree
  buffers: trees.Tree
  meta: dict[str, Any]

  def predict(self, images: Any) -> np.ndarray:
    """Returns probabilities (N, C).

    Args:
      images: a sequence of paths, PIL images and uint8 arrays (H, W, 3) of any
        size, or one array (N, H, W, 3); they are resized as in training.

    Raises:
      UserError: images of another type or shape.
      DataError: an image file that cannot be read.
    """
    images = images_lib.prepare_all(
        images, self.meta["image_size"], self.meta["resample"])
    if not len(images):
      return np.zeros((0, len(self.meta["classes"])), np.float32)
    logits = evaluate.logits(self.model, self.params, self.buffers, images)
    return scipy.special.softmax(logits, axis=-1)


def load(bundle: str, weights: str | None = None,
         merge: bool = True) -> Tuned:
  """Puts a bundle on its base weights, on every device.

  Args:
    bundle: the folder that a run wrote, or a file that `bundles` packed.
    weights: source of the base weights; None: the local file where the run
      found them. What a bundle names is never fetched.
    merge: folds the adapter into the backbone where that is exact, so that
      inference costs what it did before tuning.

  Example:
    tuned = predict.load("WORKDIR/runs/RUN/bundle")
    best = tuned.predict(images).argmax(-1)
    names = [tuned.meta["classes"][i] for i in best]

  Raises:
    UserError: no such bundle, or other base weights than the run's.
  """
  loaded = on_base(bundle, weights, merge)
  return Tuned(loaded.model, parallel.replicate(loaded.params),
               parallel.replicate(loaded.buffers), loaded.meta)


def on_base(bundle: str, weights: str | None = None,
            merge: bool = True) -> LoadedModel:
  """`load`, with the parameters on the host."""
  saved = bundles.load(bundle)
  found = (base.check(bundle, saved.meta, open_source(weights)) if weights
           else base.named(bundle, saved.meta))
  module, params = base.load(bundle, saved.meta, found)
  return attach(bundle, saved, module, params, merge)
