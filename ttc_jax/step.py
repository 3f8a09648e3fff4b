"""A batch, a step and an epoch of an optimisation, as pmapped functions.

From the inside out: `make_loss_fn` (a batch), `make_update_fn` (a step),
`make_epoch_fn` (all steps of an epoch in one dispatch) and `make_chunk_fn`
(some of them, of a training set that streams). A step changes the `Learner` and
reads what is `Fixed`.
"""
from collections.abc import Callable
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from ttc_jax import augment, optim, parallel, trees
from ttc_jax.model import Model, keep_padding


class Plan(NamedTuple):
  """Configuration values that are compiled into an epoch.

  Everything else is an argument of the compiled function.

  Attributes:
    crop_to: side of random crops, in pixels; 0: images have that of the model.
  """
  batch_size: int
  label_smoothing: float
  flip: bool
  smallest_crop: float
  decay_all: bool
  optimiser: str
  accumulate: int = 1
  recipe: augment.Recipe = augment.Recipe()
  clip_norm: float = 0.0
  crop_to: int = 0
  crop_aspect: float = 1.0

  @property
  def augments(self) -> bool:
    """Whether an image differs from epoch to epoch."""
    return (self.flip or self.smallest_crop < 1 or self.crop_to > 0
            or any(self.recipe))


def make_plan(config: ml_collections.ConfigDict) -> Plan:
  """Returns the values of `Plan` that a configuration has."""
  values = {field: config[field] for field in Plan._fields
            if field not in ("recipe", "crop_to")}
  return Plan(**values, recipe=augment.Recipe(**config.augment),
              crop_to=config.image_size if config.crop_from else 0)


Number = Any  # a scalar: numpy's, or traced


class Hyper(NamedTuple):
  """Numbers in which runs differ without another compilation.

  Attributes:
    warmup, steps: optimiser steps of the stage.
    classes: of the task; the head's columns beyond are padding.
    adapter_lr: factor on the learning rate of the adapter.
  """
  lr: Number
  weight_decay: Number
  warmup: Number
  steps: Number
  classes: Number
  warmup_lr: Number
  min_lr: Number
  adapter_lr: Number


def make_hyper(config: ml_collections.ConfigDict, steps_per_epoch: int,
               classes: int, adapter_lr: float = 1.0,
               factor: float = 1.0) -> Hyper:
  """Returns a stage's numbers, as numpy scalars.

  Args:
    factor: of the stage, on all learning rates.
  """
  return Hyper(
      np.float32(factor * config.lr), np.float32(config.weight_decay),
      np.int32(round(config.warmup_epochs * steps_per_epoch)),
      np.int32(config.epochs * steps_per_epoch), np.int32(classes),
      np.float32(factor * config.warmup_lr), np.float32(factor * config.min_lr),
      np.float32(adapter_lr))


class Learner(NamedTuple):
  """What a step changes: the tuned leaves and the optimiser's state."""
  tuned: trees.Tree
  opt_state: trees.Tree


class Fixed(NamedTuple):
  """What a step reads and never changes: frozen leaves, buffers, numbers."""
  frozen: trees.Tree
  buffers: trees.Tree
  hyper: Hyper


def make_loss_fn(model: Model, plan: Plan) -> Callable:
  """Returns `loss_fn(params, fixed, batch, key)`.

  It is the mean cross-entropy of a batch (images, labels), with augmentation
  and label smoothing (Szegedy et al., 2016) as the plan says.
  """
  def loss_fn(params, fixed, batch, key):
    images, labels = batch
    crop_key, flip_key, path_key = jax.random.split(key, 3)
    more_key, mix_key = jax.random.split(jax.random.fold_in(key, 1))
    size = plan.crop_to or images.shape[1]
    if plan.smallest_crop < 1:
      images = augment.random_crop(images, crop_key, size, plan.smallest_crop,
                                   plan.crop_aspect)
    elif plan.crop_to:
      images = augment.random_window(images, crop_key, size)
    if plan.flip:
      images = augment.random_flip(images, flip_key)
    images = augment.change(images, more_key, plan.recipe, model.normalisation)
    targets = _targets(labels, params["head"]["bias"].shape[-1], plan,
                       fixed.hyper.classes)
    images, targets = augment.mix(images, targets, mix_key, plan.recipe)
    logits = model.logits(params, images, fixed.buffers, key=path_key)
    return optax.softmax_cross_entropy(logits, targets).mean()
  return loss_fn


