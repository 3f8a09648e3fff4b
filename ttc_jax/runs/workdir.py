"""A work directory: the names in it, and how its files are read and written.

  config.json                 the configuration that the directory belongs to
  plan.json                   the runs to expect; of experiments that share
                              the directory, plan-EXPERIMENT.json each
  runs/RUN/row.json           the row of a finished run, written whole
  runs/RUN/failure.json       why the last attempt failed
  runs/RUN/metrics.jsonl      learning curve
  runs/RUN/stages.json        the stages that the run trains through
  runs/RUN/bundle             the tuned leaves
  runs/RUN/measures/NAME.json a measure of the trained model
  stages/STAGE                states of a stage, see `checkpoint.StageStore`
  results.jsonl               all rows, derived from the files row.json
  results.md                  the table
  paper/EXPERIMENT            tables and pictures of an experiment

No other module spells these names. Any number of processes may read and write
a directory at the same time: a run is claimed by a lock, every file is
replaced as a whole, and a file that is damaged costs what it holds, with a
warning.
"""
from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import json
import os
import re
import shutil
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from ttc_jax import files
from ttc_jax.errors import Busy, UserError, printable

Row = dict[str, Any]


class Expected(NamedTuple):
  """The runs that a plan expects of one task and variant.

  Attributes:
    settings: number of settings that `protocol="select"` tries on val.
    protocol: "val", "final" or "select".
    epochs: per stage.
  """
  settings: int
  seeds: Sequence[int]
  protocol: str
  epochs: int

  @property
  def runs(self) -> int:
    """Number of runs."""
    tried = self.settings if self.protocol == "select" else 0
    return len(self.seeds) + tried

  def includes(self, row: Row) -> bool:
    """Tells whether a row is one of these runs.

    Rows of seeds that an earlier start asked for are not.
    """
    if row["protocol"] == "val" and self.protocol == "select":
      return row["seed"] == self.seeds[0]
    return row["seed"] in self.seeds

  def reported(self, rows: Iterable[Row]) -> bool:
    """Tells whether every seed has its reported row, tried settings apart."""
    reported = "val" if self.protocol == "val" else "final"
    seeds = {r["seed"] for r in rows if r["protocol"] == reported}
    return set(self.seeds) <= seeds


_LONGEST = 60  # letters of a name within a folder's name: 255 bytes in all


def stem(task: str, variant: str) -> str:
  """Returns how the names of a task's and variant's runs begin.

  Letters that a folder's name should not have become "-", and long names are
  cut: the hash at the end of a run's name tells runs apart.
  """
  return "-".join(re.sub(r"[^\w.]+", "-", name)[:_LONGEST]
                  for name in (task, variant))


