"""Splits that a data set lacks, divided off its training images for good.

A fifth of each class is divided off, in an order that a hash of the images'
names decides: the same on every machine, in every process, in whatever order
the images are found.

  given              made
  train              test: a fifth; val: a fifth of what is left
  train, test        val: a fifth of train
  train, val         test: val as given; val: a fifth of train
  train, val, test   nothing

Further test sets change none of this.

A division that was made is written as list files, ttc_jax_trainlist.txt,
ttc_jax_vallist.txt and ttc_jax_testlist.txt, with lines `name label` as those
of the vtab-1k format. From then on the lists decide; they are never changed.
"""
from collections.abc import Callable, Mapping, Sequence
import hashlib
import os
from typing import NamedTuple
import unicodedata

import numpy as np

from ttc_jax import errors, files
from ttc_jax.tasks import ROLES, Task, images
from ttc_jax.tasks import folder as folder_format
from ttc_jax.vtab import rows as vtab

SEED = 0
_SHARE = 5    # one image of that many is divided off
_SHOWN = 3    # images that a sentence names
_AGAIN = "delete the lists for a new division"


class Part(NamedTuple):
  """N labelled images that the data set gives as one split.

  names: of the images, different and the same on every machine.
  labels: int32 (N,).
  take: row numbers -> the source of these images.
  """
  names: Sequence[str]
  labels: np.ndarray
  take: Callable[[Sequence[int]], images.Source]


def complete(name: str, parts: Mapping[str, Part], classes: Sequence[str],
             folders: Sequence[str], what: str) -> Task:
  """Returns a task with all roles and a test set; see the table above.

  Args:
    name: of the task.
    parts: {"train", perhaps "val", "test" and names of further test sets}.
    classes: names by label.
    folders: where the lists may lie: the first one that can be written.
    what: the data set, for sentences.

  Raises:
    errors.UserError: a class is too small to be divided; the lists do not fit
      the images.
  """
  parts = dict(parts)
  notes = []
  if "val" in parts and "test" not in parts:
    parts["test"] = parts.pop("val")
    notes.append("the given val is the test set")
  missing = [role for role in ("test", "val") if role not in parts]
  rows = {part: in_order(given.names) for part, given in parts.items()}
  if not missing:
    for path in filter(os.path.exists, (
        list_path(f, role) for f in folders for role in ROLES)):
      raise _does_not_fit(what, path)
  else:
    made, place = _fixed(parts["train"], missing, classes, folders, what)
    parts |= dict.fromkeys(made, parts["train"])
    rows |= made
    notes.append(_note(made, place))
  tests = [part for part in parts if part not in ROLES]
  tests.sort(key=lambda test: (test != "test", test))
  order = {part: rows[part] for part in ("train", "val", *tests)}
  labels = {part: _labels(parts[part], r) for part, r in order.items()}
  sources = {part: parts[part].take(r) for part, r in order.items()}
  labels["trainval"] = np.concatenate([labels["train"], labels["val"]])
  sources["trainval"] = images.chain(sources["train"], sources["val"])
  lines = [f"{part}\t{parts[part].names[i]}\t{parts[part].labels[i]}"
           for part, r in order.items() for i in r]
  text = "\n".join((*classes, *lines)).encode("utf-8", "surrogateescape")
  return Task(name, "Other", tuple(classes), labels, sources,
              hashlib.sha256(text).hexdigest()[:16], tests=tuple(tests),
              notes=tuple(notes))


def own_name(name: str, family: str) -> str:
  """Returns the name of a task: FAMILY_NAME if VTAB-1K has a task NAME."""
  name = name or family
  return f"{family}_{name}" if vtab.canonical(name) in vtab.ROWS else name


def in_order(names: Sequence[str]) -> list[int]:
  """Returns the row numbers in the order of the names' hashes."""
  return sorted(range(len(names)), key=lambda i: (_rank(names[i]), names[i]))


def _rank(name: str) -> bytes:
  # Systems differ in how they store an accent.
  text = f"{SEED}\n{unicodedata.normalize('NFC', name)}"
  return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _labels(part: Part, rows: Sequence[int]) -> np.ndarray:
  labels = np.asarray(part.labels, np.int32)[list(rows)]
  labels.setflags(write=False)
  return labels


