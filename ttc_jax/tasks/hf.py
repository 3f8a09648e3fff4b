"""`data=hf:NAME`: a data set of Hugging Face, by the library `datasets`.

  data=hf:beans
  data=hf:owner/name?config=CONFIG&revision=COMMIT&label=fine_label
  data=hf:/disk/pictures          an imagefolder, parquet files, or what
                                  save_to_disk wrote

After "?": config, revision; image and label, the columns; train, val and test,
the splits where they have other names. A revision pins what the name means.
`division` makes the splits that are not there. The data set is downloaded into
the library's cache; no code of it is run. Extra `hf`. The task is called NAME
without its owner, or hf_NAME where VTAB-1K has a task of the name.
"""
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import io
import os
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ttc_jax import errors, files
from ttc_jax.tasks import Task, division, images, prepared

PREFIX = "hf:"
OPTIONS = ("config", "revision", "image", "label", "train", "val", "test")
SPLITS = {"train": ("train",), "val": ("validation", "valid", "val", "dev"),
          "test": ("test",)}
_LABELS = ("label", "labels")
_ROWS = 1000  # that are looked at together


def names(data: str | None) -> tuple[str, ...]:
  """Returns the name of the one task that `data` is."""
  if data is None:
    return ()
  path, _ = prepared.options(data, PREFIX, OPTIONS)
  last = os.path.basename(path.rstrip("/"))
  return (division.own_name(last.removesuffix(".parquet"), "hf"),)


def load(name: str, data: str) -> Task:
  """Loads a data set and divides it; see `tasks.find`."""
  path, given = prepared.options(data, PREFIX, OPTIONS)
  splits = _open(data, path, given)
  chosen = prepared.roles(given, list(splits), SPLITS, data)
  for split in chosen.values():
    errors.check_known(f"split of {data}", split, splits)
  features = splits[chosen["train"]].features
  image = _image_column(data, given, features)
  label = _label_column(data, given, features)
  classes, number = _classes(splits[chosen["train"]], label)
  parts = {role: _part(data, split, splits[split], image, label, number)
           for role, split in chosen.items()}
  prints = "-".join(str(splits[s]._fingerprint) for s in chosen.values())
  place = os.path.join(files.cache_folder("divisions"), f"{name}-{prints}")
  return division.complete(name, parts, classes, (place[:200],), data)


def _library() -> Any:
  try:
    import datasets  # lazily: it takes seconds, and is an extra
  except ImportError as error:
    raise errors.UserError("data=hf:NAME needs the library datasets: "
                           "pip install 'ttc_jax[hf]', or pip install datasets"
                           ) from error
  return datasets


def _open(data: str, path: str, given: dict[str, str]) -> dict[str, Any]:
  """Returns {split: data set}."""
  datasets = _library()
  local = files.expand(path)
  datasets.disable_progress_bars()
  try:
    if os.path.isfile(os.path.join(local, "dataset_dict.json")) or (
        os.path.isfile(os.path.join(local, "state.json"))):
      found = datasets.load_from_disk(local)
    elif os.path.isfile(local):
      found = datasets.load_dataset("parquet", data_files=local)
    else:
      found = datasets.load_dataset(
          os.path.abspath(local) if os.path.isdir(local) else path,
          given.get("config"), revision=given.get("revision"))
  except Exception as error:  # of networks, hubs and formats
    line = " ".join(str(error).split()) or type(error).__name__
    raise errors.UserError(
        f"data={data} cannot be loaded ({line[:300]}): give hf:OWNER/NAME of "
        "the hub, or hf:FOLDER of pictures or parquet files; of several "
        "configurations, ?config=NAME") from error
  return dict(found) if isinstance(found, dict) else {"train": found}


def _image_column(data: str, given: dict[str, str], features: Any) -> str:
  if "image" in given:
    return errors.check_known(f"column of {data}", given["image"], features)
  found = [key for key, feature in features.items()
           if type(feature).__name__ == "Image"]
  if len(found) == 1 or "image" in found:
    return "image" if "image" in found else found[0]
  raise errors.UserError(
      f"data={data} has {len(found) or 'no'} columns of images (columns: "
      f"{', '.join(features)}): "
      + ("give ?image=NAME" if found else "give a data set of images"))


def _label_column(data: str, given: dict[str, str], features: Any) -> str:
  if "label" in given:
    return errors.check_known(f"column of {data}", given["label"], features)
  found = [key for key, feature in features.items()
           if type(feature).__name__ == "ClassLabel"]
  usual = [key for key in _LABELS if key in (found or features)]
  if len(found) == 1 or usual:
    return usual[0] if usual else found[0]
  raise errors.UserError(f"data={data}: which column is the label? give "
                         f"?label=NAME, of {', '.join(features)}")


