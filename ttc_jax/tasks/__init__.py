"""Tasks: named splits of labelled images, as uint8 arrays.

Every other file here that defines `names(data)` and `load(name, data)` is a
family of tasks; adding a family is adding such a file. A family returns a Task
whose images are `images.Source`s: it knows no size and no cache. It may also
have
  nested(data): more names that it loads, but that are not in "all tasks";
  hint(name, data): what to do about a name that it knows but cannot load.
"""
from collections.abc import Iterator, Mapping
import dataclasses
import functools
import hashlib
import importlib
import logging
import os
import pkgutil
import types

import numpy as np

from ttc_jax import config, errors, files
from ttc_jax.tasks import images as images_lib

ROLES = ("train", "val", "trainval")  # trainval: train, then val
_DEFAULTS = config.default()
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """One decoded split of N examples; unpacks to (images, labels).

  images: uint8 (N, S, S, 3): an array, a read-only memmap, or, for a split too
    large to cache, an `images.Stream` that decodes the slices asked for.
  labels: int32 (N,).
  sha256: of the images, where reading them has told it; else empty.
  """
  images: images_lib.Images
  labels: np.ndarray
  sha256: str = ""

  def __iter__(self) -> Iterator:
    return iter((self.images, self.labels))

  def first(self, count: int) -> "Split":
    """Returns the first `count` examples; all of them for 0."""
    return (Split(self.images[:count], self.labels[:count]) if count
            else self)

  @functools.cached_property
  def digest(self) -> str:
    """32 hexadecimal digits that identify the pixels and labels.

    Of an array, all pixels count. Of a Stream, 64 decoded images and the
    names, sizes and times of all files.
    """
    pixels = self.sha256 or images_lib.digest(self.images)
    head = f"{self.images.shape} {pixels} ".encode()
    labels = np.ascontiguousarray(self.labels, np.int32)
    return hashlib.sha256(head + labels.tobytes()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """A classification task, checked but not yet decoded.

  name: what `load` was asked for.
  group: "Natural", "Specialized", "Structured" or "Other".
  classes: the class names, by label.
  labels: for each of `splits`, int32 (N,), known without decoding.
  sources: for each of `splits`, its images before they have a size.
  digest: changes when the lists, the labels or the drawing do.
  tests: names of the test sets, the main one first.
  decode: makes images of a size from a source; `load` and `at_size` set it.
  """
  name: str
  group: str
  classes: tuple[str, ...]
  labels: Mapping[str, np.ndarray]
  sources: Mapping[str, images_lib.Source]
  digest: str
  tests: tuple[str, ...] = ("test",)
  decode: images_lib.Decoder | None = None
  _decoded: dict[str, Split | errors.DataError] = dataclasses.field(
      default_factory=dict, init=False, repr=False)

  @property
  def splits(self) -> tuple[str, ...]:
    """Returns the names of all splits: `ROLES`, then the test sets."""
    return (*ROLES, *self.tests)

  def split(self, name: str) -> Split:
    """Decodes one of `splits`, or opens its cache; once for each Task.

      task.split("train").images  # uint8 (N, S, S, 3)

    Raises:
      errors.UserError: an unknown name.
      errors.DataError: an image of the split is damaged; the sentence lists
        the damaged images of all splits.
    """
    errors.check_known("split", name, self.splits)
    if name not in self._decoded:
      self._decoded[name] = self._decode(name)
    known = self._decoded[name]
    if isinstance(known, Split):
      return known
    raise known.with_traceback(None)

  def _decode(self, name: str) -> Split | errors.DataError:
    if self.decode is None:
      raise ValueError("the task has no image size yet: see tasks.at_size")
    try:
      images, sha256 = self.decode(self.sources[name])
      return Split(images, self.labels[name], sha256)
    except errors.DataError as error:
      _log.warning("task %s: %s; reading all its images to list the damaged "
                   "ones", *map(errors.printable, (self.name, str(error))))
      return images_lib.together(self.damaged() or [error])

  def damaged(self) -> list[errors.DataError]:
    """Reads every image of every split; returns an error for each bad one."""
    return images_lib.damaged(self.sources[name] for name in self.splits)


def names(data: str | None) -> tuple[str, ...]:
  """Returns all task names, sorted: built-in ones and folders in `data`."""
  return tuple(sorted({n for f in _families() for n in _names(f, data)}))


def load(name: str, *, size: int, data: str | None = None,
         resample: str = _DEFAULTS.resample, cache: str | None = None,
         cache_gib: float = _DEFAULTS.cache_gib) -> Task:
  """Reads and checks a task without decoding an image.

    task = tasks.load("digits", size=32)
    images, labels = task.split("train")

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
  decode = images_lib.make_decoder(size, resample, cache, cache_gib)
  return dataclasses.replace(find(name, data), decode=decode)


def at_size(task: Task, size: int, *, resample: str = _DEFAULTS.resample,
            cache: str | None = None,
            cache_gib: float = _DEFAULTS.cache_gib) -> Task:
  """Returns a task that decodes its images at a size; see `load`.

  For tasks that no family of this folder loads, such as `tfds.task(...)`.
  """
  return dataclasses.replace(task, decode=images_lib.make_decoder(
      size, resample, cache, cache_gib))


def find(name: str, data: str | None) -> Task:
  """Reads and checks a task that has no image size yet; see `load`."""
  for family in _families():
    if name in _names(family, data):
      return family.load(name, data)
  try:
    errors.check_known("task", name, names(data))
  except errors.UserError as error:
    raise errors.UserError(f"{error}{_hint(name, data)}") from None
  raise AssertionError(name)  # `check_known` raises


def _names(family: types.ModuleType, data: str | None) -> tuple[str, ...]:
  nested = getattr(family, "nested", None)
  return (*family.names(data), *(nested(data) if nested else ()))


@functools.cache
def _families() -> tuple[types.ModuleType, ...]:
  """Returns the modules of this folder that define `names`.

  Families that are empty without `data` come first: a folder wins over a
  built-in task of the same name.
  """
  modules = [importlib.import_module(f"{__name__}.{m.name}")
             for m in pkgutil.iter_modules(__path__)
             if not m.name.startswith("_")]
  families = [m for m in modules if hasattr(m, "names")]
  return tuple(sorted(families, key=lambda m: len(m.names(None)) > 0))


def _hint(name: str, data: str | None) -> str:
  """Returns the likely cause of an unknown name, as the end of a sentence."""
  for family in _families():
    if hasattr(family, "hint") and (hint := family.hint(name, data)):
      return hint
  if data is None:
    return "; tasks in folders need data=DIR"
  if os.path.isfile(os.path.join(files.expand(data), "train800.txt")):
    return f"; data={data} is itself a task: give the folder above it"
  if os.path.isdir(os.path.join(files.expand(data), name)):
    return f"; the folder {os.path.join(data, name)} holds no train800.txt"
  return f"; a folder task is a folder in {data} that holds train800.txt"
