"""The vtab-1k folder format of the PyTorch PEFT repositories.

DATA/TASK holds train800.txt, val200.txt, train800val200.txt and test.txt, each
with lines `relative/path label` (relative to DATA/TASK), and may hold
classes.txt, one class name a line.
"""
import functools
import hashlib
import os
import stat
from collections.abc import Callable

import numpy as np

from ttc_jax import errors
from ttc_jax.tasks import Split, Task, images
from ttc_jax.vtab import rows as vtab

# VTAB-1K: group and number of classes, which small lists may not show whole.
_VTAB = {name: (row.group, row.classes) for name, row in vtab.ROWS.items()}

# What the format calls the roles.
LISTS = {"train": "train800", "val": "val200", "trainval": "train800val200",
          "test": "test"}
_MAX_CLASSES = 100_000  # a larger label is a slip, and would eat the memory


def names(data: str | None) -> tuple[str, ...]:
  """The folders in `data` that hold train800.txt; UserError if unreadable."""
  if data is None:
    return ()
  data = os.path.expanduser(data)
  try:
    found = sorted(os.listdir(data))
  except OSError as error:
    raise errors.UserError(f"cannot read the folder data={data} "
                           f"({error.strerror}): give a folder of tasks")
  return tuple(name for name in found
               if os.path.isfile(os.path.join(data, name, "train800.txt")))


def load(name: str, data: str, decode: Callable) -> Task:
  """Reads and checks the lists of DATA/NAME; see `tasks.load`."""
  folder = os.path.join(os.path.expanduser(data), name)
  resolve = _make_resolver(folder)
  lists = {s: _read_list(_list(folder, s), resolve) for s in LISTS}
  files = {s: files for s, (files, _) in lists.items()}
  labels = {s: labels for s, (_, labels) in lists.items()}
  classes = _classes(name, folder, labels)
  _check_apart(folder, files, "val", "train")
  for seen in ("trainval", "train", "val"):
    _check_apart(folder, files, "test", seen)

  def split(part: str) -> Split:
    source = images.Source(
        count=len(files[part]),
        read=lambda i: images.read(files[part][i]),
        key=lambda: map(images.file_key, files[part]))
    return Split(decode(source), labels[part])

  group, _ = _VTAB.get(vtab.canonical(name), ("Other", 0))
  return Task(name, group, classes, labels, split,
              _digest(folder, files, labels, classes))


def _digest(folder, files, labels, classes) -> str:
  """Of what the lists say, wherever the folder lies."""
  root = os.path.realpath(folder)
  lines = [f"{os.path.relpath(file, root)} {label}" for split in LISTS
           for file, label in zip(files[split], labels[split])]
  return hashlib.sha256("\n".join((*classes, *lines)).encode()
                        ).hexdigest()[:16]


def _list(folder: str, split: str) -> str:
  return os.path.join(folder, f"{LISTS[split]}.txt")


def _lines(path: str) -> list[str]:
  """The lines of a text file, without blank ones at the end."""
  try:
    with open(path, encoding="utf-8-sig") as file:
      text = file.read().rstrip()
  except FileNotFoundError:
    raise errors.UserError(f"{path} is missing: a task needs the lists "
                           f"{', '.join(f'{s}.txt' for s in LISTS.values())}")
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
        f"cannot read {path} ({error}): it must be readable UTF-8 text")
  if not text:
    raise errors.UserError(f"{path} is empty: it must hold one entry a line")
  return text.split("\n")


def _read_list(path: str, resolve: Callable[[str], str]
               ) -> tuple[list[str], np.ndarray]:
  """Image files and int32 labels; UserError names file and line."""
  files, labels = [], []
  for number, line in enumerate(_lines(path), start=1):
    try:
      file, label = _parse(line)
      files.append(resolve(file))
    except ValueError as error:
      raise errors.UserError(f"{path}:{number}: {error}") from None
    labels.append(label)
  labels = np.array(labels, np.int32)
  labels.setflags(write=False)
  return files, labels


def _parse(line: str) -> tuple[str, int]:
  """`some path label`, split at the last blank, for a path may hold blanks."""
  parts = line.rsplit(maxsplit=1)
  if len(parts) != 2:
    raise ValueError(f"expected 'relative/path label', found {line!r}")
  path, label = parts
  if not (label.isascii() and label.isdecimal()):
    raise ValueError(f"the label must be a whole number >= 0, not {label!r}")
  # len first: int() refuses thousands of digits with a message of its own
  if len(label) > 9 or int(label) >= _MAX_CLASSES:
    raise ValueError(f"the label {label} is out of range: it must be below "
                     f"{_MAX_CLASSES}")
  return path, int(label)


def _make_resolver(folder: str) -> Callable[[str], str]:
  """Returns path of a list -> real path; ValueError if absent or outside."""
  root = os.path.realpath(folder)
  real_folder = functools.cache(os.path.realpath)  # thousands share a few

  def resolve(path: str) -> str:
    if os.path.isabs(path):
      raise ValueError(f"the path {path!r} must be relative to {folder}")
    parent, base = os.path.split(path)
    try:
      real = os.path.join(real_folder(os.path.join(root, parent)), base)
      mode = os.lstat(real).st_mode
      if stat.S_ISLNK(mode):
        real = os.path.realpath(real)
        mode = os.stat(real).st_mode
    except (OSError, ValueError):
      real, mode = os.path.realpath(os.path.join(root, parent)), 0
    if os.path.commonpath((root, real)) != root:
      raise ValueError(f"the path {path!r} leads out of {folder}")
    if not stat.S_ISREG(mode):
      raise ValueError(f"there is no image file {path!r} in {folder}")
    return real

  return resolve


def _classes(name: str, folder: str, labels: dict[str, np.ndarray]
             ) -> tuple[str, ...]:
  """Names by label: from classes.txt, or "0", "1", ... as many as VTAB or, for
  other tasks, the lists have; UserError for a label beyond."""
  path = os.path.join(folder, "classes.txt")
  if not os.path.exists(path):
    most = 1 + max(y.max() for y in labels.values())
    _, known = _VTAB.get(vtab.canonical(name), ("", most))
    return _check_labels(folder, labels, tuple(map(str, range(known))), name)
  names = tuple(line.strip() for line in _lines(path))
  if "" in names:
    raise errors.UserError(f"{path}:{names.index('') + 1}: a blank line where "
                           "a class name is expected")
  return _check_labels(folder, labels, names, "classes.txt")


def _check_labels(folder, labels, names, source):
  for split, y in labels.items():
    if (y >= len(names)).any():
      row = int((y >= len(names)).argmax())
      raise errors.UserError(
          f"{_list(folder, split)}:{row + 1}: the label {y[row]} has no name: "
          f"{source} names {len(names)} classes, 0 to {len(names) - 1}")
  return names


def _check_apart(folder: str, files: dict[str, list[str]], held_out: str,
                 seen: str) -> None:
  """A held-out image that is also trained on makes every number worthless."""
  known = set(files[seen])
  both = [row for row, file in enumerate(files[held_out]) if file in known]
  if both:
    example = os.path.relpath(files[held_out][both[0]],
                              os.path.realpath(folder))
    raise errors.UserError(
        f"{_list(folder, held_out)}:{both[0] + 1}: {example} also stands in "
        f"{LISTS[seen]}.txt, as do {len(both)} images in all: take them out of one "
        "of the two lists")
