"""Tasks: named splits of labelled images, as uint8 arrays.

Every other file here that defines `names(data)` and `load(name, data, decode)`
is a family of tasks; adding a family is adding such a file. `decode` turns an
`images.Source` into the decoded images, so a family knows no size and no cache.
A family may also have `hint(name, data)`: what to do about a name that it knows
but cannot load.
"""
import dataclasses
import functools
import importlib
import os
import pkgutil
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from ttc_jax import errors
from ttc_jax.tasks import images

ROLES = ("train", "val", "trainval")  # trainval: train, then val


class Split(NamedTuple):
  """One decoded split of N examples.

  images: uint8 (N, S, S, 3): an array, a read-only memmap, or, for a split too
    large to cache, an `images.Stream` that decodes the slices asked for.
  labels: int32 (N,).
  """
  images: "np.ndarray | images.Stream"
  labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """A classification task, checked but not yet decoded.

  name: what `load` was asked for.
  group: "Natural", "Specialized", "Structured" or "Other".
  classes: the class names, by label.
  labels: for each of `splits`, int32 (N,), known without decoding.
  decode: makes the Split of a name in `splits`; call `split`, which checks it.
  digest: changes when the lists, the labels or the drawing do.
  tests: names of the test sets, the main one first.
  """
  name: str
  group: str
  classes: tuple[str, ...]
  labels: Mapping[str, np.ndarray]
  decode: Callable[[str], Split]
  digest: str
  tests: tuple[str, ...] = ("test",)

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of all splits: `ROLES`, then the test sets."""
    return (*ROLES, *self.tests)

  @functools.cache  # a session decodes, opens and hashes a split once
  def split(self, name: str) -> Split:
    """Decodes one of `splits`, or opens its cache.

    Raises:
      UserError: an unknown name, or an image that cannot be read.
    """
    return self.decode(errors.check_known("split", name, self.splits))


def names(data: str | None) -> tuple[str, ...]:
  """All task names, sorted: the built-in ones and the folders under `data`."""
  return tuple(sorted({n for f in _families() for n in f.names(data)}))


def load(name: str, *, size: int, data: str | None = None,
         resample: str = "bicubic", cache: str | None = None,
         cache_gib: float = 8.0) -> Task:
  """Reads and checks a task without decoding an image.

  Args:
    name: one of `names(data)`.
    size: S, the side of the decoded square images in pixels.
    data: the folder that holds folder tasks, or None.
    resample: "bicubic" or "bilinear", both antialiased.
    cache: folder of decoded images; None means $XDG_CACHE_HOME/ttc_jax/images,
      by default ~/.cache/ttc_jax/images.
    cache_gib: a split larger than this is streamed instead; 0 streams all.

  Raises:
    errors.UserError: unknown name or setting, or bad files (with file:line).
  """
  decode = images.make_decoder(size, resample, cache, cache_gib)
  for family in _families():
    if name in family.names(data):
      return family.load(name, data, decode)
  try:
    errors.check_known("task", name, names(data))
  except errors.UserError as error:
    raise errors.UserError(f"{error}{_hint(name, data)}") from None


@functools.cache
def _families() -> tuple[types.ModuleType, ...]:
  """The modules of this folder that define `names`.

  Families that are empty without `data` come first: where a folder bears the
  name of a built-in task, the user who pointed at it means the folder.
  """
  modules = [importlib.import_module(f"{__name__}.{m.name}")
             for m in pkgutil.iter_modules(__path__)
             if not m.name.startswith("_")]
  families = [m for m in modules if hasattr(m, "names")]
  return tuple(sorted(families, key=lambda m: len(m.names(None)) > 0))


def _hint(name: str, data: str | None) -> str:
  """What a user who asks for an unknown task has most likely overlooked."""
  for family in _families():
    if hasattr(family, "hint") and (hint := family.hint(name, data)):
      return hint
  if data is None:
    return "; tasks in folders need data=DIR"
  if os.path.isfile(os.path.join(os.path.expanduser(data), "train800.txt")):
    return f"; data={data} is itself a task: give the folder above it"
  if os.path.isdir(os.path.join(os.path.expanduser(data), name)):
    return f"; the folder {os.path.join(data, name)} holds no train800.txt"
  return f"; a folder task is a folder in {data} that holds train800.txt"
