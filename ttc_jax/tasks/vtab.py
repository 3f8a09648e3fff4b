"""VTAB-1K's 19 tasks, where their data sets are prepared by TFDS."""
from ttc_jax import errors
from ttc_jax.tasks import Task, tfds
from ttc_jax.vtab.rows import ROWS, Row, hint  # `hint` is part of a family

__all__ = ["SETS", "folders_of", "hint", "load", "names", "open_set",
           "prepared", "spec"]

SETS = {"vtab": ROWS}  # what task=vtab means


def spec(row: Row) -> tfds.Spec:
  """What the row says, as the reader of TFDS's data sets takes it."""
  return tfds.Spec(row.tfds, row.splits, row.label, row.classes, row.versions,
                   row.binary)


def prepared(name: str, data: str | None) -> str | None:
  """The folder of the data set of one of ROWS, or None."""
  return tfds.prepared(spec(ROWS[name]), data)


def folders_of(name: str) -> tuple[str, ...]:
  """The folders of a data directory that a task needs."""
  return (ROWS[name].tfds.split("/")[0],)


def names(data: str | None) -> tuple[str, ...]:
  """The tasks whose data set is prepared under `data`."""
  return tuple(name for name in ROWS if prepared(name, data))


def open_set(name: str, data: str | None) -> tfds.Dataset:
  """Opens the data set of one of ROWS without reading an example.

  Raises:
    errors.UserError: it is missing, damaged or in a format that is not read.
  """
  if not prepared(name, data):
    raise errors.UserError(f"{name} is not prepared{hint(name, data)}")
  return tfds.open_set(spec(ROWS[name]), data)


def check_count(name: str, dataset: tfds.Dataset) -> None:
  """errors.UserError unless the test set is as large as VTAB's."""
  row, found = ROWS[name], len(dataset.sources["test"])
  if found != row.test_count:
    raise errors.UserError(
        f"{dataset.folder}: the test set {row.test} has {found} images, "
        f"VTAB's has {row.test_count}; prepare the data set again")


def load(name: str, data: str | None) -> Task:
  """Opens a prepared data set; see `tasks.find`."""
  dataset = open_set(name, data)
  check_count(name, dataset)
  return tfds.as_task(name, dataset, ROWS[name].group)
