"""Logits, features and top-1 over a whole data set, under pmap."""
from collections.abc import Callable
import functools
from typing import Any

import numpy as np

from ttc_jax import interrupt, parallel, trees
from ttc_jax.model import Model


@functools.lru_cache(maxsize=None)
def _pmapped(model: Model, output: str, *args):
  def fn(params, buffers, images):
    return getattr(model, output)(params, images, buffers, *args)
  return parallel.pmap(fn)


def over(fn: Callable[..., Any], arrays: tuple[np.ndarray, ...],
         batch_size: int) -> np.ndarray:
  """What `fn` gives for batches of the arrays, one after another: (N, ...).

  Args:
    fn: pmapped; takes a batch of each array, on the devices.
    arrays: with the same first axis N. Every batch is padded to `batch_size`,
      rounded up for the devices.
  """
  count, outputs = len(arrays[0]), []
  batch_size = parallel.round_up(batch_size)
  for start in range(0, count, batch_size):
    interrupt.check()
    batch = [x[start:start + batch_size] for x in arrays]
    padded = (parallel.shard(parallel.pad_to(x, batch_size)) for x in batch)
    outputs.append((fn(*padded), len(batch[0])))
  # Only now wait for the device: the host has been a batch ahead of it.
  return np.concatenate([
      np.asarray(y).reshape(batch_size, *y.shape[2:])[:n] for y, n in outputs])


def _over(output, model, params, buffers, images, batch_size, *args):
  fn = functools.partial(_pmapped(model, output, *args), params, buffers)
  return over(fn, (images,), min(batch_size, len(images)))


def logits(model: Model, params: trees.Tree, buffers: trees.Tree,
           images: np.ndarray, batch_size: int = 256) -> np.ndarray:
  """(N, S, S, 3) uint8 -> (N, C); params and buffers on every device."""
  return _over("logits", model, params, buffers, images, batch_size)


def features(model: Model, params: trees.Tree, buffers: trees.Tree,
             images: np.ndarray, batch_size: int = 256) -> np.ndarray:
  """(N, S, S, 3) uint8 -> (N, D); params and buffers on every device."""
  return _over("features", model, params, buffers, images, batch_size)


def compile_for(model: Model, params: trees.Tree, buffers: trees.Tree,
                images: np.ndarray, batch_size: int = 256) -> None:
  """Runs a first batch, so that what is timed next compiles nothing."""
  logits(model, params, buffers, images[:batch_size], batch_size)


def inputs(model: Model, params: trees.Tree, buffers: trees.Tree,
           images: np.ndarray, block: int,
           batch_size: int = 256) -> np.ndarray:
  """The tokens (N, T, D) that enter a block, or beyond the last the features.
  """
  if block > model.backbone.depth:
    return features(model, params, buffers, images, batch_size)
  return _over("tokens", model, params, buffers, images, batch_size, block)


def top1(model: Model, params: trees.Tree, buffers: trees.Tree,
         images: np.ndarray, labels: np.ndarray,
         batch_size: int = 256) -> float:
  """Top-1 accuracy in percent."""
  predicted = logits(
      model, params, buffers, images, batch_size).argmax(-1)
  return 100 * float((predicted == labels).mean())
