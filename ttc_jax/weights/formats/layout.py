"""Their layout of an array and ours: transposed, heads merged, q k v fused."""
import re

import numpy as np

from ttc_jax.weights.formats.base import Format

_FUSED = ("/query/", "/key/", "/value/")  # in this order, where in one tensor


def view(format_: Format, name: str, theirs: str,
         array: np.ndarray) -> np.ndarray:
  """Their array, or our part of it, in our layout."""
  array = array.reshape((1,) * format_.squeezed.get(theirs, 0) + array.shape)
  if not format_.torch:
    return array
  mates = sharing(format_, name)
  if array.ndim and array.shape[0] % len(mates) == 0:
    rows, i = array.shape[0] // len(mates), mates.index(name)
    array = array[i * rows:(i + 1) * rows]
  if not name.endswith("/kernel"):
    return array
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def store(format_: Format, name: str, theirs: str,
          array: np.ndarray) -> np.ndarray:
  """The inverse of `view`, of a part."""
  array = array.reshape(array.shape[format_.squeezed.get(theirs, 0):])
  if not format_.torch:
    return array
  array = array.reshape(merge_heads(name, array.shape))
  if not name.endswith("/kernel"):
    return array
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def sharing(format_: Format, name: str) -> list[str]:
  """The parameters that share one tensor there, in its order."""
  part = next((part for part in _FUSED if part in name), None)
  if part is None:
    return [name]
  return [mate for other in _FUSED if format_.names(
      mate := name.replace(part, other)) == format_.names(name)]


def merge_heads(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """(D, H, D/H) -> (D, D) and the like, of an attention's parameter."""
  if re.search("/(query|key|value)/", name):
    return shape[:-2] + (shape[-2] * shape[-1],)
  if name.endswith("/out/kernel"):
    return (shape[0] * shape[1], shape[2])
  return shape
