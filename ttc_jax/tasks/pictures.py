"""Folders of pictures: DATA/CLASS/NAME.jpg, or DATA/{train,val,test}/CLASS/...

DATA is such a folder, and the task is called as it is (pictures_dtd, say, where
VTAB-1K has a task of the name); or it holds several, each a task. A folder of
classes is known by two folders within that hold pictures directly; what lies
deeper in a class's folder belongs to the class too. Symbolic links are
followed. `division` makes the splits that are not there.
"""
from collections.abc import Iterator, Sequence
import hashlib
import logging
import os
from typing import NamedTuple
import unicodedata

import numpy as np

from ttc_jax import errors, files
from ttc_jax.tasks import Task, division, domains, images
from ttc_jax.tasks import folder as folder_format

# What is taken for a picture; its content decides how it is decoded.
SUFFIXES = (".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe",
            ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif",
            ".tiff", ".webp")
SPLITS = {"train": ("train", "training"),
          "val": ("val", "valid", "validation", "dev"),
          "test": ("test", "testing")}
_WORDS = {word for known in SPLITS.values() for word in known}
_SHOWN = 3
_log = logging.getLogger(__name__)


class Skipped(NamedTuple):
  """Names of files and folders that are not read."""
  hidden: list[str]
  others: list[str]
  empty: list[str]  # folders without pictures
  beside: list[str]  # folders of pictures that are no split


def names(data: str | None) -> tuple[str, ...]:
  """Returns the task that `data` is, or those of the folders in it."""
  if data is None:
    return ()
  data = os.path.abspath(files.expand(data))
  if is_task(data):
    return (_name(data),)
  return tuple(_name(path) for path in map(
      lambda child: os.path.join(data, child), _folders(data))
               if not folder_format.is_task(path) and is_task(path))


def load(name: str, data: str) -> Task:
  """Lists the pictures of a folder and divides them; see `tasks.find`."""
  data = os.path.abspath(files.expand(data))
  paths = [data] if is_task(data) else [
      os.path.join(data, child) for child in _folders(data)]
  folder = next(path for path in paths if _name(path) == name)
  parts_of = _parts(folder)
  skipped = Skipped([], [], [], _beside(folder, parts_of))
  _check_words(folder, parts_of)
  _check_train(folder, parts_of)
  files_of: dict[str, str] = {}
  found = {part: _classes(folder, inner, skipped, files_of)
           for part, inner in parts_of.items()}
  _warn(folder, skipped)
  # Systems differ in how they store an accent.
  classes = sorted(found["train"],
                   key=lambda c: (unicodedata.normalize("NFC", c), c))
  _check(folder, found, classes)
  parts = {part: _part(folder, by_class, classes)
           for part, by_class in found.items()}
  place = hashlib.sha256(os.path.realpath(folder).encode(
      "utf-8", "surrogateescape")).hexdigest()[:16]
  cache = os.path.join(files.cache_folder("divisions"), f"{name}-{place}")
  return division.complete(name, parts, classes, (folder, cache), folder)


def hint(name: str, data: str | None) -> str | None:
  """Says why DATA/NAME, or DATA for "", is no task although it has pictures."""
  if data is None:
    return None
  folder = os.path.abspath(files.expand(os.path.join(data, name)))
  found = [c for c in _class_names(_parts(folder)["train"])
           if not folder_format.is_task(os.path.join(folder, c))]
  layout = ("pictures belong into a folder for each class, "
            f"{folder}{os.sep}CLASS{os.sep}NAME.jpg")
  if _are_splits(found):
    return (f"; {folder} has pictures in {' and '.join(found)}, but not by "
            f"class: {layout}, perhaps below train, val and test")
  if len(found) == 1:
    return (f"; {folder} has pictures in one folder only, {found[0]}: "
            f"{layout}")
  if not found and _has_picture(folder):
    return f"; {folder} holds pictures but no folders of classes: {layout}"
  return None


def _name(folder: str) -> str:
  return division.own_name(os.path.basename(folder), "pictures")


