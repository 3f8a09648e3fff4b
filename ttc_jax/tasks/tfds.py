"""Data sets that TFDS prepared, read without TensorFlow.

A data set must be prepared, as TFRecord (TFDS's default) or array_record:

  tfds build cifar10 --data_dir=DIR

With its splits and its label named, any of them is a task:

  task = tfds.task("cifar10", tfds.Spec("cifar10", {
      "train": "train[:80%]", "val": "train[80%:]", "test": "test"}), "DIR")
"""
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import glob
import hashlib
import io
import os
import re
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ttc_jax import errors, files
from ttc_jax.tasks import ROLES, Task, images, tfrecord

Example = Mapping[str, Any]
_AGAIN = "prepare the data set again"


class Spec(NamedTuple):
  """A prepared data set's splits and labels, which make it a task.

  name: of TFDS, with the configuration if there are several ("sun397/tfds");
    or the path of a folder with a version of a data set, "/.../dtd/3.0.1".
  splits: {"train", "val" and names of test sets, the main one first: TFDS's
    expression, as "train[:80%]" or "train[:800]+validation[:200]"}. "trainval"
    is train + val, if it is not given.
  label: the key of the label in an example, or a function example -> class.
  classes: their number; None: that of the label's feature.
  versions: patterns of versions that hold the same data, preferred first.
  binary: pixels are 0 and 1, to be shown as 0 and 255.
  """
  name: str
  splits: Mapping[str, str]
  label: str | Callable[[Example], int] = "label"
  classes: int | None = None
  versions: tuple[str, ...] = ("*.*.*",)
  binary: bool = False


class Dataset(NamedTuple):
  """A prepared data set, seen as one task.

  folder: of the version.
  classes: their names by label.
  splits: TFDS's expression for each split, "trainval" too.
  sources: for each split, its examples.
  labels: the same, int32, read when first asked for and checked.
  """
  spec: Spec
  folder: str
  classes: tuple[str, ...]
  splits: Mapping[str, str]
  sources: "Mapping[str, Source]"
  labels: Mapping[str, np.ndarray]


def task(name: str, spec: Spec, data: str | None = None, *,
         group: str = "Other") -> Task:
  """Returns the task that a prepared data set holds; see `tasks.at_size`.

  Args:
    name: of the task.
    data: the TFDS directory; not used where spec.name is a folder.
    group: see `Task`.

  Raises:
    errors.UserError: as `open_set`, or as `check_apart`.
  """
  tests = [part for part in spec.splits if part not in ROLES]
  check_apart(spec, data, [("val", "train"), *(
      (test, seen) for test in tests for seen in ROLES if seen in spec.splits)])
  return as_task(name, open_set(spec, data), group)


def check_apart(spec: Spec, data: str | None,
                pairs: Iterable[tuple[str, str]]) -> None:
  """errors.UserError where two of the splits share examples."""
  builder = _builder(_located(spec, data), spec)
  splits = _splits(spec, builder)
  for pair in pairs:
    one, other = (builder.info.splits[splits[part]].file_instructions
                  for part in pair)
    shared = sum(
        max(0, min(a.skip + a.take, b.skip + b.take) - max(a.skip, b.skip))
        for a in one for b in other if a.filename == b.filename)
    if shared:
      first, second = (f"{part}={splits[part]}" for part in pair)
      raise errors.UserError(
          f"{spec.name}: {first} and {second} share {shared:,} examples: "
          "divide them, as train[:80%] and train[80%:]")


def as_task(name: str, dataset: Dataset, group: str) -> Task:
  """Returns the task of an open data set."""
  tests = tuple(part for part in dataset.splits if part not in ROLES)
  return Task(name, group, dataset.classes, dataset.labels,
              sources={part: _images(dataset, part)
                       for part in (*ROLES, *tests)},
              digest=digest(dataset), tests=tests)


def _images(dataset: Dataset, part: str) -> images.Source:
  source, binary = dataset.sources[part], dataset.spec.binary

  def stamp():  # the same on every host, whenever the shards were copied
    return digest(dataset), dataset.splits[part], str(binary)
  return images.Source(
      len(source), lambda i: source.image(i, binary),
      key=lambda: (*stamp(), *_stamps(dataset.folder)), stamp=stamp)


