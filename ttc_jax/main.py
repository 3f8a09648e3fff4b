"""The command line: for task, for variant, for seed: one run, one row.

  python -m ttc_jax.main --config=configs/demo.py
  python -m ttc_jax.main --workdir=DIR --config=configs/vtab.py:\
task=caltech101,method=ttc,backbone=vit_b16,data=DIR,weights=FILE
"""
import contextlib
import itertools
import json
import os
import sys
import threading
import time

from absl import flags
import ml_collections

from ttc_jax import checkpoint, cli, compilation, files, interrupt
from ttc_jax import report, tasks, train
from ttc_jax.runs import plan as jobs
from ttc_jax.errors import Busy, DataError, RunError, Stopped, UserError
from ttc_jax.runs.progress import Progress

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "where results go; default: a folder of checkpoints/runs "
    "named after the configuration")

# Keys that may change between two starts on one work directory.
_FREE = ("tasks", "seeds", "data", "weights", "cache", "cache_gib",
         "save_seconds", "plots", "compilation_cache")
# Between looks at what other processes have done: each twice the last.
_POLL_SECONDS = (1.0, 30.0)


def open_workdir(config, weights_sha256: str, path: str) -> None:
  """Creates a work directory, or checks that it is of this configuration."""
  keep = {k: v for k, v in json.loads(config.to_json_best_effort()).items()
          if k not in _FREE}
  keep["weights_sha256"] = weights_sha256
  if config.protocol == "select":  # on whose rows settings are chosen
    keep["select_seed"] = config.seeds[0]
  file = os.path.join(path, "config.json")
  try:
    os.makedirs(os.path.join(path, "runs"), exist_ok=True)
    with files.lock(os.path.join(path, ".config.lock"), wait=True):
      if not os.path.exists(file):
        files.write_text(
            file, json.dumps(keep, indent=2, sort_keys=True) + "\n")
    with open(file, encoding="utf-8") as f:
      old = json.load(f)
  except (OSError, json.JSONDecodeError) as e:
    raise UserError(f"work directory '{path}' cannot be used: {e}") from e
  for key in sorted(keep.keys() | old.keys()):
    if keep.get(key) != old.get(key):
      raise UserError(
          f"work directory '{path}' is of another configuration: {key} is "
          f"{old.get(key)!r} there and {keep.get(key)!r} here; choose another "
          "--workdir")


