"""Writes a backbone's parameters, in our own format or as another names them.
"""
from collections.abc import Mapping
import json
from typing import Any

import flax.linen as nn
import numpy as np

from ttc_jax import normalisation as pixels
from ttc_jax import trees
from ttc_jax.errors import UserError
from ttc_jax.weights import containers, formats
from ttc_jax.weights.formats import Format, layout


def write(path: str, params: trees.Tree, fields: Mapping[str, Any],
          dtype: str = "float32", normalisation: str = "") -> None:
  """Writes a backbone's parameters in our own format, all or nothing.

  Args:
    fields: of the module: "gelu" and "epsilon", and those of `module.fields`
      that are not the defaults.
    dtype: "float32", "float16" or "bfloat16".
    normalisation: that the weights were trained with, see
      `ttc_jax.normalisation`; "": unknown.

  Raises:
    UserError: an unknown field or normalisation, or a parameter that does not
      fit the dtype.

  Example:
    >>> weights.write("mine.safetensors", params, module.fields)
  """
  where = f"weights file '{path}'"
  fields = formats.check_fields(fields, where)
  flat = cast(trees.flatten(params), dtype, where)
  if normalisation:
    pixels.mean_and_std(normalisation)
  containers.write_safetensors(path, flat, {
      "ttc_jax": json.dumps(fields),
      "normalisation": normalisation or formats.UNKNOWN})


def cast(tensors: Mapping[str, Any], dtype: str,
         where: str) -> dict[str, np.ndarray]:
  """Returns tensors of another type.

  Args:
    where: the file, for messages.

  Raises:
    UserError: a value does not fit the type.
  """
  out = {}
  for name, value in tensors.items():
    with np.errstate(over="ignore"):
      out[name] = np.asarray(value).astype(dtype, order="C")
    if not np.isfinite(out[name]).all():
      raise UserError(f"{where}: {name!r} is not finite as {dtype}")
  return out


def to_tensors(params: trees.Tree, format_: Format,
               module: nn.Module) -> dict[str, np.ndarray]:
  """Returns a backbone's parameters as a format names and lays them out: the
  inverse of `fit`, bit for bit.

  GELU and epsilon are no tensors: the file's readers have to be told.

  Args:
    params: of the module, float32.

  Returns:
    {name: float32 array}, contiguous, without a head.

  Raises:
    UserError: the format cannot hold this variant of the module.
  """
  flat = {n: np.asarray(x, np.float32)
          for n, x in trees.flatten(params).items()}
  if "pos_embedding" in flat:  # a token's position is in the token already
    before = format_.positions("cls" in flat, getattr(module, "registers", 0))
    flat["pos_embedding"] = np.pad(
        flat["pos_embedding"], ((0, 0), (before, 0), (0, 0)))
  parts: dict[str, dict[str, np.ndarray]] = {}
  for name, array in flat.items():
    if formats.is_zero(format_, name, module.fields):
      if array.any():
        raise UserError(f"the format '{format_.name}' has no place for "
                        f"{name!r} of such a backbone, unless it is 0")
      continue
    names = format_.names(name)
    if not names:
      raise UserError(f"the format '{format_.name}' has no place for the "
                      f"parameter {name!r} of a {type(module).__name__}")
    parts.setdefault(names[0], {})[name] = layout.store(
        format_, name, names[0], array)
  tensors = {theirs: np.ascontiguousarray(np.concatenate(
      [arrays[n] for n in layout.sharing(format_, next(iter(arrays)))]))
             for theirs, arrays in parts.items()}
  _check_held(tensors, format_, module)
  return tensors


def _check_held(tensors, format_, module):
  """Reads the tensors as a stranger would, and compares the fields."""
  if format_ is formats.OURS:
    return
  fields = formats.recognise(tensors, {}, {}, f"of {format_.name}").fields
  for field, value in module.fields.items():
    if field not in ("gelu", "epsilon") and fields.get(
        field, not value) not in (value, None):
      raise UserError(
          f"the format '{format_.name}' cannot hold {field}={value!r}: "
          "choose another, ttc_jax holds everything")
