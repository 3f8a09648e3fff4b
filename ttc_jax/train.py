"""One run: a method's stages in order, each an optimisation of its leaves."""
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ttc_jax import augment, checkpoint, cost, evaluate, interrupt, optim
from ttc_jax import parallel, trees
from ttc_jax.errors import RunError
from ttc_jax.methods import Context, Method
from ttc_jax.model import Model, init_head, keep_padding, pad_head
from ttc_jax.tasks import Split


class Plan(NamedTuple):
  """What is compiled into an epoch; all else is an argument of it."""
  batch_size: int
  label_smoothing: float
  flip: bool
  smallest_crop: float
  decay_all: bool
  optimiser: str = "adamw"


class Hyper(NamedTuple):
  """Numbers that runs differ in without another compilation."""
  lr: float
  weight_decay: float
  warmup: int
  steps: int
  classes: int  # those of the head beyond are padding
  warmup_lr: float = np.float32(0)
  min_lr: float = np.float32(0)


class State(NamedTuple):
  """A run between two stages; every array is on every device."""
  params: trees.Tree
  buffers: trees.Tree


class Outcome(NamedTuple):
  """What a run ends with; the head is still padded."""
  state: State
  model: Model
  history: list[dict[str, Any]]
  seconds: float
  compile_seconds: float
  images_per_second: float
  memory_bytes: int  # of a step, on a device; 0 where nobody says


def loss_fn(params, model, plan, buffers, hyper, images, labels, key):
  """Mean cross-entropy of a batch, with label smoothing and augmentation."""
  crop_key, flip_key, path_key = jax.random.split(key, 3)
  if plan.smallest_crop < 1:
    images = augment.random_crop(
        images, crop_key, images.shape[1], plan.smallest_crop)
  if plan.flip:
    images = augment.random_flip(images, flip_key)
  logits = model.logits(params, images, buffers, key=path_key)
  targets = jax.nn.one_hot(labels, logits.shape[-1])
  if plan.label_smoothing:  # over the task's classes, not the padding
    known = jnp.arange(logits.shape[-1]) < hyper.classes
    targets = ((1 - plan.label_smoothing) * targets
               + plan.label_smoothing * known / hyper.classes)
  return optax.softmax_cross_entropy(logits, targets).mean()


def make_update_fn(model, rules, plan):
  """`update_fn(tuned, opt_state, frozen, ...)`: one step on one device.

  Only the tuned leaves go round; the gradients of the others are computed by
  nobody, since nothing reads them.
  """
  def update_fn(tuned, opt_state, frozen, buffers, hyper, images, labels,
                key):
    params = trees.join(tuned, frozen)
    names = trees.label(params, rules)
    tx = optim.make_tx(
        names, optim.warmup_cosine(hyper.lr, hyper.steps, hyper.warmup,
                                   hyper.warmup_lr, hyper.min_lr),
        hyper.weight_decay, plan.decay_all, plan.optimiser)
    if model.sample is not None:
      buffers = model.sample(buffers, key)
    key = jax.random.fold_in(key, parallel.device_index())
    loss, grads = jax.value_and_grad(loss_fn)(
        params, model, plan, buffers, hyper, images, labels, key)
    grads = parallel.pmean(grads)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    params["head"] = keep_padding(params["head"], hyper.classes)
    tuned, _ = trees.split(params, names, "tune")
    return tuned, opt_state, parallel.pmean(loss)
  return update_fn


@functools.lru_cache(maxsize=None)
def make_epoch_fn(model: Model, rules: trees.Rules, plan: Plan):
  """The pmapped epoch: shuffling and all its steps in one dispatch.

  The training set (uint8, or features) lies whole on every device; the last
  N mod B images of an epoch's order are left out, others each epoch.
  """
  update_fn = make_update_fn(model, rules, plan)

  def epoch_fn(tuned, opt_state, frozen, buffers, data, hyper, key, epoch):
    images, labels = data
    key = jax.random.fold_in(jax.random.wrap_key_data(key), epoch)
    shuffle_key, steps_key = jax.random.split(key)
    steps = len(labels) // plan.batch_size
    order = jax.random.permutation(shuffle_key, len(labels))
    order = order[:steps * plan.batch_size].reshape(
        steps, len(parallel.devices()), -1)
    order = order[:, parallel.device_index()]

    def step(carry, inputs):
      rows, i = inputs
      *carry, loss = update_fn(
          *carry, frozen, buffers, hyper, images[rows], labels[rows],
          jax.random.fold_in(steps_key, i))
      return tuple(carry), loss
    (tuned, opt_state), losses = jax.lax.scan(
        step, (tuned, opt_state), (order, jnp.arange(steps)))
    # The last step's loss is older than its parameters.
    finite = jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tuned)])
    return tuned, opt_state, jnp.where(finite.all(), losses, jnp.nan)
  return parallel.pmap(epoch_fn, donate=(0, 1))


