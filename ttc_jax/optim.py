"""Path rules -> labels -> optax: who is trained, and how fast."""
from collections.abc import Callable
import re

import jax
import jax.numpy as jnp
import optax

from ttc_jax import trees

Schedule = Callable[[jax.Array], jax.Array]

HEAD = (r"head/.*", "tune")
NORM = (r"backbone/.*[nN]orm.*/(scale|bias)", "tune")
ADAPTER = (r"adapter/.*", "tune")
FREEZE = (r".*", "freeze")

MOMENTUM = 0.9  # of SGD


def warmup_cosine(lr: jax.Array, steps: jax.Array, warmup: jax.Array,
                  warmup_lr: jax.Array = 0.0,
                  min_lr: jax.Array = 0.0) -> Schedule:
  """Linear from `warmup_lr` to `lr` in `warmup` steps, then half a cosine to
  `min_lr` at `steps`.

  As optax's, with every argument traceable: runs that differ in them share
  one compilation. Step 0 has left `warmup_lr` already, by one part of `warmup`.
  """
  def schedule(step):
    rise = (step + 1) / jnp.maximum(warmup, 1)
    share = (step - warmup) / jnp.maximum(steps - warmup, 1)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * share))
    return jnp.where(step < warmup, warmup_lr + (lr - warmup_lr) * rise,
                     min_lr + (lr - min_lr) * fall)
  return schedule


def make_tx(labels: trees.Tree, schedule: Schedule, weight_decay: jax.Array,
            decay_all: bool = False,
            optimiser: str = "adamw") -> optax.GradientTransformation:
  """An optimiser on the leaves labelled "tune"; the others stay as they are.

  Args:
    labels: "tune" or "freeze" for every leaf, see `trees.label`.
    weight_decay: times the learning rate; may be traced. AdamW's is decoupled,
      SGD's is added to the gradient and so has momentum, as in PyTorch.
    decay_all: also decays biases and vectors: norms, scales, shifts.
    optimiser: one of `config.OPTIMISERS`.
  """
  def decayed(params):
    return trees.map_with_names(
        lambda name, x: decay_all or (
            x.ndim > 1 and not name.endswith("/bias")), params)
  if optimiser == "sgd":
    tune = optax.chain(optax.add_decayed_weights(weight_decay, decayed),
                       optax.sgd(schedule, momentum=MOMENTUM))
  else:
    tune = optax.adamw(schedule, weight_decay=weight_decay, mask=decayed)
  return optax.multi_transform(
      {"tune": tune, "freeze": optax.set_to_zero()}, labels)


def counts(tuned: trees.Tree) -> dict[str, int]:
  """Scalars of the tuned leaves: norm, head, and module (all the rest)."""
  parts = {"module": 0, "norm": 0, "head": 0}
  for name, leaf in trees.flatten(tuned).items():
    part = ("head" if name.startswith("head/") else
            "norm" if re.fullmatch(NORM[0], name) else "module")
    parts[part] += trees.count(leaf)
  return parts
