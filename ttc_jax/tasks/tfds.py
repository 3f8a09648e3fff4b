"""Data sets that TFDS prepared, read without TensorFlow.

A data set must be prepared, as TFRecord (TFDS's default) or array_record:

  tfds build dtd --data_dir=DIR
"""
from collections.abc import Iterator, Mapping
import contextlib
import glob
import hashlib
import io
import os
import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from ttc_jax import errors
from ttc_jax.tasks import images, tfrecord
from ttc_jax.vtab import rows as vtab_rows
from ttc_jax.vtab.rows import ROWS, Example, Row


def prepared(row: Row, data: str | None) -> str | None:
  """The folder of the preferred version that is there, or None."""
  root = os.path.join(os.path.expanduser(data or ""), row.tfds)
  for pattern in row.versions if data else ():
    found = {_numbers(p): p for p in glob.glob(
        os.path.join(glob.escape(root), pattern))
        if os.path.exists(os.path.join(p, "dataset_info.json"))}
    found.pop(None, None)
    if found:
      return found[max(found)]
  return None


def _numbers(folder):
  """The version that a folder is named after; None: not one, or half made."""
  found = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", os.path.basename(folder))
  return found and tuple(map(int, found.groups()))


class Dataset(NamedTuple):
  """A prepared data set, seen as one task.

  Attributes:
    folder: of the version.
    classes: their names by label.
    sources: for each of `tasks.SPLITS`.
    labels: the same, int32, read when first asked for and checked.
  """
  row: Row
  folder: str
  classes: tuple[str, ...]
  sources: "Mapping[str, Source]"
  labels: Mapping[str, np.ndarray]


def open_set(name: str, data: str | None) -> Dataset:
  """Opens the data set of one of ROWS without reading an example.

  Raises:
    errors.UserError: it is missing, damaged or in a format that is not read.
  """
  row = ROWS[name]
  folder = prepared(row, data)
  if folder is None:
    raise errors.UserError(f"{name} is not prepared{vtab_rows.hint(name, data)}")
  builder, files = _builder(folder, row), {}
  sources = {part: Source(builder, split, folder, files)
             for part, split in row.splits.items()}
  return Dataset(row, folder, _classes(builder, row), sources,
                 _Labels(row, sources, folder))


def check_count(dataset: Dataset) -> None:
  """errors.UserError unless the test set is as large as VTAB's."""
  row, found = dataset.row, len(dataset.sources["test"])
  if found != row.count:
    raise errors.UserError(
        f"{dataset.folder}: the test set {row.test} has {found} images, "
        f"VTAB's has {row.count}; prepare the data set again")


class _Labels(Mapping):
  """The labels of each split, int32, read when they are first asked for."""

  def __init__(self, row, sources, folder):
    self._row, self._sources, self._folder = row, sources, folder
    self._known = {}

  def __getitem__(self, part: str) -> np.ndarray:
    if part not in self._known:
      source = self._sources[part]
      labels = np.array([self._row.label(source[i])
                         for i in range(len(source))], np.int32)
      wrong = (labels < 0) | (labels >= self._row.classes)
      if wrong.any():
        raise errors.DataError(
            f"{self._folder}: example {int(wrong.argmax())} of "
            f"{self._row.splits[part]} has the label "
            f"{labels[wrong.argmax()]}, expected 0 to {self._row.classes - 1}; "
            "prepare the data set again")
      labels.setflags(write=False)
      self._known[part] = labels
    return self._known[part]

  def __iter__(self) -> Iterator[str]:
    return iter(self._sources)

  def __len__(self) -> int:
    return len(self._sources)


def _builder(folder, row):
  import tensorflow_datasets as tfds  # lazily: it takes seconds
  try:
    builder = tfds.builder_from_directory(folder)
  except Exception as error:  # a damaged folder can make it raise anything
    raise errors.UserError(f"{folder} is no whole TFDS data set ({error}); "
                           f"{_again(row)}") from error
  stored = builder.info.file_format
  if stored not in (tfds.core.FileFormat.ARRAY_RECORD,
                    tfds.core.FileFormat.TFRECORD):
    raise errors.UserError(
        f"{folder} is stored as {stored and stored.value}, expected "
        f"array_record or tfrecord; {_again(row)}")
  return builder


def _again(row):
  return f"delete the folder and prepare it again: tfds build {row.tfds}"


@contextlib.contextmanager
def _whole(folder, what):
  """Turns whatever damaged files make the readers raise into a sentence."""
  try:
    yield
  except errors.UserError:  # it is one
    raise
  except Exception as error:
    raise errors.DataError(f"{folder}: {what} cannot be read ({error}); "
                           "prepare the data set again") from error


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
    """RGB."""
    return self.decode(self[i], i, binary)

  def decode(self, example: Example, i: int, binary: bool) -> Image.Image:
    """RGB, of example i, which has been read already."""
    with _whole(self._folder, f"image {i} of {self._split}"):
      with Image.open(io.BytesIO(example["image"])) as image:
        if binary:
          image = Image.fromarray(np.asarray(image) * np.uint8(255))
        return images.to_rgb(image)


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
  """A sequence, each of its items through a function."""

  def __init__(self, items, decode):
    self._items, self._decode = items, decode

  def __len__(self) -> int:
    return len(self._items)

  def __getitem__(self, i: int) -> Example:
    return self._decode(self._items[i])


def _classes(builder, row):
  features = builder.info.features
  feature = features["label"] if "label" in features.keys() else None
  found = getattr(feature, "names", None) or ()
  if len(found) == row.classes:
    return tuple(found)
  return tuple(map(str, range(row.classes)))


def digest(folder, row):
  """Of what describes the data, and of its shards' sizes."""
  lines = [f"{row.tfds}\t{row.splits}\t{row.classes}"]
  for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*"))):
    stat = os.stat(path)
    lines.append(f"{os.path.basename(path)}\t{stat.st_size}")
  with open(os.path.join(folder, "dataset_info.json"), "rb") as f:
    lines.append(hashlib.sha256(f.read()).hexdigest())
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
