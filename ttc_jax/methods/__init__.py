"""Methods: what is tuned, in which stages, and what acts at which site.

The folder is the registry: a file `methods/NAME.py` is the method NAME, and
nothing else needs an edit. It has

  a docstring that begins "Title (source): what it does.", see `described`
  OPTIONS            names of its configuration keys, if any; `config.py`
                     holds their defaults
  SOLVED = True      if it trains nothing, so that no learning rate matters
  make(config, backbone) -> Method
"""
from collections.abc import Callable, Mapping
import importlib
import pkgutil
import re
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ttc_jax import trees
from ttc_jax.errors import UserError, check_known
from ttc_jax.model import Model
from ttc_jax.optim import ADAPTER, FREEZE, HEAD, NORM
from ttc_jax.taps import Handler, Shared
from ttc_jax.tasks import Split
from ttc_jax.tasks.images import Images


class Notes(Protocol):
  """JSON of a stage's own that outlives the process."""

  def notes(self) -> dict[str, Any]:
    """Reads what was written; {} if nothing was."""

  def write_notes(self, notes: Mapping[str, Any]) -> None:
    """Writes it as a whole."""


class Context(NamedTuple):
  """Input of a stage's `prepare`.

  Attributes:
    model: with the method's handlers where `params` has an adapter.
    params: {"backbone", "adapter", "head"}, on every device.
    buffers: of the stage before, on every device.
    images: training images, uint8 (N, S, S, 3); of a large set a Stream.
    labels: their classes, (N,).
    seed: of the run.
    val: the validation split, for methods that hold it out; else None.
    notes: where what was found so far is kept, for a stage that takes long to
      prepare; None keeps nothing.
    log: takes records for the learning curve.
    keep: takes the scores by which channels are selected, see `importance`.
    classes: of the task.
    batch_size: images that go through the model at a time.
  """
  model: Model
  params: trees.Tree
  buffers: trees.Tree
  images: Images
  labels: np.ndarray
  seed: int
  val: Split | None = None
  notes: Notes | None = None
  log: Callable[[dict[str, Any]], None] = lambda record: None
  keep: Callable[[dict[str, Any]], None] = lambda scores: None
  classes: int = 0
  batch_size: int = 64


# `(adapter, buffers)`: the trees {site: {block: {name: array}}} that a stage
# starts from. The adapter is trained; the buffers are further inputs of the
# handlers that are not trained.
Prepare = Callable[[Context], tuple[trees.Tree, trees.Tree]]
# `(head, loss)`: what a stage computes in place of training: {"kernel": (D, C),
# "bias": (C,)} of numpy, and the value of what it minimises.
Solve = Callable[[Context], tuple[trees.Tree, float]]
# `(params, buffers, backbone) -> backbone params`, numpy in and out.
Merge = Callable[[trees.Tree, trees.Tree, nn.Module], trees.Tree]


class Stage(NamedTuple):
  """One optimisation of the leaves that `rules` label "tune".

  Attributes:
    name: unique within the method.
    rules: path rules; the first match labels a leaf.
    prepare: `(context) -> (adapter, buffers)` before the stage, or None.
    holdout: True trains on the training split without the validation split,
      whatever the protocol.
    sample: `(buffers, key) -> buffers` of one training step, or None.
    solve: computes the head in place of all epochs, or None.
    lr: factor on the learning rates of the configuration.
  """
  name: str
  rules: trees.Rules
  prepare: Prepare | None = None
  holdout: bool = False
  sample: Callable[[trees.Tree, Any], trees.Tree] | None = None
  solve: Solve | None = None
  lr: float = 1.0


# Runs share a stage if its name, its rules and all stages before it agree.
TUNE_HEAD = Stage("head", (HEAD, FREEZE))
ALIGN = Stage("align", (NORM, HEAD, FREEZE))  # Eq. 4
TUNE_ADAPTER = (ADAPTER, HEAD, FREEZE)


class Method(NamedTuple):
  """A method with its options, for one backbone.

  Attributes:
    stages: the optimisations, in order.
    name: set by `load`.
    options: {key: JSON value} of the method's `OPTIONS`, with everything that
      depends on the backbone resolved: k = 0 has become 96 for ViT-B. `load`
      makes the same method from them; runs are identified by them.
    handlers: ((site, handler), ...), see `ttc_jax.taps`.
    merge: `(params, buffers, backbone) -> backbone params` that give the
      same features without taps; None if the method has no exact merge.
    cannot_merge: reason the adapter cannot be merged, or an empty string.
  """
  stages: tuple[Stage, ...]
  name: str = ""
  options: dict[str, Any] = {}
  handlers: tuple[tuple[str, Handler | Shared], ...] = ()
  merge: Merge | None = None
  cannot_merge: str = ""


