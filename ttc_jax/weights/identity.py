"""Which backbone a file is of, by the shapes of its tensors."""
from collections.abc import Callable, Mapping
import re
from types import ModuleType
from typing import Any

from ttc_jax import backbones
from ttc_jax.backbones.layers import Identity
from ttc_jax.errors import UserError
from ttc_jax.weights import reader
from ttc_jax.weights.reader import Weights

Shape = Callable[[str], tuple[int, ...] | None]


def family_of(shape: Shape) -> tuple[ModuleType, Identity] | None:
  """Returns the family of backbones that has such shapes, and what it reads
  from them; None if no family has."""
  for family in backbones.families():
    if (found := family.identify(shape)) is not None:
      return family, found
  return None


def kind(family: ModuleType, name: str) -> str | None:
  """Returns the kind of a parameter, see `backbones`; None: as it is."""
  return next((kind for pattern, kind in family.PARAMETERS.items()
               if re.fullmatch(pattern, name)), None)


def shapes_of(weights: Weights) -> Shape:
  """Returns `shape(name)` of our parameters in a file, None if missing.

  Of positions it is the shape of those of patches alone.
  """
  grids = {pattern for family in backbones.families()
           for pattern, kind in family.PARAMETERS.items() if kind == "grid"}

  def shape(name):
    if not reader.has(weights, name):
      return None
    found = reader.shape(weights, name)
    if name in grids:
      _, side = reader.grid(weights, name)
      return (1, side ** 2, *found[2:])
    return found
  return shape


def resized(shape: Shape, patch: int) -> Shape:
  """Returns the shapes with another patch size, in pixels."""
  patches = {pattern for family in backbones.families()
             for pattern, kind in family.PARAMETERS.items() if kind == "patch"}

  def other(name):
    found = shape(name)
    return (patch, patch, *found[2:]) if found and name in patches else found
  return other


def identify(weights: Weights, patch: int = 0) -> str:
  """Returns the name of the backbone that a file is of, e.g. "vit_s14".

  Args:
    patch: pixels a side that the patch embedding is going to be resized to;
      0 for the file's.

  Raises:
    UserError: no backbone has such shapes.
  """
  identity = _identity(weights, patch)
  if identity is None:
    raise UserError(
        f"weights file '{weights.path}' is of no whole backbone: tensors of "
        "the first block or the patch embedding are missing, or their shapes "
        "contradict each other")
  if identity.name is None:
    raise UserError(
        f"weights file '{weights.path}' is {identity.kind} of "
        f"{text(identity.sizes)}: no backbone here has that size"
        + (f" ({identity.reason})" if identity.reason else ""))
  return identity.name


def native_size(weights: Weights) -> int | None:
  """Returns the pixels a side that a file's position embedding is made for;
  None if it has none."""
  identity = _identity(weights)
  return identity.image_size if identity else None


def _identity(weights: Weights, patch: int = 0) -> Identity | None:
  """Returns what the tensors show and the configuration states.

  Raises:
    UserError: they contradict each other.
  """
  shape = shapes_of(weights)
  found = family_of(resized(shape, patch) if patch else shape)
  if found is None:
    return None
  identity = found[1]
  stated = {k: v for k, v in weights.sizes.items() if k in identity.sizes
            and not (k == "patch" and patch)}
  for key, value in stated.items():
    if identity.sizes[key] not in (None, value):
      raise UserError(
          f"weights file '{weights.path}' has tensors of {identity.kind} of "
          f"{key} {identity.sizes[key]}, while config.json beside it states "
          f"{value}: if it belongs to another file, move it away")
  identity = identity._replace(sizes=identity.sizes | stated)
  heads = stated.get("heads")
  if identity.name and heads:
    own = backbones.make(
        identity.name, identity.image_size or 4 * identity.sizes["patch"]).heads
    if own != heads:
      return identity._replace(name=None, reason=(
          f"by config.json it has {heads} heads, {identity.name} has {own}"))
  return identity


def text(sizes: Mapping[str, Any]) -> str:
  """Returns "width 384, patch 14, ...", without sizes that are not known."""
  return ", ".join(f"{name} {value}" for name, value in sizes.items()
                   if value is not None)


def check_variant(weights: Weights, want: Shape, name: str,
                  resample_patch: bool) -> None:
  """Compares the file's architecture with the module's.

  One sentence instead of the first of a hundred wrong shapes. A file with a
  tensor that is missing or odd passes: `fit` names the tensor.

  Args:
    want: shapes of the module.
    name: of the backbone, for messages.

  Raises:
    UserError: the sizes differ.
  """
  mine = family_of(want)
  try:
    file = family_of(shapes_of(weights))
  except UserError:
    return
  if file is None or mine is None:
    return
  identity = _identity(weights) or file[1]
  theirs, ours = dict(identity.sizes), mine[1].sizes
  differ = [k for k, v in theirs.items() if v not in (None, ours.get(k))
            and not (k == "patch" and resample_patch)]
  if not differ:
    return
  first = tuple(theirs)[:3]
  if set(differ) & set(first):
    theirs = {k: theirs[k] for k in first}
  shown = {k: ours[k] for k in theirs if k in ours}
  advice = (f"use backbone={identity.name}" if identity.name else
            "no backbone here has that size"
            + (f" ({identity.reason})" if identity.reason else ""))
  raise UserError(f"weights file '{weights.path}' is {identity.kind} of "
                  f"{text(theirs)}; {name} has {text(shown)}: {advice}")
