"""Tasks: named splits of labelled images, as uint8 arrays.

Every other file here that defines `names(data)` and `load(name, data)` is a
family of tasks; adding a family is adding such a file. A family returns a Task
whose images are `images.Source`s: it knows no size and no cache. It may also
have
  nested(data): more names that it loads, but that are not in "all tasks";
  hint(name, data): what to do about a name that it knows but cannot load;
  PREFIX, as "hf:": only such `data` is for it, and for no other family;
  SETS, {word: names}: a word that means several tasks, as "vtab".

`data` may also be a zip file: families see the folder that it unpacks to.
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
from ttc_jax.tasks import archive, bucket
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
  notes: how the splits were made, where the data set does not say: phrases.
  decode: makes images of a size from a source; `load` and `at_size` set it.
  """
  name: str
  group: str
  classes: tuple[str, ...]
  labels: Mapping[str, np.ndarray]
  sources: Mapping[str, images_lib.Source]
  digest: str
  tests: tuple[str, ...] = ("test",)
  notes: tuple[str, ...] = ()
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
  """Returns all task names, sorted: built-in ones and those in `data`."""
  return tuple(sorted({n for f in _families() for n in _names(f, data)}))


def in_data(data: str) -> tuple[str, ...]:
  """Returns the names that "all tasks" of `data` means: no built-in ones.

  Raises:
    errors.UserError: there is none.
  """
  found = tuple(dict.fromkeys(
      name for family in _families() if not family.names(None)
      for name in family.names(_given(family, data))))
  if not found and _is_itself_a_task(data):
    raise errors.UserError(f"data={data} is itself a task: give the folder "
                           "above it, and its name as the task")
  if not found:
    raise errors.UserError(
        f"no task in data={data}: give a folder with pictures in a folder for "
        "each class, a folder of tasks with train800.txt, a TFDS directory of "
        f"VTAB's data sets, a .zip, hf:NAME or tfds:NAME{hint('', data)}")
  return found


def _is_itself_a_task(data):
  from ttc_jax.tasks import folder  # a family: it imports this module
  return folder.is_task(files.expand(data))


def sets() -> dict[str, tuple[str, ...]]:
  """Returns {word: the names of the tasks that it means}, as "vtab"."""
  return {word: tuple(members) for family in _families()
          for word, members in getattr(family, "SETS", {}).items()}


def family_of(name: str, data: str | None) -> str | None:
  """Returns the name of the family that loads a task, or None."""
  for family in _families():
    if name in _names(family, data):
      return family.__name__.rpartition(".")[2]
  return None


def load(name: str, *, size: int, data: str | None = None,
         resample: str = _DEFAULTS.resample, cache: str | None = None,
         cache_gib: float = _DEFAULTS.cache_gib) -> Task:
  """Reads and checks a task without decoding an image.

    task = tasks.load("digits", size=32)
    images, labels = task.split("train")

  Args:
    name: one of `names(data)`.
    size: S, the side of the decoded square images in pixels.
    data: where the tasks lie: a folder, a zip file, hf:NAME, tfds:NAME; None.
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
      return family.load(name, _whole(family, name, data))
  try:
    errors.check_known("task", name, names(data))
  except errors.UserError as error:
    raise errors.UserError(f"{error}{_hint(name, data)}") from None
  raise AssertionError(name)  # `check_known` raises


def few_shot(task: Task, count: int) -> Task:
  """Returns a task with `count` training images of each class.

  "train" and "trainval" are both these images, so that every protocol trains
  on them; the other splits stay whole. Which images they are depends on the
  order and the labels of "train" alone: they are the same for all methods and
  seeds, and those of a smaller count are among those of a larger one.

  Raises:
    errors.UserError: a class has fewer.
  """
  labels = task.labels["train"]
  chosen: list[int] = []
  for c, name in enumerate(task.classes):
    mine = np.flatnonzero(labels == c).tolist()
    if len(mine) < count:
      raise errors.UserError(
          f"few_shot={count}, but the class {name!r} of task '{task.name}' has "
          f"{len(mine)} training images: give few_shot={len(mine)} or fewer"
          if mine else
          f"few_shot={count}, but the class {name!r} of task '{task.name}' has "
          "no training image: leave few_shot out, or take out the class")
    mine.sort(key=lambda i: hashlib.sha256(f"few_shot\n{i}".encode()).digest())
    chosen += mine[:count]
  rows = sorted(chosen)
  kept = labels[rows]
  kept.setflags(write=False)
  source = images_lib.subset(task.sources["train"], rows)
  few = ("train", "trainval")
  return dataclasses.replace(
      task, labels=_Instead(task.labels, dict.fromkeys(few, kept)),
      sources={**task.sources, **dict.fromkeys(few, source)},
      digest=hashlib.sha256(f"{task.digest} {rows}".encode()).hexdigest()[:16],
      notes=(*task.notes, f"of {len(labels):,} training images, {count} of "
             "each class are used"))


class _Instead(Mapping):
  """A mapping with some values replaced; the others are not looked at."""

  def __init__(self, whole: Mapping, instead: Mapping):
    self._whole, self._instead = whole, instead

  def __getitem__(self, key):
    return (self._instead if key in self._instead else self._whole)[key]

  def __iter__(self):
    return iter(self._whole)

  def __len__(self):
    return len(self._whole)


def _names(family: types.ModuleType, data: str | None) -> tuple[str, ...]:
  nested, data = getattr(family, "nested", None), _given(family, data)
  return (*family.names(data), *(nested(data) if nested else ()))


def _given(family: types.ModuleType, data: str | None) -> str | None:
  """Returns what a family sees of `data`: one with a prefix is for one only."""
  if data is None:
    return None
  mine = getattr(family, "PREFIX", None)
  if any(data.startswith(p) for p in _prefixes()):
    return data if mine and data.startswith(mine) else None
  if mine:
    return None
  if bucket.is_address(data):
    data = bucket.local(data)
  return archive.unpacked(data) if archive.is_archive(data) else data


def _whole(family: types.ModuleType, name: str,
           data: str | None) -> str | None:
  """`_given`; of a bucket, with all that a task needs copied."""
  given = _given(family, data)
  if given is None or data is None or not bucket.is_address(data):
    return given
  folders = getattr(family, "folders_of", lambda name: (name.split("/")[0],))
  whole = bucket.local(data, folders(name))
  return whole if os.path.isdir(whole) else given  # a zip is unpacked


def _prefixes() -> set[str]:
  return {f.PREFIX for f in _families() if hasattr(f, "PREFIX")}


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


def hint(name: str, data: str | None) -> str:
  """Returns what a family says about a name that it cannot load, or ""."""
  for family in _families():
    if hasattr(family, "hint") and (
        said := family.hint(name, _given(family, data))):
      return said
  return ""


def _hint(name: str, data: str | None) -> str:
  """Returns the likely cause of an unknown name, as the end of a sentence."""
  if said := hint(name, data):
    return said
  if data is None:
    return "; tasks in folders need data=DIR"
  if not os.path.isdir(files.expand(data)):
    return f"; data={data} holds {', '.join(in_data(data))}"
  if _is_itself_a_task(data):
    return f"; data={data} is itself a task: give the folder above it"
  if os.path.isdir(os.path.join(files.expand(data), name)):
    return f"; the folder {os.path.join(data, name)} holds no train800.txt"
  return (f"; a folder task is a folder in {data} that holds train800.txt, or "
          "pictures in a folder for each class")
