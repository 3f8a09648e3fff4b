"""One run: a method's stages in order, each an optimisation of its leaves.

`run(job, base, stages)` is what a session calls. `StageRun` trains the
epochs of one stage, saves and resumes them. The module `step` has the compiled
functions.
"""
from collections.abc import Callable, Generator
import contextlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ttc_jax import (
  augment,
  checkpoint,
  cost,
  evaluate,
  feed,
  interrupt,
  parallel,
  trees,
)
from ttc_jax.errors import RunError
from ttc_jax.methods import Context, Method, Stage
from ttc_jax.model import Model, init_head, pad_head
from ttc_jax.step import (
  Fixed,
  Learner,
  compiled,
  make_chunk_fn,
  make_epoch_fn,
  make_hyper,
  make_init_fn,
  make_plan,
  shuffled,
)
from ttc_jax.tasks import Split
from ttc_jax.tasks.images import Stream

Record = dict[str, Any]


class State(NamedTuple):
  """A run between two stages; every array is on every device."""
  params: trees.Tree
  buffers: trees.Tree


class Outcome(NamedTuple):
  """Result of a run; the head is still padded.

  Attributes:
    history: one record for each epoch of each stage.
    seconds: spent in epochs, scores and cached features.
    memory_bytes: of a step on one device; 0 where the backend does not say.
  """
  state: State
  model: Model
  history: list[Record]
  seconds: float
  compile_seconds: float
  images_per_second: float
  memory_bytes: int


class Job(NamedTuple):
  """One run with everything settled.

  Attributes:
    identity: JSON of all that decides the result; names the stages' states.
    config: of the run; `warmup_epochs` is a number.
    model: without handlers.
    val: None where the validation images are trained on.
    holdout: (train, val), for stages that must not see the latter.
    report: called as `report(stage, epoch, epochs, record)` after each epoch.
  """
  identity: dict[str, Any]
  config: ml_collections.ConfigDict
  model: Model
  method: Method
  train: Split
  val: Split | None
  holdout: tuple[Split, Split] | None
  classes: int
  seed: int
  report: Callable[[str, int, int, Record], None]


# --- A run --------------------------------------------------------------------

def stage_keys(job: Job) -> list[str]:
  """Names of the states of a job's stages.

  Each depends on everything that decides the result up to the end of the
  stage, so jobs that begin alike share their first stages.
  """
  def key(stages):
    return checkpoint.digest([job.identity, [
        (s.name, s.rules,
         (job.method.name, job.method.options)
         if s.prepare or s.solve else None,
         *((s.lr,) if s.lr != 1 else ()))
        for s in stages]])
  stages = job.method.stages
  return [key(stages[:i + 1]) for i in range(len(stages))]


def run(job: Job, base: trees.Tree, stages: checkpoint.Stages) -> Outcome:
  """Runs the stages of a method; resumes from their saved states.

  Args:
    base: pretrained backbone parameters, on every device.
    stages: where the states are.

  Raises:
    RunError: the loss, a parameter or a score is not finite.
    UserError: a state cannot be saved or read.
    Busy: another process trains one of the stages.
    Stopped: this process was asked to end; the last epoch is saved.
  """
  head = pad_head(
      init_head(job.model.backbone.width, job.classes, job.seed,
                job.config.head_init))
  params = {"backbone": base, "adapter": {},
            "head": parallel.replicate(head)}
  state, history, total = State(params, {}), [], Clock()
  for index, key in enumerate(stage_keys(job)):
    with stages.open(key) as store:
      stage_run = StageRun(job, index, store)
      state, records, clock = stage_run.run(state)
    history += [{"stage": stage_run.stage.name, **r} for r in records]
    total = total.plus(clock)
  return Outcome(state, with_handlers(job, state), history,
                 total.prepare_seconds + total.seconds, total.compile_seconds,
                 total.images / total.seconds, total.memory_bytes)