# --- What is a task -----------------------------------------------------------

def is_task(folder: str) -> bool:
  """Tells whether two folders or more hold pictures, and none is in lists.

  Folders that lists of `domains` name are domains, not classes.
  """
  folder = files.expand(folder)
  if folder_format.is_task(folder) or domains.domains(folder):
    return False
  classes = _class_names(_parts(folder)["train"])
  if _are_splits(classes):
    return False
  return len(classes) > 1 and not any(
      folder_format.is_task(os.path.join(folder, child))
      for child in _folders(folder))


def _parts(folder: str) -> dict[str, str]:
  """Returns {split: its folder}; "train" alone where nothing is divided."""
  children = _folders(folder)
  found: dict[str, str] = {}
  for part, words in SPLITS.items():
    for child in children:
      if child.lower() in words:
        found.setdefault(part, os.path.join(folder, child))
  found |= {child[len("test_"):]: os.path.join(folder, child)
            for child in children if child.startswith("test_")
            and child[len("test_"):] not in ("", "train", "val", "trainval",
                                             "test")}
  if "train" in found and _class_names(found["train"]):
    return found
  return {"train": folder}


def _are_splits(names: list[str]) -> bool:
  """Tells whether folders of pictures are splits that lack classes."""
  return bool(names) and {name.lower() for name in names} <= _WORDS


def _class_names(folder: str) -> list[str]:
  """Returns the folders within that hold a picture directly."""
  return [child for child in _folders(folder)
          if _has_picture(os.path.join(folder, child))]


def _folders(folder: str) -> list[str]:
  """Returns the names of the folders within that are not hidden, sorted."""
  try:
    with os.scandir(folder) as found:
      return sorted(entry.name for entry in found
                    if not _is_hidden(entry.name) and entry.is_dir())
  except OSError:  # a file, or a folder that is closed to us
    return []


def _has_picture(folder: str) -> bool:
  try:
    with os.scandir(folder) as found:
      return any(_is_picture(entry.name) for entry in found)
  except OSError:
    return False


def _is_hidden(name: str) -> bool:
  return name.startswith(".") or name == "__MACOSX"


def _is_picture(name: str) -> bool:
  return not _is_hidden(name) and name.lower().endswith(SUFFIXES)


# --- Listing ------------------------------------------------------------------

def _check_words(folder: str, parts: dict[str, str]) -> None:
  """errors.UserError for two folders that mean one split."""
  for part, words in SPLITS.items():
    mine = [child for child in _folders(folder) if child.lower() in words]
    if len(mine) > 1 and parts != {"train": folder}:
      raise errors.UserError(
          f"{folder} has {' and '.join(mine)}, which both mean {part}: leave "
          "one, or rename the other test_NAME, a further test set")


def _check_train(folder: str, parts: dict[str, str]) -> None:
  """errors.UserError for a split beside classes that are in none."""
  if parts != {"train": folder}:
    return
  for child in _folders(folder):
    if (child.lower() in _WORDS or child.startswith("test_")) and _class_names(
        os.path.join(folder, child)):
      raise errors.UserError(
          f"{folder}: {child} holds folders of pictures, as a split does, but "
          f"there is no train: move the classes to {folder}{os.sep}train"
          f"{os.sep}CLASS, or rename {child} if it is a class")


def _beside(folder: str, parts: dict[str, str]) -> list[str]:
  """Returns the folders of pictures beside the splits."""
  known = set(parts.values())
  return [] if folder in known else [
      child for child in _folders(folder)
      if (path := os.path.join(folder, child)) not in known
      and (_has_picture(path) or _class_names(path))]


