"""scikit-learn's 1797 handwritten 8x8 digits: real images without a download.

Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI
(the copy that scikit-learn installs).
"""
import hashlib

import numpy as np
from PIL import Image

from ttc_jax import errors
from ttc_jax.tasks import Task, images

_TRAIN, _VAL = 80, 20  # per class; the other 797 are the test split


def names(data: str | None) -> tuple[str, ...]:
  """The one task of this family, whatever `data` is."""
  del data
  return ("digits",)


def load(name: str, data: str | None) -> Task:
  """Splits the digits 800/200/797; see `tasks.find`."""
  del data
  try:
    from sklearn import datasets  # lazily: it takes a second, for one task
  except ImportError as error:
    raise errors.UserError("the task 'digits' needs scikit-learn: "
                           "pip install scikit-learn") from error
  pixels, target = datasets.load_digits(return_X_y=True)
  grey = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
  rows = _rows(target)
  return Task(
      name, "Natural", classes=tuple(map(str, range(10))),
      labels={s: target[r].astype(np.int32) for s, r in rows.items()},
      sources={s: _source(grey[r]) for s, r in rows.items()},
      digest=hashlib.sha256(grey.tobytes()).hexdigest()[:16])


def _source(grey: np.ndarray) -> images.Source:
  return images.Source(
      len(grey), lambda i: Image.fromarray(grey[i]).convert("RGB"))


def _rows(target: np.ndarray) -> dict[str, np.ndarray]:
  """Row numbers of each split: a fixed shuffle, cut class by class."""
  order = np.random.default_rng(0).permutation(len(target))
  rank = np.empty(len(target), int)  # how many of its class stand before it
  for label in range(10):
    mine = target[order] == label
    rank[mine] = np.arange(mine.sum())
  train = order[rank < _TRAIN]
  val = order[(_TRAIN <= rank) & (rank < _TRAIN + _VAL)]
  return {"train": train, "val": val,
          "trainval": np.concatenate([train, val]),
          "test": order[rank >= _TRAIN + _VAL]}