def tuned_rules(method: Method) -> trees.Rules:
  """Rules for the leaves that any stage tunes: these are counted and saved."""
  union = tuple(rule for stage in method.stages for rule in stage.rules
                if rule[1] == "tune")
  return (*dict.fromkeys(union), FREEZE)


def names() -> tuple[str, ...]:
  """Returns the names of all methods, sorted."""
  return tuple(m.name for m in pkgutil.iter_modules(__path__)
               if not m.name.startswith("_"))


def _module(name):
  return importlib.import_module(f"{__name__}.{name}")


def option_keys() -> set[str]:
  """Returns the configuration keys that belong to at least one method."""
  return {key for name in names() for key in options_of(name)}


def options_of(name: str) -> tuple[str, ...]:
  """Returns the configuration keys that a method reads: its `OPTIONS`."""
  return getattr(_module(name), "OPTIONS", ())


def is_solved(name: str) -> bool:
  """Tells whether a method computes its head and trains nothing."""
  return getattr(_module(name), "SOLVED", False)


def described(name: str) -> tuple[str, str]:
  """Returns (source, what it does) of a method.

  A method's module documentation begins "Title (source): what it does.".

  Raises:
    ValueError: the documentation does not begin like this.
  """
  text = " ".join((_module(name).__doc__ or "").split("\n\n")[0].split())
  match = re.fullmatch(r"[^(]*\((.*?)\): (.*)", text)
  if match is None:
    raise ValueError(f"methods/{name}.py: its docstring does not begin "
                     "'Title (source): what it does.'")
  return match[1], match[2]


# Options that a later version added, with the values that stand for what was
# before. They are left out at those, so that finished runs keep their names;
# a bundle that lacks them has them.
ADDED = {"stage2_lr": 1.0}


def options(config: ml_collections.ConfigDict, keys: tuple[str, ...],
            **resolved: Any) -> dict[str, Any]:
  """Returns the configuration's values of `keys` as plain JSON values.

  Args:
    resolved: values that take the place of the configuration's; for a section
      a dict of some of its keys: `adapter={"scale": 0.1}`.
  """
  values = {key: _json(config[key]) for key in keys
            if key not in ADDED or config[key] != ADDED[key]}
  for key, value in resolved.items():
    values[key] = values[key] | value if isinstance(value, dict) else value
  return values


def _json(value):
  if hasattr(value, "to_dict"):
    return {k: _json(v) for k, v in value.items()}
  return list(value) if isinstance(value, tuple) else value


def uniform(rng: np.random.Generator, bound: float,
            shape: tuple[int, ...]) -> np.ndarray:
  """Draws float32 values, uniform in [-bound, bound)."""
  return rng.uniform(-bound, bound, shape).astype(np.float32)


def dropout(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  """Zeroes entries of x with probability p["dropout"] in training.

  The others are divided by 1 - p["dropout"]. Returns x at inference, where p
  has no "key", and for a method without dropout.
  """
  if "key" not in p or "dropout" not in p:
    return x
  keep = 1 - p["dropout"]
  kept = jax.random.bernoulli(p["key"], keep, x.shape)
  return jnp.where(kept, x / keep, 0).astype(x.dtype)


def rate(dropout: float) -> dict[str, Any]:
  """Returns the buffer of a dropout rate; none for 0."""
  return {"dropout": np.float32(dropout)} if dropout else {}


def check_rate(key: str, value: float) -> None:
  """Raises UserError unless a dropout rate is in [0, 1)."""
  if not 0 <= value < 1:
    raise UserError(f"config.{key} is {value}; give 0 to below 1")


def load(name: str, config: ml_collections.ConfigDict,
         backbone: nn.Module) -> Method:
  """Returns a method with its options checked and resolved for a backbone.

  Args:
    config: has the keys that `options_of(name)` lists, but those of `ADDED` may
      be missing; others are not read.
    backbone: as `backbones.make` returns it; no parameters are needed.

  Raises:
    UserError: unknown method, or an option that does not fit.

  Example:
    backbone = backbones.make("vit_b16", 224)
    method = methods.load("ttc", config.default(), backbone)
    method.options["k"]  # 96
  """
  check_known("method", name, names())
  if ADDED.keys() - config.keys():
    config = ml_collections.ConfigDict(ADDED | dict(config.items()))
  return _module(name).make(config, backbone)._replace(name=name)