def _classes(train: Any, label: str) -> tuple[list[str], dict[Any, int]]:
  """Returns the class names and {value of the column: number}.

  Of a column that names no classes, the sorted values in train are the classes.
  """
  named = getattr(train.features[label], "names", None)
  if named:
    return list(named), {i: i for i in range(len(named))}
  values = {v for v in train[label] if isinstance(v, (str, int))}
  if len(values) < 2:
    raise errors.UserError(f"the column {label!r} has {len(values)} different "
                           "numbers or texts: give ?label=NAME of another")
  ordered = sorted(values, key=lambda v: (isinstance(v, str), v))
  return list(map(str, ordered)), {v: i for i, v in enumerate(ordered)}


def _part(data: str, split: str, rows: Any, image: str, label: str,
          number: dict[Any, int]) -> division.Part:
  values = list(rows[label])
  wrong = [i for i, value in enumerate(values)
           if not isinstance(value, (str, int)) or value not in number]
  if wrong:
    raise errors.UserError(
        f"data={data}: the split {split} has {len(wrong)} images without a "
        f"class of train (row {wrong[0]}: {values[wrong[0]]!r}); if its labels "
        "are secret, test on another split: ?test=validation")
  labels = np.array([number[value] for value in values], np.int32)
  source, paths = _source(data, split, rows, image)

  def choose(chosen: Sequence[int]) -> images.Source:
    return _with_paths(images.subset(source, chosen), lambda: [
        paths()[i] for i in chosen if i in paths()])
  return division.Part([f"{split}/{i:07d}" for i in range(len(labels))], labels,
                       choose)


def _source(data: str, split: str, rows: Any, column: str
            ) -> tuple[images.Source, Callable[[], dict[int, "_Path"]]]:
  """-> (all images; those that are files of their own, by row)."""
  stored = rows.select_columns([column]).cast_column(
      column, _library().Image(decode=False))
  own, libraries = _roots(data)

  def inside(path: str) -> _Path:
    return _inside(path, own, libraries, data)

  @functools.cache
  def paths() -> dict[int, _Path]:
    return {i: inside(path) for i, path in _paths(stored, column)}

  def read(i: int) -> Image.Image:
    value = stored[i][column]
    if value and value["bytes"] is None and value["path"]:
      return images.read(inside(value["path"]).place)
    where = f"{split}/{i} of {data}"
    try:
      return images.decode(io.BytesIO(value["bytes"]))
    except Exception as error:  # Pillow's decoders raise nearly every type
      raise images.ImageError(where, str(error)) from error

  def lines() -> Sequence[str]:
    return str(rows._fingerprint), split, column
  return images.Source(len(rows), read, key=lines,
                       name=lambda i: f"{split}/{i:07d}"), paths


class _Path(NamedTuple):
  """An image that is a file of its own; timed: its time is the user's own, not
  that of a download."""
  place: str
  timed: bool


def _with_paths(source: images.Source,
                paths: Callable[[], list[_Path]]) -> images.Source:
  """The source, whose lines tell the files of its images too."""
  lines = source.key or tuple
  return dataclasses.replace(
      source,
      key=lambda: (*lines(), *images.digests([x.place for x in paths()])),
      stamp=lambda: (*lines(), *(images.file_stamp(
          x.place, os.path.basename(x.place), x.timed) for x in paths())))


def _paths(rows: Any, column: str) -> Iterator[tuple[int, str]]:
  """Yields (row, path) of the images whose bytes are not in the rows; reads no
  bytes."""
  arrow = rows.with_format("arrow")
  for start in range(0, len(rows), _ROWS):
    at = start
    for chunk in arrow[start:start + _ROWS][column].chunks:
      empty = chunk.field("bytes").is_null().to_numpy(zero_copy_only=False)
      for i in np.flatnonzero(empty).tolist():
        if path := chunk[i].as_py() and chunk[i]["path"].as_py():
          yield at + i, path
      at += len(chunk)


def _roots(data: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The folders that images of a data set may lie in: its own, and those that
  the library downloads to; as they are called and where they really are."""
  from huggingface_hub import constants
  config = _library().config
  local = files.expand(prepared.options(data, PREFIX, OPTIONS)[0])
  own = [local, os.path.dirname(local)][os.path.isfile(local)]

  def named(*roots):
    return tuple(os.path.join(form(root), "") for root in roots
                 for form in (os.path.abspath, os.path.realpath))
  return named(own), named(
      config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH,
      config.EXTRACTED_DATASETS_PATH, constants.HF_HUB_CACHE)


def _inside(path: str, own: tuple[str, ...], libraries: tuple[str, ...],
            data: str) -> _Path:
  """Returns a path that rows name, if it is of the data set."""
  place = os.path.abspath(path)
  if not place.startswith((*own, *libraries)):
    raise errors.UserError(
        f"data={data} names the image {errors.printable(path)!r}, which is not "
        "in its folder: store images as bytes, or below the data set's folder")
  if os.path.exists(place) and not os.path.isfile(place):
    raise errors.UserError(f"data={data} names the image "
                           f"{errors.printable(path)!r}, which is no file")
  return _Path(place, not place.startswith(libraries))
