"""A run -> a job for `train.run`: splits decoded, everything settled."""
from collections.abc import Callable

import numpy as np

from ttc_jax import checkpoint, feed, parallel, tasks, train
from ttc_jax.errors import DataError
from ttc_jax.runs.inputs import Base, trained_model
from ttc_jax.runs.plan import Run, common_keys


def split_names(run_protocol: str, method) -> tuple[str, ...]:
  """Returns the roles of the splits that a run reads, its test sets apart.

  Args:
    run_protocol: "val" or "final".
    method: whose stages may hold out the validation images.
  """
  names = ("trainval",) if run_protocol == "final" else ("train", "val")
  if any(stage.holdout for stage in method.stages):
    names = (*names, "train", "val")
  return tuple(dict.fromkeys(names))


def data_digest(task: tasks.Task, run_protocol: str, method) -> str:
  """Returns a digest of the pixels and labels that a run reads.

  Of a task with a damaged image, it is the digest of the task's lists: the run
  fails when it reads the image.
  """
  names = split_names(run_protocol, method)
  if run_protocol == "final":
    names = (*names, *task.tests)
  try:
    return checkpoint.digest(
        [task.digest, {name: task.split(name).digest for name in names}])
  except DataError:
    return task.digest


def make_job(run: Run, base: Base, task: tasks.Task, report: Callable,
             training: tasks.Task | None = None) -> train.Job:
  """Settles everything about a run and decodes the images that it needs.

  A corrupt image is found here, before the training, unless its split is so
  large that it streams.

  Args:
    training: the same task at the size of the training images, where that is
      another.

  Raises:
    DataError: an image that cannot be read.
  """
  c, final = run.config, run.protocol == "final"
  training = training or task
  splits = {name: (task if name == "val" else training).split(name).first(
      c.limit) for name in split_names(run.protocol, run.method)}
  if final:
    for name in task.tests:
      task.split(name)
  to_train = {name: _in_memory(split, c.in_memory_gib)
              for name, split in splits.items() if name != "val"}
  # The method's options enter with the stage that first uses them.
  identity = {
      "task": run.task, "data": run.data, "protocol": run.protocol,
      "seed": run.seed, "config": common_keys(c), "weights": base.identity,
      "devices": len(parallel.devices()), "classes": len(task.classes)}
  return train.Job(
      identity=identity, config=c,
      model=trained_model(c, base),
      method=run.method,
      train=to_train["trainval" if final else "train"],
      val=None if final else splits["val"],
      holdout=(to_train["train"], splits["val"])
      if any(s.holdout for s in run.method.stages) else None,
      classes=len(task.classes), seed=run.seed, report=report)


def _in_memory(split, gib):
  """The split decoded, unless it is too large."""
  if not feed.fits(split.images, gib):
    return split
  return tasks.Split(np.ascontiguousarray(split.images[:]), split.labels)
