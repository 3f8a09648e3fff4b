"""What outlives a process: the state within a stage.

Orbax writes it to a folder, which appears in the store whole or not at all.
"""
import asyncio
from collections.abc import Callable, Iterator, Mapping
import contextlib
import contextvars
import errno
import hashlib
import json
import re
import sys
import threading
from typing import Any, NamedTuple, TypeVarTuple, Unpack

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from ttc_jax import files, trees
from ttc_jax.claims import Claim, Claims
from ttc_jax.errors import Busy, UserError, printable
from ttc_jax.stores import Store

Flat = dict[str, np.ndarray]

_POLICY = threading.RLock()


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
  """A stage after `epoch` epochs, and `step` steps of the next one.

  Attributes:
    arrays: {"tuned": Flat, "buffers": Flat, "opt_state": Flat}.
    meta: history and seconds so far, JSON.
  """
  epoch: int
  arrays: dict[str, Flat]
  meta: dict[str, Any]
  step: int = 0

  @property
  def name(self) -> str:
    """Name of the state's folder: EPOCH, or EPOCH-STEP within an epoch."""
    return f"{self.epoch}-{self.step}" if self.step else str(self.epoch)


class Stages:
  """The states of stages, in a store that processes may share.

  A state's name is a hash of everything that decides the result, so a killed
  run finds its state, and runs that begin alike (LayerNorm tuning and TTC's
  stage 1, TTC with another score) share what they have in common.

  Args:
    folder: of the store.
  """

  def __init__(self, store: Store, claims: Claims | None = None,
               folder: str = "stages"):
    self.store, self.claims = store, claims or Claims(store)
    self._folder = folder

  @contextlib.contextmanager
  def open(self, key: str) -> "Iterator[StageStore]":
    """Opens a stage.

    Raises:
      errors.Busy: another process has it open.
    """
    with self.claims.hold(f"{self._folder}/{key}") as claim:
      yield StageStore(self.store, f"{self._folder}/{key}", claim)

  def delete(self, key: str) -> None:
    """Deletes a stage's states, unless another process has it open."""
    with contextlib.suppress(Busy):
      with self.claims.hold(f"{self._folder}/{key}"):
        self.store.delete(f"{self._folder}/{key}")
        self.store.delete(f"{self._folder}/{key}-notes.json")
      self.claims.forget(f"{self._folder}/{key}")


class StageStore:
  """The newest state of one stage: `NAME/EPOCH`, as orbax writes it, or
  `NAME/EPOCH-STEP` within an epoch.

  Args:
    name: of the stage's folder in the store.
    claim: on the stage, by this process.
  """

  def __init__(self, store: Store, name: str, claim: Claim):
    self._store, self._name, self._claim = store, name, claim
    self.path = store.place(name)  # for messages

  def save(self, saved: Saved) -> None:
    """Saves a state and deletes the one before it.

    Raises:
      errors.Busy: this process stood still for so long that another one has
        taken over.
    """
    self._claim.check()
    if not self._store.writes:
      return
    meta = {**saved.meta, _DIGEST: digest_parts(saved.arrays)}
    with explain_disk_errors(self.path):
      self._store.tidy(self._name)
      with self._store.write_folder(f"{self._name}/{saved.name}") as folder:
        write_folder(folder, saved.arrays, meta)
      for name in self._names(self._store.direct):
        if name != saved.name:
          self._delete(name)

  def latest_epoch(self) -> int | None:
    """Returns the epochs that the newest state ends; None without a state."""
    names = self._names(self._store)
    return _place(names[-1])[0] if names else None

  def load(self) -> Saved | None:
    """Reads the newest state; deletes a damaged one with a warning.

    Raises:
      UserError: the file system fails; the state may be whole.
    """
    names = self._names(self._store)
    if not names:
      return None
    try:
      with self._store.read_folder(f"{self._name}/{names[-1]}") as folder:
        arrays, meta = read_folder(folder)
      if meta.pop(_DIGEST, None) != digest_parts(arrays):
        raise ValueError("the arrays are not those that were saved")
      epoch, step = _place(names[-1])
      return Saved(epoch, arrays, meta, step)
    except UserError:
      raise
    except (OSError, MemoryError) as e:
      if not isinstance(e, FileNotFoundError):  # it may be whole all the same
        raise UserError(
            f"the saved state '{self.path}' cannot be read ({e}); start the "
            "same command again, or delete that folder") from e
      self._drop(names[-1], type(e).__name__)
    except Exception as e:  # orbax and tensorstore raise many kinds
      self._drop(names[-1], type(e).__name__)
    return None

  def notes(self) -> dict[str, Any]:
    """Reads what `write_notes` wrote; empty, with a warning, if damaged."""
    content = self._store.read(f"{self._name}-notes.json")
    try:
      return dict(files.from_json(content)) if content else {}
    except (TypeError, ValueError):
      logging.warning("%s-notes.json is damaged and left out",
                      printable(self.path))
      return {}

  def write_notes(self, notes: Mapping[str, Any]) -> None:
    """Writes what a stage's preparation has found so far, JSON."""
    self._store.write(f"{self._name}-notes.json", json.dumps(notes).encode())

  def _drop(self, name: str, why: str) -> None:
    logging.warning("the saved state %s is damaged (%s): its stage is run "
                    "again", printable(self.path), why)
    self._delete(name)

  def _delete(self, state: str) -> None:
    for name in (state, f"{state}.zip"):
      self._store.delete(f"{self._name}/{name}")

  def _names(self, store: Store) -> list[str]:
    """Names of the states, the newest one last."""
    names = {name.removesuffix(".zip") for name in store.names(self._name)}
    return sorted((name for name in names if _STATE.fullmatch(name)),
                  key=_place)


