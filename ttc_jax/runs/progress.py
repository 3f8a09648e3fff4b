"""A bar on a terminal, and the learning curve in metrics.jsonl."""
import json
import sys
from typing import Any

import tqdm

from ttc_jax import files


class Progress:
  """Shows stage, epoch, loss, validation accuracy, images/s and time left.

  Quiet when stderr is no terminal. The file is written whole at each epoch,
  so that a resumed run's curve has no epoch twice.
  """

  def __init__(self, title: str, path: str):
    self._path, self._records = path, []
    self._bar = tqdm.tqdm(
        desc=title, unit="epoch", leave=False,
        disable=not sys.stderr.isatty(), dynamic_ncols=True)

  def expect(self, epochs: int) -> None:
    """Tells how many epochs all stages have together."""
    self._bar.reset(epochs)

  def update(self, stage: str, epoch: int, epochs: int,
             record: dict[str, Any]) -> None:
    self._records.append({"stage": stage, **record})
    files.write_text(self._path, "".join(
        json.dumps(r) + "\n" for r in self._records))
    values = {}
    if "loss" in record:
      values = {"loss": f"{record['loss']:.3f}",
                "images/s": f"{record['images_per_second']:.0f}"}
    if "val_top1" in record:
      values["val"] = f"{record['val_top1']:.1f}"
    self._bar.set_description(f"{stage} {epoch}/{epochs}", refresh=False)
    self._bar.set_postfix(values, refresh=False)
    self._bar.update("loss" in record)  # what precedes a stage is no epoch
    self._bar.refresh()

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self._bar.close()
