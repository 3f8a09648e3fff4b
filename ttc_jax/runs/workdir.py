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

  claims/runs, claims/stages  who works on which, see `claims`

No other module spells these names. The directory may be a bucket's address,
gs://; there a bundle is one file, bundle.safetensors, and a state a zip. Any
number of processes may read and write it at the same time, without locks: a
run is claimed, a row is created once, every other file is replaced as a whole,
and one that is damaged costs what it holds, with a warning.
"""
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
import contextlib
import json
import os
import re
import tempfile
from typing import Any, NamedTuple

from absl import logging

from ttc_jax import files, stores
from ttc_jax.claims import LEASE_SECONDS, Claim, Claims
from ttc_jax.errors import UserError, printable
from ttc_jax.stores import Store

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


STAGES = "stages"  # folder of `checkpoint.Stages`
_LONGEST = 60  # letters of a name within a folder's name: 255 bytes in all


def stem(task: str, variant: str) -> str:
  """Returns how the names of a task's and variant's runs begin.

  Letters that a folder's name should not have become "-", and long names are
  cut: the hash at the end of a run's name tells runs apart.
  """
  return "-".join(re.sub(r"[^\w.]+", "-", name)[:_LONGEST]
                  for name in (task, variant))


def parts_of(run: str) -> tuple[str, str, int] | None:
  """Returns (stem, protocol, seed) of a run's name; None for another name."""
  name = re.fullmatch(r"(.+)-(val|final)-s(\d+)-[0-9a-f]+", run)
  return (name[1], name[2], int(name[3])) if name else None


