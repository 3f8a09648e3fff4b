"""The vtab-1k folder format of the PyTorch PEFT repositories.

DATA/TASK holds train800.txt, val200.txt, train800val200.txt and test.txt, each
with lines `relative/path label` (relative to DATA/TASK), and may hold
classes.txt, one class name a line. Each file test_NAME.txt is a further test
set, called NAME.

A folder within a task's folder may be a task too, TASK/INNER: its paths, and
its classes.txt, may also be relative to DATA/TASK.
"""
from collections.abc import Callable, Sequence
import functools
import hashlib
import os
import posixpath
import re
import stat
from typing import NamedTuple

import numpy as np

from ttc_jax import errors, files
from ttc_jax.tasks import ROLES, Task, images
from ttc_jax.vtab import rows as vtab

# What the format calls the roles and the main test set.
LISTS = {"train": "train800", "val": "val200", "trainval": "train800val200",
         "test": "test"}
_FURTHER = re.compile(r"test_(.+)\.txt")
_TEST_NAME = re.compile(r"\w[\w.-]*")
_SHOWN = 20             # numbers of wrong lines in a sentence
_MAX_CLASSES = 100_000  # a larger label is a slip, and would eat the memory


class Entries(NamedTuple):
  """The N lines of a list.

  names: the paths as the list gives them, normalised.
  files: the image files, symbolic links resolved.
  labels: int32 (N,).
  """
  names: list[str]
  files: list[str]
  labels: np.ndarray


def names(data: str | None) -> tuple[str, ...]:
  """Returns the folders in `data` that hold train800.txt.

  Raises:
    errors.UserError: `data` cannot be read.
  """
  if data is None:
    return ()
  data = files.expand(data)
  try:
    found = sorted(os.listdir(data))
  except OSError as error:
    raise errors.UserError(
        f"cannot read the folder data={data} ({error.strerror}): give a folder "
        "of tasks or of pictures, a .zip, hf:NAME or tfds:NAME") from error
  return tuple(name for name in found if is_task(os.path.join(data, name)))


def nested(data: str | None) -> tuple[str, ...]:
  """Returns the names TASK/INNER of tasks in folders of those in `data`."""
  if data is None:
    return ()
  data = files.expand(data)
  return tuple(f"{outer}/{inner}" for outer in sorted(os.listdir(data))
               for inner in _folders(os.path.join(data, outer))
               if is_task(os.path.join(data, outer, inner)))


def is_task(folder: str) -> bool:
  """Tells whether a folder holds the lists of a task."""
  return os.path.isfile(os.path.join(folder, f"{LISTS['train']}.txt"))


def _folders(folder: str) -> list[str]:
  try:
    with os.scandir(folder) as found:
      return sorted(entry.name for entry in found if entry.is_dir())
  except OSError:  # a file, or a folder that is closed to us
    return []


def load(name: str, data: str) -> Task:
  """Reads and checks the lists of DATA/NAME; see `tasks.find`."""
  folder = os.path.join(files.expand(data), *name.split("/"))
  bases = [folder] + [os.path.dirname(folder)] * name.count("/")
  tests = _tests(folder)
  resolve = make_resolver(bases)
  lists = {s: read_list(_path(folder, s), resolve) for s in (*ROLES, *tests)}
  classes = class_names(name, bases, lists)
  _check_apart(folder, lists, "val", "train")
  for test in tests:
    for seen in ("trainval", "train", "val"):
      _check_apart(folder, lists, test, seen)
  _check_one_label(folder, lists)
  row = vtab.ROWS.get(vtab.canonical(name))
  return Task(
      name, row.group if row else "Other", classes,
      labels={s: entries.labels for s, entries in lists.items()},
      sources={s: images.from_files(entries.files, entries.names)
               for s, entries in lists.items()},
      digest=digest(lists, classes), tests=tests,
      notes=_notes(lists, classes))


def _tests(folder: str) -> tuple[str, ...]:
  """Names of the test sets: "test", then those that have a further list."""
  further = []
  for file in sorted(os.listdir(folder)):
    if found := _FURTHER.fullmatch(file):
      name = found[1]
      if name in (*ROLES, "test") or not _TEST_NAME.fullmatch(name):
        raise errors.UserError(
            f"{os.path.join(folder, file)}: a file test_NAME.txt is a further "
            f"test set, and none can be called {name!r}: rename the file")
      further.append(name)
  return ("test", *further)


