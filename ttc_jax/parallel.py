"""Data parallelism over this host's devices: the only file that says pmap.

Every array that a pmapped function takes or gives has a leading axis of
devices. `pmap` is public, in maintenance, and since JAX 0.8 a thin layer over
`jit(shard_map)`; keeping it here makes leaving it a change of this file.
"""
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

AXIS = "batch"
Tree = Any


def devices() -> list[jax.Device]:
  """This host's accelerators; a run never spans hosts."""
  return jax.local_devices()


def pmap(fn: Callable, donate: tuple[int, ...] = ()) -> Callable:
  """`jax.pmap` of `fn` with the axis name "batch"."""
  return jax.pmap(
      fn, axis_name=AXIS, devices=devices(), donate_argnums=donate)


def pmean(tree: Tree) -> Tree:
  return jax.lax.pmean(tree, AXIS)


def psum(tree: Tree) -> Tree:
  return jax.lax.psum(tree, AXIS)


def device_index() -> jax.Array:
  return jax.lax.axis_index(AXIS)


def _place(x):
  mesh = Mesh(np.asarray(devices()), (AXIS,))
  return jax.device_put(x, NamedSharding(mesh, PartitionSpec(AXIS)))


def replicate(tree: Tree) -> Tree:
  """Puts a copy of every leaf on every device: (...) -> (devices, ...)."""
  n = len(devices())

  def copy(x):
    x = np.asarray(x)
    return _place(np.broadcast_to(x[None], (n, *x.shape)))
  return jax.tree.map(copy, tree)


def unreplicate(tree: Tree) -> Tree:
  """The first device's copy, as numpy."""
  return jax.tree.map(lambda x: np.asarray(x[0]), tree)


def shard(tree: Tree) -> Tree:
  """Spreads the first axis over the n devices: (B, ...) -> (n, B/n, ...)."""
  n = len(devices())
  return jax.tree.map(
      lambda x: _place(np.asarray(x).reshape(n, len(x) // n, *x.shape[1:])),
      tree)


def pad_to(x: np.ndarray, count: int) -> np.ndarray:
  """Repeats the last row until there are `count`; mask the rest yourself."""
  last = np.repeat(x[-1:], count - len(x), axis=0)
  return np.concatenate([x, last])


def round_up(count: int) -> int:
  """The next multiple of the number of devices."""
  n = len(devices())
  return -(-count // n) * n
