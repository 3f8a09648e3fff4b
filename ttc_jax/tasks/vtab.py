"""VTAB-1K's 19 tasks as 19 rows, read through TFDS without TensorFlow.

Splits and label rules are those of google-research/task_adaptation (d7630d3):
800 training and 200 validation images by their order in TFDS, the whole test
set. A data set must be prepared as array_record:

  tfds build dtd --data_dir=DIR --file_format=array_record
"""
from collections.abc import Callable, Iterator, Mapping
import contextlib
import glob
import hashlib
import io
import os
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ttc_jax import errors
from ttc_jax.tasks import Split, Task, images

Example = Mapping[str, Any]


class Row(NamedTuple):
  """One task.

  Attributes:
    tfds: name, and configuration if there are several.
    versions: prefixes of versions that hold the same data, preferred first.
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
    "cifar100": Row(_N, "cifar100", ("3.",), "train[45000:45200]", "test",
                    100, 10_000, _label),
    "caltech101": Row(_N, "caltech101", ("3.",), "train[2754:2954]", "test",
                      102, 6_084, _label),
    "dtd": Row(_N, "dtd", ("3.",), "validation[:200]", "test",
               47, 1_880, _label),
    "oxford_flowers102": Row(_N, "oxford_flowers102", ("2.",),
                             "validation[:200]", "test", 102, 6_149, _label),
    "oxford_iiit_pet": Row(_N, "oxford_iiit_pet", ("3.",),
                           "train[2944:3144]", "test", 37, 3_669, _label),
    "svhn": Row(_N, "svhn_cropped", ("3.",), "train[65931:66131]", "test",
                10, 26_032, _label),
    "sun397": Row(_N, "sun397/tfds", ("4.",), "validation[:200]", "test",
                  397, 21_750, _label),
    "patch_camelyon": Row(_SP, "patch_camelyon", ("2.",), "validation[:200]",
                          "test", 2, 32_768, _label),
    "eurosat": Row(_SP, "eurosat/rgb", ("2.",), "train[16200:16400]",
                   "train[21600:]", 10, 5_400, _label),
    "resisc45": Row(_SP, "resisc45", ("3.",), "train[18900:19100]",
                    "train[25200:]", 45, 6_300, _label),
    "diabetic_retinopathy": Row(
        _SP, "diabetic_retinopathy_detection/btgraham-300", ("3.",),
        "validation[:200]", "test", 5, 42_670, _label),
    "clevr_count": Row(_ST, "clevr", ("3.",), "train[63000:63200]",
                       "validation", 8, 15_000, clevr_count),
    "clevr_dist": Row(_ST, "clevr", ("3.",), "train[63000:63200]",
                      "validation", 6, 15_000, clevr_dist),
    "dmlab": Row(_ST, "dmlab", ("2.",), "validation[:200]", "test",
                 6, 22_735, _label),
    # 3.2.0 holds the same data as 3.1.0 (task_adaptation, issue 18).
    "kitti": Row(_ST, "kitti", ("3.1.", "3.2."), "validation[:200]", "test",
                 4, 711, kitti),
    "dsprites_loc": Row(_ST, "dsprites", ("2.",), "train[589824:590024]",
                        "train[663552:]", 16, 73_728,
                        bin_of("label_x_position", 2), binary=True),
    "dsprites_ori": Row(_ST, "dsprites", ("2.",), "train[589824:590024]",
                        "train[663552:]", 16, 73_728,
                        bin_of("label_orientation", 2.5), binary=True),
    "smallnorb_azi": Row(_ST, "smallnorb", ("2.",), "test[:200]",
                         "test[50%:]", 18, 12_150, at("label_azimuth")),
    "smallnorb_ele": Row(_ST, "smallnorb", ("2.",), "test[:200]",
                         "test[50%:]", 9, 12_150, at("label_elevation")),
}


def prepared(row: Row, data: str | None) -> str | None:
  """The folder of the preferred version that is there, or None."""
  root = os.path.join(os.path.expanduser(data or ""), row.tfds)
  for prefix in row.versions if data else ():
    found = [p for p in glob.glob(glob.escape(os.path.join(root, prefix)) + "*")
             if os.path.exists(os.path.join(p, "dataset_info.json"))]
    if found:
      return max(found, key=lambda p: [
          int(n) if n.isdecimal() else -1
          for n in os.path.basename(p).split(".")])
  return None


def names(data: str | None) -> tuple[str, ...]:
  """The tasks whose data set is prepared under `data`."""
  return tuple(name for name, row in ROWS.items() if prepared(row, data))


def hint(name: str, data: str | None) -> str | None:
  """How to get the data of one of the 19, for whom it is missing."""
  if name not in ROWS:
    return None
  row = ROWS[name]
  return (f"; VTAB's {name} needs {row.tfds} of TFDS, version "
          f"{' or '.join(v + '*' for v in row.versions)}, under "
          f"data={data or 'DIR'}: tfds build {row.tfds} "
          f"--data_dir={data or 'DIR'} --file_format=array_record")


def load(name: str, data: str | None, decode: Callable) -> Task:
  """Opens a prepared data set; see `tasks.load`."""
  row = ROWS[name]
  folder = prepared(row, data)
  builder = _builder(folder, row)
  sources = {part: _Source(builder, split, folder)
             for part, split in row.splits.items()}
  if len(sources["test"]) != row.count:
    raise errors.UserError(
        f"{folder}: the test set {row.test} has {len(sources['test'])} images, "
        f"VTAB's has {row.count}; prepare the data set again")
  labels = _Labels(row, sources, folder)

  def split(part: str) -> Split:
    source = sources[part]
    key = f"{digest}\t{row.splits[part]}"
    return Split(decode(images.Source(
        len(source), lambda i: source.image(i, row.binary),
        lambda: (key,))), labels[part])
  digest = _digest(folder, row)
  return Task(name, row.group, _classes(builder, row), labels, split, digest)


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
        raise errors.UserError(
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
  if stored != tfds.core.FileFormat.ARRAY_RECORD:
    raise errors.UserError(
        f"{folder} is stored as {stored and stored.value}, expected "
        f"array_record; {_again(row)}")
  return builder


def _again(row):
  return f"prepare it: tfds build {row.tfds} --file_format=array_record"


@contextlib.contextmanager
def _whole(folder, what):
  """Turns whatever damaged files make the readers raise into a sentence."""
  try:
    yield
  except Exception as error:
    raise errors.UserError(f"{folder}: {what} cannot be read ({error}); "
                           "prepare the data set again") from error


class _Source:
  """The examples of a split, their images still encoded."""

  def __init__(self, builder, split, folder):
    import tensorflow_datasets as tfds
    self._folder, self._split = folder, split
    with _whole(folder, f"the split {split}"):
      self._examples = builder.as_data_source(
          split, decoders={"image": tfds.decode.SkipDecoding()})

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, i: int) -> Example:
    with _whole(self._folder, f"example {i} of {self._split}"):
      return self._examples[i]

  def image(self, i: int, binary: bool) -> Image.Image:
    """RGB."""
    encoded = self[i]["image"]
    with _whole(self._folder, f"image {i} of {self._split}"):
      with Image.open(io.BytesIO(encoded)) as image:
        if binary:
          image = Image.fromarray(np.asarray(image) * np.uint8(255))
        return images.to_rgb(image)


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
