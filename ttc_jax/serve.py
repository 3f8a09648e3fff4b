"""Many tasks on one backbone in memory: bundles served by name.

This is a library; there is no server process.

  model = ttc_jax.serve.load("ViT-B_16.npz")
  model.add("pets", "runs/pets/runs/RUN/bundle")
  model.add("cars", "cars.safetensors")
  model.predict(images, task="pets")               # (N, C) probabilities
  model.predict(images, task=["pets", "cars"])     # one task an image
  model.use("cars")                                # of calls that name none
  model.merge("cars"), model.unmerge("cars"), model.remove("pets")

A batch of many tasks passes the backbone once: each image has tuned leaves of
its own (`jax.vmap`), the frozen kernels are shared, so their products are as
large as those of one task. Tasks with the same method, options, image size,
normalisation and dtype form a group; a call makes one pass for each group.
Tasks that tune whole kernels (`full`) or are merged form groups of one.

Programs are compiled for batches and numbers of tasks that are powers of two,
and for class counts that are multiples of 64: another task or a larger batch
compiles nothing until it passes the next of these numbers.
"""
from collections.abc import Sequence
import functools
import json
import operator
import os
import re
import sys
import threading
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special

from ttc_jax import bundles, checkpoint, evaluate, parallel, predict, trees
from ttc_jax.config import FROZEN_DTYPES
from ttc_jax.errors import UserError, check_known
from ttc_jax.model import Model, pad_head
from ttc_jax.tasks import images as images_lib
from ttc_jax.weights import open_source

Flat = dict[str, Any]
_CLASSES = 64  # heads are padded to a multiple


class Task(NamedTuple):
  """A bundle on its base.

  Attributes:
    base: key of the base, among those of the server.
    group: key that is equal for tasks that can pass the backbone together.
    tuned, buffers: {name: array}, what differs from the base.
    meta: the bundle's metadata.
    bundle, saved: its path and what it holds, to be merged or unmerged.
  """
  model: Model
  base: str
  group: tuple
  tuned: Flat
  buffers: Flat
  meta: dict[str, Any]
  bundle: str
  saved: bundles.Bundle


class Group(NamedTuple):
  """Tasks of one program.

  Attributes:
    rows: {task: its row in `stacked`}.
    stacked: {name: the tasks' leaves, one a row}, on every device.
    meta: of one of the bundles.
  """
  model: Model
  base: str
  rows: dict[str, int]
  stacked: Flat
  meta: dict[str, Any]