def _targets(labels, width, plan, classes):
  """Probabilities (B, width), smoothed over the task's classes alone."""
  targets = jax.nn.one_hot(labels, width)
  if plan.label_smoothing:
    known = jnp.arange(width) < classes
    targets = ((1 - plan.label_smoothing) * targets
               + plan.label_smoothing * known / classes)
  return targets


def make_update_fn(model: Model, rules: trees.Rules, plan: Plan) -> Callable:
  """Returns `update_fn(learner, fixed, batch, key) -> (learner, loss)`.

  It is one optimiser step on one device; gradients are averaged over devices.
  Only tuned leaves are carried and differentiated.
  """
  gradient_fn = _make_gradient_fn(make_loss_fn(model, plan), plan.accumulate)

  def update_fn(learner, fixed, batch, key):
    hyper = fixed.hyper
    params = trees.join(learner.tuned, fixed.frozen)
    labels = trees.label(params, rules)
    tx = optim.make_tx(
        labels, optim.warmup_cosine(hyper.lr, hyper.steps, hyper.warmup,
                                    hyper.warmup_lr, hyper.min_lr),
        hyper.weight_decay, plan.decay_all, plan.optimiser, plan.clip_norm)
    if model.sample is not None:
      fixed = fixed._replace(buffers=model.sample(fixed.buffers, key))
    key = jax.random.fold_in(key, parallel.device_index())
    loss, grads = gradient_fn(learner.tuned, fixed, batch, key)
    # In place of the gradients that frozen leaves lack: any array, it is
    # replaced by zeros.
    grads = trees.join(parallel.pmean(grads), fixed.frozen)
    updates, opt_state = tx.update(grads, learner.opt_state, params)
    if "adapter" in updates:  # not where the head alone is trained
      updates["adapter"] = jax.tree.map(
          lambda u: hyper.adapter_lr * u, updates["adapter"])
    params = optax.apply_updates(params, updates)
    params["head"] = keep_padding(params["head"], hyper.classes)
    tuned, _ = trees.split(params, labels, "tune")
    return Learner(tuned, opt_state), parallel.pmean(loss)
  return update_fn


def _make_gradient_fn(loss_fn, parts):
  """Returns `(tuned, fixed, batch, key) -> (loss, gradients)` of a batch.

  Of several parts of the batch, one after the other, the means: the same
  numbers up to rounding, with the activations of one part in memory. Each part
  draws its own random numbers.
  """
  def gradient_fn(tuned, fixed, batch, key):
    return jax.value_and_grad(lambda tuned: loss_fn(
        trees.join(tuned, fixed.frozen), fixed, batch, key))(tuned)

  def over_parts(tuned, fixed, batch, key):
    batch = jax.tree.map(
        lambda x: x.reshape(parts, len(x) // parts, *x.shape[1:]), batch)

    def add(total, part):
      i, batch = part
      found = gradient_fn(tuned, fixed, batch, jax.random.fold_in(key, i))
      return jax.tree.map(jnp.add, total, found), None
    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, tuned)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(parts), batch))
    return jax.tree.map(lambda x: x / parts, total)
  return gradient_fn if parts == 1 else over_parts


def shuffled(key: jax.Array, epoch: Number, count: int,
             plan: Plan) -> tuple[jax.Array, jax.Array]:
  """Returns an epoch's order of images and the key of its steps.

  The last N mod B images of the order are left out, others in each epoch.

  Args:
    key: of the stage, as `jax.random.key_data` gives it.
    count: N, of the training set.

  Returns:
    Rows (steps, devices, B/n), and a key that each step folds its number into.
  """
  shuffle_key, steps_key = _epoch_keys(key, epoch)
  steps = count // plan.batch_size
  order = jax.random.permutation(shuffle_key, count)[:steps * plan.batch_size]
  return order.reshape(steps, len(parallel.devices()), -1), steps_key


def _epoch_keys(key, epoch):
  """(key of the order, key of the steps)."""
  return jax.random.split(
      jax.random.fold_in(jax.random.wrap_key_data(key), epoch))