_COMPILED = {}


def compiled_epoch_fn(model, rules, plan, args):
  """Returns (the compiled epoch, seconds spent compiling it, 0 if known)."""
  avals = jax.tree.map(lambda x: (x.shape, str(x.dtype)), args)
  key = (model, rules, plan, str(avals))
  if key in _COMPILED:
    return _COMPILED[key], 0.0
  start = time.perf_counter()
  _COMPILED[key] = make_epoch_fn(model, rules, plan).lower(*args).compile()
  return _COMPILED[key], time.perf_counter() - start


class Job(NamedTuple):
  """One run, everything settled.

  Attributes:
    identity: JSON of all that decides the result, for the stages' names.
    model: without handlers.
    val: None where the validation images are trained on.
    holdout: train800 and val200, where a stage must not see the latter.
    report: called as `report(stage, epoch, epochs, record)` after each epoch.
  """
  identity: dict[str, Any]
  model: Model
  method: Method
  plan: Plan
  train: Split
  val: Split | None
  holdout: tuple[Split, Split] | None
  classes: int
  seed: int
  epochs: int
  warmup_epochs: float
  lr: float
  weight_decay: float
  eval_every: int
  save_seconds: float
  report: Any
  warmup_lr: float = 0.0
  min_lr: float = 0.0


def run(job: Job, base: trees.Tree, directory: str) -> Outcome:
  """Runs the stages of a method, resuming what `directory` has of them.

  Args:
    base: pretrained backbone parameters, on every device.
    directory: where the states of stages are kept.

  Raises:
    RunError: the loss, a parameter or a score is not finite.
    UserError: a state cannot be saved or read.
    Busy: another process is at one of the stages.
    Stopped: this process was asked to end; the last epoch is saved.
  """
  head = pad_head(
      init_head(job.model.backbone.width, job.classes, job.seed))
  params = {"backbone": base, "adapter": {},
            "head": parallel.replicate(head)}
  state, history, total = State(params, {}), [], _Clock()
  for index, stage in enumerate(job.method.stages):
    key = checkpoint.digest([job.identity, [
        (s.name, s.rules,
         (job.method.name, job.method.options) if s.prepare else None)
        for s in job.method.stages[:index + 1]]])
    with checkpoint.StageStore(f"{directory}/{key}") as store:
      state, records, clock = _run_stage(job, index, stage, state, store)
    history += [{"stage": stage.name, **r} for r in records]
    total = total.plus(clock)
  return Outcome(state, _with_handlers(job, state), history,
                 total.prepare_seconds + total.seconds, total.compile_seconds,
                 total.images / total.seconds, total.memory_bytes)


class _Clock(NamedTuple):
  """Seconds: of epochs; of scores and cached features before them."""
  seconds: float = 0.0
  prepare_seconds: float = 0.0
  compile_seconds: float = 0.0
  images: int = 0
  memory_bytes: int = 0

  def plus(self, other):
    sums = _Clock(*(a + b for a, b in zip(self, other)))
    return sums._replace(
        memory_bytes=max(self.memory_bytes, other.memory_bytes))


def _with_handlers(job, state):
  """Without an adapter the handlers are left out, and compilations shared."""
  handlers = job.method.handlers if state.params["adapter"] else ()
  return job.model._replace(handlers=handlers)


class _Inputs(NamedTuple):
  """What a stage trains on; a head alone trains on the backbone's features."""
  model: Model
  params: trees.Tree
  buffers: trees.Tree
  data: trees.Tree       # (images or features, labels), on every device
  val: Split | None


class _Progress(NamedTuple):
  """What changes from epoch to epoch."""
  tuned: trees.Tree
  opt_state: trees.Tree
  records: list[dict[str, Any]]
  clock: _Clock


