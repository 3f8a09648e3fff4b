"""Logits, features and top-1 over a whole data set, under pmap."""
from collections.abc import Callable
import functools
from typing import Any

import numpy as np

from ttc_jax import interrupt, parallel, trees
from ttc_jax.model import Model
from ttc_jax.tasks.images import Images  # uint8 (N, S, S, 3)


@functools.cache
def _pmapped(model: Model, output: str, *args):
  def fn(params, buffers, images):
    return getattr(model, output)(params, images, buffers, *args)
  return parallel.pmap_rows(fn)


def over(fn: Callable[..., Any], arrays: tuple[Images, ...],
         batch_size: int) -> np.ndarray:
  """Returns the results of `fn` for all batches of the arrays: (N, ...).

  Args:
    fn: of `parallel.pmap_rows`; takes a batch of each array, on the devices.
    arrays: with the same first axis N.
    batch_size: rounded up to a multiple of the devices; the last batch is
      padded to it.
  """
  count, outputs = len(arrays[0]), []
  batch_size = parallel.round_up(batch_size)
  for start in range(0, count, batch_size):
    interrupt.check()
    batch = (parallel.shard_rows(x, start, batch_size) for x in arrays)
    outputs.append((fn(*batch), min(batch_size, count - start)))
  # Wait for the device only now, so that the host runs a batch ahead of it.
  return np.concatenate([parallel.unshard(y)[:n] for y, n in outputs])


def _over(output, model, params, buffers, images, batch_size, *args):
  fn = functools.partial(_pmapped(model, output, *args), params, buffers)
  return over(fn, (images,), min(batch_size, len(images)))


def logits(model: Model, params: trees.Tree, buffers: trees.Tree,
           images: Images, batch_size: int = 256) -> np.ndarray:
  """Returns logits (N, C) of uint8 images (N, S, S, 3).

  Args:
    params, buffers: on every device, see `parallel.replicate`.
  """
  return _over("logits", model, params, buffers, images, batch_size)


def features(model: Model, params: trees.Tree, buffers: trees.Tree,
             images: Images, batch_size: int = 256) -> np.ndarray:
  """Returns features (N, D) of uint8 images; arguments as of `logits`."""
  return _over("features", model, params, buffers, images, batch_size)


def compile_for(model: Model, params: trees.Tree, buffers: trees.Tree,
                images: Images, batch_size: int = 256) -> None:
  """Runs an empty batch, so that a later timing includes no compilation."""
  empty = np.zeros((min(batch_size, len(images)), *images.shape[1:]),
                   images.dtype)
  logits(model, params, buffers, empty, batch_size)


def inputs(model: Model, params: trees.Tree, buffers: trees.Tree,
           images: Images, block: int, batch_size: int = 256) -> np.ndarray:
  """Returns the tokens (N, T, D) that enter a block.

  For a block above the last, depth + 1, the features (N, D).
  """
  if block > model.backbone.depth:
    return features(model, params, buffers, images, batch_size)
  return _over("tokens", model, params, buffers, images, batch_size, block)


def top1(model: Model, params: trees.Tree, buffers: trees.Tree,
         images: Images, labels: np.ndarray,
         batch_size: int = 256, masked: bool = False) -> float:
  """Returns the top-1 accuracy in percent; arguments as of `logits`.

  Args:
    labels: (N,) of int.
    masked: only the classes that `labels` has can be predicted.
  """
  found = logits(model, params, buffers, images, batch_size)
  if masked:
    absent = np.setdiff1d(np.arange(found.shape[-1]), labels)
    found[:, absent] = -np.inf
  predicted = found.argmax(-1)
  return 100 * float((predicted == labels).mean())
