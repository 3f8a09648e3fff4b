"""Logits, features and top-1 over a whole data set, under pmap."""
import functools

import numpy as np

from ttc_jax import interrupt, parallel, trees
from ttc_jax.model import Model


@functools.lru_cache(maxsize=None)
def _pmapped(model: Model, output: str, *args):
  def fn(params, selection, images):
    return getattr(model, output)(params, images, selection, *args)
  return parallel.pmap(fn)


def _over(output, model, params, selection, images, batch_size, *args):
  batch_size = parallel.round_up(min(batch_size, len(images)))
  fn, outputs = _pmapped(model, output, *args), []
  for start in range(0, len(images), batch_size):
    interrupt.check()
    batch = images[start:start + batch_size]
    padded = parallel.shard(parallel.pad_to(batch, batch_size))
    outputs.append((fn(params, selection, padded), len(batch)))
  # Only now wait for the device: the host has been a batch ahead of it.
  return np.concatenate([
      np.asarray(y).reshape(batch_size, *y.shape[2:])[:n] for y, n in outputs])


def logits(model: Model, params: trees.Tree, selection: trees.Tree,
           images: np.ndarray, batch_size: int = 256) -> np.ndarray:
  """(N, S, S, 3) uint8 -> (N, C); params and selection on every device."""
  return _over("logits", model, params, selection, images, batch_size)


def features(model: Model, params: trees.Tree, selection: trees.Tree,
             images: np.ndarray, batch_size: int = 256) -> np.ndarray:
  """(N, S, S, 3) uint8 -> (N, D); params and selection on every device."""
  return _over("features", model, params, selection, images, batch_size)


def compile_for(model: Model, params: trees.Tree, selection: trees.Tree,
                images: np.ndarray, batch_size: int = 256) -> None:
  """Runs a first batch, so that what is timed next compiles nothing."""
  logits(model, params, selection, images[:batch_size], batch_size)


def inputs(model: Model, params: trees.Tree, selection: trees.Tree,
           images: np.ndarray, block: int,
           batch_size: int = 256) -> np.ndarray:
  """The tokens (N, T, D) that enter a block, or beyond the last the features.
  """
  if block > model.backbone.depth:
    return features(model, params, selection, images, batch_size)
  return _over("tokens", model, params, selection, images, batch_size, block)


def top1(model: Model, params: trees.Tree, selection: trees.Tree,
         images: np.ndarray, labels: np.ndarray,
         batch_size: int = 256) -> float:
  """Top-1 accuracy in percent."""
  predicted = logits(
      model, params, selection, images, batch_size).argmax(-1)
  return 100 * float((predicted == labels).mean())
