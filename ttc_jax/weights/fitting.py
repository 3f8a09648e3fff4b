"""Fits the tensors of an opened file to a module: every one used or refused."""
from collections.abc import Mapping
import math
import re
from typing import Any

import flax.linen as nn
import numpy as np

from ttc_jax import trees
from ttc_jax.backbones import layers
from ttc_jax.errors import UserError
from ttc_jax.weights import formats, identity, reader, resampling
from ttc_jax.weights.reader import Weights

Shapes = Mapping[str, tuple[int, ...]]


def fit(weights: Weights, expected: trees.Tree, name: str,
        resample_patch: bool = False) -> trees.Tree:
  """Returns the parameters of a module, numpy float32.

  Position embeddings are resized to the module's grid, Swin's tables of biases
  to its window. Positions of tokens before the patches are added to the tokens.

  Args:
    expected: tree of the module's shapes (`backbones.shapes`).
    name: of the backbone, for messages.
    resample_patch: resizes the patch embedding of another patch size.

  Raises:
    UserError: the file is of another variant; a tensor is missing, left
      over, of another shape or type, or not finite.
  """
  want = {n: leaf.shape for n, leaf in trees.flatten(expected).items()}
  identity.check_variant(weights, want.get, name, resample_patch)
  kinds = _kinds(want)
  _check_all_used(weights, kinds, name)
  special = _tokens(weights, want, kinds, name)
  return trees.unflatten({
      n: special[n] if n in special else
      np.zeros(shape, np.float32) if _is_zero(weights, n) else
      _resized(weights, n, shape, kinds[n], resample_patch)
      for n, shape in want.items()})


def _kinds(want: Shapes) -> dict[str, str | None]:
  found = identity.family_of(want.get)
  return {n: found and identity.kind(found[0], n) for n in want}


def _check_all_used(weights, kinds, name):
  """Finds every parameter, and leaves no tensor of the file over."""
  found = {reader.find(weights, n) for n, kind in kinds.items()
           if kind != "tokens" and not _is_zero(weights, n)}
  left = sorted(n for n in weights.tensors.keys() - found
                - set(weights.format.tokens)
                if not re.fullmatch(weights.format.ignored, n))
  if left:
    raise UserError(
        f"weights file '{weights.path}' has {len(left)} tensors that {name} "
        f"has no place for, first {left[0]!r}")


def _is_zero(weights, name):
  """Whether the file lacks a parameter because it is 0."""
  format_ = weights.format
  return not reader.has(weights, name) and (
      bool(re.fullmatch(format_.optional, name))
      or formats.is_zero(format_, name, weights.fields))


def _resized(weights, name, shape, kind, resample_patch):
  """Our parameter, from another window or patch where that is allowed."""
  if kind == "window":
    return _bias_table(weights, name, shape)
  if kind == "patch" and resample_patch:
    side = reader.shape(weights, name)[0]
    kernel = reader.array(weights, name, (side, side, *shape[2:]))
    return resampling.resize_patch(kernel, shape[0])
  return reader.array(weights, name, shape)


def _bias_table(weights, name, shape):
  """Biases by offset, resized to another window."""
  found = reader.shape(weights, name)
  side = math.isqrt(found[0]) if found else 0
  if len(found) != 2 or not 0 < side < 2 * reader.LARGEST_GRID or (
      side ** 2 != found[0]):
    found = shape  # `reader.array` says what is wrong
  table = reader.array(weights, name, (found[0], shape[1]))
  return resampling.resize_positions(table[None], shape[0])[0]


# --- Tokens and positions -----------------------------------------------------

def _tokens(weights, want, kinds, name):
  """{name: array} of the tokens before the patches and of the positions."""
  tokens = {n: want[n] for n, kind in kinds.items() if kind == "tokens"}
  grids = {n: want[n] for n, kind in kinds.items() if kind == "grid"}
  there = [n for n in weights.format.tokens if n in weights.tensors]
  if not tokens and not grids and not there:
    return {}
  width = next(iter((tokens | grids).values()), (0,))[-1]
  found = sum(_token_shape(weights, n, width)[1] for n in there)
  wanted = sum(shape[1] for shape in tokens.values())
  if found != wanted:
    raise UserError(
        f"weights file '{weights.path}' has {found} tokens before the patches, "
        f"{name} has {wanted}: leave the fields pool and registers to the file")
  prefix = np.concatenate([np.zeros((1, 0, width), np.float32), *(
      reader.values(weights, n).reshape(_token_shape(weights, n, width))
      for n in there)], axis=1)
  out = {}
  for n, shape in grids.items():
    of_prefix, of_patches = _positions(weights, n, width)
    prefix[:, :of_prefix.shape[1]] += of_prefix
    out[n] = resampling.resize_positions(of_patches, shape[1])
  ends = np.cumsum([shape[1] for shape in tokens.values()], dtype=int)
  return out | dict(zip(tokens, np.split(prefix, ends, axis=1), strict=False))


def _token_shape(weights, theirs, width):
  shape = weights.tensors[theirs].shape
  found = (1,) * weights.format.squeezed.get(theirs, 0) + shape
  if len(found) != 3 or found[0] != 1 or found[2] != width:
    raise UserError(f"weights file '{weights.path}': {theirs!r} has the shape "
                    f"{shape}, expected (1, tokens, {width})")
  return found


def _positions(weights, name, width):
  """-> positions of the first tokens (1, T, D), positions of patches."""
  extra, side = reader.grid(weights, name)
  theirs = reader.find(weights, name)
  found = reader.shape(weights, name)
  if found[-1] != width:
    raise UserError(
        f"weights file '{weights.path}': {theirs!r} has the shape "
        f"{weights.tensors[theirs].shape}, expected the width {width}")
  position = reader.values(weights, theirs).reshape(found)
  return position[:, :extra], position[:, extra:extra + side ** 2]


# --- Fields -------------------------------------------------------------------

def check_fields(weights: Weights, module: nn.Module, name: str) -> None:
  """Raises UserError if the module lacks a field that the file determines."""
  for field in weights.fields:
    if not hasattr(module, field):
      raise UserError(
          f"weights file '{weights.path}' is of another architecture: it "
          f"settles the field '{field}', which {name} does not have")


def settled(weights: Weights, given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the file's fields, overridden by the given ones.

  Raises:
    UserError: the file leaves a field open, and it is not given.
  """
  fields = weights.fields | dict(given)
  lacking = [name for name, value in fields.items() if value is None]
  if lacking == ["gelu"]:
    raise UserError(
        f"weights file '{weights.path}' does not say the field 'gelu': "
        "put the model's config.json beside it, or give the field (as in "
        "--config.gelu), for a GELU one of "
        f"{', '.join(layers.GELU)} (OpenAI's CLIP: quick, SigLIP: tanh)")
  if lacking:
    raise UserError(
        f"weights file '{weights.path}' does not say the field"
        f"{'s' * (len(lacking) > 1)} {', '.join(map(repr, lacking))}, which no "
        "tensor shows: put the model's config.json beside it, or give "
        f"{'them' if len(lacking) > 1 else 'it'} to backbones.load")
  return fields