def prepared(spec: Spec, data: str | None) -> str | None:
  """Returns the folder of the preferred version that is there, or None."""
  root = files.expand(spec.name)
  if os.path.isabs(root):
    return files.utf8(root) if _is_version(root) else None
  root = os.path.join(files.expand(data or ""), spec.name)
  for pattern in spec.versions if data else ():
    found = {_numbers(path): path for path in glob.glob(
        os.path.join(glob.escape(root), pattern)) if _is_version(path)}
    found.pop(None, None)
    if found:
      return files.utf8(found[max(found)])
  return None


def _is_version(folder: str) -> bool:
  return os.path.exists(os.path.join(folder, "dataset_info.json"))


def _numbers(folder):
  """Returns the version of a folder's name; None: it is none, or half made."""
  found = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", os.path.basename(folder))
  return found and tuple(map(int, found.groups()))


def split_names(spec: Spec, data: str | None) -> list[str]:
  """Returns the names of a prepared data set's splits; raises as `open_set`."""
  return list(_builder(_located(spec, data), spec).info.splits)


def open_set(spec: Spec, data: str | None) -> Dataset:
  """Opens a prepared data set without reading an example.

  Raises:
    errors.UserError: it is missing, damaged or in a format that is not read,
      or has no such split or label.
  """
  folder = _located(spec, data)
  builder = _builder(folder, spec)
  splits = _splits(spec, builder)
  classes = _classes(builder, spec)
  opened: dict[str, tfrecord.File] = {}  # shared by the splits
  sources = {part: Source(builder, split, folder, opened)
             for part, split in splits.items()}
  return Dataset(spec, folder, classes, splits, sources,
                 _Labels(spec, splits, sources, folder, len(classes)))


def _located(spec: Spec, data: str | None) -> str:
  folder = prepared(spec, data)
  if folder is None:
    raise errors.UserError(
        f"the data set {spec.name} is not prepared under data={data}: "
        f"tfds build {spec.name} --data_dir={data or 'DIR'}")
  return folder


def _splits(spec: Spec, builder) -> dict[str, str]:
  """Checks all names; returns TFDS's expression of each split."""
  given = dict(spec.splits)
  for role in ("train", "val"):
    if role not in given:
      raise errors.UserError(f"the splits of {spec.name} are "
                             f"{', '.join(given)}: add {role!r}")
  if not given.keys() - set(ROLES):
    raise errors.UserError(f"the splits of {spec.name} are "
                           f"{', '.join(given)}: add a test set")
  given.setdefault("trainval", f"{given['train']}+{given['val']}")
  for split in given.values():
    for part in split.split("+"):
      errors.check_known(f"split of {spec.name}", part.partition("[")[0],
                         builder.info.splits)
    try:
      builder.info.splits[split]
    except Exception as error:  # its parser raises several types
      raise errors.UserError(
          f"{split!r} is no split of {spec.name} ({_line(error)}): give one "
          "like 'train[:80%]'") from error
  return given


def _classes(builder, spec: Spec) -> tuple[str, ...]:
  """Class names: of the label's feature if it has as many, else "0", "1"..."""
  features = builder.info.features
  key = spec.label if isinstance(spec.label, str) else "label"
  if isinstance(spec.label, str):
    errors.check_known(f"feature of {spec.name}", key, features.keys())
  feature = features[key] if key in features.keys() else None
  found = tuple(getattr(feature, "names", None) or ())
  count = spec.classes or len(found)
  if not count:
    raise errors.UserError(f"the feature {key!r} of {spec.name} does not tell "
                           "the number of classes: give `classes`")
  return found if len(found) == count else tuple(map(str, range(count)))


class _Labels(Mapping):
  """The labels of each split, int32, read when they are first asked for."""

  def __init__(self, spec: Spec, splits: Mapping[str, str],
               sources: "Mapping[str, Source]", folder: str, classes: int):
    self._splits, self._sources, self._folder = splits, sources, folder
    self._label, self._classes = label_of(spec), classes
    self._known: dict[str, np.ndarray] = {}

  def __getitem__(self, part: str) -> np.ndarray:
    if part not in self._known:
      union = f"{self._splits['train']}+{self._splits['val']}"
      self._known[part] = (
          np.concatenate([self["train"], self["val"]])
          if part == "trainval" and self._splits[part] == union
          else self._read(part))
      self._known[part].setflags(write=False)
    return self._known[part]

  def _read(self, part: str) -> np.ndarray:
    source = self._sources[part]
    labels = np.array([self._label(source[i]) for i in range(len(source))],
                      np.int32)
    wrong = (labels < 0) | (labels >= self._classes)
    if wrong.any():
      first = int(np.argmax(wrong))
      raise errors.DataError(
          f"{self._folder}: example {first} of {self._splits[part]} has the "
          f"label {labels[first]}, expected 0 to {self._classes - 1}; {_AGAIN}")
    return labels

  def __iter__(self) -> Iterator[str]:
    return iter(self._sources)

  def __len__(self) -> int:
    return len(self._sources)


