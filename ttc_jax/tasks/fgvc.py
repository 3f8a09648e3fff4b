"""FGVC: the five data sets of fine-grained classes of VPT, SSF and SCT.

Read from one of

  DATA/FOLDER/{train,val,test}.json   VPT's split files, {image: class id}, in
                                      the downloaded data set (KMnP/vpt
                                      4410440, fgvc_split.zip): its own division
  TFDS                                no NABirds; val is the last tenth of train
                                      in TFDS's order, of the same size as VPT's

VPT divides a tenth off the training images as val, but for Flowers, whose val
is public; SSF's README refers to VPT for the data. The sizes are those of VPT's
Table 8.

Not reproduced: VPT's val images where its split files are absent, since no seed
is published; the crops (VPT: resize to 256, random and centre crop of 224);
final runs of VPT and SSF, which are tested every epoch. "trainval" is train and
val, all public training images, whereas VPT's runs that it reports train on
train alone.

task=fgvc means all five. A data set of TFDS is not in "all tasks" of its
folder, since VTAB-1K has one of them too.
"""
from collections.abc import Mapping, Sequence
import dataclasses
import logging
import os
from typing import NamedTuple

import numpy as np

from ttc_jax import errors, files
from ttc_jax.tasks import Task, division, images, tfds
from ttc_jax.tasks import folder as folder_format

_log = logging.getLogger(__name__)


class Row(NamedTuple):
  """One data set.

  folder: as VPT's split files call it.
  images: the folder within, to which the split files' paths are relative.
  counts: images of train, val and test.
  tfds: its name in TFDS; empty: it is not there.
  val: the split that TFDS has; empty: the last images of train.
  """
  folder: str
  images: str
  classes: int
  counts: tuple[int, int, int]
  tfds: str = ""
  val: str = ""

  @property
  def splits(self) -> dict[str, str]:
    """TFDS's expression of each role and of the test set."""
    cut = self.counts[0]
    return {"train": "train" if self.val else f"train[:{cut}]",
            "val": self.val or f"train[{cut}:]", "test": "test"}


ROWS = {
    "fgvc_cub": Row("CUB_200_2011", "images", 200, (5_394, 600, 5_794),
                    "caltech_birds2011"),
    "fgvc_nabirds": Row("nabirds", "images", 555, (21_536, 2_393, 24_633)),
    "fgvc_flowers": Row("OxfordFlower", "", 102, (1_020, 1_020, 6_149),
                        "oxford_flowers102", "validation"),
    "fgvc_dogs": Row("Stanford-dogs", "Images", 120, (10_800, 1_200, 8_580),
                     "stanford_dogs"),
    "fgvc_cars": Row("Stanford-cars", "", 196, (7_329, 815, 8_041),
                     "cars196"),
}
PARTS = ("train", "val", "test")
SETS = {"fgvc": ROWS}


def names(data: str | None) -> tuple[str, ...]:
  """Returns the data sets with VPT's split files under `data`."""
  return tuple(name for name, row in ROWS.items() if _json(row, data))


def folders_of(name: str) -> tuple[str, ...]:
  """The folders of `data` that a data set may need."""
  row = ROWS[name]
  return (row.folder, *([row.tfds.split("/")[0]] if row.tfds else []))


def nested(data: str | None) -> tuple[str, ...]:
  """Returns those that TFDS prepared under `data`."""
  return tuple(name for name, row in ROWS.items() if _prepared(row, data))


def load(name: str, data: str) -> Task:
  """Reads VPT's split files, or opens TFDS's data set; see `tasks.find`."""
  row = ROWS[name]
  folder = _json(row, data)
  task = _of_json(name, row, folder) if folder else _of_tfds(name, row, data)
  found = tuple(task.sources[part].count for part in PARTS)
  if (found, len(task.classes)) != (row.counts, row.classes):
    _log.warning("%s has %s images of train, val and test and %d classes, "
                 "VPT's has %s and %d", name, found, len(task.classes),
                 row.counts, row.classes)
  return task


