"""Prints classes and probabilities of images.

  python -m ttc_jax.predict --bundle=WORKDIR/runs/RUN/bundle IMAGE|FOLDER...

A folder stands for the images in it and in its subfolders. Images that cannot
be read are listed together; the others are answered, and the exit code is 1.
"""
from collections.abc import Iterator, Sequence
from concurrent import futures
import csv
import json
import os
import sys
from typing import Any, NamedTuple

from absl import flags
import numpy as np

from ttc_jax import cli, files, predict
from ttc_jax.errors import UserError, printable
from ttc_jax.report.formats import csv_cell
from ttc_jax.tasks import images as images_lib
from ttc_jax.tasks.pictures import SUFFIXES

_BATCH = 256  # images that are decoded and held at a time
_SHOWN = 20   # damaged images that are listed


class Answer(NamedTuple):
  """An image's likeliest classes, or why it cannot be read.

  Attributes:
    classes: [(class, probability), ...], the likeliest first.
    error: one sentence, or empty.
  """
  path: str
  classes: list[tuple[str, float]]
  error: str = ""


def image_paths(arguments: Sequence[str]) -> list[str]:
  """Returns files as they are named, folders as the images within, sorted.

  Raises:
    UserError: a folder without an image.
  """
  paths = []
  for argument in map(files.expand, arguments):
    found = sorted(_within(argument)) if os.path.isdir(argument) else [argument]
    if not found:
      raise UserError(f"no image in the folder '{argument}': its files end in "
                      f"none of {', '.join(SUFFIXES)}")
    paths += found
  return paths


def _within(folder):
  """Images in a folder and its subfolders, links followed, hidden ones not."""
  seen = set()

  def fail(error):
    raise UserError(f"the folder '{error.filename}' cannot be read "
                    f"({error.strerror}): mend that, or name other folders")
  for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
    folders[:] = [f for f in folders if not f.startswith(".")]
    if (real := os.path.realpath(place)) in seen:
      folders.clear()  # a link to a folder around it
      continue
    seen.add(real)
    yield from (os.path.join(place, name) for name in names
                if name.lower().endswith(SUFFIXES) and name[0] != ".")


def answers(tuned: predict.Tuned, paths: Sequence[str],
            top: int) -> Iterator[Answer]:
  """Yields the answer of every image, in order, decoding a batch at a time."""
  meta = tuned.meta

  def read(path):
    try:
      return images_lib.prepare(path, meta["image_size"], meta["resample"])
    except UserError as error:
      return error

  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for start in range(0, len(paths), _BATCH):
      batch = paths[start:start + _BATCH]
      images = list(pool.map(read, batch))
      good = [x for x in images if not isinstance(x, UserError)]
      probabilities = iter(_padded(tuned, good, len(paths) > _BATCH))
      for path, image in zip(batch, images, strict=True):
        if isinstance(image, UserError):
          yield Answer(path, [], str(image))
          continue
        p = next(probabilities)
        yield Answer(path, [(meta["classes"][i], float(p[i])) for i in
                            np.argsort(-p, kind="stable")[:top]])


def _padded(tuned, images, many):
  """Probabilities of images; of many batches all have one size, so that one
  program serves them."""
  size = tuned.meta["image_size"]
  rows = _BATCH if many and images else len(images)
  batch = np.zeros((rows, size, size, 3), np.uint8)
  for row, image in zip(batch, images, strict=False):
    row[:] = image
  return tuned.predict(batch)[:len(images)]


# --- Output -------------------------------------------------------------------

def write_text(found: Iterator[Answer]) -> Iterator[Answer]:
  """Prints "path, tab, class, tab, probability" lines; yields the answers."""
  for answer in found:
    for name, p in answer.classes:
      print(f"{printable(answer.path)}\t{printable(name)}\t{p:.4f}")
    yield answer


def write_csv(found: Iterator[Answer]) -> Iterator[Answer]:
  """Prints CSV: image, rank from 1, class, probability; yields the answers."""
  writer = csv.writer(sys.stdout, lineterminator="\n")
  writer.writerow(["image", "rank", "class", "probability"])
  for answer in found:
    for rank, (name, p) in enumerate(answer.classes, 1):
      writer.writerow([csv_cell(answer.path), rank, csv_cell(name), f"{p:.6f}"])
    yield answer


def write_json(found: Iterator[Answer]) -> Iterator[Answer]:
  """Prints a JSON list: {"image", "classes": [{"class", "probability"}]}, or
  {"image", "error"}; yields the answers."""
  before = "["
  for answer in found:
    print(before + json.dumps(_object(answer)), end="")
    before = ",\n "
    yield answer
  print("]")


def _object(answer: Answer) -> dict[str, Any]:
  if answer.error:
    return {"image": answer.path, "error": answer.error}
  return {"image": answer.path, "classes": [
      {"class": name, "probability": p} for name, p in answer.classes]}


def report(failed: Sequence[Answer], count: int) -> int:
  """Prints which of `count` images cannot be read; returns the exit code."""
  for answer in failed[:_SHOWN]:
    print(f"error: {printable(answer.error)}", file=sys.stderr)
  if len(failed) > 1:
    listed = (f"; the first {_SHOWN} are listed" if len(failed) > _SHOWN
              else "")
    print(f"error: {len(failed)} of {count} images cannot be read{listed}",
          file=sys.stderr)
  return 1 if failed else 0


def main(argv: list[str]) -> int:
  if not _BUNDLE.value or not argv[1:]:
    raise UserError("give --bundle=DIR and at least one image or folder")
  if _JSON.value and _CSV.value:
    raise UserError("give --json or --csv, not both")
  paths = image_paths(argv[1:])
  tuned = predict.load(
      _BUNDLE.value, _WEIGHTS.value, frozen_dtype=_FROZEN.value)
  write = (write_json if _JSON.value else write_csv if _CSV.value
           else write_text)
  failed = [a for a in write(answers(tuned, paths, _TOP.value)) if a.error]
  return report(failed, len(paths))


if __name__ == "__main__":
  _BUNDLE = flags.DEFINE_string(
      "bundle", None, "folder of a finished run, or a packed bundle")
  _WEIGHTS = flags.DEFINE_string(
      "weights", None, "the base weights; by default the local file that the "
      "bundle names")
  _FROZEN = flags.DEFINE_string(
      "frozen_dtype", None, "of frozen kernels: float32, bfloat16 or int8; by "
      "default as in training")
  _TOP = flags.DEFINE_integer("top", 1, "classes an image", lower_bound=1)
  _JSON = flags.DEFINE_bool("json", False, "print a list of objects")
  _CSV = flags.DEFINE_bool("csv", False, "print a table for spreadsheets")
  cli.run(main)
