"""Reads every image of a task and reports what it holds and what is wrong."""
from collections.abc import Iterable, Sequence
import hashlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ttc_jax import errors, tasks
from ttc_jax.tasks import images

SHOWN = 20  # damaged images that a report lists, of each split


class Seen(NamedTuple):
  """What a split of N examples holds.

  labels: int64 (N,); -1 where an example could not be read.
  ids: N strings that tell the examples apart.
  pixels: N hashes of decoded images.
  wrong: sentences about examples that could not be read.
  """
  labels: np.ndarray
  ids: list[str]
  pixels: list[str]
  wrong: list[str]


def check(name: str, data: str | None) -> dict[str, Any]:
  """Reads all splits of a task and reports.

  Returns:
    name, tfds (None), splits ({split: count, labels (a histogram), sha256 (of
    pixels and labels, in order), reference}), shared ({"pixels": number of
    images that training and the test sets have in common}) and wrong, a list
    of sentences. All are plain values, ready for JSON.

  A task that cannot be opened has no splits.
  """
  try:
    task = tasks.find(name, data)
  except errors.UserError as error:
    return {"name": name, "tfds": None, "splits": {}, "shared": {},
            "wrong": [str(error)]}
  hashes: dict[str, str | errors.DataError] = {}
  seen = {part: _read(task, part, hashes) for part in task.splits}
  tested = {p for test in task.tests for p in seen[test].pixels}
  return {"name": name, "tfds": None,
          "splits": {part: summary(s, len(task.classes))
                     for part, s in seen.items()},
          "shared": {"pixels": len(tested & {*seen["trainval"].pixels})},
          "wrong": _wrong(seen)}


def _read(task: tasks.Task, part: str, hashes: dict) -> Seen:
  """Reads a split; `hashes` holds what other splits have read already."""
  source = task.sources[part]
  keys = [source.name(i) if source.name else f"{part} {i}"
          for i in range(source.count)]
  rows = {key: i for i, key in enumerate(keys) if key not in hashes}
  hashes.update(zip(rows, images.in_order(
      lambda i: _pixels(source, i), rows.values()), strict=True))
  results = [(-1, key, key) if isinstance(hashes[key], Exception)
             else (int(label), hashes[key], hashes[key])
             for key, label in zip(keys, task.labels[part], strict=True)]
  labels, ids, pixels = zip(*results, strict=True)
  wrong = [str(hashes[key]) for key in keys
           if isinstance(hashes[key], Exception)]
  return Seen(np.array(labels, np.int64), list(ids), list(pixels),
              list(dict.fromkeys(wrong)))


def _pixels(source: images.Source, i: int) -> str | errors.DataError:
  try:
    return pixel_hash(source.read(i))
  except errors.DataError as error:
    return error


def pixel_hash(image: Image.Image) -> str:
  """Returns a hash of an RGB image's size and pixels."""
  size = f"{image.width}x{image.height} ".encode()
  return hashlib.sha256(size + image.tobytes()).hexdigest()


def _wrong(seen: dict[str, Seen]) -> list[str]:
  """Each damaged image once: with the first split that holds it."""
  told: set[str] = set()
  wrong = []
  for part, s in seen.items():
    new = [sentence for sentence in s.wrong if sentence not in told]
    told.update(new)
    wrong += [f"{part}: {sentence}" for sentence in first(new)]
  return wrong


def first(sentences: Sequence[str]) -> list[str]:
  """The first 20 of the sentences, and one that tells how many more."""
  more = len(sentences) - SHOWN
  return [*sentences[:SHOWN],
          *([f"{more} more examples cannot be read"] if more > 0 else [])]


def histogram(labels: np.ndarray, classes: int) -> list[int]:
  """Number of examples of each class; labels out of range are left out."""
  inside = (labels >= 0) & (labels < classes)
  return np.bincount(labels[inside], minlength=classes).tolist()


def summary(seen: Seen, classes: int) -> dict[str, Any]:
  """What a report says of a split."""
  lines = "".join(f"{key}\t{label}\n"
                  for key, label in zip(seen.ids, seen.labels, strict=True))
  digest = hashlib.sha256(
      lines.encode("utf-8", "surrogateescape")).hexdigest()
  return {"count": len(seen.ids), "labels": histogram(seen.labels, classes),
          "sha256": None if seen.wrong else digest,
          "reference": "no reference"}


def text(report: dict[str, Any]) -> str:
  """A report for people: a line a split, then what is wrong."""
  lines = [f"{report['name']}  {report['tfds'] or ''}".rstrip()]
  for part, split in report["splits"].items():
    counts = split["labels"]
    digest = (split["sha256"] or "")[:16] or "none: not all could be read"
    lines.append(
        f"  {part:15}{split['count']:7,} images, {sum(n > 0 for n in counts)} "
        f"of {len(counts)} classes, {min(counts)} to {max(counts)} a class, "
        f"sha256 {digest} ({split['reference']})")
  lines += _shared(report["shared"])
  lines += [f"  wrong: {sentence}" for sentence in report["wrong"]]
  lines += [] if report["wrong"] else ["  all well"]
  return "\n".join(map(errors.printable, lines))


def _shared(shared: dict[str, int]) -> Iterable[str]:
  if shared:
    ids = f"{shared['ids']} ids and " if "ids" in shared else ""
    yield (f"  trainval and test share {ids}the pixels of {shared['pixels']} "
           "images")
