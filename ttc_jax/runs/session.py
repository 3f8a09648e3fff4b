"""This process's part in the runs of a work directory."""
from collections.abc import Callable
import contextlib
import itertools
import json
import threading
import time

import ml_collections

from ttc_jax import (
  bundles,
  checkpoint,
  compilation,
  cost,
  hosts,
  interrupt,
  measures,
  parallel,
  train,
)
from ttc_jax.claims import Claim
from ttc_jax.config import default
from ttc_jax.errors import (
  Busy,
  DataError,
  RunError,
  Stopped,
  UserError,
  printable,
)
from ttc_jax.report import best
from ttc_jax.runs import inputs, job, plan
from ttc_jax.runs.progress import Progress
from ttc_jax.runs.row import finish
from ttc_jax.runs.workdir import STAGES, Row, WorkDir

# Keys that may change between two starts on one work directory.
_FREE = ("tasks", "seeds", "data", "weights", "cache", "cache_gib",
         "save_seconds", "lease_seconds", "hosts", "plots", "compilation_cache",
         "keep_stages", "in_memory_gib", "workers", "measures", "eval_every")
# Likewise, where experiments share a work directory.
_FREE_OF_EXPERIMENTS = ("experiment", "variants", "method")
# Between looks at what other processes have done: each twice the last.
_POLL_SECONDS = (1.0, 30.0)