def _classes(folder: str, inner: str, skipped: Skipped,
             known: dict[str, str]) -> dict[str, list[str]]:
  """Returns {class: paths relative to `folder`} of a split's folder.

  known: {real file: path} of all pictures so far; it is added to.
  """
  found: dict[str, list[str]] = {}
  top = os.path.relpath(inner, folder)
  for entry in _entries(inner):
    path = entry.name if top == "." else f"{top}/{entry.name}"
    if not entry.is_dir():
      _skip(entry.name, path, skipped)
      continue
    if _is_hidden(entry.name):
      skipped.hidden.append(path)
      continue
    _check_name(inner, entry.name)
    real_of = dict(_pictures(folder, path, skipped, ()))
    for picture, real in sorted(real_of.items()):
      if known.setdefault(real, picture) != picture:
        raise errors.UserError(
            f"{folder}: {known[real]} and {picture} are one file, by a link: "
            "take one of them out")
    if real_of:
      found[entry.name] = sorted(real_of)
    else:
      skipped.empty.append(path)
  return found


def _pictures(folder: str, path: str, skipped: Skipped,
              above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
  """Yields (path, real file) of the pictures below `path`, at any depth."""
  here = os.path.join(folder, path)
  real = os.path.realpath(here)
  if real in above:
    raise errors.UserError(f"{here} is a link to a folder above it: remove it")
  for entry in _entries(here):
    inner = f"{path}/{entry.name}"
    if entry.is_dir() and not _is_hidden(entry.name):
      _check_name(here, entry.name)
      yield from _pictures(folder, inner, skipped, (*above, real))
    elif _is_picture(entry.name) and entry.is_file():
      _check_name(here, entry.name)
      yield inner, (os.path.realpath(entry.path) if entry.is_symlink()
                    else os.path.join(real, entry.name))
    else:
      _skip(entry.name, inner, skipped)


def _entries(folder: str) -> list[os.DirEntry]:
  try:
    with os.scandir(folder) as found:
      return list(found)
  except OSError as error:
    raise errors.UserError(f"cannot read the folder {folder} "
                           f"({error.strerror}): make it readable, or take it "
                           "out") from error


def _check_name(folder: str, name: str) -> None:
  """errors.UserError for a name that no list could hold."""
  try:
    name.encode()
  except UnicodeEncodeError:
    why = "is not UTF-8"
  else:
    if not set("\r\n") & set(name):
      return
    why = "has a line break"
  raise errors.UserError(f"{folder}: the name {name!r} {why}: rename it")


def _skip(name: str, path: str, skipped: Skipped) -> None:
  if _is_hidden(name):
    skipped.hidden.append(path)
  elif not division.is_list(name):
    skipped.others.append(path)


def _warn(folder: str, skipped: Skipped) -> None:
  """One warning that counts what was left out."""
  kinds = ((skipped.hidden, "hidden"), (skipped.others, "no pictures"),
           (skipped.empty, "folders without pictures"),
           (skipped.beside, "folders of pictures beside the splits"))
  told = [f"{len(paths)} {kind} ({', '.join(sorted(paths)[:_SHOWN])}"
          f"{', ...' if len(paths) > _SHOWN else ''})"
          for paths, kind in kinds if paths]
  if told:
    _log.warning("%s: left out: %s", *map(errors.printable, (
        folder, "; ".join(told))))


def _check(folder: str, found: dict[str, dict[str, list[str]]],
           classes: list[str]) -> None:
  for part, by_class in found.items():
    if not by_class:
      raise errors.UserError(f"{folder}: {part} holds no pictures: fill its "
                             "folder, or take it out")
    unknown = sorted(by_class.keys() - set(classes))
    if unknown:
      raise errors.UserError(
          f"{folder}: {part} has pictures of {unknown[0]!r}, and train has no "
          f"such class: the classes are {', '.join(classes[:10])}"
          f"{', ...' if len(classes) > 10 else ''}")


def _part(folder: str, by_class: dict[str, list[str]], classes: list[str]
          ) -> division.Part:
  paths = [path for c in classes for path in by_class.get(c, ())]
  labels = np.repeat(np.arange(len(classes), dtype=np.int32),
                     [len(by_class.get(c, ())) for c in classes])

  def take(rows: Sequence[int]) -> images.Source:
    chosen = [paths[i] for i in rows]
    return images.from_files([os.path.join(folder, path) for path in chosen],
                             chosen)
  return division.Part(paths, labels, take)
