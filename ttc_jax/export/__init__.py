"""Weights out: a tuned model as other libraries load it, with its model card.

The folder is the registry: a module with a `TARGET` is an export target, and
nothing else names it.
"""
from collections.abc import Callable, Mapping
import importlib
import importlib.util
import json
import os
import pkgutil
import shutil
from typing import Any, NamedTuple
import uuid

import jax
import jax.numpy as jnp

from ttc_jax import (
  bundles,
  cost,
  files,
  normalisation,
  predict,
  quantisation,
  trees,
)
from ttc_jax.errors import UserError
from ttc_jax.export import card
from ttc_jax.predict import LoadedModel

NOTE = "ttc_jax.json"  # in every export, for machines


class Target(NamedTuple):
  """A format in which tuned models are written.

  Attributes:
    name: on the command line, `--to=NAME`.
    write: `(model, folder) -> None`, writes the files into an empty folder;
      raises UserError for what the format cannot hold exactly.
    code: Python lines for the model card that load the files: from a PIL
      `image`, RGB, to `logits`. They may use {folder}, {size}, {resample} of
      PIL, {resized} of `images.resize`, {backbone}, {mean} and {std}; other
      braces are doubled.
    merged: the format holds weights alone: an adapter has to be merged.
    extra, libraries: pip extra and modules that `write` needs.
    hub_library: `library_name` of the card on the Hugging Face Hub.
    limits: sentences for the card's section "Limits".
    crops: the lines of code may crop the centre: the format says nothing of
      images itself.
  """
  name: str
  write: Callable[[LoadedModel, str], None]
  code: str
  merged: bool
  extra: str = ""
  libraries: tuple[str, ...] = ()
  hub_library: str = "ttc_jax"
  limits: tuple[str, ...] = ()
  crops: bool = False


def targets() -> dict[str, Target]:
  """Returns {name: target} of every module in this folder that has one."""
  modules = [importlib.import_module(f"{__name__}.{m.name}")
             for m in pkgutil.iter_modules(__path__)
             if not m.name.startswith("_")]
  return {m.TARGET.name: m.TARGET for m in modules if hasattr(m, "TARGET")}


def load(bundle: str, weights: str | None = None) -> LoadedModel:
  """Puts a bundle on its base weights, merged where that is exact, in float32.

  Args:
    bundle: the folder that a run wrote, or a packed file.
    weights: source of the base weights; None: the file that the bundle names.

  Raises:
    UserError: as `predict.load`.
  """
  return in_float32(predict.on_base(bundle, weights))


def in_float32(model: LoadedModel) -> LoadedModel:
  """Returns the model with kernels and computation in float32."""
  backbone: Any = model.model.backbone
  backbone = backbone.clone(dtype=jnp.float32)
  params = model.params | {
      "backbone": quantisation.restore(model.params["backbone"])}
  return model._replace(
      model=model.model._replace(backbone=backbone), params=params)


def check_libraries(target: Target) -> None:
  """Raises UserError if a library that the target needs is not installed."""
  lacking = [m for m in target.libraries
             if importlib.util.find_spec(m) is None]
  if lacking:
    raise UserError(f"--to={target.name} needs {' and '.join(lacking)}: pip "
                    f"install -e '.[{target.extra}]'")


def check(model: LoadedModel, target: Target) -> None:
  """Raises UserError if the target cannot hold the model or lacks a library.
  """
  check_libraries(target)
  if "/" in model.meta["resample"] and not target.crops:
    raise UserError(
        f"--to={target.name} holds no centre crop, and this model was trained "
        f"with resample={model.meta['resample']}; use the bundle itself, "
        "`ttc_jax.predict`")
  if model.cannot_merge and target.merged:
    raise UserError(
        f"--to={target.name} has no place for the adapter of method "
        f"'{model.meta['method']}', and it cannot be merged, because "
        f"{model.cannot_merge}; {_holds_all()} holds the whole computation")


def _holds_all():
  """The targets that hold any computation, as flags."""
  return " or ".join(sorted(
      f"--to={name}" for name, t in targets().items() if not t.merged))


