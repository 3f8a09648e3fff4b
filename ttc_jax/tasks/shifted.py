"""Drawn tasks whose test sets are drawn in another way: domain shift.

Training and validation images, and the first test set, are those of the task
without "_shifted" (`rendered.py`). Further test sets show the same scenes, so a
difference in accuracy is due to the shift alone:

  colour   the three channels change places, and dark and light too
  texture  stripes and spots are blended over the whole image
  noise    normal noise of deviation 0.12 instead of 0.02, of pixels in [0, 1]
"""
from collections.abc import Callable, Mapping
import hashlib
import pathlib
import zlib

import numpy as np
from PIL import Image

from ttc_jax.tasks import Task, images, rendered

_SOURCE = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()
_SUFFIX = "_shifted"
_BASES = ("sprites_location", "sprites_orientation", "scene_count")


def colour(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns the negative with its channels in another order."""
  order = ((1, 2, 0), (2, 0, 1))[rng.integers(2)]
  return 1 - picture[..., order]


def texture(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns the picture with a pattern of waves, 35 % of the result."""
  axis = np.arange(len(picture)) / len(picture)
  waves = np.zeros(picture.shape[:2])
  for _ in range(3):
    across, down = rng.uniform(-10, 10, 2)
    waves += np.sin(2 * np.pi * (across * axis[None] + down * axis[:, None]
                                 + rng.uniform()))
  pattern = 0.5 + waves[..., None] / 6 * rng.uniform(0.5, 1.0, 3)
  return 0.65 * picture + 0.35 * pattern


def noise(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns the picture with strong noise."""
  return picture + rng.normal(0, 0.12, picture.shape)


SHIFTS: Mapping[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]]
SHIFTS = {"colour": colour, "texture": texture, "noise": noise}


def names(data: str | None) -> tuple[str, ...]:
  """Returns the shifted tasks, whatever `data` is."""
  del data
  return tuple(base + _SUFFIX for base in _BASES)


def load(name: str, data: str | None) -> Task:
  """Returns a task with the test sets test, colour, texture and noise."""
  base = name.removesuffix(_SUFFIX)
  task = rendered.load(base, data)
  rows = len(task.labels["test"])
  digest = hashlib.sha256(f"{task.digest} {_SOURCE}".encode()).hexdigest()
  return Task(
      name, task.group, task.classes,
      labels={**task.labels, **{s: task.labels["test"] for s in SHIFTS}},
      sources={**task.sources,
               **{s: _source(base, s, rows) for s in SHIFTS}},
      digest=digest[:16], tests=("test", *SHIFTS))


def _source(base: str, shift: str, rows: int) -> images.Source:
  return images.Source(
      rows, lambda i: Image.fromarray(render(base, shift, i)),
      key=lambda: (_SOURCE, *_drawing(base), shift))


def _drawing(base: str) -> tuple[str, ...]:
  """Returns what the unshifted pictures depend on."""
  return rendered.load(base, None).digest, base


def render(base: str, shift: str, row: int) -> np.ndarray:
  """Returns one image of a shifted test set, uint8 (SIZE, SIZE, 3)."""
  picture = rendered.render(base, "test", row) / 255
  rng = np.random.default_rng([zlib.crc32(f"{base} {shift}".encode()), row])
  return np.round(255 * np.clip(SHIFTS[shift](picture, rng), 0, 1)).astype(
      np.uint8)
