"""Data parallelism over this host's devices: the only file that calls pmap.

Every array that a pmapped function takes or returns has a leading axis of
devices. `pmap` is public, in maintenance mode, and since JAX 0.8 a thin layer
over `jit(shard_map)`; to replace it, only this file has to change.
"""
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

AXIS = "batch"
Tree = Any


def devices() -> list[jax.Device]:
  """Returns this host's devices; a run never spans hosts."""
  return jax.local_devices()


def pmap(fn: Callable, donate: tuple[int, ...] = ()) -> Callable:
  """Returns `jax.pmap` of `fn` with the axis name "batch".

  Args:
    donate: positions of arguments whose memory the results may reuse.
  """
  return jax.pmap(
      fn, axis_name=AXIS, devices=devices(), donate_argnums=donate)


def pmean(tree: Tree) -> Tree:
  """Returns the mean over the devices; inside a pmapped function."""
  return jax.lax.pmean(tree, AXIS)


def psum(tree: Tree) -> Tree:
  """Returns the sum over the devices; inside a pmapped function."""
  return jax.lax.psum(tree, AXIS)


def device_index() -> jax.Array:
  """Returns this device's number; inside a pmapped function."""
  return jax.lax.axis_index(AXIS)


def _place(x):
  mesh = Mesh(np.asarray(devices()), (AXIS,))
  return jax.device_put(x, NamedSharding(mesh, PartitionSpec(AXIS)))


def replicate(tree: Tree) -> Tree:
  """Copies every leaf to every device: (...) -> (devices, ...)."""
  n = len(devices())

  def copy(x):
    x = np.asarray(x)
    return _place(np.broadcast_to(x[None], (n, *x.shape)))
  return jax.tree.map(copy, tree)


def unreplicate(tree: Tree) -> Tree:
  """Returns the first device's copy of every leaf, as numpy."""
  return jax.tree.map(lambda x: np.asarray(x[0]), tree)


def shard(tree: Tree) -> Tree:
  """Splits the first axis over the n devices: (B, ...) -> (n, B/n, ...)."""
  n = len(devices())
  return jax.tree.map(
      lambda x: _place(np.asarray(x).reshape(n, len(x) // n, *x.shape[1:])),
      tree)


def pad_to(x: np.ndarray, count: int) -> np.ndarray:
  """Repeats the last row until there are `count` rows.

  The caller has to ignore or mask the results of the repeated rows.
  """
  last = np.repeat(x[-1:], count - len(x), axis=0)
  return np.concatenate([x, last])


def round_up(count: int) -> int:
  """Returns `count` rounded up to a multiple of the number of devices."""
  n = len(devices())
  return -(-count // n) * n