class Clock(NamedTuple):
  """Time and images of a stage.

  Attributes:
    seconds: of the epochs, without compilation.
    prepare_seconds: of scores and cached features before them.
    images: trained on, epoch by epoch.
    memory_bytes: of a step on one device.
    step_seconds, feed_seconds: of a training set that streams: what the steps
      took, and what reading took, each were it not waiting for the other.
  """
  seconds: float = 0.0
  prepare_seconds: float = 0.0
  compile_seconds: float = 0.0
  images: int = 0
  memory_bytes: int = 0
  step_seconds: float = 0.0
  feed_seconds: float = 0.0

  def plus(self, other: "Clock") -> "Clock":
    """Returns the sums, and the larger memory."""
    return Clock(
        self.seconds + other.seconds,
        self.prepare_seconds + other.prepare_seconds,
        self.compile_seconds + other.compile_seconds,
        self.images + other.images,
        max(self.memory_bytes, other.memory_bytes),
        self.step_seconds + other.step_seconds,
        self.feed_seconds + other.feed_seconds)


def with_handlers(job: Job, state: State) -> Model:
  """Returns the job's model with the method's handlers.

  Without an adapter they are left out, so that compilations are shared.
  """
  handlers = job.method.handlers if state.params["adapter"] else ()
  return job.model._replace(handlers=handlers)


# --- A stage ------------------------------------------------------------------

class Inputs(NamedTuple):
  """What a stage trains on.

  A head alone trains on the backbone's features: then `model` has no backbone.

  Attributes:
    data: (images or features, labels), on every device; or what feeds them.
  """
  model: Model
  params: trees.Tree
  buffers: trees.Tree
  data: trees.Tree | feed.Feed
  val: Split | None


class Progress(NamedTuple):
  """What changes from epoch to epoch.

  Attributes:
    losses: of the steps of the epoch that has begun.
  """
  learner: Learner
  records: list[Record]
  clock: Clock
  losses: np.ndarray = np.zeros(0, np.float32)


