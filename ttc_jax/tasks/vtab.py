"""VTAB-1K's 19 tasks as 19 rows, read through TFDS without TensorFlow.

Splits and label rules are those of google-research/task_adaptation (d7630d3):
800 training and 200 validation images by their order in TFDS, the whole test
set. A data set must be prepared, as TFRecord (TFDS's default) or array_record:

  python -m ttc_jax.tasks prepare dtd --data=DIR
  tfds build dtd --data_dir=DIR
"""
from collections.abc import Callable, Iterator, Mapping
import contextlib
import glob
import hashlib
import io
import os
import re
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ttc_jax import errors
from ttc_jax.tasks import Split, Task, images, tfrecord

Example = Mapping[str, Any]


class Row(NamedTuple):
  """One task.

  Attributes:
    tfds: name, and configuration if there are several.
    versions: patterns of versions that hold the same data, preferred first.
    val, test: TFDS splits; training is on the first 800 of "train".
    count: of the test set.
    label: example -> class.
    binary: pixels are 0 and 1, to be shown as 0 and 255.
  """
  group: str
  tfds: str
  versions: tuple[str, ...]
  val: str
  test: str
  classes: int
  count: int
  label: Callable[[Example], int]
  binary: bool = False

  @property
  def splits(self) -> dict[str, str]:
    """The TFDS split of each of `tasks.SPLITS`."""
    train = "train[:800]"
    return {"train800": train, "val200": self.val,
            "train800val200": f"{train}+{self.val}", "test": self.test}


# --- Label rules --------------------------------------------------------------

def at(key: str) -> Callable[[Example], int]:
  """The label that the data set has."""
  return lambda example: int(example[key])


def bin_of(key: str, wide: float) -> Callable[[Example], int]:
  """floor(value / wide)."""
  return lambda example: int(np.floor(int(example[key]) / wide))


def interval(value: float, thresholds: tuple[float, ...]) -> int:
  """The largest i with thresholds[i] < value."""
  return int(np.searchsorted(thresholds, value, side="left")) - 1


def clevr_count(example: Example) -> int:
  """3 to 10 objects: 0 to 7."""
  return len(example["objects"]["color"]) - 3


def clevr_dist(example: Example) -> int:
  """By the distance of the closest object."""
  closest = min(float(c[2]) for c in example["objects"]["pixel_coords"])
  return interval(closest, (0, 8, 8.5, 9, 9.5, 10, 100))


def kitti(example: Example) -> int:
  """By the distance of the closest car, van or truck; 3: there is none."""
  objects = example["objects"]
  away = [float(place[2]) for kind, place in zip(
      objects["type"], objects["location"]) if int(kind) < 3]
  return interval(min([*away, 1000.0]), (-100, 8, 20, 999))


# --- The rows -----------------------------------------------------------------

