"""Checks whether a prepared data set is the one that VTAB-1K means.

It reads all examples and compares them with what is certain (`facts`): the
splits' sizes, the classes, the histograms that the makers of a data set fixed,
the order that TFDS gives, and that no image is in two splits. Two sites that
want more compare fingerprints (`fingerprint`).
"""
from collections import Counter
import hashlib
from typing import Any

import numpy as np

from ttc_jax import errors
from ttc_jax.tasks import check as generic
from ttc_jax.tasks import images, tfds, vtab
from ttc_jax.tasks.check import Seen
from ttc_jax.vtab import facts
from ttc_jax.vtab.rows import ROWS, SPLITS, Row


def check(name: str, data: str) -> dict[str, Any]:
  """Reads all four splits of one of `vtab.ROWS` and reports.

  Returns:
    What `tasks.check.check` returns, with: tfds, the version that is there;
    sha256, of ids and labels; shared, images that trainval and test have in
    common by ids and by pixels.

  A data set that is missing or cannot be opened has no splits.
  """
  try:
    dataset = vtab.open_set(name, data)
  except errors.UserError as error:
    return {"name": name, "tfds": None, "splits": {}, "shared": {},
            "wrong": [str(error)]}
  row = ROWS[name]
  seen = {part: _read(dataset, row, part) for part in SPLITS}
  wrong = [f"{part}: {sentence}" for part, s in seen.items()
           for sentence in (*generic.first(s.wrong),
                            *_wrong_labels(name, row, part, s),
                            *_repeated(row, s), *_wrong_order(row, part, s),
                            *_wrong_names(row, part, s, dataset.classes))]
  wrong += (*_wrong_union(seen), *_shared_ids(row, seen))
  return {
      "name": name,
      "tfds": f"{row.tfds}:{dataset.folder.rstrip('/').rpartition('/')[2]}",
      "splits": {part: generic.summary(s, row.classes)
                 for part, s in seen.items()},
      "shared": {kind: len(_common(seen, "trainval", "test", kind))
                 for kind in ("ids", "pixels")},
      "wrong": wrong,
  }


# --- Reading ------------------------------------------------------------------

def _read(dataset: tfds.Dataset, row: Row, part: str) -> Seen:
  wrong: list[str] = []
  labels: list[int] = []
  ids: list[str] = []
  pixels: list[str] = []
  for number, result in enumerate(images.in_order(
      lambda i: _example(dataset, row, part, i),
      range(len(dataset.sources[part])))):
    if isinstance(result, errors.UserError):
      wrong.append(str(result))
      result = (-1, *[f"{part} {number}"] * 2)
    label, key, pixel = result
    labels.append(label)
    ids.append(key)
    pixels.append(pixel)
  return Seen(np.array(labels, np.int64), ids, pixels, wrong)


def _example(dataset, row, part, i):
  """Label, id and pixels of an example; the error itself if there is one."""
  try:
    example = dataset.sources[part][i]
    image = dataset.sources[part].decode(example, i, row.binary)
    label = row.label(example)
    key = _id(row, dataset.classes, label, example)
  except errors.UserError as error:
    return error
  except (LookupError, TypeError, ValueError) as error:
    return errors.UserError(
        f"example {i} is not as TFDS builds it ({type(error).__name__}: "
        f"{error}); prepare the data set again")
  pixels = generic.pixel_hash(image)
  return label, pixels if key is None else key, pixels


def _id(row, classes, label, example):
  if row.tfds not in facts.IDS:
    return None
  key = example[facts.IDS[row.tfds]]
  key = key.decode() if isinstance(key, bytes) else str(key)
  if row.tfds in facts.IN_A_CLASS and 0 <= label < len(classes):
    return f"{classes[label]}/{key}"
  return key


# --- Judging ------------------------------------------------------------------

