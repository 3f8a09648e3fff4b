"""VTAB-1K's 19 tasks as 19 rows: splits, label rules, sizes.

Splits and label rules are those of google-research/task_adaptation (d7630d3):
800 training and 200 validation images by their order in TFDS, the whole test
set.
"""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

SPLITS = ("train", "val", "trainval", "test")
Example = Mapping[str, Any]


class Row(NamedTuple):
  """One task.

  Attributes:
    tfds: name, and configuration if there are several.
    versions: patterns of versions that hold the same data, preferred first.
    val, test: TFDS splits; training is on the first 800 of "train".
    test_count: images of the test set.
    label: example -> class.
    binary: pixels are 0 and 1, to be shown as 0 and 255.
  """
  group: str
  tfds: str
  versions: tuple[str, ...]
  val: str
  test: str
  classes: int
  test_count: int
  label: Callable[[Example], int]
  binary: bool = False

  @property
  def splits(self) -> dict[str, str]:
    """The TFDS split of each of `SPLITS`."""
    train = "train[:800]"
    return {"train": train, "val": self.val,
            "trainval": f"{train}+{self.val}", "test": self.test}


# --- Label rules --------------------------------------------------------------

def at(key: str) -> Callable[[Example], int]:
  """Returns example -> the label that the data set has under `key`."""
  return lambda example: int(example[key])


def bin_of(key: str, wide: float) -> Callable[[Example], int]:
  """Returns example -> floor(value under `key` / wide)."""
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
  """By the distance of the closest car, van or truck; 3: none in sight."""
  objects = example["objects"]
  away = [float(place[2]) for kind, place in zip(
      objects["type"], objects["location"], strict=True) if int(kind) < 3]
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


def canonical(name: str) -> str:
  """Returns the row's name of a task; NOAH's folders say "cifar"."""
  return "cifar100" if name == "cifar" else name


def hint(name: str, data: str | None) -> str | None:
  """Returns how to get the data of one of the 19, or None."""
  if name not in ROWS:
    return None
  row, data = ROWS[name], data or "DIR"
  return (f"; VTAB's {name} needs {row.tfds} of TFDS, version "
          f"{' or '.join(row.versions)}, under data={data}: "
          f"python -m ttc_jax.tasks prepare {name} --data={data}, or "
          f"tfds build {row.tfds} --data_dir={data}")