class WorkDir:
  """Reads and writes one work directory.

  Example:
    rows = WorkDir("runs/caltech").rows()
  """

  def __init__(self, path: str | os.PathLike):
    self.path = epath.Path(path).expanduser()

  def __str__(self) -> str:
    return os.fspath(self.path)

  # --- Names ------------------------------------------------------------------

  def folder(self, run: str) -> epath.Path:
    """Folder of a run."""
    return self.path / "runs" / run

  def bundle(self, run: str) -> str:
    """Path of a run's bundle."""
    return os.fspath(self.folder(run) / "bundle")

  @property
  def stages(self) -> str:
    """Folder of the stages' states."""
    return os.fspath(self.path / "stages")

  @property
  def results(self) -> str:
    """Path of the derived file of all rows."""
    return os.fspath(self.path / "results.jsonl")

  # --- The directory ----------------------------------------------------------

  def exists(self) -> bool:
    """Tells whether the directory is there."""
    return self.path.is_dir()

  def adopt(self, config: Mapping[str, Any],
            usual: Mapping[str, Any]) -> None:
    """Creates the directory for a configuration, or checks that it is of it.

    Args:
      config: JSON of all keys that no later start may change.
      usual: the default of a key that one side lacks: the directory may be of
        another version, or of an experiment.

    Raises:
      UserError: the directory cannot be used, or is of another configuration.
    """
    file = self.path / "config.json"
    files.utf8(str(self))
    try:
      (self.path / "runs").mkdir(parents=True, exist_ok=True)
      with files.lock(self._path(".config.lock"), wait=True):
        if not file.exists():
          self._write(file, dict(sorted(config.items())))
      old = json.loads(file.read_text())
    except (OSError, ValueError) as e:
      raise UserError(f"work directory '{self}' cannot be used: {e}") from e
    for key in sorted(config.keys() | old.keys()):
      there, here = (_whole(x.get(key), usual.get(key)) for x in (old, config))
      if there != here:
        raise UserError(
            f"work directory '{self}' is of another configuration: {key} is "
            f"{there!r} there and {here!r} here; choose another --workdir")

  def write_plan(self, tasks: Mapping[str, Mapping[str, Expected]],
                 missing: Mapping[str, str], experiment: str = "") -> None:
    """Writes the plan.

    Args:
      tasks: {task: {variant: Expected}}.
      missing: {task: why its data cannot be read}.
      experiment: whose plan it is; others keep theirs.
    """
    name = f"plan-{experiment}.json" if experiment else "plan.json"
    self._write(self.path / name, {
        "tasks": {task: {label: expected._asdict()
                         for label, expected in variants.items()}
                  for task, variants in tasks.items()},
        "missing": dict(missing)})

  def plan(self) -> dict[str, Any]:
    """Reads {"tasks": {task: {variant: fields of Expected}}, "missing": {}}.

    Both are empty where there is no plan; plans of experiments are joined.
    """
    tasks: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for path in sorted(self.path.glob("plan*.json")):
      plan = _read(path) or {}
      for task, variants in plan.get("tasks", {}).items():
        tasks.setdefault(task, {}).update(variants)
      missing |= plan.get("missing", {})
    return {"tasks": tasks, "missing": missing}

  def experiments(self) -> dict[str, dict[str, list[str]]]:
    """Reads {experiment: {task: names of its variants}} of the plans."""
    found = {}
    for path in sorted(self.path.glob("plan-*.json")):
      tasks = (_read(path) or {}).get("tasks", {})
      found[path.stem.removeprefix("plan-")] = {
          task: [*variants] for task, variants in tasks.items()}
    return found

  def expected(self) -> dict[tuple[str, str], Expected]:
    """Reads {(task, variant): Expected} of the plan, in its order."""
    return {(task, label): Expected(**fields)
            for task, variants in self.plan()["tasks"].items()
            for label, fields in variants.items()}

  def write_table(self, text: str) -> None:
    """Writes the table, Markdown."""
    files.write_text(self._path("results.md"), text)

  # --- Runs -------------------------------------------------------------------

  @contextlib.contextmanager
  def claim(self, run: str) -> Iterator[None]:
    """Holds a run for this process.

    Raises:
      Busy: another process holds it.
    """
    with files.lock(os.fspath(self.folder(run) / ".lock")):
      yield

  def running(self) -> list[str]:
    """Names of the unfinished runs that some process holds, sorted."""
    return [run for run in self._runs()
            if files.is_locked(os.fspath(self.folder(run) / ".lock"))
            and not (self.folder(run) / "row.json").exists()]

  def row(self, run: str) -> Row | None:
    """Reads the row of a run; None where it is not finished or damaged."""
    row = _read(self.folder(run) / "row.json")
    if row is None or row.get("run") == run:
      return row
    logging.warning("%s is not the row of its run, which will be done again",
                    printable(os.fspath(self.folder(run) / "row.json")))
    return None

  def rows(self) -> list[Row]:
    """Reads the rows of all finished runs, the earliest first."""
    found = filter(None, map(self.row, self._runs()))
    return sorted(found, key=lambda row: (row.get("finished", ""), row["run"]))

  def write_row(self, row: Row) -> None:
    """Writes the row of a run, then results.jsonl anew."""
    folder = self.folder(row["run"])
    folder.mkdir(parents=True, exist_ok=True)
    self._write(folder / "row.json", row)
    (folder / "failure.json").unlink(missing_ok=True)
    # The last process to hold the lock sees the rows of all before it.
    with files.lock(self._path(".results.lock"), wait=True):
      files.write_text(self.results, to_lines(self.rows()))

  def failures(self) -> list[dict[str, Any]]:
    """Reads {"run", "task", "variant", "error"} of the runs that failed."""
    return [failure for run in self._runs()
            if (failure := _read(self.folder(run) / "failure.json"))
            and failure.get("run") == run]

  def write_failure(self, run: str, task: str, variant: str,
                    error: str) -> None:
    """Notes why a run failed."""
    folder = self.folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    self._write(folder / "failure.json", {
        "run": run, "task": task, "variant": variant, "error": error})

  def curve(self, run: str) -> list[dict[str, Any]]:
    """Reads a run's learning curve: a record for each epoch, perhaps none."""
    file = self.folder(run) / "metrics.jsonl"
    return from_lines(os.fspath(file)) if file.exists() else []

  def write_curve(self, run: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes a run's learning curve as a whole."""
    self.folder(run).mkdir(parents=True, exist_ok=True)
    files.write_text(os.fspath(self.folder(run) / "metrics.jsonl"),
                     to_lines(records))

  def experiment(self, name: str) -> str:
    """Folder of an experiment's tables and pictures."""
    return os.fspath(self.path / "paper" / name)

  def has_bundle(self, run: str) -> bool:
    """Tells whether a run's bundle is there."""
    return os.path.exists(self.bundle(run))

  def measure(self, run: str, name: str) -> dict[str, Any] | None:
    """Reads a measure of a run; None where it is missing or damaged."""
    return _read(self.folder(run) / "measures" / f"{name}.json")

  def measures(self, run: str) -> dict[str, dict[str, Any]]:
    """Reads {name: measure} of a run."""
    paths = sorted((self.folder(run) / "measures").glob("*.json"))
    return {path.stem: found for path in paths
            if (found := _read(path)) is not None}

  def write_measure(self, run: str, name: str,
                    value: Mapping[str, Any]) -> None:
    """Writes a measure of a run."""
    folder = self.folder(run) / "measures"
    folder.mkdir(parents=True, exist_ok=True)
    self._write(folder / f"{name}.json", value)

  # --- Stages -----------------------------------------------------------------

  def write_stages(self, run: str, stages: Sequence[str]) -> None:
    """Notes the stages that a run trains through."""
    self.folder(run).mkdir(parents=True, exist_ok=True)
    self._write(self.folder(run) / "stages.json", {"stages": list(stages)})

  def delete_stages(self, runs: Iterable[str]) -> None:
    """Deletes the stages of finished runs that no unfinished run needs.

    A stage that another process holds stays.
    """
    finished, needed = set(runs), set()
    for run in set(self._runs()) - finished:
      if self.row(run) is None:
        needed |= self._stages_of(run)
    for stage in set().union(*map(self._stages_of, finished)) - needed:
      with contextlib.suppress(Busy), files.lock(
          os.path.join(self.stages, ".locks", stage)):
        for path in epath.Path(self.stages).glob(f"{stage}*"):
          if path.is_dir():
            shutil.rmtree(path)
          else:
            path.unlink()

  def _stages_of(self, run: str) -> set[str]:
    noted = _read(self.folder(run) / "stages.json") or {}
    return set(noted.get("stages", ()))

  # --- Pieces -----------------------------------------------------------------

  def _path(self, name: str) -> str:
    return os.fspath(self.path / name)

  def _runs(self) -> list[str]:
    folder = self.path / "runs"
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []

  @staticmethod
  def _write(path: epath.Path, value: Any) -> None:
    files.write_text(os.fspath(path), json.dumps(value, indent=2) + "\n")


def _whole(value, usual):
  """A value, or its default; a section that lacks keys has their defaults."""
  if isinstance(value, dict) and isinstance(usual, dict):
    return {**usual, **value}
  return usual if value is None else value


def _read(path: epath.Path) -> dict[str, Any] | None:
  """The object of a JSON file; None where it is missing or damaged."""
  try:
    value = json.loads(path.read_bytes().decode())
    if isinstance(value, dict):
      return value
    raise ValueError("no JSON object")
  except (FileNotFoundError, NotADirectoryError):
    return None
  except ValueError as error:  # JSON's and Unicode's errors too
    logging.warning("%s is damaged and left out (%s)",
                    printable(os.fspath(path)), error)
    return None


def to_lines(objects: Iterable[Mapping[str, Any]]) -> str:
  """JSON lines, one object a line."""
  return "".join(json.dumps(x) + "\n" for x in objects)


def from_lines(path: str) -> list[dict[str, Any]]:
  """Reads the objects of a JSON-lines file.

  A damaged line is left out with a warning; a last line without an end, which
  may just be being written, without one.
  """
  found = []
  with open(path, "rb") as file:
    for number, line in enumerate(file, 1):
      try:
        found.append(dict(json.loads(line.decode())))
      except (ValueError, TypeError):
        if line.endswith(b"\n"):
          logging.warning("%s:%d is damaged and left out", printable(path),
                          number)
  return found
