"""Weights out: a tuned model as others load it, with its model card.

The folder is the registry: a module with `write(model, folder)` is a target.
It also has

  NAME      on the command line
  LOAD      code that loads it: the lines of its card, with {folder} and {size}
            and {resample}; from a PIL `image`, RGB, to `logits`
  MERGED    whether it has a place for weights alone, none for an adapter
  EXTRA     the pip extra that it needs, and the modules that come with it
"""
from collections.abc import Callable
import importlib
import importlib.util
import json
import os
import pkgutil
import shutil
import types
from typing import Any
import uuid

import jax
import jax.numpy as jnp
import numpy as np

from ttc_jax import files, predict, trees
from ttc_jax.backbones.vit import ViT
from ttc_jax.errors import UserError
from ttc_jax.export import card
from ttc_jax.predict import LoadedModel
from ttc_jax.tasks import images

NOTE = "ttc_jax.json"  # in every export, for machines


def targets() -> dict[str, types.ModuleType]:
  """{name: module} of every target there is."""
  modules = (importlib.import_module(f"{__name__}.{m.name}")
             for m in pkgutil.iter_modules(__path__)
             if not m.name.startswith("_"))
  return {m.NAME: m for m in modules if hasattr(m, "write")}


def load(bundle: str, weights: str | None = None) -> LoadedModel:
  """A bundle on its base weights, merged where that is exact, in float32.

  Raises:
    UserError: as `predict.load`.
  """
  model = predict.on_base(bundle, weights)
  backbone = model.model.backbone.clone(dtype=jnp.float32)
  return model._replace(model=model.model._replace(backbone=backbone))


def check(model: LoadedModel, target: types.ModuleType) -> None:
  """Raises UserError if the target cannot hold the model, or lacks a library.
  """
  check_libraries(target)
  if model.cannot_merge and target.MERGED:
    whole = sorted(name for name, t in targets().items() if not t.MERGED)
    raise UserError(
        f"--to={target.NAME} has no place for the adapter of method "
        f"'{model.meta['method']}', and it cannot be merged, because "
        f"{model.cannot_merge}; --to={' or '.join(whole)} holds the whole "
        "computation")


def check_libraries(target: types.ModuleType) -> None:
  """Raises UserError if the target lacks one."""
  extra, libraries = target.EXTRA
  lacking = [m for m in libraries if importlib.util.find_spec(m) is None]
  if lacking:
    raise UserError(f"--to={target.NAME} needs {' and '.join(lacking)}: pip "
                    f"install -e '.[{extra}]'")


def write(model: LoadedModel, target: types.ModuleType, out: str) -> str:
  """Writes the folder `out`, whole or not at all, and returns its path.

  Raises:
    UserError: `out` exists, see `files.new` and `check`; of the target: what it
      cannot hold exactly.
  """
  out = files.new(out)
  check(model, target)
  scratch = f"{out}.{uuid.uuid4().hex}.tmp"
  os.makedirs(scratch)
  try:
    target.write(model, scratch)
    # Within a string of the card's code.
    folder = json.dumps(os.path.basename(out), ensure_ascii=False)[1:-1]
    code = target.LOAD.format(folder=folder, **loading(model.meta))
    files.write_text(os.path.join(scratch, NOTE),
                     json.dumps(note(model, target), indent=2) + "\n")
    files.write_text(os.path.join(scratch, "README.md"),
                     card.text(model, target.NAME, code))
    os.rename(scratch, out)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return out


def note(model: LoadedModel, target: types.ModuleType) -> dict[str, Any]:
  """JSON of what one needs beside the file: classes and preprocessing."""
  meta = dict(model.meta)
  if "://" not in meta["weights_source"]:  # no folders of whoever exports
    meta["weights_source"] = os.path.basename(meta["weights_source"])
  return {"target": target.NAME, "merged": not model.cannot_merge,
          "classes": meta["classes"], "preprocessing": preprocessing(meta),
          "bundle": meta}


def preprocessing(meta: dict[str, Any]) -> dict[str, Any]:
  """From an RGB image to what the backbone reads.

  The image is resized to `size` x `size`, its aspect ratio not kept, divided
  by 255, and (x - mean) / std, each channel.
  """
  black, white = (images.normalise(np.full(3, x, np.uint8),
                                   meta["normalisation"]) for x in (0, 255))
  std = 1 / (np.float64(white) - black)
  return {"size": meta["image_size"], "resample": meta["resample"],
          "mean": [round(x, 6) for x in (-black * std).tolist()],
          "std": [round(x, 6) for x in std.tolist()]}


def loading(meta: dict[str, Any]) -> dict[str, Any]:
  """What the code of a card is filled with."""
  how = preprocessing(meta)
  return {"size": meta["image_size"], "resample": meta["resample"].upper(),
          "backbone": meta["backbone"], "mean": how["mean"], "std": how["std"]}


def check_fields(model: LoadedModel, target: str,
                 expected: dict[str, Any]) -> None:
  """Raises UserError if the backbone is not what a target computes.

  Args:
    expected: {field: value, or the values} of `module.fields`; a field that
      is not there is not held.
  """
  for field, value in model.model.backbone.fields.items():
    allowed = expected.get(field, ())
    if value not in (allowed if isinstance(allowed, tuple) else (allowed,)):
      raise UserError(
          f"--to={target} has no place for {field}={value!r}, which this "
          "backbone has: its model would compute another function; "
          "--to=stablehlo holds every backbone")


def computation(
    model: LoadedModel) -> Callable[[trees.Tree, jax.Array], jax.Array]:
  """`(params, images) -> logits` for uint8 images (B, S, S, 3), B symbolic."""
  buffers = model.buffers

  def logits(params, images):
    return model.model.logits(params, images, buffers)

  def one_by_one(params, images):
    return jax.vmap(lambda image: logits(params, image[None])[0])(images)
  # ViT asks for `len(images)`, which has to be a number.
  return (one_by_one if isinstance(model.model.backbone, ViT) else logits)


def symbolic_images(model: LoadedModel) -> jax.ShapeDtypeStruct:
  """The shape of any number of images."""
  batch, = jax.export.symbolic_shape("batch")
  size = model.model.backbone.image_size
  return jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
