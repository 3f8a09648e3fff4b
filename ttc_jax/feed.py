"""A training set that does not fit in memory, as chunks of batches.

Grain reads: its threads decode the rows of an epoch's order, a chunk ahead of
the devices, and hand them on in that order whatever thread was faster. The
order is the one that an epoch in memory has (`step.shuffled`), so it is global,
seeded, and begins at any step. A host reads the rows of its own devices only.
"""
from collections.abc import Callable, Generator, Iterator
from concurrent import futures
import contextlib
import math
import os
import threading
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from ttc_jax import parallel, trees
from ttc_jax.tasks.images import Images

_CHUNK_BYTES = 256 * 2 ** 20  # of a chunk, on one host


class Chunk(NamedTuple):
  """Consecutive steps of an epoch.

  Attributes:
    first, steps: the steps are first, ..., first + steps - 1.
    batches: (images (devices here, K, B/n, ...), labels (devices here, K,
      B/n)), on the devices; those beyond `steps` are padding.
  """
  first: int
  steps: int
  batches: trees.Tree


def fits(images: Images, gib: float) -> bool:
  """Tells whether images take at most so many GiB."""
  return math.prod(images.shape) * images.dtype.itemsize <= gib * 2 ** 30


class Feed:
  """Reads the images of a training set in a given order.

  Args:
    images: (N, ...), indexed row by row: a Stream, an array or a memmap.
    labels: (N,).
    batch_size: images a step, on all devices together.
    workers: threads that decode; 0: one for each core.

  Attributes:
    steps: K, of a chunk.
    seconds: that the workers were busy, divided by their number: what the
      images read so far take where nothing else is slower.
  """

  def __init__(self, images: Images, labels: np.ndarray, batch_size: int,
               workers: int = 0):
    self._images, self._labels = images, labels
    self._batch = batch_size // len(parallel.devices())
    self._workers = workers or os.cpu_count() or 1
    a_step = (len(parallel.here()) * self._batch * images.dtype.itemsize
              * math.prod(images.shape[1:]))
    self.steps = max(1, min(_CHUNK_BYTES // a_step, len(labels) // batch_size))
    self._busy, self._lock = 0.0, threading.Lock()

  @property
  def seconds(self) -> float:
    return self._busy / self._workers

  def shapes(self) -> trees.Tree:
    """Returns the shapes and dtypes of a chunk's batches."""
    lead = (len(parallel.here()), self.steps, self._batch)
    return tuple(jax.ShapeDtypeStruct((*lead, *x.shape[1:]), x.dtype)
                 for x in (self._images, self._labels))

  def chunks(self, order: np.ndarray, first: int = 0) -> Generator[Chunk]:
    """Yields the chunks of an epoch; close the iterator to stop early.

    Args:
      order: rows (steps, devices, B/n), see `step.shuffled`.
      first: the step to begin with.

    Raises:
      DataError: an image that cannot be decoded.
    """
    rows = self._rows(order[first:, parallel.here()])
    with contextlib.closing(self._read(rows.reshape(-1))) as read:
      for mine in rows:
        images = next(read).reshape(*mine.shape, *self._images.shape[1:])
        yield Chunk(first, min(self.steps, len(order) - first), parallel.put(
            (images, self._labels[np.maximum(mine, 0)])))
        first += self.steps

  def _rows(self, order):
    """(steps, devices, B/n) -> (chunks, devices, K, B/n), padded with -1."""
    lack = -len(order) % self.steps
    order = np.pad(order, ((0, lack), (0, 0), (0, 0)), constant_values=-1)
    return order.reshape(-1, self.steps, *order.shape[1:]).swapaxes(1, 2)

  def _read(self, rows: np.ndarray) -> Any:
    """The iterator of grain that gives the images of a chunk at a time."""
    import grain  # takes long to import; most runs fit in memory
    chunk = self.steps * self._batch * len(parallel.here())
    return iter(
        grain.MapDataset.source(rows).map(self._row).to_iter_dataset(
            grain.ReadOptions(self._workers, chunk))
        .batch(chunk, batch_fn=np.stack))

  def _row(self, row: int) -> np.ndarray:
    if row < 0:
      return np.zeros(self._images.shape[1:], self._images.dtype)
    begin = time.perf_counter()
    image = np.array(self._images[int(row)])  # of a memmap, read here
    with self._lock:
      self._busy += time.perf_counter() - begin
    return image


def run(chunk_fn: Callable, learner: Any, fixed: Any, key: Any, epoch: int,
        chunks: Iterator[Chunk]
        ) -> Generator[tuple[Any, np.ndarray, float, bool]]:
  """Trains on chunks; the host reads one while the devices train on another.

  Args:
    chunk_fn: compiled, see `step.make_chunk_fn`, as are the arguments after it.

  Yields:
    (learner, losses of the chunk's steps, seconds that the steps took, whether
    this was the last chunk).
  """
  chunk = next(chunks, None)
  with futures.ThreadPoolExecutor(1) as waiting:
    while chunk:
      steps, begin = chunk.steps, time.perf_counter()
      at = parallel.replicate(tuple(
          map(np.int32, (epoch, chunk.first, steps))))
      learner, losses = chunk_fn(learner, fixed, chunk.batches, key, at)
      ended = waiting.submit(_when_ready, losses)
      chunk = next(chunks, None)
      seconds = ended.result() - begin
      yield learner, np.asarray(losses[0])[:steps], seconds, chunk is None


def _when_ready(x):
  """Waits for an array of the devices; returns the time."""
  jax.block_until_ready(x)
  return time.perf_counter()