class Session:
  """Runs what a configuration asks for and no other process does.

  Any number of processes may share a work directory: each takes runs that are
  neither done nor being done, and leaves when none is left.

  Args:
    workdir: path of the work directory.
    say: takes a line about each run that this process finishes.

  Attributes:
    base: of the variants that set none of their own.
    missing: {task: why it is skipped}.
    done: {run: row}, also of other processes.
    failed: {run: why}, of the runs that this process tried.

  Raises:
    UserError: a value, file or directory that cannot be used; nothing is
      written then.
  """

  def __init__(self, config: ml_collections.ConfigDict, workdir: str,
               say: Callable[[str], None] = print):
    self.config, self.say = config, say
    self.workdir = WorkDir(workdir, config.lease_seconds, hosts.shared)
    self.stages = checkpoint.Stages(
        self.workdir.store, self.workdir.claims, STAGES)
    inputs.check_values(config)
    cost.counter()  # which every row needs, after its training
    compilation.start(config.compilation_cache)
    self.inputs = inputs.Inputs(config)
    self.tasks, self.missing = self.inputs.tasks, self.inputs.missing
    self.base = self.inputs.base(config)
    inputs.check_runs(config, self.inputs)
    kept = _kept_keys(config, self.base)
    # Earlier versions did not note what a config.json beside the weights says.
    self.workdir.adopt(kept, _json(default()) | {
        "weights_part": "", "weights_config": kept["weights_config"]}, _FREE)
    self.done: dict[str, Row] = {}
    self.failed: dict[str, str] = {}
    self._planned: dict[str, plan.Run] = {}
    self._decoding: dict[str, threading.Thread] = {}
    self._look()
    self.workdir.write_plan(
        {task: {label: plan.expected(c)
                for label, c in plan.variants(config, task).items()}
         for task in self.tasks}, self.missing, config.experiment)

  def _look(self) -> None:
    """Reads what is done by now."""
    self.done |= {row["run"]: row for row in self.workdir.rows()}

  def run_all(self) -> None:
    """Returns when all runs are done or have failed, in whatever process."""
    with compilation.precision(self.config.matmul_precision):
      self._run_all()

  def _run_all(self) -> None:
    pause, longest = _POLL_SECONDS
    self._stop_together()
    while not all([self._settle_task(*pair) for pair in itertools.zip_longest(
        self.tasks, list(self.tasks)[1:])]):
      until = time.monotonic() + pause
      while time.monotonic() < until:
        interrupt.check()
        time.sleep(min(1.0, pause))
      pause = min(2 * pause, longest)
      self._stop_together()
      self._look()
    self.workdir.write_results()

  @staticmethod
  def _stop_together() -> None:
    """Stops where any host was asked to: those in step stop at one point."""
    if parallel.any_host(interrupt.asked())[0]:
      interrupt.stop()

  # --- A task -----------------------------------------------------------------

  def _settle_task(self, task: str, next_task: str | None) -> bool:
    """Runs the task's unclaimed runs. Returns True when all are settled."""
    while task in self._decoding and self._decoding[task].is_alive():
      self._decoding[task].join(0.5)
      interrupt.check()
    self._decode_ahead(next_task)
    variants = plan.variants(self.config, task)
    settled = all([self._settle_variant(task, label, config)
                   for label, config in variants.items()])
    if settled and not self.config.keep_stages and self._is_done(task):
      for stage in self.workdir.spent_stages(
          run for run, row in self.done.items() if row["task"] == task):
        self.stages.delete(stage)
    return settled

  def _decode_ahead(self, task: str | None) -> None:
    """Fills the cache with a task's images while the task before it trains.

    Built-in tasks are drawn in no time. An error is left to the run that needs
    the image.
    """
    if (task is None or task in self._decoding or not self.config.data
        or self._is_done(task)):
      return
    wanted = [(found, split)
              for config in plan.variants(self.config, task).values()
              for found, splits in (
                  (self.inputs.task(task, config), self.tasks[task].splits),
                  (self.inputs.training(task, config), ("train", "trainval")))
              for split in splits]
    def decode():
      # RuntimeError: of its threads, when the process ends.
      with contextlib.suppress(UserError, Stopped, RuntimeError):
        for found, split in wanted:
          found.split(split)
    self._decoding[task] = threading.Thread(target=decode, daemon=True)
    self._decoding[task].start()

  def _is_done(self, task: str) -> bool:
    """Tells whether every variant of a task has the rows that it reports."""
    rows = [r for r in self.done.values() if r["task"] == task]
    return all(
        plan.expected(c).reported(r for r in rows if r["variant"] == label)
        for label, c in plan.variants(self.config, task).items())

  def _settle_variant(self, task: str, variant: str, config) -> bool:
    """Runs a variant's unclaimed runs. Returns True when all are settled."""
    protocol = config.protocol
    if protocol == "select":
      config, protocol = self.select(task, variant, config), "final"
    if config is None:
      return False
    return all([self.settle(self.make_run(task, variant, config, protocol, s))
                for s in config.seeds])

  def select(self, task: str, variant: str, config):
    """Returns the configuration with the setting that is best on val.

    None while other processes run some settings; a configuration without
    seeds if all settings have failed.
    """
    if config.settings_of:
      config = self._take_settings(task, config)
      if config is None or not config.seeds or plan.takes_all(config):
        return config
    by_run: dict[str, ml_collections.ConfigDict] = {}
    settings = plan.settings(config)
    while settings:
      for setting in settings:
        tried = config.copy_and_resolve_references()
        tried.update(setting)
        run = self.make_run(task, variant, tried, "val", config.seeds[0])
        by_run[run.name] = tried
        self.settle(run)
      if not by_run.keys() <= self.done.keys() | self.failed.keys():
        return None
      rows = [self.done[name] for name in by_run if name in self.done]
      if not rows:
        return ml_collections.ConfigDict({"seeds": ()})
      chosen = best(rows)[0]
      settings = plan.further_settings(
          config, by_run.values(), chosen)
    return by_run[chosen["run"]]

  def _take_settings(self, task: str, config):
    """Returns a variant's configuration with what `settings_of` has chosen.

    None and without seeds as `select`.
    """
    found = plan.variants(self.config, task)
    source = config.settings_of
    chosen = self.select(task, source, found[source])
    if chosen is None:
      return None
    config = config.copy_and_resolve_references()
    if not chosen.seeds:
      config.seeds = ()
    else:
      config.update({key: chosen[key] for key in plan.searched(found, source)
                     if not config.grid[key]})
    return config

  # --- A run ------------------------------------------------------------------

  def make_run(self, task: str, variant: str, config, protocol: str,
               seed: int) -> plan.Run:
    """Returns a run, its configuration and its method's options resolved."""
    base = self.inputs.base(config)
    config = inputs.resolved(config, base)
    method = inputs.load_method(config, base)
    config = inputs.settled(config, method)
    data = job.data_digest(self.inputs.task(task, config), protocol, method)
    run = plan.Run(task, variant, config, method, protocol, seed, data,
                   base.identity)
    return self._planned.setdefault(run.name, run)

  def rows(self) -> list[Row]:
    """Returns the rows that are done, but none of other images of a task.

    Of an experiment, only its own: others may share the work directory.
    """
    if self.config.experiment:
      return [self.done[run] for run in self._planned if run in self.done]
    digests: dict[str, set[str]] = {}
    for run in self._planned.values():
      digests.setdefault(run.task, set()).add(run.data)
    return [row for row in self.done.values()
            if row["data_digest"] in digests.get(
                row["task"], {row["data_digest"]})]

  def settle(self, run: plan.Run) -> bool:
    """Does a run that no process has done or does.

    Returns:
      True when the run is done or has failed; False while another process
      does it.
    """
    self._stop_together()
    to_measure = self._to_measure(run)
    if run.name in self.failed or run.name in self.done and not to_measure:
      return True
    try:
      with self.workdir.claim(run.name) as claim:
        # The process that held the claim before may have done it.
        row = self.workdir.row(run.name)
        if row is None or to_measure and not self.workdir.has_bundle(run.name):
          row = self._do(run, claim)
          self.say(_line(row))
        self.done[run.name] = row
        for name in self._to_measure(run):
          try:
            self._measure(run, name)
          except RunError as error:  # of the measure; the run itself is done
            self.failed[_measured(run, name)] = str(error)
    except Busy:
      return False
    except (RunError, DataError) as error:
      if parallel.spans_hosts() and isinstance(error, DataError):
        raise  # the other hosts, which read other images, do not know
      self.failed[run.name] = str(error)
      self.workdir.write_failure(run.name, run.task, run.variant, str(error))
    return True

  def _to_measure(self, run: plan.Run) -> list[str]:
    """Names of the measures that a run still lacks."""
    return [name for name in run.config.measures if run.protocol == "final"
            and run.seed in measures.seeds(name, run.config.seeds)
            and _measured(run, name) not in self.failed
            and self.workdir.measure(run.name, name) is None]

  def _measure(self, run: plan.Run, name: str) -> None:
    interrupt.check()
    with self.workdir.bundle_here(run.name) as bundle:
      value = measures.take(
          name, bundle, self.inputs.base(run.config),
          self.inputs.task(run.task, run.config), run.config.limit, run.seed)
    self.workdir.write_measure(run.name, name, value)

  def _do(self, run: plan.Run, claim: Claim) -> Row:
    interrupt.check()
    task = self.inputs.task(run.task, run.config)
    base = self.inputs.base(run.config)

    def write_curve(records):
      if not claim.lost():  # else the curve is another process's
        self.workdir.write_curve(run.name, records)

    with Progress(run.name, write_curve,
                  seconds=self.workdir.curve_seconds) as bar:
      todo = job.make_job(run, base, task, bar.update,
                          self.inputs.training(run.task, run.config))
      bar.expect(len(todo.method.stages) * todo.config.epochs)
      self.workdir.write_stages(run.name, train.stage_keys(todo))
      outcome = train.run(todo, base.params, self.stages)
    row, bundle = finish(run, todo, base, task, outcome)
    claim.check()
    row["bundle_bytes"] = bundles.put(
        self.workdir.store, self.workdir.bundle_name(run.name), bundle)
    return self.workdir.write_row(row)


def _measured(run, name):
  """How a measure of a run is called in `Session.failed`."""
  return f"{run.name}, {name}"


def _kept_keys(config, base):
  """JSON of the values that no later start on a work directory may change."""
  free = (*_FREE, *(_FREE_OF_EXPERIMENTS if config.experiment else ()))
  keep = {k: v for k, v in _json(config).items() if k not in free}
  keep["weights_sha256"] = base.source.sha256
  keep["weights_part"] = base.source.part
  keep["weights_config"] = base.stated
  if config.protocol == "select":  # on whose rows settings are chosen
    keep["select_seed"] = config.seeds[0]
  return keep


def _json(config):
  return json.loads(config.to_json_best_effort())


def _line(row: Row) -> str:
  accuracy = (f"test {row['test_top1']:.1f} %" if row["val_top1"] is None
              else f"val {row['val_top1']:.1f} %")
  key = "l2" if row.get("l2") else "lr"  # rows of earlier versions lack it
  return printable(
      f"{row['task']}  {row['variant']}  seed {row['seed']}  "
      f"{key} {row[key]:g}  {accuracy}  {row['seconds_train']:.0f} s")