def label_of(spec: Spec) -> Callable[[Example], int]:
  """Returns example -> class."""
  label = spec.label
  if isinstance(label, str):
    return lambda example: int(example[label])
  return label


def _builder(folder: str, spec: Spec) -> Any:
  import tensorflow_datasets as tfds  # lazily: it takes seconds
  again = f"delete the folder and prepare it again: tfds build {spec.name}"
  try:
    builder = tfds.builder_from_directory(folder)
  except Exception as error:  # a damaged folder can make it raise anything
    raise errors.UserError(f"{folder} is no whole TFDS data set "
                           f"({_line(error)}); "
                           f"{again}") from error
  stored = builder.info.file_format
  if stored not in (tfds.core.FileFormat.ARRAY_RECORD,
                    tfds.core.FileFormat.TFRECORD):
    raise errors.UserError(
        f"{folder} is stored as {stored and stored.value}, expected "
        f"array_record or tfrecord; {again}")
  return builder


def _line(error: Exception) -> str:
  return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _whole(folder, what):
  """Turns what the readers raise for damaged files into a sentence."""
  try:
    yield
  except errors.UserError:  # a sentence already
    raise
  except Exception as error:
    raise errors.DataError(f"{folder}: {what} cannot be read ({_line(error)}); "
                           f"{_AGAIN}") from error


class Source:
  """The examples of a split in TFDS's order, their images still encoded."""

  def __init__(self, builder, split, folder, files):
    self._folder, self._split = folder, split
    with _whole(folder, f"the split {split}"):
      self._examples = _examples(builder, split, files)

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, i: int) -> Example:
    with _whole(self._folder, f"example {i} of {self._split}"):
      return self._examples[i]

  def image(self, i: int, binary: bool) -> Image.Image:
    """Returns example i as an RGB image."""
    return self.decode(self[i], i, binary)

  def decode(self, example: Example, i: int, binary: bool) -> Image.Image:
    """Returns the RGB image of example i, which has been read already."""
    with _whole(self._folder, f"image {i} of {self._split}"):
      return images.decode(io.BytesIO(example["image"]),
                           _lit if binary else None)


def _lit(image):
  return Image.fromarray(np.asarray(image) * np.uint8(255))


def _examples(builder, split, files):
  """A sequence of examples; `files` are the TFRecord files opened so far."""
  import tensorflow_datasets as tfds
  features = builder.info.features
  encoded = {key: tfds.decode.SkipDecoding() for key, feature in
             features.items() if isinstance(feature, tfds.features.Image)}
  if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
    return builder.as_data_source(split, decoders=encoded)
  records = tfrecord.Records(
      builder.info.splits[split].file_instructions, files)
  return _Decoded(records, lambda record: features.deserialize_example_np(
      record, decoders=encoded))


class _Decoded:
  """A sequence that applies a function to the items of another."""

  def __init__(self, items, decode):
    self._items, self._decode = items, decode

  def __len__(self) -> int:
    return len(self._items)

  def __getitem__(self, i: int) -> Example:
    return self._decode(self._items[i])


def digest(dataset: Dataset) -> str:
  """Returns a hash of the data set's description and its shards' sizes."""
  spec = dataset.spec
  name = os.path.basename(spec.name) if os.path.isabs(
      files.expand(spec.name)) else spec.name
  lines = [f"{name}\t{dict(spec.splits)}\t{len(dataset.classes)}"]
  if isinstance(spec.label, str):
    lines.append(spec.label)
  for path in sorted(glob.glob(os.path.join(
      glob.escape(dataset.folder), "*"))):
    lines.append(f"{os.path.basename(path)}\t{os.stat(path).st_size}")
  with open(os.path.join(dataset.folder, "dataset_info.json"), "rb") as f:
    lines.append(hashlib.sha256(f.read()).hexdigest())
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _stamps(folder: str) -> Iterator[str]:
  """Yields lines that change when a shard does; contents are not read."""
  for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*"))):
    stat = os.stat(path)
    yield (f"{os.path.basename(path)}\t{stat.st_size}\t{stat.st_mtime_ns}\t"
           f"{stat.st_ctime_ns}")
