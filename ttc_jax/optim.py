"""Path rules -> labels -> optax: which leaves are trained, and how fast."""
from collections.abc import Callable
import re

import jax
import jax.numpy as jnp
import optax

from ttc_jax import trees

Schedule = Callable[[jax.Array], jax.Array]
Number = jax.Array | float

HEAD = (r"head/.*", "tune")
NORM = (r"backbone/.*[nN]orm.*/(scale|bias)", "tune")
ADAPTER = (r"adapter/.*", "tune")
FREEZE = (r".*", "freeze")

MOMENTUM = 0.9  # of SGD


def warmup_cosine(lr: Number, steps: Number, warmup: Number,
                  warmup_lr: Number = 0.0, min_lr: Number = 0.0) -> Schedule:
  """Returns `step -> learning rate`: a line from `warmup_lr` to `lr` in
  `warmup` steps, then half a cosine to `min_lr` at step `steps`.

  As optax's, but every argument may be traced: runs that differ in them share
  one compiled program. Step 0 already has 1 / `warmup` of the rise.
  """
  def schedule(step):
    rise = (step + 1) / jnp.maximum(warmup, 1)
    share = (step - warmup) / jnp.maximum(steps - warmup, 1)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * share))
    return jnp.where(step < warmup, warmup_lr + (lr - warmup_lr) * rise,
                     min_lr + (lr - min_lr) * fall)
  return schedule


def make_tx(labels: trees.Tree, schedule: Schedule, weight_decay: Number,
            decay_all: bool = False,
            optimiser: str = "adamw",
            clip_norm: float = 0.0) -> optax.GradientTransformation:
  """Returns an optimiser of the leaves labelled "tune"; others do not change.

  Args:
    labels: "tune" or "freeze" for every leaf, see `trees.label`.
    weight_decay: multiplied by the learning rate; may be traced. AdamW's is
      decoupled. SGD's is added to the gradient, before the momentum, as in
      PyTorch.
    decay_all: True also decays biases and vectors: norms, scales, shifts.
    optimiser: one of `config.OPTIMISERS`.
    clip_norm: above 0, the gradients of all tuned leaves together are scaled
      to at most this norm, before anything else.
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
  if clip_norm:
    tune = optax.chain(optax.clip_by_global_norm(clip_norm), tune)
  return optax.multi_transform(
      {"tune": tune, "freeze": optax.set_to_zero()}, labels)


def counts(tuned: trees.Tree) -> dict[str, int]:
  """Returns the numbers of scalars: {"module", "norm", "head"}.

  Args:
    tuned: {"backbone", "adapter", "head"} with the tuned leaves only. Norm
      means the LayerNorms of the backbone, module everything else that is not
      the head.
  """
  parts = {"module": 0, "norm": 0, "head": 0}
  for name, leaf in trees.flatten(tuned).items():
    part = ("head" if name.startswith("head/") else
            "norm" if re.fullmatch(NORM[0], name) else "module")
    parts[part] += trees.count(leaf)
  return parts
