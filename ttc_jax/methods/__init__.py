"""Methods: what is tuned, in which stages, and what acts at which site.

The folder is the registry: `methods/NAME.py` with
`make(config, backbone) -> Method` is the method NAME.
"""
from collections.abc import Callable
import importlib
import pkgutil
import re
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from ttc_jax import trees
from ttc_jax.errors import check_known
from ttc_jax.model import Model
from ttc_jax.optim import ADAPTER, FREEZE, HEAD, NORM
from ttc_jax.tasks import Split


class Context(NamedTuple):
  """What a stage may look at before it starts.

  Attributes:
    images, labels: what the run trains on.
    val: the Split val200, for methods that hold it out.
    directory: path of the stage's states; beside it a file may be kept.
    log: takes records for the learning curve.
  """
  model: Model
  params: trees.Tree
  buffers: trees.Tree
  images: np.ndarray
  labels: np.ndarray
  seed: int
  val: Split | None = None
  directory: str = ""
  log: Callable[[dict[str, Any]], None] = lambda record: None


class Stage(NamedTuple):
  """One optimisation of the leaves that `rules` label "tune".

  Attributes:
    prepare: `(context) -> (adapter, buffers)` before the stage, or None.
    holdout: trains on train800 alone, whatever the protocol.
    sample: `(buffers, key) -> buffers` of a training step, or None.
  """
  name: str
  rules: trees.Rules
  prepare: Callable[[Context], tuple[trees.Tree, trees.Tree]] | None = None
  holdout: bool = False
  sample: Callable | None = None


# Runs share a stage that is the same in name, rules and all before it.
TUNE_HEAD = Stage("head", (HEAD, FREEZE))
ALIGN = Stage("align", (NORM, HEAD, FREEZE))  # Eq. 4
TUNE_ADAPTER = (ADAPTER, HEAD, FREEZE)


class Method(NamedTuple):
  """Attributes:
    options: what distinguishes this variant, for the results row.
    handlers: ((site, handler), ...).
    merge: `(params, buffers, backbone) -> backbone params` that give the
      same features without taps; None where there is nothing to fold.
    cannot_merge: why not, if it cannot.
  """
  stages: tuple[Stage, ...]
  name: str = ""  # set by `load`
  options: dict[str, Any] = {}
  handlers: tuple = ()
  merge: Callable | None = None
  cannot_merge: str = ""


def tuned_rules(method: Method) -> trees.Rules:
  """Rules for the leaves that any stage tunes: what is counted and saved."""
  union = tuple(rule for stage in method.stages for rule in stage.rules
                if rule[1] == "tune")
  return (*dict.fromkeys(union), FREEZE)


def names() -> tuple[str, ...]:
  """Every method there is."""
  return tuple(m.name for m in pkgutil.iter_modules(__path__)
               if not m.name.startswith("_"))


def option_keys() -> set[str]:
  """Keys of the configuration that belong to some method: its `OPTIONS`."""
  return {key for name in names() for key in options_of(name)}


def options_of(name: str) -> tuple[str, ...]:
  """Keys of the configuration that a method alone reads."""
  module = importlib.import_module(f"{__name__}.{name}")
  return getattr(module, "OPTIONS", ())


def described(name: str) -> tuple[str, str]:
  """Returns (source, what it does) of a method.

  A method's module documentation begins "Title (source): what it does.".
  """
  module = importlib.import_module(f"{__name__}.{name}")
  text = " ".join(module.__doc__.split("\n\n")[0].split())
  source, what = re.fullmatch(r"[^(]*\((.*?)\): (.*)", text).groups()
  return source, what


def options(config: Any, keys: tuple[str, ...]) -> dict[str, Any]:
  """The configuration's values of a method's `OPTIONS`, as JSON."""
  return {key: value.to_dict() if hasattr(value := config[key], "to_dict")
          else value for key in keys}


def uniform(rng: np.random.Generator, bound: float,
            shape: tuple[int, ...]) -> np.ndarray:
  """float32, uniform within +-bound."""
  return rng.uniform(-bound, bound, shape).astype(np.float32)


def load(name: str, config: Any, backbone: nn.Module) -> Method:
  """Returns a method, its options checked against the backbone.

  Raises:
    UserError: unknown method, or an option that does not fit.
  """
  check_known("method", name, names())
  module = importlib.import_module(f"{__name__}.{name}")
  return module.make(config, backbone)._replace(name=name)
