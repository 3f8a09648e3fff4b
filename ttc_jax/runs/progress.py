"""A bar on a terminal, and the learning curve of a run."""
from collections.abc import Callable, Sequence
import sys
import time
from typing import Any

import tqdm

from ttc_jax.errors import printable

Record = dict[str, Any]
LINE_SECONDS = 60.0  # between two lines where there is no terminal


class Progress:
  """Shows stage, epoch, loss, validation accuracy, images/s and time left.

  Where stderr is no terminal, as in a batch system, it prints a line a minute.
  The curve is written as a whole at each epoch, so a resumed run's curve has no
  epoch twice.

  Args:
    title: of the bar until the first epoch.
    write: takes all records of the curve so far.
    show: False shows nothing; None shows a bar on a terminal, else lines.
    seconds: between two writes, the one at the end apart.
  """

  def __init__(self, title: str, write: Callable[[Sequence[Record]], None],
               show: bool | None = None, seconds: float = 0.0):
    self._write, self._seconds = write, seconds
    self._written, self._at = 0, -float("inf")  # records, and when
    self._records: list[Record] = []
    self._title, self._lines = title, show is None and not sys.stderr.isatty()
    self._said = time.monotonic()
    self._bar = tqdm.tqdm(
        desc=title, unit="epoch", leave=False,
        disable=not (sys.stderr.isatty() if show is None else show),
        dynamic_ncols=True)

  def expect(self, epochs: int) -> None:
    """Sets how many epochs all stages have together."""
    self._bar.reset(epochs)

  def update(self, stage: str, epoch: int, epochs: int,
             record: Record) -> None:
    """Adds a record to the curve and shows it."""
    self._records.append({"stage": stage, **record})
    if time.monotonic() - self._at >= self._seconds:
      self._write_all()
    values = {}
    if "loss" in record:
      values = {"loss": f"{record['loss']:.3f}",
                "images/s": f"{record['images_per_second']:.0f}"}
    if "val_top1" in record:
      values["val"] = f"{record['val_top1']:.1f}"
    if self._lines and time.monotonic() - self._said >= LINE_SECONDS:
      said = "".join(f", {key} {value}" for key, value in values.items())
      print(printable(f"{self._title}: {stage} {epoch}/{epochs}{said}"),
            file=sys.stderr, flush=True)
      self._said = time.monotonic()
    self._bar.set_description(f"{stage} {epoch}/{epochs}", refresh=False)
    self._bar.set_postfix(values, refresh=False)
    self._bar.update("loss" in record)  # what precedes a stage is no epoch
    self._bar.refresh()

  def __enter__(self) -> "Progress":
    return self

  def _write_all(self) -> None:
    self._write(self._records)
    self._written, self._at = len(self._records), time.monotonic()

  def __exit__(self, *exc) -> None:
    if self._written < len(self._records):
      self._write_all()
    self._bar.close()
