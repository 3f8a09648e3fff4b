"""Downloads and builds VTAB's data sets by TFDS, where no user is needed."""
from collections.abc import Callable, Iterable
import importlib.util
import os
from typing import NamedTuple

from ttc_jax import files
from ttc_jax.tasks import tfds, vtab
from ttc_jax.vtab.rows import ROWS, Row

FORMAT = "array_record"


class Manual(NamedTuple):
  """What a user has to download by hand.

  source: where it is found, and how to unpack it.
  paths: what the builder opens, below `manual_folder`.
  """
  source: str
  paths: tuple[str, ...]


# As the builders of TFDS say and as their code reads.
MANUAL = {
    "resisc45": Manual(
        "download NWPU-RESISC45.rar (https://1drv.ms/u/s!AmgKYzARBl5ca3HNaHIlz"
        "p_IXjs) and unpack it, so that NWPU-RESISC45/airplane/"
        "airplane_001.jpg is there", ("NWPU-RESISC45",)),
    "diabetic_retinopathy_detection/btgraham-300": Manual(
        "download all of https://www.kaggle.com/c/diabetic-retinopathy-"
        "detection/data (an account is needed) and unpack its archives, so "
        "that train/10_left.jpeg and test/1_left.jpeg are there",
        ("sample", "train", "test", "trainLabels.csv")),
}

# Packages, beside our own requirements, that builders import when they run.
# TFDS unpacks every archive with TensorFlow, so there is no data set that is
# built without it.
_ALSO = {"sun397/tfds": "cv2", "kitti": "cv2",
         "diabetic_retinopathy_detection/btgraham-300": "cv2",
         "patch_camelyon": "h5py", "dsprites": "h5py"}


def needs(row: Row) -> tuple[str, ...]:
  """Returns the packages that TFDS needs to build the data set."""
  also = _ALSO.get(row.tfds)
  return ("tensorflow", also) if also else ("tensorflow",)


def manual_folder(data: str) -> str:
  """Returns the folder of files that a user downloaded by hand."""
  return os.path.join(files.expand(data), "downloads", "manual")


def prepare(names: Iterable[str], data: str, say: Callable[[str], None] = print
            ) -> dict[str, str]:
  """Prepares the data sets of tasks that are not there yet.

  Args:
    names: of `ROWS`.
    data: the TFDS directory.
    say: called with a line for each data set, and with a summary.

  Returns:
    {data set of TFDS: reason why it is still missing}.
  """
  rows = {ROWS[name].tfds: ROWS[name] for name in names}
  missing = {}
  for tfds_name, row in rows.items():
    why = _prepare(row, data, say)
    if why:
      missing[tfds_name] = why
    say(f"{tfds_name}: {why or f'is there, {_folder(row, data)}'}")
  say(f"{len(rows) - len(missing)} of {len(rows)} data sets are there" +
      (f"; missing: {', '.join(missing)}" if missing else ""))
  return missing


def _prepare(row: Row, data: str, say: Callable[[str], None]) -> str | None:
  """Builds a data set that is not there; returns why it is still missing."""
  if _folder(row, data):
    return None
  why = _obstacle(row, data)
  if why is None:
    say(f"{row.tfds}: downloading and building")
    why = _build(row, data)
  return why


def _folder(row: Row, data: str) -> str | None:
  return tfds.prepared(vtab.spec(row), data)


def _obstacle(row, data):
  """What the user has to do first, or None."""
  return "; ".join([*_lacking(row), *_absent(row, data)]) or None


def _lacking(row):
  lacking = [p for p in needs(row) if importlib.util.find_spec(p) is None]
  if lacking:
    yield (f"TFDS needs {' and '.join(lacking)} to build it (reading does "
           "not): pip install -e '.[tf]'")


def _absent(row, data):
  if row.tfds not in MANUAL:
    return
  source, paths = MANUAL[row.tfds]
  folder = manual_folder(data)
  absent = [p for p in paths if not os.path.exists(os.path.join(folder, p))]
  if absent:
    yield (f"it cannot be downloaded automatically: {source} below {folder} "
           f"(there is no {', '.join(absent)} yet)")


def _build(row, data):
  """Builds a data set; returns the reason of a failure, or None."""
  import tensorflow_datasets as tfds  # lazily: it takes seconds
  try:
    builder = _builder(tfds, row, files.expand(data))
    builder.download_and_prepare(file_format=FORMAT)
  except Exception as error:  # networks, disks and archives raise anything
    text = " ".join(str(error).split()) or type(error).__name__
    return f"TFDS could not build it ({text}); start the same command again"
  if _folder(row, data) is None:
    return f"TFDS built it, but not in {data}/{row.tfds}/{row.versions[0]}"
  return None


def _builder(tfds, row, data):
  """Returns a builder of the preferred version that TFDS can build."""
  for version in row.versions[:-1]:
    try:
      return tfds.builder(f"{row.tfds}:{version}", data_dir=data)
    except AssertionError:  # raised for a version that TFDS does not have
      continue
  return tfds.builder(f"{row.tfds}:{row.versions[-1]}", data_dir=data)