def divide(names: Sequence[str], labels: np.ndarray, missing: Sequence[str],
           classes: Sequence[str], what: str) -> dict[str, list[int]]:
  """Returns {role: row numbers} of train and of the roles in `missing`.

  Each role holds a fifth of each class of what the roles before it have left,
  at least one image; train holds the rest. A class without images stays so.
  """
  by_class: dict[int, list[int]] = {c: [] for c in range(len(classes))}
  order = in_order(names)
  for i in order:
    by_class[int(labels[i])].append(i)
  need = len(missing) + 1
  small = [f"{classes[c]} ({len(rows)})" for c, rows in by_class.items()
           if 0 < len(rows) < need]
  if small:
    more = f" and {len(small) - _SHOWN} more" if len(small) > _SHOWN else ""
    raise errors.UserError(
        f"{what}: to divide off {' and '.join(missing)}, a class needs {need} "
        f"images or more, but these have fewer: {', '.join(small[:_SHOWN])}"
        f"{more}; add images, take the classes out, or give the split"
        f"{'s' if len(missing) > 1 else ''}")
  role_of: dict[int, str] = {}
  for rows in by_class.values():
    for role in missing:
      count = max(1, (len(rows) + _SHARE // 2) // _SHARE)
      role_of |= dict.fromkeys(rows[:count], role)
      rows = rows[count:]
    role_of |= dict.fromkeys(rows, "train")
  return {role: [i for i in order if role_of[i] == role]
          for role in ("train", *missing)}


# --- The lists ----------------------------------------------------------------

def list_path(folder: str, role: str) -> str:
  """Returns the list file of a role.

  The library `datasets` takes a file called "_train." for the training images.
  """
  return os.path.join(folder, f"ttc_jax_{role}list.txt")


def is_list(file: str) -> bool:
  """Tells whether a file name is that of a list."""
  return file in {list_path("", role) for role in ("train", "val", "test")}


def _note(made: Mapping[str, list[int]], place: str) -> str:
  roles = [role for role in ("train", "val", "test") if role in made]
  count = sum(map(len, made.values()))
  return (f"{', '.join(roles[:-1])} and {roles[-1]} are a division of "
          f"{count:,} images, kept in {place}{os.sep}"
          f"ttc_jax_{{{','.join(roles)}}}list.txt")


def _fixed(part: Part, missing: Sequence[str], classes: Sequence[str],
           folders: Sequence[str], what: str
           ) -> tuple[dict[str, list[int]], str]:
  """Returns the division that lists hold, and where; made if there is none."""
  for folder in folders:
    if os.path.exists(list_path(folder, "train")):
      return _read(part, missing, folder, what), folder
  made = divide(part.names, part.labels, missing, classes, what)
  return made, _write(part, made, folders)


def _write(part: Part, made: Mapping[str, list[int]], folders: Sequence[str]
           ) -> str:
  """Writes the lists; returns the folder that took them."""
  refused: OSError | None = None
  for folder in folders:
    try:
      os.makedirs(folder, exist_ok=True)
      for role in sorted(made, key=lambda role: role == "train"):  # train last
        files.write_text(list_path(folder, role), "".join(
            f"{part.names[i]} {part.labels[i]}\n" for i in made[role]))
      return folder
    except OSError as error:
      refused = error
  raise errors.UserError(
      f"the lists of the division cannot be written into {folders[-1]} "
      f"({refused and refused.strerror}): make it writable, or set "
      "XDG_CACHE_HOME") from refused


def _does_not_fit(what: str, path: str) -> errors.UserError:
  return errors.UserError(
      f"{what}: {path} is {'there' if os.path.exists(path) else 'missing'}, "
      "which does not fit the given splits: put things back as they were, or "
      f"{_AGAIN}")


def _read(part: Part, missing: Sequence[str], folder: str, what: str
          ) -> dict[str, list[int]]:
  """Reads the lists, which must hold each image once."""
  made: dict[str, list[int]] = {}
  listed: dict[str, str] = {}  # name: the list that holds it
  for role in ("train", "val", "test"):
    path = list_path(folder, role)
    if os.path.exists(path) != (role in ("train", *missing)):
      raise _does_not_fit(what, path)
    if role in ("train", *missing):
      made[role] = _rows(part, path, listed)
  lists = os.path.join(folder, "ttc_jax_*list.txt")
  known = set(part.names)
  _refuse(what, [name for name in listed if name not in known],
          f"of the lists {lists} that are gone", "put them back")
  _refuse(what, [name for name in part.names if name not in listed],
          f"in none of the lists {lists}",
          "take them out, add them to a list")
  return made


def _rows(part: Part, path: str, listed: dict[str, str]) -> list[int]:
  """Returns the row numbers of a list's images; adds its names to `listed`."""
  number = {name: i for i, name in enumerate(part.names)}
  rows = []
  for line, text in enumerate(folder_format.lines(path), start=1):
    try:
      name, label = folder_format.parse(text)
    except ValueError as error:
      raise errors.UserError(f"{path}:{line}: {error}; or {_AGAIN}") from error
    if name in listed:
      raise errors.UserError(f"{path}:{line}: {name} also stands in "
                             f"{listed[name]}: take one of the lines out")
    listed[name] = path
    if name not in number:
      continue  # it is gone
    if label != part.labels[number[name]]:
      raise errors.UserError(
          f"{path}:{line}: the label of {name} is {label} here, but its class "
          f"is number {part.labels[number[name]]} now, so classes were added, "
          f"renamed or taken out: put them back, or {_AGAIN}")
    rows.append(number[name])
  return rows


def _refuse(what: str, names: Sequence[str], fault: str, fix: str) -> None:
  if names:
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    raise errors.UserError(f"{what}: images {fault}: {len(names)} ({shown}): "
                           f"{fix}, or {_AGAIN}")