def hint(name: str, data: str | None) -> str | None:
  """Returns how to get one of the five, or None."""
  if name not in ROWS:
    return None
  row, data = ROWS[name], data or "DIR"
  prepare = f", or tfds build {row.tfds} --data_dir={data}" if row.tfds else ""
  return (f"; {name} needs {data}/{row.folder} with its images in "
          f"{row.images or '.'} and VPT's train.json, val.json and test.json"
          f"{prepare}")


def _json(row: Row, data: str | None) -> str | None:
  """The folder that holds the split files, or None."""
  folder = os.path.join(files.expand(data or ""), row.folder)
  there = data and all(os.path.isfile(os.path.join(folder, f"{part}.json"))
                       for part in PARTS)
  return folder if there else None


def _spec(row: Row) -> tfds.Spec:
  return tfds.Spec(row.tfds, row.splits, classes=row.classes)


def _prepared(row: Row, data: str | None) -> str | None:
  return tfds.prepared(_spec(row), data) if row.tfds else None


def _of_tfds(name: str, row: Row, data: str) -> Task:
  notes = () if row.val else (
      "val is the last tenth of train in TFDS's order: not VPT's images",)
  return dataclasses.replace(tfds.task(name, _spec(row), data), notes=notes)


# --- VPT's split files --------------------------------------------------------

def _of_json(name: str, row: Row, folder: str) -> Task:
  listed = {part: _read(os.path.join(folder, f"{part}.json"))
            for part in PARTS}
  known = {**listed["train"], **listed["val"]}
  ids = sorted(set(known.values()), key=lambda i: (isinstance(i, str), i))
  number = {value: i for i, value in enumerate(ids)}
  base = os.path.join(folder, row.images) if row.images else folder
  resolve = folder_format.make_resolver([base])
  parts = {part: _part(os.path.join(folder, f"{part}.json"), entries, number,
                       resolve) for part, entries in listed.items()}
  seen = {**dict.fromkeys(listed["train"], "train"),
          **dict.fromkeys(listed["val"], "val")}
  both = [path for path in listed["test"] if path in seen] or [
      path for path in listed["val"] if path in listed["train"]]
  if both:
    raise errors.UserError(
        f"{folder}: {both[0]} stands in two of train.json, val.json and "
        f"test.json, as do {len(both)} images in all: take them out of one")
  return division.complete(name, parts, _class_names(known, ids), (), folder)


def _read(path: str) -> dict[str, int | str]:
  """Reads {image: class id}."""
  try:
    found = files.read_json(path)
    if found and isinstance(found, dict) and all(
        type(value) in (int, str) for value in found.values()):
      return found
    why = "it is no {image: class id}"
  except (OSError, ValueError) as error:
    why = str(error)
  raise errors.UserError(f"{path} cannot be read ({why}): give VPT's split "
                         "file")


def _part(path: str, entries: Mapping[str, int | str],
          number: Mapping[int | str, int], resolve) -> division.Part:
  found = []
  for name, value in entries.items():
    if value not in number:
      raise errors.UserError(f"{path}: {name} is of class {value!r}, which "
                             "train.json and val.json lack: correct the file")
    try:
      found.append(resolve(name))
    except ValueError as error:
      raise errors.UserError(f"{path}: {error}") from error
  labels = np.array([number[value] for value in entries.values()], np.int32)

  def take(rows: Sequence[int]) -> images.Source:
    return images.from_files([found[i][1] for i in rows],
                             [found[i][0] for i in rows])
  return division.Part([name for name, _ in found], labels, take)


def _class_names(known: Mapping[str, int | str], ids: Sequence[int | str]
                 ) -> list[str]:
  """The folders of the images, where each class has its own; else the ids."""
  folders: dict[int | str, set[str]] = {value: set() for value in ids}
  for path, value in known.items():
    folders[value].add(os.path.basename(os.path.dirname(path)))
  found = [next(iter(f)) for f in folders.values() if len(f) == 1]
  apart = len(set(found)) == len(ids) and "" not in found
  return found if apart else list(map(str, ids))