@functools.cache
def make_epoch_fn(model: Model, rules: trees.Rules, plan: Plan) -> Any:
  """Returns the pmapped epoch: shuffling and all its steps in one dispatch.

  `epoch_fn(learner, fixed, data, key, epoch) -> (learner, losses)`: `data` is
  the whole training set (images uint8 or features, labels), on every device;
  `losses` has one value a step, NaN where a tuned leaf is not finite at the
  end. The learner is donated.
  """
  update_fn = make_update_fn(model, rules, plan)

  def epoch_fn(learner, fixed, data, key, epoch):
    images, labels = data
    order, steps_key = shuffled(key, epoch, len(labels), plan)
    order = order[:, parallel.device_index()]

    def step(learner, inputs):
      rows, i = inputs
      return update_fn(learner, fixed, (images[rows], labels[rows]),
                       jax.random.fold_in(steps_key, i))
    learner, losses = jax.lax.scan(
        step, learner, (order, jnp.arange(len(order))))
    return learner, _nan_unless_finite(losses, learner)
  return parallel.pmap(epoch_fn, donate=(0,))


@functools.cache
def make_chunk_fn(model: Model, rules: trees.Rules, plan: Plan) -> Any:
  """Returns pmapped steps of an epoch, of batches that the host supplies.

  `chunk_fn(learner, fixed, batches, key, at) -> (learner, losses)`: `batches`
  is (images (K, B/n, ...), labels (K, B/n)) on each device, in the order of
  `shuffled`; `at` is (epoch, first step, steps) as int32 (3,), so that a
  shorter chunk at the end needs no other program. `losses` (K,) are those of
  `make_epoch_fn`; the ones beyond the steps are 0. The learner is donated.
  """
  update_fn = make_update_fn(model, rules, plan)

  def chunk_fn(learner, fixed, batches, key, at):
    epoch, first, count = at
    _, steps_key = _epoch_keys(key, epoch)

    def step(i, carry):
      learner, losses = carry
      learner, loss = update_fn(
          learner, fixed, jax.tree.map(lambda x: x[i], batches),
          jax.random.fold_in(steps_key, first + i))
      return learner, losses.at[i].set(loss)
    learner, losses = jax.lax.fori_loop(
        0, count, step, (learner, jnp.zeros(len(batches[1]))))
    return learner, _nan_unless_finite(losses, learner)
  return parallel.pmap(chunk_fn, donate=(0,))


def _nan_unless_finite(losses, learner):
  """The losses; the last one is older than the parameters after it."""
  finite = jnp.array(
      [jnp.isfinite(x).all() for x in jax.tree.leaves(learner.tuned)])
  return jnp.where(finite.all(), losses, jnp.nan)


@functools.cache
def make_init_fn(rules: trees.Rules, optimiser: str,
                 clip_norm: float = 0.0) -> Callable:
  """Returns the pmapped `init_fn(tuned, frozen) -> opt_state`."""
  def init_fn(tuned, frozen):
    params = trees.join(tuned, frozen)
    return optim.make_tx(
        trees.label(params, rules), lambda step: jnp.zeros(()), 0.0,
        optimiser=optimiser, clip_norm=clip_norm).init(params)
  return parallel.pmap(init_fn)


_COMPILED: dict[tuple, Any] = {}


def compiled(make_fn: Callable, model: Model, rules: trees.Rules, plan: Plan,
             args: tuple) -> tuple[Any, float]:
  """Returns (a compiled function, seconds spent on compiling it; 0 if known).

  Where JAX has joined hosts it is compiled by its first call: only then does
  pmap make global arrays of each host's part.

  Args:
    make_fn: `make_epoch_fn` or `make_chunk_fn`.
    args: of the function, or their shapes.
  """
  fn = make_fn(model, rules, plan)
  if jax.process_count() > 1:
    return fn, 0.0
  avals = jax.tree.map(lambda x: (x.shape, str(x.dtype)), args)
  config: Any = jax.config  # of whose keys JAX 0.10 declares few
  key = (make_fn, model, rules, plan, str(avals),
         config.jax_default_matmul_precision)
  if key in _COMPILED:
    return _COMPILED[key], 0.0
  start = time.perf_counter()
  _COMPILED[key] = fn.lower(*args).compile()
  return _COMPILED[key], time.perf_counter() - start
