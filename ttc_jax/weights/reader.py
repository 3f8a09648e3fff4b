"""Opens a file of weights: its format, fields and tensors.

Tensors stay in the file until their shape has been compared with the module's,
so a wrong or hostile file costs no memory.
"""
from collections.abc import Mapping
import math
import os
import re
from typing import Any, NamedTuple

import numpy as np

from ttc_jax import files
from ttc_jax.errors import UserError
from ttc_jax.weights import containers, formats, sources
from ttc_jax.weights.containers import Tensor
from ttc_jax.weights.formats import Format, Normalisation, layout

LARGEST_GRID = 256  # patches a side of a believable position embedding


class Weights(NamedTuple):
  """An opened file.

  Attributes:
    fields: of the module, as far as the file and its configuration determine
      them; None for a field that they leave open.
    tensors: by the names that they have in the format.
    outside: names of tensors that do not belong to the backbone, e.g. of
      another tower.
    sizes, positioned: see `formats.Found`.
    normalisation: (mean, std) that the weights were trained with, of pixels in
      [0, 1], by the configuration beside the file or by its format; None if
      unknown.
  """
  path: str
  format: Format
  fields: dict[str, Any]
  tensors: Mapping[str, Tensor]
  outside: tuple[str, ...] = ()
  sizes: Mapping[str, Any] = {}
  positioned: tuple[int, ...] = (0,)
  normalisation: Normalisation | None = None


def read(path: str) -> Weights:
  """Opens a local file; the tensors stay in it.

  Args:
    path: of an `.npz`, `.safetensors` or `.pth` file, or of the index of
      sharded safetensors. A `config.json` beside it is read too. Of
      "FILE.npz:img" only the tensors below that name, see
      `sources.split_part`.

  Raises:
    UserError: the file is missing, damaged, of no known format, or of an
      architecture that is not supported.
  """
  path, part = sources.split_part(path)
  everything, metadata = containers.open_file(path)
  if part:
    everything = _below(part, everything, path)
  found = formats.recognise(
      everything, metadata, _beside(path, "config.json"), path)
  for pattern, what in found.format.refused.items():
    for name in filter(re.compile(pattern).fullmatch, found.tensors):
      raise UserError(
          f"weights file '{path}' has {what} ({name!r}), which is not "
          "supported: use a plain ViT or Swin")
  return Weights(
      path, found.format, found.fields, found.tensors,
      _outside(path, everything, found), found.sizes, found.positioned,
      found.normalisation or _of_processor(path))


def _below(part, everything, path):
  """The tensors below a name, by the rest of their names.

  The tree may stand at the top of the file, or below what training adds.
  """
  for root in formats.TREES:
    below = f"{root}{part}/"
    found = {n.removeprefix(below): t for n, t in everything.items()
             if n.startswith(below)}
    if found:
      return found
  tops = sorted({n.partition("/")[0] for n in everything})
  raise UserError(f"weights file '{path}' has no part '{part}'; at its top are "
                  f"{', '.join(tops[:6])}{', ...' if len(tops) > 6 else ''}")


def _outside(path, everything, found):
  """Names of the tensors outside the format's root, all of them known."""
  taken = {id(t.whole or t) for t in found.tensors.values()}
  outside = tuple(n for n, t in everything.items() if id(t) not in taken)
  unknown = sorted(n for n in outside if not re.fullmatch(found.beside, n))
  if unknown:
    raise UserError(
        f"weights file '{path}' has {len(unknown)} tensors beside those of "
        f"{found.format.name} whose part in the features is not known, first "
        f"{unknown[0]!r}: save the backbone alone, if they have none")
  return outside


def _of_processor(path):
  """The normalisation in Hugging Face's preprocessor_config.json."""
  config = _beside(path, "preprocessor_config.json")
  if config.get("do_normalize") is False:
    return None
  try:
    return formats.normalisation(
        config.get("image_mean"), config.get("image_std"))
  except UserError as error:
    raise UserError(f"weights file '{path}': {error}") from error


def _beside(path, name):
  """Returns the object in a JSON file beside the file, {} if there is none."""
  beside = os.path.join(os.path.dirname(path), name)
  try:
    config = files.read_json(beside)
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise UserError(f"'{beside}', beside the weights, cannot be read "
                    f"({error}): mend it or move it away") from error
  return config if isinstance(config, dict) else {}


# --- One tensor ---------------------------------------------------------------