def write(model: LoadedModel, target: Target, out: str) -> str:
  """Writes the folder `out`, whole or not at all, and returns its path.

  Example:
    target = export.targets()["timm"]
    export.write(export.load("WORKDIR/runs/RUN/bundle"), target, "pets-timm")

  Raises:
    UserError: `out` exists, see `files.new` and `check`; or the target cannot
      hold the model exactly.
  """
  out = files.new(out)
  check(model, target)
  scratch = f"{out}.{uuid.uuid4().hex}.tmp"
  os.makedirs(scratch)
  try:
    target.write(model, scratch)
    how = preprocessing(model.meta)
    files.write_text(os.path.join(scratch, NOTE),
                     json.dumps(note(model, target), indent=2) + "\n")
    files.write_text(os.path.join(scratch, "README.md"), card.text(
        model, target, loading_code(model.meta, target, out), how))
    os.rename(scratch, out)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return out


def note(model: LoadedModel, target: Target) -> dict[str, Any]:
  """Returns what a program needs beside the file, as JSON: classes,
  preprocessing, and the bundle's metadata."""
  meta = bundles.published(model.meta)
  return {"target": target.name, "merged": not model.cannot_merge,
          "classes": meta["classes"], "preprocessing": preprocessing(meta),
          "bundle": meta}


def preprocessing(meta: dict[str, Any]) -> dict[str, Any]:
  """Returns how an RGB image becomes the backbone's input.

  The image is resized to `size` x `size`, its aspect ratio not kept (or, of a
  `resample` with a short side, kept and the centre cropped), divided by 255,
  and (x - mean) / std, each channel.
  """
  mean, std = normalisation.mean_and_std(meta["normalisation"])
  return {"size": meta["image_size"], "resample": meta["resample"],
          "mean": list(mean), "std": list(std)}


def loading_code(meta: dict[str, Any], target: Target, out: str) -> str:
  """Returns the target's lines of code, filled in for a model in `out`."""
  how = preprocessing(meta)
  # Within a string of the code.
  folder = json.dumps(os.path.basename(out), ensure_ascii=False)[1:-1]
  return target.code.format(
      folder=folder, size=how["size"], resized=how["resample"],
      resample=how["resample"].upper(),
      backbone=meta["backbone"], mean=how["mean"], std=how["std"])


# --- For the targets ----------------------------------------------------------

def of_family(model: LoadedModel, target: str,
              families: Mapping[type, Any]) -> Any:
  """Returns the value of the class that the backbone is an instance of.

  Args:
    families: {class of a backbone: value}, of all that the target holds.

  Raises:
    UserError: none of them.
  """
  backbone = model.model.backbone
  for family, value in families.items():
    if isinstance(backbone, family):
      return value
  raise UserError(f"--to={target} has no {type(backbone).__name__}; "
                  f"{_holds_all()} holds every backbone")


def check_fields(model: LoadedModel, target: str,
                 expected: Mapping[str, Any]) -> None:
  """Raises UserError if the target's model would compute another function.

  Args:
    expected: {field: value, or a tuple of values} of the backbone's `fields`;
      a field that is missing here is one that the target does not hold.
  """
  backbone: Any = model.model.backbone
  for field, value in backbone.fields.items():
    allowed = expected.get(field, ())
    if value not in (allowed if isinstance(allowed, tuple) else (allowed,)):
      raise UserError(
          f"--to={target} has no place for {field}={value!r}, which this "
          "backbone has: its model would compute another function; "
          f"{_holds_all()} holds every backbone")


def computation(
    model: LoadedModel) -> Callable[[trees.Tree, jax.Array], jax.Array]:
  """Returns `(params, images) -> logits` for uint8 images (B, S, S, 3) of any
  B, which may be symbolic."""
  def logits(params, images):
    return model.model.logits(params, images, model.buffers)

  def one_by_one(params, images):
    return jax.vmap(lambda image: logits(params, image[None])[0])(images)

  try:
    jax.eval_shape(logits, cost.shapes(model.params), symbolic_images(model))
  except Exception:  # JAX has several errors for "not with a symbolic batch"
    # A backbone or a method needs the batch as a number (ViT: `len(images)`).
    return one_by_one
  return logits


def symbolic_images(model: LoadedModel) -> jax.ShapeDtypeStruct:
  """Returns the shape of any number of images, (batch, S, S, 3) uint8."""
  batch, = jax.export.symbolic_shape("batch")
  size = model.meta["image_size"]
  return jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