def _run_stage(job, index, stage, state, store):
  """Returns (state, records of the epochs, clock)."""
  begin = time.perf_counter()
  saved, log = store.load(), []
  state = _prepare(job, stage, state, saved, store.path, log)
  for record in saved.meta["records"] if saved else ():
    _report(job, stage, record)
  if saved and saved.epoch == job.epochs:
    return state, saved.meta["records"], _Clock(*saved.meta["clock"])
  inputs = _inputs(job, stage, state)
  names = trees.label(inputs.params, stage.rules)
  tuned, frozen = trees.split(inputs.params, names, "tune")
  now = _start(job, stage, tuned, frozen, saved,
               time.perf_counter() - begin, log)
  fixed = _fixed(job, index)
  last_save = time.perf_counter()
  for epoch in range(saved.epoch if saved else 0, job.epochs):
    with interrupt.held():  # an epoch that has begun ends, and is saved
      now, losses = _epoch(job, stage, inputs, frozen, fixed, epoch, now)
      _check_finite(job, stage, epoch, losses, store)
      now = _record(job, inputs, frozen, epoch + 1, losses, now)
      _report(job, stage, now.records[-1])
      last, asked = epoch + 1 == job.epochs, interrupt.asked()
      if (last or asked
          or time.perf_counter() - last_save >= job.save_seconds):
        store.save(_saved(epoch + 1, state.buffers, now, last))
        last_save = time.perf_counter()
    if asked:  # a request that came after the look waits for the next save
      interrupt.check()
  params = {**state.params, **trees.join(now.tuned, frozen)}
  return State(params, state.buffers), now.records, now.clock


def _report(job, stage, record):
  """Of an epoch, or of what a `prepare` logged under a name of its own."""
  job.report(record.get("stage", stage.name), record["epoch"],
             record.get("epochs", job.epochs), record)


def _train_split(job, stage):
  return job.holdout[0] if stage.holdout else job.train


def _start(job, stage, tuned, frozen, saved, seconds, log):
  opt_state = _make_init_fn(stage.rules, job.plan.optimiser)(tuned, frozen)
  # The epoch donates its inputs; the base weights must survive it.
  now = _Progress(jax.tree.map(jnp.copy, tuned), opt_state, log,
                  _Clock(prepare_seconds=seconds))
  if not saved:
    return now
  flat = saved.arrays["opt_state"]
  leaves, treedef = jax.tree.flatten(opt_state)
  arrays = [flat[f"{i:04d}"] for i in range(len(leaves))]
  opt_state = jax.tree.unflatten(treedef, parallel.replicate(arrays))
  return now._replace(opt_state=opt_state, records=saved.meta["records"],
                      clock=_Clock(*saved.meta["clock"]))


def _fixed(job, index):
  """The hyper-parameters and the key of a stage, on every device."""
  split = _train_split(job, job.method.stages[index])
  steps = len(split.labels) // job.plan.batch_size
  hyper = Hyper(np.float32(job.lr), np.float32(job.weight_decay),
                np.int32(round(job.warmup_epochs * steps)),
                np.int32(job.epochs * steps), np.int32(job.classes),
                np.float32(job.warmup_lr), np.float32(job.min_lr))
  key = jax.random.fold_in(jax.random.key(job.seed), index)
  return parallel.replicate((hyper, jax.random.key_data(key)))


def _epoch(job, stage, inputs, frozen, fixed, epoch, now):
  """Dispatches an epoch and waits for its losses."""
  args = (now.tuned, now.opt_state, frozen, inputs.buffers, inputs.data,
          *fixed, parallel.replicate(np.int32(epoch)))
  fn, compile_seconds = compiled_epoch_fn(
      inputs.model, stage.rules, job.plan, args)
  begin = time.perf_counter()
  tuned, opt_state, losses = fn(*args)
  losses = np.asarray(losses[0])
  clock = now.clock.plus(_Clock(
      time.perf_counter() - begin, 0.0, compile_seconds,
      len(losses) * job.plan.batch_size, cost.step_bytes(fn) or 0))
  return now._replace(tuned=tuned, opt_state=opt_state, clock=clock), losses


def _check_finite(job, stage, epoch, losses, store):
  bad = losses[~np.isfinite(losses)]
  if not bad.size:
    return
  kept = store.latest_epoch()
  kept = (f"the state after epoch {kept} is kept in '{store.path}'" if kept
          else "no epoch of this stage had been saved")
  raise RunError(
      f"training diverged in stage '{stage.name}', epoch {epoch + 1} of "
      f"{job.epochs}: the loss or a parameter became {bad[0]}; lower config.lr "
      f"(now {job.lr:g}); {kept}")


