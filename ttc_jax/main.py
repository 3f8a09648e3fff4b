"""The command line: for task, for variant, for seed: one run, one row.

  python -m ttc_jax.main --config=configs/demo.py
  python -m ttc_jax.main --workdir=DIR --config=configs/vtab.py:\
task=caltech101,method=ttc,backbone=vit_b16,data=DIR,weights=FILE
"""
import fcntl
import json
import os
import sys

from absl import flags
from ml_collections import config_flags

from ttc_jax import checkpoint, cli, files, jobs, report, train
from ttc_jax.errors import RunError, UserError
from ttc_jax.progress import Progress

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configuration, FILE[:key=value,...]", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "where results go; default: a folder of checkpoints/runs "
    "named after the configuration")

# Keys that may change between two starts on one work directory.
_FREE = ("tasks", "seeds", "data", "weights", "cache", "cache_gib",
         "save_seconds", "plots")


def open_workdir(config, weights_sha256: str, path: str) -> int:
  """Creates a work directory, or checks that it is of this configuration.

  Returns:
    The descriptor of the lock: until it is closed, or the process ends, no
    other process may work there.
  """
  keep = {k: v for k, v in json.loads(config.to_json_best_effort()).items()
          if k not in _FREE}
  keep["weights_sha256"] = weights_sha256
  file = os.path.join(path, "config.json")
  try:
    os.makedirs(os.path.join(path, "runs"), exist_ok=True)
    lock = _lock(os.path.join(path, ".lock"))
    if not os.path.exists(file):
      files.write_text(file, json.dumps(keep, indent=2, sort_keys=True) + "\n")
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
  return lock


def _lock(path: str) -> int:
  descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(descriptor)
    raise UserError(f"another process is at work in '{os.path.dirname(path)}'; "
                    "wait for it, or choose another --workdir") from None
  return descriptor


class Session:
  """A work directory with what all its runs share."""

  def __init__(self, config, workdir: str):
    self.config, self.workdir = config, workdir
    jobs.check_config(config)
    self.tasks = jobs.load_tasks(config)
    self.base = jobs.load_base(config)
    jobs.check_runs(config, self.base, self.tasks)
    self._lock = open_workdir(config, self.base.sha256, workdir)
    self.results = os.path.join(workdir, "results.jsonl")
    self.done = {row["run"]: row for row in report.read(self.results)}
    self.failed = []

  def close(self) -> None:
    """Lets another process work in the directory."""
    os.close(self._lock)

  def row(self, run: jobs.Run) -> dict | None:
    """The row of a run: from the results if it is there, else by running."""
    if run.name in self.done:
      return self.done[run.name]
    directory = os.path.join(self.workdir, "runs", run.name)
    os.makedirs(directory, exist_ok=True)
    task = self.tasks[run.task]
    with Progress(run.name, os.path.join(directory, "metrics.jsonl")) as bar:
      job = jobs.make_job(run, self.base, task, bar.update)
      bar.expect(len(job.method.stages) * job.epochs)
      try:
        outcome = train.run(job, self.base.params,
                            os.path.join(self.workdir, "stages"))
      except RunError as error:
        self.failed.append(f"{run.name}: {error}")
        return None
      row = jobs.finish(run, job, self.base, task, outcome, directory)
    report.append(self.results, row)
    self.done[run.name] = row
    print(_line(row), flush=True)
    return row

  def run_all(self) -> None:
    for task in self.tasks:
      for variant, config in jobs.variants(self.config, task).items():
        protocol = config.protocol
        if protocol == "select":
          config, protocol = self.select(task, variant, config), "final"
        for seed in config.seeds if config else ():
          self.row(self.make_run(task, variant, config, protocol, seed))

  def make_run(self, task, variant, config, protocol, seed) -> jobs.Run:
    return jobs.Run(task, variant, config, protocol, seed,
                    self.tasks[task].digest)

  def select(self, task: str, variant: str, config):
    """The configuration with the setting that is best on val200."""
    rows, by_run = [], {}
    for setting in jobs.settings(config):
      tried = config.copy_and_resolve_references()
      tried.update(setting)
      run = self.make_run(task, variant, tried, "val", config.seeds[0])
      row = self.row(run)
      if row:
        rows.append(row)
        by_run[run.name] = tried
    return by_run[report.best(rows)[0]["run"]] if rows else None


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
  session = Session(config, workdir)
  session.run_all()
  session.close()
  rows = list(session.done.values())
  if rows:
    text = report.summary(rows)
    if config.plots:
      for file in plots.write(rows, workdir) or ["none: no final run yet"]:
        print(f"plot: {file}")
    files.write_text(os.path.join(workdir, "results.md"), text)
    print(f"\n{text}\nRows, bundles and curves: {workdir}")
  for failure in session.failed:
    print(f"failed: {failure}", file=sys.stderr)
  return 1 if session.failed else 0


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  cli.run(main)
