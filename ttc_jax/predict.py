"""Classes and probabilities of images, from a bundle and its base weights.

  python -m ttc_jax.predict --bundle=WORKDIR/runs/RUN/bundle IMAGE...
"""
from typing import Any, NamedTuple

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import scipy.special

from ttc_jax import backbones, bundles, checkpoint, cli, evaluate, methods
from ttc_jax import parallel, taps, trees
from ttc_jax.errors import UserError
from ttc_jax.model import Model
from ttc_jax.tasks import images as images_lib
from ttc_jax.weights import sources


class Tuned(NamedTuple):
  """A tuned model: `tuned.predict(images)`.

  Attributes:
    params, buffers: on every device.
    meta: the bundle's, among others `classes`, `image_size`, `resample`.
  """
  model: Model
  params: trees.Tree
  buffers: trees.Tree
  meta: dict[str, Any]

  def predict(self, images: np.ndarray) -> np.ndarray:
    """uint8 images (N, S, S, 3) -> probabilities (N, C)."""
    images = images_lib.check_batch(images, self.meta["image_size"])
    if not len(images):
      return np.zeros((0, len(self.meta["classes"])), np.float32)
    logits = evaluate.logits(self.model, self.params, self.buffers, images)
    return scipy.special.softmax(logits, axis=-1)


class LoadedModel(NamedTuple):
  """A bundle on its base weights, on the host.

  Attributes:
    meta: the bundle's.
    cannot_merge: why the adapter is none to fold into the weights, if so.
  """
  model: Model
  params: trees.Tree
  buffers: trees.Tree
  meta: dict[str, Any]
  cannot_merge: str


def load(bundle: str, weights: str | None = None,
         merge: bool = True) -> Tuned:
  """Puts a bundle on its base weights.

  Args:
    bundle: the folder that a run wrote, or one that `bundles` packed.
    weights: source of the base weights; None: where the run found them.
    merge: folds the adapter into the backbone where that is exact, so that
      inference costs what it did before tuning.

  Raises:
    UserError: no such bundle, or other base weights than the run's.
  """
  attached = on_base(bundle, weights, merge)
  return Tuned(attached.model, parallel.replicate(attached.params),
               parallel.replicate(attached.buffers), attached.meta)


def on_base(bundle: str, weights: str | None = None,
            merge: bool = True) -> LoadedModel:
  """As `load`, without a device."""
  saved = bundles.load(bundle)
  source = weights or saved.meta["weights_source"]
  check_base(bundle, saved.meta, source, hash_of(source))
  module, params = base(saved.meta, source)
  return attach(bundle, saved, module, params, merge)


def hash_of(source: str) -> str:
  """The hash by which a bundle knows its base weights."""
  if source == "random":
    return source
  try:
    return sources.sha256(sources.locate(source))
  except UserError as error:
    raise UserError(
        f"{error}; give the base weights (--weights=FILE)") from error


def check_base(bundle: str, meta: dict[str, Any], source: str,
               sha256: str) -> None:
  """Raises UserError if the bundle was tuned on other weights."""
  if sha256 != meta["weights_sha256"]:
    raise UserError(
        f"bundle '{bundle}' was tuned on weights with sha256 "
        f"{meta['weights_sha256']}, but '{source}' has {sha256}; give the "
        "right file (--weights=FILE)")


def base(meta: dict[str, Any], source: str) -> tuple[nn.Module, trees.Tree]:
  """The backbone that a bundle was tuned on, and its pretrained parameters."""
  fields = meta["fields"] | {"dtype": jnp.dtype(meta["dtype"])}
  if source == "random":
    module = backbones.make(meta["backbone"], meta["image_size"], **fields)
    return module, backbones.init(module)
  return backbones.load(
      meta["backbone"], source, meta["image_size"], **fields)