def _record(job, inputs, frozen, done, losses, now):
  """Adds the epoch's record, with the validation accuracy where it is due."""
  record = {"epoch": done, "loss": float(losses.mean()),
            "images_per_second": now.clock.images / now.clock.seconds}
  if inputs.val and (done % job.eval_every == 0 or done == job.epochs):
    record["val_top1"] = evaluate.top1(
        inputs.model, trees.join(now.tuned, frozen), inputs.buffers,
        *inputs.val)
  return now._replace(records=[*now.records, record])


def _saved(done, buffers, now, finished):
  leaves = [] if finished else jax.tree.leaves(now.opt_state)
  opt_state = {f"{i:04d}": x
               for i, x in enumerate(parallel.unreplicate(leaves))}
  arrays = {
      "tuned": trees.flatten(parallel.unreplicate(now.tuned)),
      "buffers": trees.flatten(parallel.unreplicate(buffers)),
      "opt_state": opt_state}
  return checkpoint.Saved(done, arrays, {
      "records": now.records, "clock": list(now.clock)})


def _prepare(job, stage, state, saved, directory, log):
  """The state that the stage starts from."""
  if saved:
    arrays = {k: parallel.replicate(trees.unflatten(v) if k == "buffers"
                                    else v)
              for k, v in saved.arrays.items() if k != "opt_state"}
    params = state.params
    if stage.prepare:  # which replaces the adapter that there was
      params = {**params, "adapter": {}}
    return State(checkpoint.overlay(params, arrays["tuned"]),
                 arrays["buffers"])
  if not stage.prepare:
    return state
  def keep(record):
    log.append(record)
    _report(job, stage, record)
  adapter, buffers = stage.prepare(Context(
      _with_handlers(job, state), state.params, state.buffers,
      job.train.images, job.train.labels, job.seed,
      job.holdout and job.holdout[1], directory, keep))
  params = {**state.params, "adapter": parallel.replicate(adapter)}
  return State(params, parallel.replicate(buffers))


def _inputs(job, stage, state):
  """What the stage trains on.

  Where nothing is tuned or random below some block, the frozen part runs once
  and the rest trains on what it gave: the same numbers, sooner.
  """
  model, params, buffers = _with_handlers(job, state), *state
  start = frozen_blocks(model.backbone, params, stage.rules)
  random = (job.plan.flip or job.plan.smallest_crop < 1
            or model.backbone.drop_path > 0 or stage.sample)
  model = model._replace(sample=stage.sample)
  train, val = _train_split(job, stage), job.val
  if start and not random and _fits(model, params, buffers, start, train):
    def cached(split):
      return split and Split(evaluate.inputs(
          model, params, buffers, split.images, start), split.labels)
    train, val = cached(train), cached(val)
    model = model._replace(start=start)
    if start > model.backbone.depth:  # the features
      model = Model(None, "none")
      params, buffers = {"head": params["head"]}, {}
  data = parallel.replicate((np.asarray(train.images), train.labels))
  return _Inputs(model, params, buffers, data, val)


def frozen_blocks(backbone, params: trees.Tree, rules: trees.Rules) -> int:
  """How many of the first blocks hold nothing that is tuned.

  L + 1, one more than there are, if the final norm is frozen too and only the
  head is tuned; 0 if the embedding is tuned.
  """
  lowest = backbone.depth + 1
  for name, label in trees.flatten(trees.label(params, rules)).items():
    part, _, rest = name.partition("/")
    if label == "tune" and part == "backbone":
      lowest = min(lowest, backbone.block_of(rest))
    elif label == "tune" and part == "adapter":
      lowest = min(lowest, int(rest.split("/")[1]))
  # Tokens are cached where a block begins.
  return max(0, lowest if lowest != backbone.depth else lowest - 1)


_CACHE_BYTES = 4 * 2 ** 30


def _fits(model, params, buffers, start, split):
  """Whether the cached inputs of the blocks above have room on a device."""
  if start > model.backbone.depth:
    return True
  one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
                     (params, buffers))
  image = jax.ShapeDtypeStruct((1, *split.images.shape[1:]), np.uint8)
  tokens = jax.eval_shape(
      lambda params, buffers, image: model.tokens(
          params, image, buffers, start), *one, image)
  return (len(split.labels) * tokens.size * tokens.dtype.itemsize
          <= _CACHE_BYTES)


@functools.lru_cache(maxsize=None)
def _make_init_fn(rules, optimiser="adamw"):
  """`(tuned, frozen) -> opt_state`, on every device."""
  def init_fn(tuned, frozen):
    params = trees.join(tuned, frozen)
    return optim.make_tx(
        trees.label(params, rules), lambda step: 0.0, 0.0,
        optimiser=optimiser).init(params)
  return parallel.pmap(init_fn)