_STATE = re.compile(r"\d+(-\d+)?")


def _place(name: str) -> tuple[int, int]:
  """(epochs, steps of the next one) of a state's name."""
  epoch, _, step = name.partition("-")
  return int(epoch), int(step or 0)


def write_folder(path: str, arrays: Mapping[str, Flat],
                 meta: Mapping[str, Any]) -> None:
  """Writes {part: {name: array}} and JSON to a folder, through orbax.

  A folder of that name is replaced.
  """
  with _every_host_writes(), _checkpointer() as writer:
    writer.save(path, force=True, args=ocp.args.Composite(
        arrays=ocp.args.StandardSave(_fill(arrays)),
        meta=ocp.args.JsonSave(dict(meta))))


def read_folder(path: str, check: Callable[[Any], None] | None = None
                ) -> tuple[dict[str, Flat], Any]:
  """Reads (arrays, metadata) that `write_folder` wrote.

  Args:
    check: sees the tree of the arrays' shapes before they are read.

  Raises:
    Exception: of many kinds, for a folder that is not whole.
  """
  with quiet_reads(), _checkpointer() as reader:
    if check:
      check(reader.metadata(path).item_metadata["arrays"].tree)
    got = reader.restore(path, args=ocp.args.Composite(
        arrays=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()))
  return _unfill(got.arrays), got.meta


class _First:
  """A module in which this process is the first one."""

  def __init__(self, module: Any):
    self._module = module

  def __getattr__(self, name: str) -> Any:
    return getattr(self._module, name)

  def process_index(self) -> int:
    return 0


@contextlib.contextmanager
def _every_host_writes() -> Iterator[None]:
  """Within the block, Orbax writes numpy arrays on this host too.

  Where JAX has joined hosts, its handler of numpy arrays writes them on the
  first one alone, whatever `primary_host` says, and raises nothing.
  """
  handlers: Any = sys.modules[ocp.type_handlers.NumpyHandler.__module__]
  real = handlers.multihost
  if jax.process_index():
    handlers.multihost = _First(real)
  try:
    yield
  finally:
    handlers.multihost = real


def _checkpointer():
  """An orbax checkpointer that waits for no other process."""
  here = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
      primary_host=here, active_processes={here},
      barrier_sync_key_prefix=f"alone_{here}")
  # Its signals that a folder was made are the same for all processes.
  at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
  return ocp.Checkpointer(ocp.CompositeCheckpointHandler(
      arrays=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
      meta=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
      composite_options=ocp.CompositeOptions(
          multiprocessing_options=alone, async_options=at_once)),
      multiprocessing_options=alone)


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
  with _POLICY:  # which is the process's: threads take turns
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_Policy())
    try:
      yield
    finally:
      asyncio.set_event_loop_policy(before)


# Orbax saves no empty dictionary: a marker stands for it.
def _fill(arrays):
  return {k: dict(v) or {"_empty": np.zeros(1)} for k, v in arrays.items()}


def _unfill(arrays):
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