def attach(bundle: str, saved: bundles.Bundle, module: nn.Module,
           params: trees.Tree, merge: bool) -> LoadedModel:
  """Puts a bundle on its base's parameters.

  Raises:
    UserError: the bundle's arrays are not those of its method there.
  """
  meta = saved.meta
  method = _method(bundle, meta, module)
  bare = {"backbone": params, "adapter": {}, "head": {}}
  _check_backbone(bundle, saved, method, bare)
  params = checkpoint.overlay(bare, saved.tuned)
  buffers = trees.unflatten(saved.buffers)
  model = Model(module, meta["normalisation"], method.handlers)
  _check_fit(bundle, saved, model, params, buffers)
  if merge and method.merge:
    backbone = method.merge(params, buffers, module)
    params = params | {"backbone": backbone, "adapter": {}}
    model, buffers = model._replace(handlers=()), {}
  return LoadedModel(model, params, buffers, meta, method.cannot_merge)


def _method(bundle, meta, module):
  options = ml_collections.ConfigDict(meta["options"])
  try:
    return methods.load(meta["method"], options, module)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise UserError(
        f"bundle '{bundle}': its options are not those of {meta['method']} "
        f"({' '.join(str(e).split())[:200]})") from e


def _check_backbone(bundle, saved, method, bare):
  """Raises UserError unless it has what the method tunes of the backbone, of
  the shapes that are there, and nothing else."""
  meta = saved.meta
  tuned, _ = trees.split(
      bare, trees.label(bare, methods.tuned_rules(method)), "tune")
  want = {name: np.shape(x) for name, x in trees.flatten(tuned).items()}
  have = {name: x.shape for name, x in saved.tuned.items()
          if not name.startswith(("adapter/", "head/"))}
  for name in sorted(want.keys() | have.keys()):
    if have.get(name) != want.get(name):
      raise UserError(
          f"bundle '{bundle}': {name!r} has the shape "
          f"{have.get(name, 'none')}, but {meta['method']} on "
          f"{meta['backbone']} at {meta['image_size']} px tunes "
          f"{want.get(name, 'none')}")


def _check_fit(bundle, saved, model, params, buffers):
  """Raises UserError unless every array has a place, and the shape for it."""
  meta, size, seen = saved.meta, model.backbone.image_size, {}
  sites = tuple(site for site, _ in model.handlers)
  try:
    found = jax.eval_shape(
        lambda *args: model.logits(
            *args, extra_tap=taps.record(sites, into=seen)), params,
        jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8), buffers).shape
  except Exception as e:  # whatever a wrong shape or a lacking leaf makes
    raise UserError(
        f"bundle '{bundle}': its arrays do not fit {meta['method']} on "
        f"{meta['backbone']} ({' '.join(str(e).split())[:200]})") from e
  if found != (1, len(meta["classes"])):
    raise UserError(f"bundle '{bundle}': it gives logits of shape {found} for "
                    f"an image and {len(meta['classes'])} classes")
  adapted = {name.removeprefix("adapter/"): x for name, x in saved.tuned.items()
             if name.startswith("adapter/")}
  widths = {f"{site}/{block}": y.shape[-1] for (site, block), y in seen.items()}
  for name, x in [*adapted.items(), *saved.buffers.items()]:
    width = widths.get("/".join(name.split("/")[:2]))
    if width is None:
      raise UserError(f"bundle '{bundle}': {meta['method']} on "
                      f"{meta['backbone']} has no place for {name!r}")
    if name.endswith("/channels") and not ((0 <= x) & (x < width)).all():
      raise UserError(f"bundle '{bundle}': {name!r} has channels beyond the "
                      f"{width} that there are")


def main(argv) -> None:
  paths = argv[1:]
  if not _BUNDLE.value or not paths:
    raise UserError("give --bundle=DIR and at least one image")
  tuned = load(_BUNDLE.value, _WEIGHTS.value)
  meta = tuned.meta
  images = np.stack([images_lib.prepare(
      path, meta["image_size"], meta["resample"]) for path in paths])
  for path, probabilities in zip(paths, tuned.predict(images)):
    for i in np.argsort(-probabilities, kind="stable")[:_TOP.value]:
      print(f"{path}\t{meta['classes'][i]}\t{probabilities[i]:.4f}")


if __name__ == "__main__":  # no flags for those who import `load`
  _BUNDLE = flags.DEFINE_string(
      "bundle", None, "folder of a finished run, or a packed bundle")
  _WEIGHTS = flags.DEFINE_string(
      "weights", None, "the base weights, if they moved since")
  _TOP = flags.DEFINE_integer("top", 1, "classes an image", lower_bound=1)
  cli.run(main)