class StageRun:
  """One stage of a job: prepared or resumed, trained, saved.

  Args:
    index: of the stage in the method.
    store: of the stage's states, held by this process.
  """

  def __init__(self, job: Job, index: int, store: checkpoint.StageStore):
    self.job, self.index, self.store = job, index, store
    self.stage: Stage = job.method.stages[index]
    self.plan = make_plan(job.config)
    self.epochs = 1 if self.stage.solve else job.config.epochs
    self._last_save = 0.0

  def run(self, state: State) -> tuple[State, list[Record], Clock]:
    """Returns (state after the stage, records of its epochs, clock)."""
    begin = time.perf_counter()
    saved = self.store.load()
    if parallel.any_host(saved is None)[0]:  # hosts begin at one point
      saved = None
    state, log = (self._resumed(state, saved), []) if saved else (
        self._prepared(state))
    for record in saved.meta["records"] if saved else ():
      self._report(record)
    if saved and saved.epoch == self.epochs:
      return state, saved.meta["records"], Clock(**saved.meta["clock"])
    if self.stage.solve:
      return self._solved(state, self.stage.solve)
    inputs = self._inputs(state, begun=bool(saved and saved.meta.get("losses")))
    tuned, frozen = trees.split(
        inputs.params, trees.label(inputs.params, self.stage.rules), "tune")
    progress = self._start(tuned, frozen, saved, log)
    if not saved:
      progress = progress._replace(
          clock=Clock(prepare_seconds=time.perf_counter() - begin))
    done = saved.epoch if saved else 0
    progress = self._train(inputs, frozen, progress, done, state.buffers)
    params = {**state.params, **trees.join(progress.learner.tuned, frozen)}
    return State(params, state.buffers), progress.records, progress.clock

  def _train(self, inputs, frozen, progress, done, buffers):
    """Trains the epochs that are left, saving now and then."""
    fixed, key = self._fixed(inputs, frozen)
    # Not within `held`, since it may take minutes.
    progress = self._compile(inputs, fixed, key, progress)
    interrupt.check()
    self._last_save = time.perf_counter()
    for epoch in range(done, self.epochs):
      parts = (self._chunks if isinstance(inputs.data, feed.Feed)
               else self._epoch)(inputs, fixed, key, epoch, progress)
      with contextlib.closing(parts):
        ended = False
        while not ended:
          with interrupt.held():  # what has begun ends, and is saved
            progress, ended = next(parts)
            self._check_finite(epoch, progress.losses)
            if ended:
              progress = self._record(inputs, frozen, epoch + 1, progress)
              self._report(progress.records[-1])
            asked = self._save(epoch + ended, buffers, progress)
          if asked:  # a request after the look waits for the next save
            interrupt.stop()
    return progress

  def _save(self, done, buffers, progress):
    """Saves the state where it is due. Returns whether to stop."""
    last = done == self.epochs
    asked, due = parallel.any_host(
        interrupt.asked(), time.perf_counter() - self._last_save
        >= self.job.config.save_seconds)
    if last or asked or due:
      self.store.save(_saved(done, buffers, progress, last))
      self._last_save = time.perf_counter()
    return asked

  def _report(self, record):
    """Reports an epoch, or what a `prepare` logged under its own name."""
    self.job.report(record.get("stage", self.stage.name), record["epoch"],
                    record.get("epochs", self.epochs), record)

  @property
  def _split(self) -> Split:
    """The images that this stage trains on."""
    job = self.job
    return job.holdout[0] if self.stage.holdout and job.holdout else job.train

  # --- Before the first epoch -------------------------------------------------

  def _resumed(self, state, saved):
    """State of the stage as it was saved."""
    buffers = parallel.replicate(trees.unflatten(saved.arrays["buffers"]))
    params = state.params
    if self.stage.prepare:  # which replaces the adapter that there was
      params = {**params, "adapter": {}}
    tuned = parallel.replicate(saved.arrays["tuned"])
    return State(checkpoint.overlay(params, tuned), buffers)

  def _prepared(self, state):
    """(state that the stage starts from, records that `prepare` logged)."""
    log: list[Record] = []
    if not self.stage.prepare:
      return state, log

    def keep(record):
      log.append(record)
      self._report(record)
    adapter, buffers = self.stage.prepare(self._context(state)._replace(
        log=keep))
    params = {**state.params, "adapter": parallel.replicate(adapter)}
    return State(params, parallel.replicate(buffers)), log

  def _context(self, state) -> Context:
    """What a stage's `prepare` or `solve` is told; images as in use: where
    training crops at random places, their centres."""
    job = self.job
    images = job.train.images
    if self.plan.crop_to:
      images = _centre(images, self.plan.crop_to)
    return Context(
        with_handlers(job, state), state.params, state.buffers, images,
        job.train.labels, job.seed, job.holdout and job.holdout[1],
        self.store, classes=job.classes, **self._at_a_time())

  def _at_a_time(self):
    """The `batch_size` of a Context whose batches go through in parts."""
    parts, usual = self.plan.accumulate, Context._field_defaults["batch_size"]
    return {} if parts == 1 else {
        "batch_size": min(usual, self.plan.batch_size // parts)}

  def _inputs(self, state, begun):
    """What the stage trains on.

    Where nothing is tuned or random below some block, the frozen part runs
    once and the rest trains on what it gave: the same numbers, sooner.

    Args:
      begun: an epoch was left within, which streaming alone can go on with.
    """
    plan, stage = self.plan, self.stage
    model, params = with_handlers(self.job, state), state.params
    buffers = state.buffers
    start = frozen_blocks(model.backbone, params, stage.rules)
    random = (plan.augments or model.backbone.drop_path > 0 or stage.sample)
    model = model._replace(sample=stage.sample)
    train, val = self._split, self.job.val
    if start and not random and _fits(model, params, buffers, start, train):
      def cached(split):
        return split and Split(evaluate.inputs(
            model, params, buffers, split.images, start), split.labels)
      train, val = cached(train), cached(val)
      if start > model.backbone.depth:  # the features
        model = Model(None, "none")
        params, buffers = {"head": params["head"]}, {}
      else:
        model = model._replace(start=start)
    return Inputs(model, params, buffers, self._data(train, begun), val)

  def _data(self, train, stream):
    """The training set on every device, or what feeds it."""
    config = self.job.config
    if not stream and feed.fits(train.images, config.in_memory_gib):
      return parallel.replicate((np.asarray(train.images), train.labels))
    return feed.Feed(
        train.images, train.labels, config.batch_size, config.workers)

  def _start(self, tuned, frozen, saved, log):
    """The stage before the first epoch that is left."""
    opt_state = make_init_fn(
        self.stage.rules, self.plan.optimiser, self.plan.clip_norm)(
            tuned, frozen)
    # The epoch donates its inputs; the base weights must survive it.
    learner = Learner(jax.tree.map(jnp.copy, tuned), opt_state)
    if not saved:
      return Progress(learner, log, Clock())
    arrays = parallel.replicate(saved.arrays["opt_state"])
    opt_state = trees.map_with_names(lambda name, _: arrays[name], opt_state)
    losses = np.asarray(saved.meta.get("losses", ()), np.float32)
    return Progress(learner._replace(opt_state=opt_state),
                    saved.meta["records"], Clock(**saved.meta["clock"]), losses)

  def _fixed(self, inputs, frozen):
    """(what every step reads, the stage's key), on every device."""
    job = self.job
    hyper = make_hyper(
        job.config, len(self._split.labels) // self.plan.batch_size,
        job.classes, job.method.options.get("adapter_lr", 1.0),
        self.stage.lr)
    key = jax.random.fold_in(jax.random.key(job.seed), self.index)
    hyper, key = parallel.replicate((hyper, jax.random.key_data(key)))
    return Fixed(frozen, inputs.buffers, hyper), key

  # --- In place of epochs -----------------------------------------------------

  def _solved(self, state, solve):
    """Computes the stage's head; its one record has the loss that is least."""
    job, begin = self.job, time.perf_counter()
    head, loss = solve(self._context(state))
    if not all(np.isfinite(x).all() for x in head.values()):
      raise RunError(f"stage '{self.stage.name}' found a head that is not "
                     "finite: are the features?")
    count, seconds = len(job.train.labels), time.perf_counter() - begin
    head = parallel.replicate(pad_head(head))
    record = {"epoch": 1, "loss": loss, "images_per_second": count / seconds}
    state = State({**state.params, "head": head}, state.buffers)
    if job.val:
      record["val_top1"] = evaluate.top1(
          with_handlers(job, state), state.params, state.buffers,
          job.val.images, job.val.labels)
    self._report(record)
    progress = Progress(Learner({"head": head}, {}), [record],
                        Clock(seconds, images=count))
    self.store.save(_saved(1, state.buffers, progress, True))
    return state, progress.records, progress.clock

  # --- An epoch ---------------------------------------------------------------

  def _compiled(self, inputs, fixed, key, epoch, progress):
    """Returns (compiled epoch, its arguments, seconds of compilation)."""
    args = (progress.learner, fixed, inputs.data, key,
            parallel.replicate(np.int32(epoch)))
    fn, seconds = compiled(
        make_epoch_fn, inputs.model, self.stage.rules, self.plan, args)
    return fn, args, seconds

  def _compiled_chunk(self, inputs, fixed, key, progress):
    """Returns (compiled chunk, seconds of compilation)."""
    args = (progress.learner, fixed, inputs.data.shapes(), key,
            parallel.replicate((np.int32(0),) * 3))
    return compiled(
        make_chunk_fn, inputs.model, self.stage.rules, self.plan, args)

  def _compile(self, inputs, fixed, key, progress):
    """Compiles what is run, if it is not yet; adds the time to the clock."""
    *_, seconds = (
        self._compiled_chunk(inputs, fixed, key, progress)
        if isinstance(inputs.data, feed.Feed)
        else self._compiled(inputs, fixed, key, 0, progress))
    return progress._replace(
        clock=progress.clock.plus(Clock(compile_seconds=seconds)))

  def _epoch(self, inputs, fixed, key, epoch, progress
             ) -> Generator[tuple[Progress, bool]]:
    """Yields (progress after the epoch, True): all of it in one dispatch."""
    fn, args, _ = self._compiled(inputs, fixed, key, epoch, progress)
    begin = time.perf_counter()
    learner, losses = fn(*args)
    losses = np.asarray(losses[0])
    clock = progress.clock.plus(Clock(
        time.perf_counter() - begin, 0.0, 0.0,
        len(losses) * self.plan.batch_size, cost.step_bytes(fn) or 0))
    yield progress._replace(learner=learner, clock=clock, losses=losses), True

  def _chunks(self, inputs, fixed, key, epoch, progress
              ) -> Generator[tuple[Progress, bool]]:
    """Yields (progress, whether the epoch has ended) after each chunk."""
    fn, _ = self._compiled_chunk(inputs, fixed, key, progress)
    source, size = inputs.data, self.plan.batch_size
    order, _ = shuffled(parallel.unreplicate(key), epoch,
                        len(self._split.labels), self.plan)
    chunks = source.chunks(np.asarray(order), len(progress.losses))
    run = feed.run(fn, progress.learner, fixed, key, epoch, chunks)
    with contextlib.closing(chunks), contextlib.closing(run):
      begin, read = time.perf_counter(), source.seconds
      for learner, losses, step_seconds, last in run:
        clock = progress.clock.plus(Clock(
            time.perf_counter() - begin, 0.0, 0.0, len(losses) * size,
            cost.step_bytes(fn) or 0, step_seconds, source.seconds - read))
        read = source.seconds
        progress = Progress(learner, progress.records, clock,
                            np.append(progress.losses, losses))
        yield progress, last
        begin = time.perf_counter()

  def _check_finite(self, epoch, losses):
    bad = losses[~np.isfinite(losses)]
    if not bad.size:
      return
    last = self.store.latest_epoch()
    kept = (f"the state after epoch {last} is kept in '{self.store.path}'"
            if last else "no epoch of this stage had been saved")
    raise RunError(
        f"training diverged in stage '{self.stage.name}', epoch {epoch + 1} "
        f"of {self.epochs}: the loss or a parameter became {bad[0]}; lower "
        f"config.lr (now {self.job.config.lr:g}); {kept}")

  def _record(self, inputs, frozen, done, progress):
    """Ends the epoch: adds its record, with the validation where it is due."""
    clock = progress.clock
    record = {"epoch": done, "loss": float(progress.losses.mean()),
              "images_per_second": clock.images / clock.seconds}
    if clock.feed_seconds:
      record |= {"step_images_per_second": clock.images / clock.step_seconds,
                 "feed_images_per_second": clock.images / clock.feed_seconds}
    due = done % self.job.config.eval_every == 0 or done == self.epochs
    if inputs.val and due:
      params = trees.join(progress.learner.tuned, frozen)
      record["val_top1"] = evaluate.top1(
          inputs.model, params, inputs.buffers, inputs.val.images,
          inputs.val.labels)
    return Progress(
        progress.learner, [*progress.records, record], progress.clock)


def _centre(images, size):
  """The centres of images (N, S, S, 3), of a Stream as they are decoded."""
  if isinstance(images, Stream):
    return images.changed(size, lambda x: augment.centre(x[None], size)[0])
  return augment.centre(np.asarray(images), size)


def _saved(done, buffers, progress, finished):
  """What is kept of a stage; the optimiser's state until it is finished."""
  opt_state = {} if finished else trees.flatten(progress.learner.opt_state)
  arrays = {"tuned": trees.flatten(progress.learner.tuned),
            "buffers": trees.flatten(buffers), "opt_state": opt_state}
  return checkpoint.Saved(done, parallel.unreplicate(arrays), {
      "records": progress.records, "clock": progress.clock._asdict(),
      "losses": progress.losses.tolist()}, len(progress.losses))


# --- Cached inputs ------------------------------------------------------------

def frozen_blocks(backbone: Any, params: trees.Tree,
                  rules: trees.Rules) -> int:
  """Returns how many of the first blocks hold no tuned leaf.

  L + 1, one more than the depth, where only the head is tuned; 0 where the
  embedding is tuned.
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
