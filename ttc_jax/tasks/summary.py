"""What a task holds, in a few lines, before something is trained on it."""
from collections.abc import Iterator, Sequence

import numpy as np

from ttc_jax.errors import printable
from ttc_jax.tasks import Task

_SHOWN = 20  # classes whose names are shown


def lines(task: Task) -> list[str]:
  """Returns the lines: classes, images of each split, how it was divided.

    pets: 4 classes: cat, dog, owl, rabbit
      train  192 images, 48 of each class
      val     48 images, 12 of each class
      test    60 images
      train, val and test are a division of 300 images, kept in ...
  """
  return list(map(printable, _lines(task)))


def line(task: Task) -> str:
  """Returns the same in one line, without names of classes."""
  counts = ", ".join(f"{part} {task.sources[part].count:,}"
                     for part in ("train", "val", *task.tests))
  return printable(f"{task.name}: {len(task.classes)} classes; {counts}"
                   + "".join(f"; {note}" for note in task.notes))


def _lines(task: Task) -> Iterator[str]:
  names = ", ".join(task.classes[:_SHOWN])
  more = len(task.classes) - _SHOWN
  yield (f"{task.name}: {len(task.classes)} classes: {names}"
         + (f", and {more} more" if more > 0 else ""))
  parts = ("train", "val", *task.tests)
  counts = {part: f"{task.sources[part].count:,}" for part in parts}
  wide, right = max(map(len, parts)), max(map(len, counts.values()))
  for part in parts:
    # Labels of a test set may cost a look at each of its examples.
    a_class = "" if part in task.tests else _a_class(
        task.labels[part], task.classes)
    yield f"  {part:{wide}}  {counts[part]:>{right}} images{a_class}"
  yield from (f"  {note}" for note in task.notes)


def _a_class(labels: np.ndarray, classes: Sequence[str]) -> str:
  counts = np.bincount(labels, minlength=len(classes))
  least, most = int(counts.argmin()), int(counts.argmax())
  if counts[least] == counts[most]:
    return f", {counts[least]:,} of each class"
  return (f", {counts[least]:,} ({classes[least]}) to {counts[most]:,} "
          f"({classes[most]}) of a class")
