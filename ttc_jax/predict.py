"""Classes and probabilities of images, from a bundle and its base weights.

  python -m ttc_jax.predict --bundle=WORKDIR/runs/RUN/bundle IMAGE...
"""
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ttc_jax import backbones, checkpoint, cli, evaluate, methods
from ttc_jax import parallel, trees
from ttc_jax.backbones import sources
from ttc_jax.errors import UserError
from ttc_jax.model import Model
from ttc_jax.tasks import images as images_lib

class Tuned(NamedTuple):
  """A tuned model: `tuned.predict(images)`.

  Attributes:
    params, selection: on every device.
    meta: the bundle's, among others `classes`, `image_size`, `resample`.
  """
  model: Model
  params: trees.Tree
  selection: trees.Tree
  meta: dict[str, Any]

  def predict(self, images: np.ndarray) -> np.ndarray:
    """uint8 images (N, S, S, 3) -> probabilities (N, C)."""
    logits = evaluate.logits(self.model, self.params, self.selection, images)
    return np.asarray(jax.nn.softmax(logits))


def load(bundle: str, weights: str | None = None,
         merge: bool = True) -> Tuned:
  """Puts a bundle on its base weights.

  Args:
    bundle: the folder that a run wrote.
    weights: source of the base weights; None: where the run found them.
    merge: folds the adapter into the backbone where that is exact, so that
      inference costs what it did before tuning.

  Raises:
    UserError: no such bundle, or other base weights than the run's.
  """
  saved = checkpoint.load_bundle(bundle)
  meta = saved.meta
  module, params = _base(bundle, meta, weights or meta["weights_source"])
  method = methods.load(
      meta["method"], ml_collections.ConfigDict(meta["options"]), module)
  params = checkpoint.overlay(
      {"backbone": params, "adapter": {}, "head": {}}, saved.tuned)
  selection, handlers = trees.unflatten(saved.selection), method.handlers
  if merge and method.merge:
    backbone = method.merge(params, selection, module)
    params = params | {"backbone": backbone, "adapter": {}}
    selection, handlers = {}, ()
  return Tuned(Model(module, meta["normalisation"], handlers),
               parallel.replicate(params), parallel.replicate(selection), meta)


def _base(bundle, meta, source):
  """The backbone that a bundle was tuned on, and its pretrained parameters."""
  fields = meta["fields"] | {"dtype": jnp.dtype(meta["dtype"])}
  if source == "random":
    module = backbones.make(meta["backbone"], meta["image_size"], **fields)
    return module, backbones.init(module)
  try:
    sha256 = sources.sha256(sources.locate(source))
  except UserError as error:
    raise UserError(f"{error}; give the base weights with --weights") from error
  if sha256 != meta["weights_sha256"]:
    raise UserError(
        f"bundle '{bundle}' was tuned on weights with sha256 "
        f"{meta['weights_sha256']}, but '{source}' has {sha256}; give the "
        "right file with --weights")
  return backbones.load(
      meta["backbone"], source, meta["image_size"], **fields)


def main(argv) -> None:
  paths = argv[1:]
  if not _BUNDLE.value or not paths:
    raise UserError("give --bundle=DIR and at least one image")
  tuned = load(_BUNDLE.value, _WEIGHTS.value)
  meta = tuned.meta
  images = np.stack([
      images_lib.resize(images_lib.read(path), meta["image_size"],
                        meta["resample"]) for path in paths])
  for path, probabilities in zip(paths, tuned.predict(images)):
    for i in np.argsort(-probabilities, kind="stable")[:_TOP.value]:
      print(f"{path}\t{meta['classes'][i]}\t{probabilities[i]:.4f}")


if __name__ == "__main__":  # no flags for those who import `load`
  _BUNDLE = flags.DEFINE_string("bundle", None, "folder of a finished run")
  _WEIGHTS = flags.DEFINE_string(
      "weights", None, "the base weights, if they moved since")
  _TOP = flags.DEFINE_integer("top", 1, "classes an image", lower_bound=1)
  cli.run(main)
