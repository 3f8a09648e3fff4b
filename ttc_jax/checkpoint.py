"""What outlives a process: the state within a stage.

It is written by orbax, whole or not at all: into a temporary folder that is
renamed when it is complete.
"""
import asyncio
from collections.abc import Callable, Iterator, Mapping
import contextlib
import contextvars
import errno
import hashlib
import json
import os
from typing import Any, NamedTuple, TypeVarTuple, Unpack

from absl import logging
import numpy as np
import orbax.checkpoint as ocp

from ttc_jax import files, trees
from ttc_jax.errors import UserError

Flat = dict[str, np.ndarray]


def digest(value: Any) -> str:
  """A short hash of a JSON value, the same in every process."""
  text = json.dumps(value, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_arrays(flat: Mapping[str, Any]) -> str:
  """Returns the SHA-256, hexadecimal, of named arrays.

  It covers names, dtypes, shapes and bytes (little-endian, row by row), and
  not the order of the names: one flipped bit in a file changes it.

  Args:
    flat: {"a/b/c": array or scalar}.
  """
  hashed = hashlib.sha256()
  for name in sorted(flat):
    x = np.asarray(flat[name], order="C")
    x = x.astype(x.dtype.newbyteorder("<"), copy=False)
    hashed.update(json.dumps([name, x.dtype.name, x.shape]).encode() + b"\n")
    hashed.update(x.tobytes())
  return hashed.hexdigest()


def digest_parts(arrays: Mapping[str, Flat]) -> str:
  """Returns `digest_arrays` of {part: {name: array}}."""
  return digest_arrays({f"{part}/{name}": x for part, flat in arrays.items()
                        for name, x in flat.items()})


_DIGEST = "sha256_of_arrays"  # of a stage's state, beside its records


class Saved(NamedTuple):
  """A stage after `epoch` epochs.

  Attributes:
    arrays: {"tuned": Flat, "buffers": Flat, "opt_state": Flat}.
    meta: history and seconds so far, JSON.
  """
  epoch: int
  arrays: dict[str, Flat]
  meta: dict[str, Any]


class StageStore:
  """The newest state of one stage, in a folder of its own.

  While it is open no other process can open it: errors.Busy.

  The folder's name is a hash of everything that decides the result, so a
  killed run finds its state, and runs that begin alike (LayerNorm tuning and
  TTC's stage 1, TTC with another score) share what they have in common.
  """

  def __init__(self, path: str):
    self.path = os.path.abspath(path)
    self._lock = contextlib.ExitStack()
    folder, name = os.path.split(self.path)
    self._lock.enter_context(
        files.lock(os.path.join(folder, ".locks", name)))
    self._manager = ocp.CheckpointManager(
        self.path, options=ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False))

  def save(self, saved: Saved) -> None:
    meta = {**saved.meta, _DIGEST: digest_parts(saved.arrays)}
    args = ocp.args.Composite(
        arrays=ocp.args.StandardSave(fill(saved.arrays)),
        meta=ocp.args.JsonSave(meta))
    with explain_disk_errors(self.path):
      self._manager.save(saved.epoch, args=args, force=True)

  def latest_epoch(self) -> int | None:
    """Returns the epoch of the newest state; None where there is none."""
    return self._manager.latest_step()

  def load(self) -> Saved | None:
    """Reads the newest state; deletes a damaged one with a warning.

    Raises:
      UserError: the file system fails; the state may be whole.
    """
    epoch = self.latest_epoch()
    if epoch is None:
      return None
    args = ocp.args.Composite(arrays=ocp.args.StandardRestore(),
                              meta=ocp.args.JsonRestore())
    try:
      with quiet_reads():
        got = self._manager.restore(epoch, args=args)
      arrays, meta = unfill(got.arrays), dict(got.meta)
      if meta.pop(_DIGEST, None) != digest_parts(arrays):
        raise ValueError("the arrays are not those that were saved")
      return Saved(epoch, arrays, meta)
    except (OSError, MemoryError) as e:
      if not isinstance(e, FileNotFoundError):  # it may be whole all the same
        raise UserError(
            f"the saved state '{self.path}' cannot be read ({e}); start the "
            "same command again, or delete that folder") from e
      self._drop(epoch, type(e).__name__)
    except Exception as e:  # orbax and tensorstore raise many kinds
      self._drop(epoch, type(e).__name__)
    return None

  def _drop(self, epoch: int, why: str) -> None:
    logging.warning("the saved state %s is damaged (%s): its stage is run "
                    "again", self.path, why)
    self._manager.delete(epoch)

  def close(self) -> None:
    """Releases the stage for other processes."""
    self._manager.close()
    self._lock.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()


_Args = TypeVarTuple("_Args")


class _Loop(asyncio.SelectorEventLoop):
  """Drops what arrives after the loop was closed."""

  def call_soon_threadsafe(
      self, callback: Callable[[Unpack[_Args]], object], *args: *_Args,
      context: contextvars.Context | None = None) -> asyncio.Handle:
    try:
      return super().call_soon_threadsafe(callback, *args, context=context)
    except RuntimeError:
      if not self.is_closed():
        raise
      return asyncio.Handle(callback, args, self)  # never runs


class _Policy(asyncio.DefaultEventLoopPolicy):

  def new_event_loop(self):
    return _Loop()


@contextlib.contextmanager
def quiet_reads() -> Iterator[None]:
  """Within the block, a damaged file raises one error and prints nothing.

  Orbax closes its loop when the first read fails; each of the other reads
  would print the traceback of "Event loop is closed".
  """
  before = asyncio.get_event_loop_policy()
  asyncio.set_event_loop_policy(_Policy())
  try:
    yield
  finally:
    asyncio.set_event_loop_policy(before)


# Orbax saves no empty dictionary: a marker stands for it.
def fill(arrays):
  return {k: dict(v) or {"_empty": np.zeros(1)} for k, v in arrays.items()}


def unfill(arrays):
  return {k: {n: np.asarray(x) for n, x in v.items() if n != "_empty"}
          for k, v in arrays.items()}


class explain_disk_errors:
  """Turns a full or forbidden disk into one sentence."""

  def __init__(self, path):
    self.path = path

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if error is None or not isinstance(error, Exception):
      return
    full = (getattr(error, "errno", None) == errno.ENOSPC
            or "No space left" in str(error)
            or "RESOURCE_EXHAUSTED" in str(error))
    if full:
      raise UserError(
          f"no space left to save '{self.path}': free some, or choose another "
          "--workdir, and start the same command again") from error
    if isinstance(error, OSError):
      raise UserError(f"cannot save '{self.path}': {error.strerror}") from error


def overlay(params: trees.Tree, tuned: Mapping[str, Any]) -> trees.Tree:
  """The tree with the leaves of those names in place of its own."""
  # A tree without leaves, an adapter before its stage, has no name to keep.
  return {**params, **trees.unflatten(trees.flatten(params) | dict(tuned))}
