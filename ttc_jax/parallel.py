"""Data parallelism over devices: the only file that calls pmap.

The devices are this host's; after `span_hosts`, those of all hosts of a pod:
then every host runs the same program at the same time, and holds the part of
each array that is on its own devices.

Every array that a pmapped function takes or returns has a leading axis of
devices. `pmap` is public, in maintenance mode, and since JAX 0.8 a thin layer
over `jit(shard_map)`; to replace it, only this file has to change.
"""
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

AXIS = "batch"
Tree = Any
_spanning: list[bool] = []
_PIECE = 2 ** 26  # bytes that are told at once


def span_hosts() -> None:
  """Makes every function of this module span the devices of all hosts.

  `jax.distributed` has been initialised, and nothing was compiled yet.
  """
  _spanning.append(True)


def spans_hosts() -> bool:
  """Tells whether a run spans several hosts."""
  return bool(_spanning) and jax.process_count() > 1


def devices() -> list[jax.Device]:
  """Returns the devices that share a batch: of this host, or of all."""
  return jax.devices() if spans_hosts() else jax.local_devices()


def here() -> list[int]:
  """Returns which of `devices()` are this host's."""
  return [i for i, device in enumerate(devices())
          if device.process_index == jax.process_index()]


def pmap(fn: Callable, donate: tuple[int, ...] = ()) -> Callable:
  """Returns `jax.pmap` of `fn` with the axis name "batch".

  Args:
    donate: positions of arguments whose memory the results may reuse.
  """
  return jax.pmap(
      fn, axis_name=AXIS, donate_argnums=donate,
      # Across hosts pmap takes all devices, and no list of them.
      devices=None if spans_hosts() else devices())


def pmean(tree: Tree) -> Tree:
  """Returns the mean over the devices; inside a pmapped function."""
  return jax.lax.pmean(tree, AXIS)


def psum(tree: Tree) -> Tree:
  """Returns the sum over the devices; inside a pmapped function."""
  return jax.lax.psum(tree, AXIS)


def device_index() -> jax.Array:
  """Returns this device's number; inside a pmapped function."""
  return jax.lax.axis_index(AXIS)


def pmap_rows(fn: Callable) -> Callable:
  """Returns `pmap` of a function whose result has a row for each image; every
  host has the rows of all devices, which `unshard` takes."""
  def gathered(*args):
    rows = fn(*args)
    return jax.lax.all_gather(rows, AXIS) if spans_hosts() else rows
  return pmap(gathered)


def unshard(x: jax.Array) -> np.ndarray:
  """Returns all rows of a `pmap_rows`: (devices, B/n, ...) -> (B, ...)."""
  whole = np.asarray(x[0] if spans_hosts() else x)
  return whole.reshape(-1, *whole.shape[2:])


def any_host(*flags: bool) -> list[bool]:
  """Returns for each flag whether it is True on any host."""
  if not spans_hosts():
    return [*flags]
  gathered = np.asarray(multihost_utils.process_allgather(np.asarray(flags)))
  return [bool(of_hosts.any()) for of_hosts in gathered.T]


def tell(content: bytes) -> bytes:
  """Returns the first host's content; of the others' nothing is used."""
  if not spans_hosts():
    return content
  if jax.process_index():
    content = b""
  size = int.from_bytes(_tell(len(content).to_bytes(8, "big"), 8), "big")
  return b"".join(
      _tell(content[start:start + _PIECE], min(_PIECE, size - start))
      for start in range(0, size, _PIECE))


def _tell(content, size):
  """`tell` of so many bytes, in few sizes, since each is a program."""
  room = np.zeros(1 << max(10, (size - 1).bit_length()), np.uint8)
  if jax.process_index() == 0:
    room[:size] = np.frombuffer(content, np.uint8)
  told = np.asarray(multihost_utils.broadcast_one_to_all(room))
  return told[:size].tobytes()


def put(tree: Tree) -> Tree:
  """Puts the rows of (devices here, ...) on this host's devices, one each."""
  mesh = Mesh(np.asarray(jax.local_devices()), (AXIS,))
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(AXIS)))


def replicate(tree: Tree) -> Tree:
  """Copies every leaf to every device: (...) -> (devices here, ...)."""
  n = len(jax.local_devices())

  def copy(x):
    x = np.asarray(x)
    return put(np.broadcast_to(x[None], (n, *x.shape)))
  return jax.tree.map(copy, tree)


def unreplicate(tree: Tree) -> Tree:
  """Returns the first device's copy of every leaf, as numpy."""
  def first(x):  # not x[0], a program over all devices for every shape
    shards = getattr(x, "addressable_shards", None)
    return np.array(shards[0].data if shards else x)[0]
  return jax.tree.map(first, tree)


def shard(tree: Tree) -> Tree:
  """Splits the first axis over the n devices: (B, ...) -> (n, B/n, ...).

  Of several hosts each has all of (B, ...), and gets its devices' part.
  """
  n, mine = len(devices()), here()
  return jax.tree.map(
      lambda x: put(np.asarray(x).reshape(
          n, len(x) // n, *x.shape[1:])[mine]), tree)


def shard_rows(x: Any, start: int, count: int) -> jax.Array:
  """Returns rows start to start + count, (n, count/n, ...), as `shard` does.

  Beyond the end the last row is repeated, see `pad_to`. Of several hosts each
  reads the rows of its own devices.

  Args:
    x: an array, or what is indexed like one and decodes what is asked for.
    count: a multiple of the number of devices.
  """
  if not spans_hosts():
    return shard(pad_to(x[start:start + count], count))
  rows = np.minimum(np.arange(start, start + count), len(x) - 1)
  mine = rows.reshape(len(devices()), -1)[here()]
  return put(x[mine.reshape(-1)].reshape(*mine.shape, *x.shape[1:]))


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