class WorkDir:
  """Reads and writes one work directory.

  Args:
    path: a path, or gs://BUCKET/PATH.
    lease_seconds: after which another process takes over the run of a host
      that has gone silent.
    share: see `hosts.shared`.

  Raises:
    UserError: the place cannot be a work directory.

  Example:
    rows = WorkDir("runs/caltech").rows()
  """

  def __init__(self, path: str | os.PathLike[str],
               lease_seconds: float = LEASE_SECONDS,
               share: Callable[[Store], Store] = lambda store: store):
    self.store = share(stores.open_store(path))
    self.claims = Claims(self.store, lease_seconds)
    self._rows: dict[str, Row] = {}  # they never change

  def __str__(self) -> str:
    return self.store.address

  @property
  def name(self) -> str:
    """The last part of the path."""
    return self.store.address.rstrip("/").rpartition("/")[2]

  def bundle(self, run: str) -> str:
    """Address of a run's bundle."""
    return self.store.place(self.bundle_name(run))

  def bundle_name(self, run: str) -> str:
    """Name of a run's bundle in the store: a folder, in a bucket one file."""
    local = isinstance(self.store.direct, stores.Disk)
    return f"runs/{run}/bundle{'' if local else '.safetensors'}"

  @contextlib.contextmanager
  def bundle_here(self, run: str) -> Iterator[str]:
    """Gives the path of a run's bundle on this machine."""
    name = self.bundle_name(run)
    if not name.endswith(".safetensors"):
      with self.store.read_folder(name) as folder:
        yield folder
      return
    with tempfile.TemporaryDirectory() as scratch:
      path = os.path.join(scratch, "bundle.safetensors")
      with open(path, "wb") as file:
        file.write(self.store.read(name) or b"")
      yield path

  # --- The directory ----------------------------------------------------------

  def exists(self) -> bool:
    """Tells whether the directory is there."""
    return self.store.exists()

  @property
  def started(self) -> bool:
    """Whether a command has used the directory."""
    return self.exists() and self.store.read("config.json") is not None

  def adopt(self, config: Mapping[str, Any], usual: Mapping[str, Any],
            free: Collection[str] = ()) -> None:
    """Creates the directory for a configuration, or checks that it is of it.

    Args:
      config: JSON of all keys that no later start may change.
      usual: the default of a key that one side lacks: the directory may be of
        another version, or of an experiment.
      free: keys of an earlier version that may change by now.

    Raises:
      UserError: the directory cannot be used, or is of another configuration.
    """
    try:
      self.store.create("config.json", _json(dict(sorted(config.items()))))
      old = files.from_json(self.store.read("config.json") or b"")
    except (OSError, ValueError) as e:
      why = "it is a file" if os.path.isfile(f"{self}") else e
      raise UserError(f"work directory '{self}' cannot be used: {why}; give "
                      "another --workdir") from e
    for key in sorted((config.keys() | old.keys()) - {*free}):
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
    self.store.write(name, _json({
        "tasks": {task: {label: expected._asdict()
                         for label, expected in variants.items()}
                  for task, variants in tasks.items()},
        "missing": dict(missing)}))

  def plan(self) -> dict[str, Any]:
    """Reads {"tasks": {task: {variant: fields of Expected}}, "missing": {}}.

    Both are empty where there is no plan; plans of experiments are joined.
    """
    tasks: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for plan in self._plans().values():
      for task, variants in plan.get("tasks", {}).items():
        tasks.setdefault(task, {}).update(variants)
      missing |= plan.get("missing", {})
    return {"tasks": tasks, "missing": missing}

  def experiments(self) -> dict[str, dict[str, list[str]]]:
    """Reads {experiment: {task: names of its variants}} of the plans."""
    return {name: {task: [*variants]
                   for task, variants in plan.get("tasks", {}).items()}
            for name, plan in self._plans().items() if name}

  def expected(self) -> dict[tuple[str, str], Expected]:
    """Reads {(task, variant): Expected} of the plan, in its order."""
    return {(task, label): Expected(**fields)
            for task, variants in self.plan()["tasks"].items()
            for label, fields in variants.items()}

  def _plans(self) -> dict[str, dict[str, Any]]:
    """{experiment: its plan}; "" is the plan of none."""
    found = (re.fullmatch(r"plan(?:-(.+))?\.json", name)
             for name in self.store.names(""))
    plans = {match[1] or "": self._read(match[0]) or {}
             for match in found if match}
    for plan in plans.values():
      if not _is_plan(plan):
        logging.warning("a plan of %s is damaged and left out", self)
        plan.clear()
    return plans

  def write_table(self, text: str) -> None:
    """Writes the table, Markdown."""
    self.store.write("results.md", text.encode())

  @contextlib.contextmanager
  def output(self, folder: str = "") -> Iterator[str]:
    """Gives a folder of this machine; its files are put into `folder` at the
    end of the block."""
    with tempfile.TemporaryDirectory() as scratch:
      yield scratch
      for name in sorted(os.listdir(scratch)):
        with open(os.path.join(scratch, name), "rb") as file:
          self.store.write(f"{folder}/{name}".lstrip("/"), file.read())

  def experiment(self, name: str) -> str:
    """Folder of an experiment's tables and pictures, for `output`."""
    return f"paper/{name}"

  def table(self, name: str) -> dict[str, Any] | None:
    """Reads an experiment's first table; None where it is missing or
    damaged."""
    return self._read(f"{self.experiment(name)}/{name}.json")

  # --- Runs -------------------------------------------------------------------

  @contextlib.contextmanager
  def claim(self, run: str) -> Iterator[Claim]:
    """Holds a run for this process.

    Raises:
      Busy: another process holds it.
    """
    with self.claims.hold(f"runs/{run}") as claim:
      yield claim
    if run in self._rows:
      with contextlib.suppress(OSError, UserError):  # it is of no use
        self.claims.forget(f"runs/{run}")

  def running(self) -> list[str]:
    """Names of the unfinished runs that some process holds, sorted."""
    held = (name.partition("/")[2] for name in self.claims.held("runs"))
    return [run for run in held
            if self.store.read(f"runs/{run}/row.json") is None]

  def row(self, run: str) -> Row | None:
    """Reads the row of a run; None where it is not finished or damaged."""
    if run not in self._rows:
      row = self._read(f"runs/{run}/row.json")
      if row is not None and row.get("run") != run:
        logging.warning(
            "%s is not the row of its run, which will be done again",
            printable(self.store.place(f"runs/{run}/row.json")))
        row = None
      if row is None:
        return None
      self._rows[run] = row
    return dict(self._rows[run])

  def rows(self) -> list[Row]:
    """Reads the rows of all finished runs, the earliest first."""
    found = filter(None, map(self.row, self._runs()))
    return sorted(found, key=lambda row: (
        str(row.get("finished", "")), row["run"]))

  def write_row(self, row: Row) -> Row:
    """Writes the row of a run, then results.jsonl anew.

    Returns:
      The row that is there: another process may have been first.
    """
    run = row["run"]
    name, content = f"runs/{run}/row.json", _json(row)
    if not self.store.create(name, content) and self.row(run) is None:
      self.store.write(name, content)  # in place of a damaged one
    self.store.delete(f"runs/{run}/failure.json")
    self.write_results()
    return self.row(run) or row

  def write_results(self) -> None:
    """Writes results.jsonl, all rows, anew."""
    # Whoever writes last looks again after it, so no row stays out.
    written = None
    while (found := [r["run"] for r in self.rows()]) != written:
      self.store.write("results.jsonl", to_lines(self.rows()).encode())
      written = found

  def failures(self) -> list[dict[str, Any]]:
    """Reads {"run", "task", "variant", "error"} of the runs that failed."""
    return [failure for run in self._runs()
            if (failure := self._read(f"runs/{run}/failure.json"))
            and failure.get("run") == run]

  def write_failure(self, run: str, task: str, variant: str,
                    error: str) -> None:
    """Notes why a run failed."""
    self.store.write(f"runs/{run}/failure.json", _json({
        "run": run, "task": task, "variant": variant, "error": error}))

  @property
  def curve_seconds(self) -> float:
    """Least time between two writes of a curve: a bucket takes one a second."""
    return 0.0 if isinstance(self.store.direct, stores.Disk) else 10.0

  def curve(self, run: str) -> list[dict[str, Any]]:
    """Reads a run's learning curve: a record for each epoch, perhaps none."""
    name = f"runs/{run}/metrics.jsonl"
    return of_lines(self.store.read(name) or b"", self.store.place(name))

  def write_curve(self, run: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes a run's learning curve as a whole."""
    self.store.write(f"runs/{run}/metrics.jsonl", to_lines(records).encode())

  def has_bundle(self, run: str) -> bool:
    """Tells whether a run's bundle is there."""
    folder, _, name = self.bundle_name(run).rpartition("/")
    return name in self.store.names(folder)

  def measure(self, run: str, name: str) -> dict[str, Any] | None:
    """Reads a measure of a run; None where it is missing or damaged."""
    return self._read(f"runs/{run}/measures/{name}.json")

  def measures(self, run: str) -> dict[str, dict[str, Any]]:
    """Reads {name: measure} of a run."""
    files = self.store.names(f"runs/{run}/measures")
    return {file.removesuffix(".json"): found for file in files
            if (found := self._read(f"runs/{run}/measures/{file}")) is not None}

  def write_measure(self, run: str, name: str,
                    value: Mapping[str, Any]) -> None:
    """Writes a measure of a run."""
    self.store.write(f"runs/{run}/measures/{name}.json", _json(value))

  # --- Stages -----------------------------------------------------------------

  def write_stages(self, run: str, stages: Sequence[str]) -> None:
    """Notes the stages that a run trains through."""
    self.store.write(f"runs/{run}/stages.json", _json({"stages": [*stages]}))

  def spent_stages(self, runs: Iterable[str]) -> list[str]:
    """Returns the stages of finished runs that no unfinished run needs."""
    finished, needed = set(runs), set()
    for run in set(self._runs()) - finished:
      if self.row(run) is None:
        needed |= self._stages_of(run)
    spent = set().union(*map(self._stages_of, finished)) - needed
    return sorted(spent & {*self.store.names(STAGES)})

  def _stages_of(self, run: str) -> set[str]:
    noted = self._read(f"runs/{run}/stages.json") or {}
    return set(noted.get("stages", ()))

  # --- Pieces -----------------------------------------------------------------

  def _runs(self) -> list[str]:
    return self.store.names("runs")

  def _read(self, name: str) -> dict[str, Any] | None:
    """The object of a JSON file; None where it is missing or damaged."""
    content = self.store.read(name)
    if content is None:
      return None
    try:
      value = files.from_json(content)
      if isinstance(value, dict):
        return value
      raise ValueError("no JSON object")
    except ValueError as error:  # JSON's and Unicode's errors too
      logging.warning("%s is damaged and left out (%s)",
                      printable(self.store.place(name)), error)
      return None


def _is_plan(plan):
  tasks, missing = plan.get("tasks", {}), plan.get("missing", {})
  return isinstance(missing, dict) and isinstance(tasks, dict) and all(
      isinstance(variants, dict) and all(
          isinstance(fields, dict) and fields.keys() == set(Expected._fields)
          for fields in variants.values()) for variants in tasks.values())


def _json(value: Any) -> bytes:
  return (json.dumps(value, indent=2) + "\n").encode()


def _whole(value, usual):
  """A value, or its default; a section that lacks keys has their defaults."""
  if isinstance(value, dict) and isinstance(usual, dict):
    return {**usual, **value}
  return usual if value is None else value


def to_lines(objects: Iterable[Mapping[str, Any]]) -> str:
  """JSON lines, one object a line."""
  return "".join(json.dumps(x) + "\n" for x in objects)


def from_lines(path: str) -> list[dict[str, Any]]:
  """Reads the objects of a JSON-lines file, as `of_lines`."""
  with open(path, "rb") as file:
    return of_lines(file.read(), path)


def of_lines(content: bytes, path: str) -> list[dict[str, Any]]:
  """Returns the objects of JSON lines.

  A damaged line is left out with a warning that names `path`; a last line
  without an end, which may just be being written, without one.
  """
  found = []
  for number, line in enumerate(content.splitlines(keepends=True), 1):
    try:
      found.append(dict(files.from_json(line)))
    except (ValueError, TypeError):
      if line.endswith(b"\n"):
        logging.warning("%s:%d is damaged and left out", printable(path),
                        number)
  return found