class Session:
  """This process's part in the runs of a work directory.

  Any number of processes may share one: each takes runs that are neither done
  nor being done, and leaves when there are none.

  Attributes:
    missing: {task: why it is skipped}.
    done: {run: row}, also of other processes.
    failed: {run: why}, those that this process tried.
  """

  def __init__(self, config, workdir: str):
    self.config, self.workdir = config, workdir
    jobs.check_config(config)
    compilation.start(config.compilation_cache)
    self.tasks, self.missing = jobs.load_tasks(config)
    self.base = jobs.load_base(config)
    jobs.check_runs(config, self.base, self.tasks)
    open_workdir(config, self.base.sha256, workdir)
    self.results = os.path.join(workdir, "results.jsonl")
    self.done, self.failed, self._ahead = self._read(), {}, {}
    self._write_plan()

  def _write_plan(self) -> None:
    """For those who watch: which runs there will be."""
    def of_task(task):
      return {label: {"settings": len(jobs.settings(c)), "seeds": list(c.seeds),
                      "protocol": c.protocol, "epochs": c.epochs}
              for label, c in jobs.variants(self.config, task).items()}
    files.write_text(os.path.join(self.workdir, "plan.json"), json.dumps({
        "tasks": {task: of_task(task) for task in self.tasks},
        "missing": self.missing}, indent=2) + "\n")

  def _read(self):
    return {row["run"]: row for row in report.read(self.results)}

  def run_all(self) -> None:
    """Returns when all runs are done or have failed, by whomever."""
    pause, longest = _POLL_SECONDS
    while not all([self._do_task(*pair) for pair in itertools.zip_longest(
        self.tasks, list(self.tasks)[1:])]):
      until = time.monotonic() + pause
      while time.monotonic() < until:
        interrupt.check()
        time.sleep(min(1.0, pause))
      pause = min(2 * pause, longest)

  def _do_task(self, task: str, after: str | None) -> bool:
    """Does what is free of a task; whether that was all."""
    while task in self._ahead and self._ahead[task].is_alive():
      self._ahead[task].join(0.5)
      interrupt.check()
    self._decode_ahead(after)
    return all([self._do(task, variant, config)
                for variant, config in jobs.variants(
                    self.config, task).items()])

  def _decode_ahead(self, task: str | None) -> None:
    """Fills the cache with a task's images while the one before it trains.

    Built-in tasks are drawn in no time. An error waits for the run that needs
    the image.
    """
    if (task is None or task in self._ahead or not self.config.data
        or self._is_done(task)):
      return
    def decode():
      # RuntimeError: of its threads, when the process ends.
      with contextlib.suppress(UserError, Stopped, RuntimeError):
        for split in self.tasks[task].splits:
          self.tasks[task].split(split)
    self._ahead[task] = threading.Thread(target=decode, daemon=True)
    self._ahead[task].start()

  def _is_done(self, task: str) -> bool:
    """Whether every final run of a task has a row, or every run on val200."""
    rows = [r for r in self.done.values() if r["task"] == task
            and r["data_digest"] == self.tasks[task].digest]
    return all(
        {(label, seed) for seed in c.seeds} <= {
            (r["variant"], r["seed"]) for r in rows
            if (r["protocol"] == "val") == (c.protocol == "val")}
        for label, c in jobs.variants(self.config, task).items())

  def _do(self, task: str, variant: str, config) -> bool:
    """Does what is free of a task and a variant; whether that was all."""
    protocol = config.protocol
    if protocol == "select":
      config, protocol = self.select(task, variant, config), "final"
    if config is None:
      return False
    return all([self.settle(self.make_run(task, variant, config, protocol, s))
                for s in config.seeds])

  def select(self, task: str, variant: str, config):
    """The configuration with the setting that is best on val200.

    None while others are at some of them; without seeds if all have failed.
    """
    by_run = {}
    for setting in jobs.settings(config):
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
    return by_run[report.best(rows)[0]["run"]]

  def make_run(self, task, variant, config, protocol, seed) -> jobs.Run:
    return jobs.Run(task, variant, config, protocol, seed,
                    self.tasks[task].digest)

  def settle(self, run: jobs.Run) -> bool:
    """Does a run if nobody has or does; whether it is done or has failed."""
    if run.name in self.done or run.name in self.failed:
      return True
    directory = os.path.join(self.workdir, "runs", run.name)
    try:
      with files.lock(os.path.join(directory, ".lock")):
        # Whoever had the lock before may have done it.
        self.done |= self._read()
        if run.name not in self.done:
          row = self._row(run, directory)
          report.append(self.results, row)
          self.done[run.name] = row
          print(_line(row), flush=True)
    except Busy:
      return False
    except (RunError, DataError) as error:
      self._fail(run, str(error))
    return True

  def _row(self, run, directory):
    interrupt.check()
    task = self.tasks[run.task]
    with Progress(run.name, os.path.join(directory, "metrics.jsonl")) as bar:
      job = jobs.make_job(run, self.base, task, bar.update)
      bar.expect(len(job.method.stages) * job.epochs)
      outcome = train.run(job, self.base.params,
                          os.path.join(self.workdir, "stages"))
      return jobs.finish(run, job, self.base, task, outcome, directory)

  def _fail(self, run, error):
    self.failed[run.name] = error
    report.append(os.path.join(self.workdir, "failed.jsonl"), {
        "run": run.name, "task": run.task, "variant": run.variant,
        "error": error})


def _line(row) -> str:
  accuracy = (f"test {row['test_top1']:.1f} %" if row["val_top1"] is None
              else f"val {row['val_top1']:.1f} %")
  return (f"{row['task']}  {row['variant']}  seed {row['seed']}  "
          f"lr {row['lr']:g}  {accuracy}  {row['seconds_train']:.0f} s")


def default_workdir(config, config_file: str) -> str:
  stem = os.path.splitext(os.path.basename(config_file.split(":")[0]))[0]
  key = checkpoint.digest(json.loads(config.to_json_best_effort()))[:8]
  return os.path.join("checkpoints", "runs", f"{stem}-{key}")


def main(argv) -> int:
  if argv[1:]:
    raise UserError(f"unexpected argument {argv[1]!r}; after --config=FILE: "
                    "there must be no blanks")
  config = _CONFIG.value
  if config.plots:
    from ttc_jax import plots  # an extra; missed before the long work
  workdir = _WORKDIR.value or default_workdir(
      config, flags.FLAGS["config"].config_filename)
  interrupt.listen()
  session = Session(config, workdir)
  for task, why in session.missing.items():
    print(f"skipped: {task}: {why}", file=sys.stderr)
  try:
    session.run_all()
  except Stopped as stop:
    print(f"{stop}; start the same command again to go on", file=sys.stderr)
    return interrupt.exit_code()
  _conclude(session)
  for name, why in [*session.missing.items(), *session.failed.items()]:
    print(f"failed: {name}: {why}", file=sys.stderr)
  return 1 if session.missing or session.failed else 0


def _conclude(session) -> None:
  """Writes and prints the tables."""
  workdir, rows = session.workdir, list(session.done.values())
  if rows:
    text = report.summary(rows, [*session.tasks, *session.missing])
    if session.config.plots:
      from ttc_jax import plots
      for file in plots.write(rows, workdir) or ["none: no final run yet"]:
        print(f"plot: {file}")
    files.write_text(os.path.join(workdir, "results.md"), text)
    print(f"\n{text}\nRows, bundles and curves: {workdir}")
  print(compilation.count())


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  cli.run(main)