def _path(folder: str, split: str) -> str:
  """The list of a role or a test set."""
  return os.path.join(folder, f"{LISTS.get(split, f'test_{split}')}.txt")


def digest(lists: dict[str, Entries], classes: tuple[str, ...]) -> str:
  """Returns a hash of the lists' contents; the folder's place is no part."""
  lines = [f"{name} {label}" for entries in lists.values()
           for name, label in zip(entries.names, entries.labels, strict=True)]
  return hashlib.sha256("\n".join((*classes, *lines)).encode()
                        ).hexdigest()[:16]


# --- Reading ------------------------------------------------------------------

def lines(path: str) -> list[str]:
  """Returns the lines of a text file, without blank ones at the end."""
  try:
    with open(path, "rb") as file:
      content = file.read()
  except FileNotFoundError as error:
    raise errors.UserError(
        f"{path} is missing: a task needs the lists "
        f"{', '.join(f'{s}.txt' for s in LISTS.values())}") from error
  except OSError as error:
    raise errors.UserError(f"cannot read {path} ({error.strerror}): it must "
                           "be a readable text file") from error
  text = _decode(path, content).rstrip()
  if not text:
    raise errors.UserError(f"{path} is empty: it must hold one entry a line")
  return re.split(r"\r\n|\r|\n", text)


def _decode(path: str, content: bytes) -> str:
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
      raise errors.UserError(
          f"{path} is UTF-16 text: save it as UTF-8") from error
    line = 1 + content[:error.start].count(b"\n")
    raise errors.UserError(
        f"{path}:{line}: the byte 0x{content[error.start]:02x} is not UTF-8: "
        "save the file as UTF-8 text") from error


def read_list(path: str, resolve: Callable[[str], tuple[str, str]]
               ) -> Entries:
  """Reads a list; UserError names file and lines.

  Args:
    resolve: see `make_resolver`.
  """
  found, labels, wrong = [], [], {}
  for number, line in enumerate(lines(path), start=1):
    try:
      file, label = parse(line)
      found.append(resolve(file))
      labels.append(label)
    except ValueError as error:
      wrong[number] = str(error)
  if wrong:
    raise errors.UserError(_wrong_lines(path, wrong))
  array = np.array(labels, np.int32)
  array.setflags(write=False)
  return Entries([name for name, _ in found], [file for _, file in found],
                 array)


def _wrong_lines(path: str, wrong: dict[int, str]) -> str:
  first, *others = wrong
  sentence = f"{path}:{first}: {wrong[first]}"
  if not others:
    return sentence
  numbers = ", ".join(map(str, others[:_SHOWN]))
  dots = ", ..." if len(others) > _SHOWN else ""
  return (f"{sentence}; {len(others)} more lines of this list are wrong: "
          f"{numbers}{dots}")


def parse(line: str) -> tuple[str, int]:
  """Splits `some path label` at the last blank: a path may hold blanks.

  Raises:
    ValueError: what is wrong with the line.
  """
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


def make_resolver(bases: Sequence[str]
                   ) -> Callable[[str], tuple[str, str]]:
  """Returns path of a list -> (the path normalised, the real file).

  The file is in the first of `bases` that holds it. Symbolic links are
  followed: the folder is the user's own. The path itself cannot leave `bases`.
  """
  real_folder = functools.cache(os.path.realpath)  # thousands share a few

  def find(base, name):
    # The list is UTF-8, and so are the names on the disk: whatever the locale.
    parent, last = posixpath.split(os.fsdecode(name.encode()))
    try:
      real = os.path.join(real_folder(os.path.join(base, parent)), last)
      mode = os.lstat(real).st_mode
      if stat.S_ISLNK(mode):
        real = os.path.realpath(real)
        mode = os.stat(real).st_mode
    except (OSError, ValueError):
      return None
    return real if stat.S_ISREG(mode) else None

  def resolve(path: str) -> tuple[str, str]:
    name = posixpath.normpath(path)
    if os.path.isabs(path):
      raise ValueError(f"the path {path!r} must be relative to {bases[0]}")
    if name.split("/")[0] == "..":
      raise ValueError(f"the path {path!r} leads out of {bases[0]}")
    for base in bases:
      if real := find(base, name):
        return name, real
    hint = "; folders are separated by '/'" if "\\" in path else ""
    raise ValueError(f"there is no image file {path!r} in {bases[0]}{hint}")

  return resolve


