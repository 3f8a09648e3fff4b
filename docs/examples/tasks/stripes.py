"""Stripes: which way do they run? A family of one drawn task.

Copied to `ttc_jax/tasks/stripes.py` this file adds the task "stripes".
"""
import hashlib

import numpy as np
from PIL import Image

from ttc_jax.tasks import Task, images

CLASSES = ("horizontal", "vertical")
COUNTS = {"train": 800, "val": 200, "test": 400}
SIDE = 32  # pixels; images are resized to config.image_size


def names(data: str | None) -> tuple[str, ...]:
  """The tasks of this family, whatever `data` is: it needs none."""
  del data
  return ("stripes",)


def load(name: str, data: str | None) -> Task:
  """Returns the task with its labels; images are drawn when they are read."""
  del data
  labels, sources, first = {}, {}, 0
  for split, count in COUNTS.items():
    rows = np.arange(first, first + count)
    labels[split] = (rows % 2).astype(np.int32)
    sources[split] = _source(rows)
    first += count
  seen = COUNTS["train"] + COUNTS["val"]
  labels["trainval"] = np.concatenate([labels["train"], labels["val"]])
  sources["trainval"] = _source(np.arange(seen))
  # The digest tells runs apart: it must change when the images do.
  digest = hashlib.sha256(f"stripes 1 {COUNTS} {SIDE}".encode()).hexdigest()
  return Task(name, "Structured", CLASSES, labels, sources, digest[:16])


def _source(rows: np.ndarray) -> images.Source:
  return images.Source(len(rows), lambda i: _draw(int(rows[i])))


def _draw(row: int) -> Image.Image:
  """The same picture for the same row, on every machine."""
  rng = np.random.default_rng(row)
  wave = 128 + 60 * np.sin(
      np.arange(SIDE) * rng.uniform(0.5, 1.5) + rng.uniform(0, 6))
  pixels = np.broadcast_to(wave[:, None], (SIDE, SIDE))
  pixels = pixels + rng.normal(0, 20, pixels.shape)
  if row % 2:
    pixels = pixels.T
  grey = np.clip(pixels, 0, 255).astype(np.uint8)
  return Image.fromarray(grey).convert("RGB")
