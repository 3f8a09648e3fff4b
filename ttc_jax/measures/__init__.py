"""Measures: what the paper's figures show of a trained model, as JSON.

Every other file here is a measure: `measures/NAME.py` with
`measure(trained) -> {name: JSON value}`. A session takes the measures that
`config.measures` names of every final run, from the run's bundle; one that is
long and has a spread of its own says ONCE = True, and is taken of the first
seed alone.
"""
from collections.abc import Sequence
import importlib
import pkgutil
from typing import Any, NamedTuple

import numpy as np

from ttc_jax import bundles, evaluate, parallel, tasks, trees
from ttc_jax.errors import check_known
from ttc_jax.model import Model
from ttc_jax.predict import loaded


class Trained(NamedTuple):
  """A trained model beside the pretrained one, parameters on every device.

  Attributes:
    model, params, buffers: with the method's handlers and the head.
    bare: the pretrained model.
    base: its parameters, with an empty adapter.
    task: with its splits.
    limit: of the images of each split, 0 for none: the run's.
    seed: of the run.
  """
  model: Model
  params: trees.Tree
  buffers: trees.Tree
  bare: Model
  base: trees.Tree
  task: tasks.Task
  limit: int
  seed: int

  @property
  def train(self) -> tasks.Split:
    """The images that the run trained on."""
    return self.task.split("trainval").first(self.limit)

  def test(self, most: int = 0) -> tasks.Split:
    """Returns the first test set, or at most `most` images of it: the first
    ones; or the first ones of each class in turn where those lack a class, as
    they do in sorted lists."""
    split = self.task.split(self.task.tests[0]).first(self.limit)
    some = split.first(most)
    if set(some.labels) == set(split.labels):
      return some
    turn = np.zeros(len(split.labels), int)  # of an image within its class
    for label in np.unique(split.labels):
      mine = np.flatnonzero(split.labels == label)
      turn[mine] = np.arange(len(mine))
    rows = np.sort(np.argsort(turn, kind="stable")[:most])
    return tasks.Split(split.images[rows], split.labels[rows])

  def features(self, split: tasks.Split) -> np.ndarray:
    """Returns features (N, D) of the trained model: [CLS], normed."""
    return evaluate.features(self.model, self.params, self.buffers,
                             split.images)

  def features_before(self, split: tasks.Split) -> np.ndarray:
    """Returns features (N, D) of the pretrained model."""
    return evaluate.features(self.bare, self.base, {}, split.images)


def names() -> tuple[str, ...]:
  """Returns the names of all measures, sorted."""
  return tuple(m.name for m in pkgutil.iter_modules(__path__))


def seeds(name: str, given: Sequence[int]) -> Sequence[int]:
  """Returns the seeds of whose runs a measure is taken."""
  return given[:1] if getattr(_load(name), "ONCE", False) else given


def _load(name):
  check_known("measure", name, names())
  return importlib.import_module(f"{__name__}.{name}")


def take(name: str, bundle: str, base: Any, task: tasks.Task, limit: int,
         seed: int) -> dict[str, Any]:
  """Takes a measure of a finished run.

  Args:
    name: one of `names()`.
    bundle: path of the run's bundle.
    base: what it was trained from: `backbone`, and `params` on every device.
    task: that it was trained on.
    limit, seed: of the run.

  Returns:
    JSON, as the measure's file says.

  Raises:
    UserError: an unknown name, or the bundle does not fit the base.
  """
  module = _load(name)
  saved = bundles.load(bundle)
  pretrained = parallel.unreplicate(base.params)
  found = loaded.attach(bundle, saved, base.backbone, pretrained, merge=False)
  return module.measure(Trained(
      found.model, parallel.replicate(found.params),
      parallel.replicate(found.buffers),
      found.model._replace(handlers=()),
      {"backbone": base.params, "adapter": {}}, task, limit, seed))