# --- Checking -----------------------------------------------------------------

def class_names(name: str, bases: Sequence[str], lists: dict[str, Entries]
             ) -> tuple[str, ...]:
  """Returns the class names, by label.

  They are those of classes.txt; or else "0", "1", ..., as many as VTAB's row
  or, for other tasks, the lists have. UserError for a label beyond, or where
  there is one class only.
  """
  for path in (os.path.join(base, "classes.txt") for base in bases):
    if os.path.exists(path):
      found = tuple(line.strip() for line in lines(path))
      if "" in found:
        raise errors.UserError(f"{path}:{found.index('') + 1}: a blank line "
                               "where a class name is expected")
      first: dict[str, int] = {}
      for number, class_ in enumerate(found, 1):
        if (line := first.setdefault(class_, number)) != number:
          raise errors.UserError(
              f"{path}:{number}: the class {class_!r} stands in line {line} "
              "too: give each label its own name")
      return _check_labels(bases[0], lists, found, "classes.txt")
  row = vtab.ROWS.get(vtab.canonical(name))  # small lists may not show all
  count = (row.classes if row
           else 1 + max(int(e.labels.max()) for e in lists.values()))
  return _check_labels(bases[0], lists, tuple(map(str, range(count))), name)


def _check_labels(folder: str, lists: dict[str, Entries],
                  classes: tuple[str, ...], source: str) -> tuple[str, ...]:
  for split, entries in lists.items():
    beyond = entries.labels >= len(classes)
    if beyond.any():
      row = int(np.argmax(beyond))
      raise errors.UserError(
          f"{_path(folder, split)}:{row + 1}: the label {entries.labels[row]} "
          f"has no name: {source} names {len(classes)} classes, 0 to "
          f"{len(classes) - 1}")
  if len(classes) < 2:
    raise errors.UserError(f"{folder} has one class only, {classes[0]!r}: a "
                           "task needs two or more")
  return classes


def _check_one_label(folder: str, lists: dict[str, Entries]) -> None:
  """Refuses an image that has two labels."""
  known: dict[str, tuple[int, str]] = {}
  for split, entries in lists.items():
    for row, (file, label) in enumerate(zip(
        entries.files, entries.labels.tolist(), strict=True)):
      other, where = known.setdefault(file, (label, split))
      if label != other:
        raise errors.UserError(
            f"{_path(folder, split)}:{row + 1}: {entries.names[row]} has the "
            f"label {label} here and {other} in "
            f"{os.path.basename(_path(folder, where))}: correct one of them")


def _notes(lists: dict[str, Entries], classes: tuple[str, ...]
           ) -> tuple[str, ...]:
  """What is unusual about lists that can be used."""
  notes = []
  parts, both = ({file for part in which for file in lists[part].files}
                 for which in (("train", "val"), ("trainval",)))
  if apart := len(parts ^ both):
    notes.append(f"{LISTS['trainval']}.txt is not {LISTS['train']}.txt and "
                 f"{LISTS['val']}.txt together: {apart:,} images are in one "
                 "and not in the other")
  for split, entries in lists.items():
    if again := len(entries.files) - len(set(entries.files)):
      notes.append(f"{os.path.basename(_path('', split))} names an image again "
                   f"in {again:,} lines")
  unused = set(range(len(classes))).difference(*(
      entries.labels.tolist() for entries in lists.values()))
  if unused:
    notes.append(f"no list has an image of {len(unused)} of {len(classes)} "
                 f"classes ({', '.join(classes[i] for i in sorted(unused)[:3])}"
                 f"{', ...' if len(unused) > 3 else ''})")
  return tuple(notes)


def _check_apart(folder: str, lists: dict[str, Entries], held_out: str,
                 seen: str) -> None:
  """Refuses an image that is both held out and trained on."""
  known = set(lists[seen].files)
  both = [row for row, file in enumerate(lists[held_out].files)
          if file in known]
  if both:
    raise errors.UserError(
        f"{_path(folder, held_out)}:{both[0] + 1}: "
        f"{lists[held_out].names[both[0]]} also stands in {LISTS[seen]}.txt, "
        f"as do {len(both)} images in all: take them out of one of the two "
        "lists")
