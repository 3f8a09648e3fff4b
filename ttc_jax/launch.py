"""A session from its configuration to its printed tables: what `main` runs."""
from collections.abc import Iterable
import functools
import json
import os
import sys
from typing import Any

from ttc_jax import (
  checkpoint,
  compilation,
  hosts,
  interrupt,
  parallel,
  report,
  tasks,
  weights,
)
from ttc_jax.errors import Stopped, UserError, printable
from ttc_jax.report import grid
from ttc_jax.runs.session import Session
from ttc_jax.tasks import summary

_IN_DETAIL = 3  # tasks that are described in several lines each


def default_workdir(config, config_file: str) -> str:
  """Returns a folder of checkpoints/runs named after the configuration.

  Experiments that differ in their variants alone have the same one.
  """
  stem = os.path.splitext(os.path.basename(config_file))[0]
  named = json.loads(config.to_json_best_effort())
  if config.experiment:
    for key in ("experiment", "variants", "measures"):
      named.pop(key)
  key = checkpoint.digest(named)[:8]
  return os.path.join("checkpoints", "runs", f"{stem}-{key}")


def run(config: Any, config_file: str, workdir: str | None,
        address: tuple[str | None, int | None, int | None]) -> int:
  """Runs a session and prints its tables; 1 if a task or run is missing.

  Args:
    config: the ConfigDict, locked.
    config_file: where it is from; names the default work directory.
    workdir: where results go; None: `default_workdir`.
    address: fields of `hosts.Address`.
  """
  hosts.join(config.hosts, hosts.Address(*address))
  try:
    code = _run(config, config_file, workdir)
  except Stopped:  # all hosts did
    hosts.leave()
    raise
  except Exception as error:
    explained = hosts.failed(error)
    if parallel.spans_hosts():
      hosts.abandon(2 if isinstance(explained or error, UserError) else 1)
    if explained is None:
      raise
    raise explained from error
  hosts.leave()
  return code


def _run(config, config_file, workdir):
  if config.plots:
    from ttc_jax import plots  # noqa: F401  an extra; missed before long work
  workdir = workdir or default_workdir(config, config_file)
  interrupt.listen()
  session = Session(config, workdir, functools.partial(print, flush=True))
  if session.base.normalisation and not config.normalisation:
    print(printable(f"normalisation: {session.base.normalisation}, as the "
                    f"weights {session.base.source.name} say"))
  if note := _other_size(session):
    print(printable(note))
  for task, why in session.missing.items():
    print(printable(f"skipped: {task}: {why}"), file=sys.stderr)
  for line in describe(session.tasks.values()):
    print(line)
  session.run_all()
  if config.experiment:
    _conclude_experiment(session)
  else:
    _conclude(session)
  print(compilation.count())
  for name, why in [*session.missing.items(), *session.failed.items()]:
    print(printable(f"failed: {name}: {why}"), file=sys.stderr)
  return 1 if session.missing or session.failed else 0


def _other_size(session: Session) -> str:
  """A sentence where the weights are of another image size; else ""."""
  path, size = session.base.source.path, session.config.image_size
  native = path and weights.native_size(weights.read(path))
  if not native or native == size:
    return ""
  return (f"image_size: {size} px; {session.base.source.name} was trained at "
          f"{native} px, so its positions are resampled")


def describe(loaded: Iterable[tasks.Task]) -> list[str]:
  """Returns what each task holds: in one line each, where they are many."""
  loaded = list(loaded)
  if len(loaded) > _IN_DETAIL:
    return [summary.line(task) for task in loaded]
  return [line for task in loaded for line in summary.lines(task)]


def _conclude_experiment(session: Session) -> None:
  """Writes the tables and pictures of an experiment, prints the tables."""
  from ttc_jax import experiments
  name, config = session.config.experiment, session.config
  tasks = [*session.tasks, *session.missing]
  shown = experiments.show(name, experiments.Results(
      experiments.title(name), session.rows(), tasks, session.workdir,
      [f for f in experiments.failures(session.workdir)
       if f.task in tasks and f.variant in config.variants],
      (config, session.base)))
  for one in shown:
    if isinstance(one, experiments.Grid):
      print(f"\n{grid.text(one)}", end="")
  print()
  for path in experiments.write(name, shown, session.workdir):
    print(f"written: {printable(path)}")


def _conclude(session: Session) -> None:
  """Writes and prints the tables."""
  workdir, rows = session.workdir, session.rows()
  if rows:
    text = report.summary(rows, [*session.tasks, *session.missing])
    if session.config.plots:
      from ttc_jax import plots
      for file in plots.write(rows, workdir) or ["none: no final run yet"]:
        print(f"plot: {file}")
    workdir.write_table(text)
    print(f"\n{text}\nRows, bundles and curves: {printable(str(workdir))}")
