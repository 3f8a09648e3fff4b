"""VTAB-1K's 19 tasks, where their data sets are prepared by TFDS."""
from collections.abc import Callable

from ttc_jax.tasks import Split, Task, images, tfds
from ttc_jax.vtab.rows import ROWS, hint  # `hint` is part of a family

__all__ = ["hint", "load", "names"]


def names(data: str | None) -> tuple[str, ...]:
  """The tasks whose data set is prepared under `data`."""
  return tuple(name for name, row in ROWS.items() if tfds.prepared(row, data))


def load(name: str, data: str | None, decode: Callable) -> Task:
  """Opens a prepared data set; see `tasks.load`."""
  dataset = tfds.open_set(name, data)
  tfds.check_count(dataset)
  row = dataset.row

  def split(part: str) -> Split:
    source = dataset.sources[part]
    key = f"{digest}\t{row.splits[part]}"
    return Split(decode(images.Source(
        len(source), lambda i: source.image(i, row.binary),
        lambda: (key,))), dataset.labels[part])
  digest = tfds.digest(dataset.folder, row)
  return Task(name, row.group, dataset.classes, dataset.labels, split, digest)