class ModelServer:
  """A backbone and the tasks that were added to it.

  Threads may share it: a call uses the tasks of the moment when it begins.
  Those should name their tasks, since `use` is the same for all threads.

  Attributes:
    base: source and hash of the base weights.
    batch_size: images of a pass, at most.
    frozen_dtype: in which frozen kernels are kept; None: as each bundle says.
    in_use: the task of calls that name none: that of `use`, by default the
      first one that was added; None if there is none, or it was removed.
  """

  def __init__(self, source: str, batch_size: int = 64,
               frozen_dtype: str | None = None):
    if not hasattr(batch_size, "__index__") or batch_size < 1:
      raise UserError(f"batch_size is {batch_size!r}; give a whole number of 1 "
                      "or more")
    if frozen_dtype is not None:
      check_known("frozen_dtype", frozen_dtype, FROZEN_DTYPES)
    self.frozen_dtype = frozen_dtype
    self.in_use: str | None = None
    self.base = open_source(source)
    self.batch_size = operator.index(batch_size)
    self._lock = threading.RLock()
    # {key: (module, parameters on the host, on devices)}
    self._bases: dict[str, tuple[Any, Flat, Flat]] = {}
    self._tasks: dict[str, Task] = {}
    self._groups: dict[tuple, Group] | None = None

  @property
  def tasks(self) -> dict[str, list[str]]:
    """Returns {task: names of its classes}."""
    return {name: task.meta["classes"] for name, task in self._tasks.items()}

  def add(self, name: str, bundle: str, replace: bool = False,
          merge: bool = False) -> None:
    """Adds a bundle as a task.

    Args:
      name: of the task.
      bundle: the folder that a run wrote, or a packed file.
      replace: replaces the task of that name, if there is one.
      merge: folds the adapter into the task's own copies of the kernels, where
        that is exact: as fast as the bare backbone, but in a pass of its own,
        and the copies need memory.

    Example:
      model.add("pets", "pets.safetensors")

    Raises:
      UserError: the name is taken; no bundle; another base, both hashes named.
    """
    if not isinstance(name, str):
      raise UserError(f"a name of a task is {name!r}; expected text")
    saved = bundles.load(bundle)
    predict.base.check(bundle, saved.meta, self.base)
    with self._lock:
      if name in self._tasks and not replace:
        raise UserError(f"a task is already called {name!r}; give another name "
                        "or replace=True")
      self._put(name, bundle, saved, merge)
      if not self._tasks.keys() - {name}:
        self.in_use = name

  def use(self, name: str) -> None:
    """Makes a task that of all calls that name none.

    UserError if there is no task of that name.
    """
    with self._lock:
      self.in_use = check_known("task", name, self._tasks)

  def merge(self, name: str | None = None) -> None:
    """Folds a task's adapter into copies of the kernels, as `add` can.

    Where that is not exact, nothing changes.

    Args:
      name: of the task; None: that in use.

    Raises:
      UserError: there is no task of that name.
    """
    self._put_again(name, merge=True)

  def unmerge(self, name: str | None = None) -> None:
    """Takes a task's adapter out of the kernels again: the bits of the bundle.

    Args:
      name: of the task; None: that in use.

    Raises:
      UserError: there is no task of that name.
    """
    self._put_again(name, merge=False)

  def _named(self, task):
    """The name of a task, that in use for None; or a list of names."""
    task = self.in_use if task is None else task
    if task is None:
      raise UserError("no task is in use: name one, or call use(NAME)")
    if isinstance(task, str):
      return task
    names = list(task) if hasattr(task, "__iter__") else [task]
    for name in names:
      if not isinstance(name, str):
        raise UserError(f"a name of a task is {name!r}; expected text")
    return names

  def _put_again(self, name, merge):
    with self._lock:
      name = self._named(name)
      check_known("task", name, self._tasks)
      task = self._tasks[name]
      self._put(name, task.bundle, task.saved, merge)

  def _put(self, name, bundle, saved, merge):
    """Adds or replaces a task; the lock is held."""
    base = self._base(bundle, saved.meta)
    module, host, _ = self._bases[base]
    model, params, buffers, *_ = predict.attach(
        bundle, saved, module, trees.unflatten(host), merge)
    params |= {"head": jax.tree.map(
        np.asarray, pad_head(params["head"], _CLASSES))}
    before = {f"backbone/{n}": x for n, x in host.items()}
    tuned = {n: x for n, x in trees.flatten(params).items()
             if x is not before.get(n)}
    buffers = trees.flatten(buffers)
    kernels = any(re.fullmatch("backbone/.*/kernel", n) for n in tuned)
    group = ("alone", name) if kernels else (
        "like", _likeness(base, saved.meta, tuned, buffers))
    self._tasks = self._tasks | {name: Task(
        model, base, group, tuned, buffers, saved.meta, bundle, saved)}
    self._groups = None

  def remove(self, name: str) -> None:
    """Removes a task; UserError if there is none of that name."""
    with self._lock:
      check_known("task", name, self._tasks)
      self._tasks = {n: t for n, t in self._tasks.items() if n != name}
      self._groups = None
      if self.in_use == name:
        self.in_use = None

  def predict(self, images: Sequence[Any], task: str | Sequence[str] | None
              = None) -> np.ndarray | list[np.ndarray]:
    """Returns probabilities of images: the softmax of `logits`.

    Example:
      pets, cars = model.predict(["a.jpg", "b.jpg"], task=["pets", "cars"])
    """
    found = self.logits(images, task)
    if isinstance(found, list):
      return [scipy.special.softmax(one) for one in found]
    return scipy.special.softmax(found, axis=-1)

  def logits(self, images: Sequence[Any], task: str | Sequence[str] | None
             = None) -> np.ndarray | list[np.ndarray]:
    """Returns logits of images, float32.

    Args:
      images: uint8 (N, S, S, 3), S the task's size, taken as they are; or a
        sequence of uint8 arrays (H, W, 3), PIL images and paths, which are
        resized and cropped as in the task's training.
      task: one name for all images, or one for each; None: the task in use.

    Returns:
      (N, C), classes in the order of `tasks`; for a sequence of names a list
      of N arrays (C_i,).

    Raises:
      UserError: unknown task; images that cannot be read.
    """
    task = self._named(task)
    _check_sequence(images)
    tasks, groups = self._snapshot()
    names = [task] * len(images) if isinstance(task, str) else task
    if len(names) != len(images):
      raise UserError(f"{len(images)} images and {len(names)} names of tasks; "
                      "give one name, or one for each image")
    for name in {task} if isinstance(task, str) else set(names):
      check_known("task", name, tasks)
    out: list[Any] = [None] * len(names)
    for key, group in groups.items():
      at = [i for i, name in enumerate(names) if tasks[name].group == key]
      if at:
        pixels = np.stack([_pixels(images, i, tasks[names[i]].meta)
                           for i in at])
        rows = np.asarray([group.rows[names[i]] for i in at], np.int32)
        for i, logits in zip(
            at, self._logits(group, rows, pixels), strict=True):
          out[i] = logits[:len(tasks[names[i]].meta["classes"])]
    if isinstance(task, str):
      classes = len(tasks[task].meta["classes"])
      return np.asarray(out, np.float32).reshape(-1, classes)
    return out

  def classify(self, images: Sequence[Any],
               task: str | Sequence[str] | None = None,
               top: int = 1) -> list[list[tuple[str, float]]]:
    """Returns the `top` likeliest classes of each image.

    Example:
      [[(name, probability)]] = model.classify(["a.jpg"], task="pets")

    Returns:
      A list [(class, probability), ...] for each image, the likeliest first.
    """
    task = self._named(task)
    _check_sequence(images)
    names = [task] * len(images) if isinstance(task, str) else task
    classes = self.tasks
    return [[(classes[name][i], float(p[i]))
             for i in np.argsort(-p, kind="stable")[:top]]
            for name, p in zip(
                names, self.predict(images, task), strict=True)]

  def _snapshot(self):
    """-> (tasks, groups); later calls of `add` make new dictionaries."""
    with self._lock:
      if self._groups is None:
        self._groups = _group(self._tasks)
      return self._tasks, self._groups

  def _base(self, bundle, meta):
    """Loads the backbone of a bundle unless it is loaded; -> its key."""
    kept = predict.base.frozen_dtype(meta, self.frozen_dtype)
    key = json.dumps([kept, *(meta[k] for k in (
        "backbone", "image_size", "fields", "dtype"))], sort_keys=True)
    if key not in self._bases:
      module, params = predict.base.load(bundle, meta, self.base, kept)
      host = {n: np.asarray(x) for n, x in trees.flatten(params).items()}
      devices = {}
      # Backbones of two image sizes differ in the positions alone.
      for name, x in host.items():
        for _, other, there in self._bases.values():
          if (name in other and other[name].dtype == x.dtype
              and np.array_equal(other[name], x)):
            host[name], devices[name] = other[name], there[name]
            break
        else:
          devices[name] = parallel.replicate(x)
      self._bases[key] = module, host, devices
    return key

  def _logits(self, group, rows, images):
    """Rows (N,) of a group, images (N, S, S, 3) -> logits (N, C padded)."""
    one = len(set(rows.tolist())) == 1
    program = functools.partial(
        _program(group.model, one), self._bases[group.base][2], group.stacked)
    batch_size = min(self.batch_size, 1 << (len(rows) - 1).bit_length())
    with predict.base.precision(group.meta):
      return evaluate.over(program, (rows, images), batch_size)


