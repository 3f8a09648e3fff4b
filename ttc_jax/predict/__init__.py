"""Classes and probabilities of images, from a bundle and its base weights.

  tuned = ttc_jax.predict.load("WORKDIR/runs/RUN/bundle")
  probabilities = tuned.predict(images)        # uint8 (N, S, S, 3) -> (N, C)
  logits = tuned.logits(images)                # before the softmax

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

  @property
  def classes(self) -> tuple[str, ...]:
    """Names of the classes, in the order of the columns of `logits`."""
    return tuple(self.meta["classes"])

  def logits(self, images: Any) -> np.ndarray:
    """Returns logits (N, C), float32, before the softmax.

    Column i is the class `classes[i]`.

    Args:
      images: a sequence of paths, PIL images and uint8 arrays (H, W, 3) of any
        size, or one array (N, H, W, 3); they are resized as in training.

    Raises:
      UserError: images of another type or shape.
      DataError: an image file that cannot be read.
    """
    pixels = self._prepared(images)
    if not len(pixels):
      return np.zeros((0, len(self.classes)), np.float32)
    with base.precision(self.meta):
      return evaluate.logits(self.model, self.params, self.buffers, pixels)

  def predict(self, images: Any) -> np.ndarray:
    """Returns probabilities (N, C), the softmax of `logits`."""
    return scipy.special.softmax(self.logits(images), axis=-1)

  def classify(self, images: Any) -> list[str]:
    """Returns the likeliest class of each image; images as of `logits`."""
    return [self.classes[i] for i in self.logits(images).argmax(-1)]

  def features(self, images: Any) -> np.ndarray:
    """Returns features (N, D) of the tuned backbone, before the head; images
    as of `logits`."""
    pixels = self._prepared(images)
    if not len(pixels):
      return np.zeros((0, self.model.backbone.width), np.float32)
    with base.precision(self.meta):
      return evaluate.features(self.model, self.params, self.buffers, pixels)

  def _prepared(self, images):
    return images_lib.prepare_all(
        images, self.meta["image_size"], self.meta["resample"])


def load(bundle: str, weights: str | None = None, merge: bool = True,
         frozen_dtype: str | None = None) -> Tuned:
  """Puts a bundle on its base weights, on every device.

  Args:
    bundle: the folder that a run wrote, or a file that `bundles` packed.
    weights: source of the base weights; None: the local file where the run
      found them. What a bundle names is never fetched.
    merge: folds the adapter into the backbone where that is exact, so that
      inference costs what it did before tuning.
    frozen_dtype: in which frozen kernels are kept: float32, bfloat16 or int8,
      see `ttc_jax.quantisation`; None: as when the bundle was tuned.

  Example:
    tuned = predict.load("WORKDIR/runs/RUN/bundle")
    best = tuned.predict(images).argmax(-1)
    names = [tuned.meta["classes"][i] for i in best]

  Raises:
    UserError: no such bundle, or other base weights than the run's.
  """
  loaded = on_base(bundle, weights, merge, frozen_dtype)
  return Tuned(loaded.model, parallel.replicate(loaded.params),
               parallel.replicate(loaded.buffers), loaded.meta)


def on_base(bundle: str, weights: str | None = None, merge: bool = True,
            frozen_dtype: str | None = None) -> LoadedModel:
  """`load`, with the parameters on the host."""
  saved = bundles.load(bundle)
  found = (base.check(bundle, saved.meta, open_source(weights)) if weights
           else base.named(bundle, saved.meta))
  module, params = base.load(bundle, saved.meta, found, frozen_dtype)
  return attach(bundle, saved, module, params, merge)