def find(weights: Weights, name: str) -> str:
  """Returns the name in the file of one of our parameters.

  Raises:
    UserError: the file lacks it.
  """
  names = weights.format.names(name) or (name,)
  for theirs in names:
    if theirs in weights.tensors:
      return theirs
  raise UserError(
      f"weights file '{weights.path}' lacks the tensor {names[0]!r} "
      f"({len(weights.tensors)} others are there)")


def has(weights: Weights, name: str) -> bool:
  """Returns whether the file has one of our parameters."""
  names = weights.format.names(name) or (name,)
  return any(theirs in weights.tensors for theirs in names)


def shape(weights: Weights, name: str) -> tuple[int, ...]:
  """Returns the shape in our layout of one of our parameters, from the file's
  header alone; the head axes stay merged where the format merges them."""
  theirs = find(weights, name)
  of_file = weights.tensors[theirs].shape
  with containers.readable(weights.path):  # numpy refuses impossible shapes
    imagined = np.broadcast_to(0, of_file)
    return layout.view(weights.format, name, theirs, imagined).shape


def array(weights: Weights, name: str, expected: tuple[int, ...]) -> np.ndarray:
  """Returns one of our parameters, float32, of exactly the expected shape.

  Raises:
    UserError: another shape or type, or values that are not finite.
  """
  theirs = find(weights, name)
  in_file = (layout.merge_heads(name, expected) if weights.format.torch
             else expected)
  found = shape(weights, name)
  if found != in_file:
    raise UserError(
        f"weights file '{weights.path}': {theirs!r} has the shape "
        f"{weights.tensors[theirs].shape}, so {name!r} would have {found} "
        f"instead of {in_file}")
  return layout.view(weights.format, name, theirs,
                     values(weights, theirs)).reshape(expected)


def values(weights: Weights, theirs: str) -> np.ndarray:
  """Returns a tensor of the file by the file's name, float32 and finite."""
  tensor = weights.tensors[theirs]
  where = f"weights file '{weights.path}': {theirs!r}"
  if tensor.dtype not in containers.FLOATS:
    raise UserError(f"{where} has the type {tensor.dtype}, expected floats "
                    "of 16, 32 or 64 bits")
  with containers.readable(weights.path):
    found = tensor.read()
  with np.errstate(over="ignore"):
    found = found.astype(np.float32)
  if not np.isfinite(found).all():
    raise UserError(f"{where} holds values that are not finite")
  return found


# --- Positions ----------------------------------------------------------------

def count_tokens(weights: Weights) -> int:
  """Returns the number of tokens before the patches."""
  return formats.count_tokens(weights.tensors, weights.format.tokens)


def grid(weights: Weights, name: str) -> tuple[int, int]:
  """Returns how many tokens before the patches have a position, and the number
  of patches a side.

  Args:
    name: of our parameter of positions.

  Raises:
    UserError: the positions are of no square grid.
  """
  found, theirs = shape(weights, name), find(weights, name)
  where = (f"weights file '{weights.path}': {theirs!r} has the shape "
           f"{weights.tensors[theirs].shape}")
  tokens = found[1] if len(found) == 3 and found[0] == 1 else 0
  _check_stated(weights, tokens, where)
  for extra in weights.positioned:
    side = math.isqrt(max(tokens - extra, 0))
    if side ** 2 + extra == tokens and 1 <= side <= LARGEST_GRID:
      return extra, side
  if weights.positioned == (1,) and math.isqrt(tokens) ** 2 == tokens > 0:
    raise UserError(
        f"{where}: beside a class token that has a position, these are no "
        "square grid of patches; if it has none, as in DeiT III, put the "
        "model's config.json beside the file")
  raise UserError(
      f"{where}, expected (1, n * n, D)" + "".join(
          f", or {extra} more for tokens before the patches"
          for extra in weights.positioned if extra)
      + ": only square grids are supported")


def _check_stated(weights, tokens, where):
  """Compares the number of positions with the image size that is stated."""
  if "image_size" not in weights.sizes:
    return
  height, width = weights.sizes["image_size"]
  patch = weights.sizes.get("patch") or shape(weights, "embedding/kernel")[0]
  rows, columns = height // patch, width // patch
  if tokens - rows * columns not in weights.positioned:
    raise UserError(
        f"{where}, but config.json beside it states images of {height} x "
        f"{width} px, which are {rows} x {columns} patches: correct it or "
        "move it away")
  if rows != columns:
    raise UserError(
        f"{where}, a grid of {rows} x {columns} patches ({height} x {width} "
        "px): only square grids are supported")