_N, _SP, _ST = "Natural", "Specialized", "Structured"
_label = at("label")
ROWS = {
    "cifar100": Row(_N, "cifar100", ("3.*.*",), "train[45000:45200]", "test",
                    100, 10_000, _label),
    "caltech101": Row(_N, "caltech101", ("3.*.*",), "train[2754:2954]", "test",
                      102, 6_084, _label),
    "dtd": Row(_N, "dtd", ("3.*.*",), "validation[:200]", "test",
               47, 1_880, _label),
    "oxford_flowers102": Row(_N, "oxford_flowers102", ("2.*.*",),
                             "validation[:200]", "test", 102, 6_149, _label),
    # 4.0.0, which alone TFDS has built since 4.9.7, has the keys of 3.2.0 and
    # so its order; it encodes anew some images whose JPEGs were corrupt.
    "oxford_iiit_pet": Row(_N, "oxford_iiit_pet", ("3.*.*", "4.0.0"),
                           "train[2944:3144]", "test", 37, 3_669, _label),
    "svhn": Row(_N, "svhn_cropped", ("3.*.*",), "train[65931:66131]", "test",
                10, 26_032, _label),
    "sun397": Row(_N, "sun397/tfds", ("4.*.*",), "validation[:200]", "test",
                  397, 21_750, _label),
    "patch_camelyon": Row(_SP, "patch_camelyon", ("2.*.*",), "validation[:200]",
                          "test", 2, 32_768, _label),
    "eurosat": Row(_SP, "eurosat/rgb", ("2.*.*",), "train[16200:16400]",
                   "train[21600:]", 10, 5_400, _label),
    "resisc45": Row(_SP, "resisc45", ("3.*.*",), "train[18900:19100]",
                    "train[25200:]", 45, 6_300, _label),
    "diabetic_retinopathy": Row(
        _SP, "diabetic_retinopathy_detection/btgraham-300", ("3.*.*",),
        "validation[:200]", "test", 5, 42_670, _label),
    "clevr_count": Row(_ST, "clevr", ("3.*.*",), "train[63000:63200]",
                       "validation", 8, 15_000, clevr_count),
    "clevr_dist": Row(_ST, "clevr", ("3.*.*",), "train[63000:63200]",
                      "validation", 6, 15_000, clevr_dist),
    "dmlab": Row(_ST, "dmlab", ("2.0.1",), "validation[:200]", "test",
                 6, 22_735, _label),
    # 3.2.0 holds the same data as 3.1.0 (task_adaptation, issue 18), and 3.3.0
    # adds names of a label that is not used (its release notes).
    "kitti": Row(_ST, "kitti", ("3.1.0", "3.2.0", "3.3.0"), "validation[:200]",
                 "test", 4, 711, kitti),
    "dsprites_loc": Row(_ST, "dsprites", ("2.*.*",), "train[589824:590024]",
                        "train[663552:]", 16, 73_728,
                        bin_of("label_x_position", 2), binary=True),
    "dsprites_ori": Row(_ST, "dsprites", ("2.*.*",), "train[589824:590024]",
                        "train[663552:]", 16, 73_728,
                        bin_of("label_orientation", 2.5), binary=True),
    "smallnorb_azi": Row(_ST, "smallnorb", ("2.*.*",), "test[:200]",
                         "test[50%:]", 18, 12_150, at("label_azimuth")),
    "smallnorb_ele": Row(_ST, "smallnorb", ("2.*.*",), "test[:200]",
                         "test[50%:]", 9, 12_150, at("label_elevation")),
}


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


def canonical(name: str) -> str:
  """The row's name of a task that NOAH's folders call otherwise."""
  return "cifar100" if name == "cifar" else name


def names(data: str | None) -> tuple[str, ...]:
  """The tasks whose data set is prepared under `data`."""
  return tuple(name for name, row in ROWS.items() if prepared(row, data))


def hint(name: str, data: str | None) -> str | None:
  """How to get the data of one of the 19, for whom it is missing."""
  if name not in ROWS:
    return None
  row, data = ROWS[name], data or "DIR"
  return (f"; VTAB's {name} needs {row.tfds} of TFDS, version "
          f"{' or '.join(row.versions)}, under data={data}: "
          f"python -m ttc_jax.tasks prepare {name} --data={data}, or "
          f"tfds build {row.tfds} --data_dir={data}")


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
    raise errors.UserError(f"{name} is not prepared{hint(name, data)}")
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


def load(name: str, data: str | None, decode: Callable) -> Task:
  """Opens a prepared data set; see `tasks.load`."""
  dataset = open_set(name, data)
  check_count(dataset)
  row = dataset.row

  def split(part: str) -> Split:
    source = dataset.sources[part]
    key = f"{digest}\t{row.splits[part]}"
    return Split(decode(images.Source(
        len(source), lambda i: source.image(i, row.binary),
        lambda: (key,))), dataset.labels[part])
  digest = _digest(dataset.folder, row)
  return Task(name, row.group, dataset.classes, dataset.labels, split, digest)


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


def _digest(folder, row):
  """Of what describes the data, and of its shards' sizes."""
  lines = [f"{row.tfds}\t{row.splits}\t{row.classes}"]
  for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*"))):
    stat = os.stat(path)
    lines.append(f"{os.path.basename(path)}\t{stat.st_size}")
  with open(os.path.join(folder, "dataset_info.json"), "rb") as f:
    lines.append(hashlib.sha256(f.read()).hexdigest())
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