def load(base: str, batch_size: int = 64,
         frozen_dtype: str | None = None) -> ModelServer:
  """Returns a server without tasks.

  It reads the weights when the first bundle names their backbone.

  Args:
    base: source of the weights that the bundles were tuned on.
    batch_size: largest number of images of a pass. A pass of many tasks holds
      the tuned leaves of each of its images.
    frozen_dtype: in which frozen kernels are kept, float32, bfloat16 or int8,
      see `ttc_jax.quantisation`; None: as each bundle was tuned, so that
      bundles of two dtypes hold two copies of the kernels.

  Example:
    model = serve.load("ViT-B_16.npz")
    model.add("pets", "runs/pets/runs/RUN/bundle")
    model.predict(images, task="pets")  # (N, C) probabilities

  Raises:
    UserError: the weights do not exist or cannot be read.
  """
  return ModelServer(base, batch_size, frozen_dtype)


def _pixels(images, i, meta):
  """Image i as uint8 (S, S, 3)."""
  if images_lib.are_prepared(images, meta["image_size"]):
    return np.asarray(images[i])
  return images_lib.prepare(images[i], meta["image_size"], meta["resample"])


def _likeness(base, meta, tuned, buffers):
  """A string that is equal for tasks that can share a program."""
  shapes = [{n: np.shape(x) for n, x in flat.items()
             if not n.startswith("head/")} for flat in (tuned, buffers)]
  return json.dumps([base, meta["method"], meta["options"],
                     meta["normalisation"], meta.get("matmul_precision"),
                     *shapes], sort_keys=True)