def _wrong_labels(name, row, part, seen):
  """Yields sentences about the labels' count, range and histogram."""
  want = row.test_count if part == "test" else facts.COUNTS[part]
  if len(seen.labels) != want:
    yield f"{len(seen.labels)} examples, expected {want}"
  read = seen.labels[seen.labels != -1] if seen.wrong else seen.labels
  outside = (read < 0) | (read >= row.classes)
  if outside.any():
    yield (f"{outside.sum()} labels are out of range, as "
           f"{read[outside.argmax()]}, expected 0 to {row.classes - 1}")
  found = generic.histogram(seen.labels, row.classes)
  if part == "test" and name in facts.TEST and tuple(found) != facts.TEST[name]:
    first = next(c for c, n in enumerate(found) if n != facts.TEST[name][c])
    yield (f"class {first} has {found[first]} images, expected "
           f"{facts.TEST[name][first]}")
  most = facts.MOST.get(name, {}).get(part)
  if most is not None and max(found) > most:
    yield (f"class {int(np.argmax(found))} has {max(found)} images, expected "
           f"at most {most}")


def _repeated(row, seen):
  if row.tfds not in facts.IDS:  # pixels may repeat, and do in dsprites
    return
  twice = [key for key, n in Counter(seen.ids).items() if n > 1]
  if twice:
    yield f"{len(twice)} examples stand in it more than once, as {twice[0]}"


def _wrong_order(row, part, seen):
  """Yields a sentence if the examples stand in another order than TFDS's.

  TFDS writes a split by the MD5 of its name and each example's key.

  So train[:800] are the same everywhere; a copy made another way need not be.
  """
  key = facts.KEYS.get(row.tfds, str) if row.tfds in facts.IDS else None
  if key is None or seen.wrong or "+" in row.splits[part]:
    return
  split = row.splits[part].partition("[")[0]
  try:
    places = [_place(split, key(name)) for name in seen.ids]
  except ValueError as error:
    yield f"its ids are not those of {row.tfds} ({error})"
    return
  late = [i for i in range(1, len(places)) if places[i] < places[i - 1]]
  if late:
    yield (f"{len(late)} examples do not stand where TFDS puts them, the first "
           f"is {seen.ids[late[0]]}")


def _place(split, key):
  return hashlib.md5(f"{split}{key}".encode()).digest()


def _wrong_names(row, part, seen, classes):
  """Compares the ids with those that TFDS would read, where all are known."""
  if row.tfds not in facts.NAMES or seen.wrong:
    return
  expected = [name for one in row.splits[part].split("+")
              for name in _names(row, one, classes)]
  pairs = zip(seen.ids, expected, strict=False)  # the count is checked above
  wrong = [(found, want) for found, want in pairs if found != want]
  if wrong:
    found, want = wrong[0]
    yield (f"{len(wrong)} examples are not those that TFDS puts there, the "
           f"first is {found}, expected {want}")


def _names(row, split, classes):
  """The ids of "NAME" or "NAME[from:to]", in order."""
  split, _, between = split.rstrip("]").partition("[")
  start, _, end = between.partition(":")
  key = facts.KEYS.get(row.tfds) or str
  names = sorted(facts.NAMES[row.tfds](split, classes),
                 key=lambda name: _place(split, key(name)))
  return names[int(start or 0):int(end) if end else None]


def _wrong_union(seen):
  train, val, both = (seen[p] for p in SPLITS[:3])
  unread = train.wrong or val.wrong or both.wrong
  if unread or both.ids == train.ids + val.ids:
    return []
  return ["trainval: it is not train and then val"]


def _common(seen, one, other, kind):
  return (set(getattr(seen[one], kind)) & set(getattr(seen[other], kind)))


def _shared_ids(row, seen):
  """Yields sentences about examples that are in two splits."""
  if row.tfds not in facts.IDS:
    return
  for one, other in (("train", "val"), ("trainval", "test")):
    ids = _common(seen, one, other, "ids")
    if row.tfds in facts.IN_A_SPLIT:
      pixels = _common(seen, one, other, "pixels")
      ids = {key for key, p in zip(seen[one].ids, seen[one].pixels,
                                   strict=True)
             if key in ids and p in pixels}
    if ids:
      yield (f"{other}: {len(ids)} of its examples also stand in {one}, as "
             f"{min(ids)}")
