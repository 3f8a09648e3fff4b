"""Domains: the same classes in several kinds of pictures, as in PACS.

DATA/TASK has, for two domains or more, the lists DOMAIN.txt (all its images),
DOMAIN_train.txt and DOMAIN_test.txt, with lines `relative/path label`, and
perhaps classes.txt. Then there are, beside a task TASK that its other lists may
make,

  TASK/from_DOMAIN    trained on one domain, tested on its test list, then on
                      every other domain as a whole
  TASK/except_DOMAIN  trained on all other domains, tested on their test lists
                      together, then on the domain left out as a whole

A fifth of each class of the training images is "val", chosen by the names of
the images: the same on every machine. (Task TASK/leave_out_DOMAIN, where a
folder has its lists, is another division.)
"""
from collections.abc import Mapping
import os
import re
from typing import NamedTuple

import numpy as np

from ttc_jax import errors, files
from ttc_jax.tasks import Task, division, folder, images
from ttc_jax.tasks.folder import Entries

_NAME = re.compile(r"(?P<task>[^/]+)/(?P<how>from|except)_(?P<domain>.+)")


class Lists(NamedTuple):
  """The three lists of a domain."""
  whole: Entries
  train: Entries
  test: Entries


def names(data: str | None) -> tuple[str, ...]:
  """Returns no name: these tasks are asked for by name; see `nested`."""
  del data
  return ()


def nested(data: str | None) -> tuple[str, ...]:
  """Returns the names TASK/from_DOMAIN and TASK/except_DOMAIN."""
  if data is None or not os.path.isdir(files.expand(data)):
    return ()
  data = files.expand(data)
  return tuple(name for task in sorted(os.listdir(data))
               for name in nested_in(task, os.path.join(data, task)))


def nested_in(task: str, path: str) -> tuple[str, ...]:
  """Returns the names of the tasks that the folder of one makes."""
  return tuple(f"{task}/{how}_{domain}" for domain in domains(path)
               for how in ("from", "except"))


def domains(path: str) -> tuple[str, ...]:
  """Returns the names of a folder's domains, sorted; none if fewer than two."""
  try:
    found = set(os.listdir(path))
  except OSError:  # a file, or a folder that is closed to us
    return ()
  known = sorted(
      file.removesuffix("_train.txt") for file in found
      if file.endswith("_train.txt")
      and {file.replace("_train.txt", end) for end in ("_test.txt", ".txt")}
      <= found)
  return tuple(known) if len(known) > 1 else ()


def hint(name: str, data: str | None) -> str | None:
  """Says how a folder's domains are named, or which list one lacks."""
  if data is None or not os.path.isdir(files.expand(data)):
    return None
  if not name:
    found = nested(data)
    return (f"; its tasks of domains are named: task={found[0]} and so on, "
            f"{len(found)} in all") if found else None
  task = name.partition("/")[0]
  base = os.path.join(files.expand(data), task)
  if domains(base):
    return f"; domains of {base}: {', '.join(nested_in(task, base))}"
  lists = set(os.listdir(base)) if os.path.isdir(base) else set()
  for file in sorted(lists):
    domain = file.removesuffix("_train.txt")
    if domain != file and f"{domain}_test.txt" in lists and (
        f"{domain}.txt" not in lists):
      return (f"; {base} has {domain}_train.txt and {domain}_test.txt, but no "
              f"{domain}.txt, the list of all images of that domain")
  return None


def load(name: str, data: str) -> Task:
  """Reads and checks the lists of a task; see `tasks.find`."""
  match = _NAME.fullmatch(name)
  if match is None:  # `nested` made the name
    raise ValueError(name)
  base = os.path.join(files.expand(data), match["task"])
  resolve = folder.make_resolver([base])
  lists = {domain: Lists(*(folder.read_list(
      os.path.join(base, f"{domain}{end}.txt"), resolve)
                           for end in ("", "_train", "_test")))
           for domain in domains(base)}
  one = match["domain"]
  inside = [d for d in lists if (d == one) == (match["how"] == "from")]
  outside = {d: lists[d].whole for d in lists if d not in inside}
  train = _joined([lists[d].train for d in inside])
  test = _joined([lists[d].test for d in inside])
  _check_apart(base, train, {"the test lists": test, **outside})
  return _task(name, base, train, {"test": test, **outside})


def _task(name: str, base: str, train: Entries,
          tests: Mapping[str, Entries]) -> Task:
  """Divides "val" off the training images."""
  classes = folder.class_names(name, [base], {"train": train, **tests})
  rows = division.divide(train.names, train.labels, ["val"], classes, name)
  lists = {role: _part(train, rows[role]) for role in ("train", "val")}
  lists = {**lists, "trainval": _joined([lists["train"], lists["val"]]),
           **tests}
  return Task(
      name, "Other", classes,
      labels={s: entries.labels for s, entries in lists.items()},
      sources={s: images.from_files(entries.files, entries.names)
               for s, entries in lists.items()},
      digest=folder.digest(lists, classes), tests=tuple(tests),
      notes=("val is a fifth of each class of the training lists",))


def _joined(parts: list[Entries]) -> Entries:
  return Entries([name for p in parts for name in p.names],
                 [file for p in parts for file in p.files],
                 np.concatenate([p.labels for p in parts]))


def _part(entries: Entries, rows: list[int]) -> Entries:
  return Entries([entries.names[i] for i in rows],
                 [entries.files[i] for i in rows], entries.labels[rows])


def _check_apart(base: str, train: Entries,
                 tests: Mapping[str, Entries]) -> None:
  """Refuses an image that is both trained on and tested on."""
  seen = set(train.files)
  for what, entries in tests.items():
    both = [name for name, file in zip(entries.names, entries.files,
                                       strict=True) if file in seen]
    if both:
      raise errors.UserError(
          f"{base}: {both[0]} stands in a training list and in {what}, as do "
          f"{len(both)} images in all: take them out of one of the two lists")