def _group(tasks):
  """{key: Group}: stacks the leaves of tasks with an equal key."""
  members: dict[tuple, dict[str, Task]] = {}
  for name, task in tasks.items():
    members.setdefault(task.group, {})[name] = task
  groups = {}
  for key, those in members.items():
    first = next(iter(those.values()))
    groups[key] = Group(
        first.model, first.base, {name: i for i, name in enumerate(those)},
        _stack(list(those.values())), first.meta)
  return groups


def _stack(tasks):
  """Stacks the tasks' leaves, on every device; the last task fills the rows up
  to a power of two."""
  capacity = 1 << (len(tasks) - 1).bit_length()
  classes = max(task.tuned["head/bias"].shape[-1] for task in tasks)
  flats = []
  for task in tasks:
    head = pad_head({n: task.tuned[f"head/{n}"] for n in ("kernel", "bias")},
                    classes)
    flats.append({
        **{f"tuned/{n}": x for n, x in task.tuned.items()},
        **{f"buffers/{n}": x for n, x in task.buffers.items()},
        **{f"tuned/head/{n}": x for n, x in head.items()}})
  flats += flats[-1:] * (capacity - len(flats))
  return {name: parallel.replicate(np.stack([flat[name] for flat in flats]))
          for name in flats[0]}


def _check_sequence(images):
  if isinstance(images, (str, bytes, os.PathLike)) or not hasattr(
      images, "__len__"):
    raise UserError(f"images are {images!r}; expected a sequence of them")


@functools.cache
def _program(model: Model, one: bool):
  """Pmapped `(base, stacked, rows, images) -> logits` of each image with the
  leaves of its row.

  Args:
    one: all rows are the same, so the leaves are picked once.
  """
  def logits(base, stacked, row, images):
    picked = trees.unflatten({n: x[row] for n, x in stacked.items()})
    params = checkpoint.overlay(
        {"backbone": trees.unflatten(base), "adapter": {}, "head": {}},
        trees.flatten(picked["tuned"]))
    return model.logits(params, images, picked.get("buffers", {}))

  def of_one(base, stacked, rows, images):
    return logits(base, stacked, rows[0], images)

  def of_each(base, stacked, rows, images):
    return jax.vmap(lambda row, image: logits(
        base, stacked, row, image[None])[0])(rows, images)
  return parallel.pmap_rows(of_one if one else of_each)


if __name__ == "__main__":
  print("error: ttc_jax.serve is a Python API and no command: call model = "
        "ttc_jax.serve.load(WEIGHTS), model.add(NAME, BUNDLE) and "
        "model.predict(images, task=NAME); on the command line use python -m "
        "ttc_jax.predict", file=sys.stderr)
  sys.exit(2)
