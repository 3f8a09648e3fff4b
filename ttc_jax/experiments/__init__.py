"""The paper's tables and figures: what is run, what is measured, what is shown.

Every other file here is an experiment: `experiments/NAME.py` has

  a docstring that begins "Table 3: which component brings what."
  VARIANTS        names of `VARIANTS` below, or {name: configuration values}
  MEASURES        {variant: names of measures}, if any
  TRAINS = False  if it is drawn without any run
  WEIGHTS         in `checkpoints/`, that it runs on by default; else the ViT's
  draw(results)   -> what is shown: `Grid`s and `Picture`s

`configs/paper.py:NAME` runs one; runs and stages are shared with others in the
same work directory, because a name stands for the same values everywhere.
"""
from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import copy
import importlib
import os
import pkgutil
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from ttc_jax import files, report
from ttc_jax.errors import UserError, check_known
from ttc_jax.report import formats, grid, tables
from ttc_jax.report import rows as rows_lib
from ttc_jax.report.grid import Grid
from ttc_jax.runs.inputs import Base
from ttc_jax.runs.workdir import Row, WorkDir, parts_of

BOTH = "both stages"  # as many epochs as TTC's two stages together
# Methods of one stage train for as long as both stages of TTC; `layernorm` is
# stage 1 alone and `layernorm_2x` the control of equal compute. Linear probing
# runs on cached features.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": dict(method="full", epochs=BOTH),
    "linear": dict(method="linear", epochs=100),
    "bias": dict(method="bias", epochs=BOTH),
    "adapter": dict(method="adapter", epochs=BOTH),
    "lora": dict(method="lora", epochs=BOTH),
    "vpt_shallow": dict(method="vpt_shallow", epochs=BOTH),
    "vpt_deep": dict(method="vpt_deep", epochs=BOTH),
    "ssf": dict(method="ssf", epochs=BOTH),
    "noah": dict(method="noah"),
    "sct": dict(method="sct", epochs=BOTH),
    "layernorm": dict(method="layernorm"),
    "layernorm_2x": dict(method="layernorm", epochs=BOTH),
    "ttc": dict(method="ttc"),
    "ttc_random": dict(method="ttc", score="random"),
    "ttc_l2": dict(method="ttc", score="l2"),
    "ttc_taylor_abs": dict(method="ttc", score="taylor_abs"),
    "ttc_taylor_square": dict(method="ttc", score="taylor_square"),
    "ttc_block": dict(method="ttc", score="block"),
    "ttc_one_rate": dict(method="ttc"),
    "ttc_map": dict(method="ttc", tune_norm=False),
    "ttc_on_linear": dict(method="ttc", stage1="linear", tune_norm=False),
    "ttc_joint": dict(method="ttc", stage1="none", epochs=BOTH),
    "ttc_rows": dict(method="ttc", tune="rows", position="mhsa"),
    "ttc_mhsa": dict(method="ttc", position="mhsa"),
    "ttc_both": dict(method="ttc", position="both"),
}
# Which settings a variant takes from another one's search; all others search
# the whole grid, full tuning one of its own. Stage 2 starts from the very
# stage 1 that `layernorm` has and tries a rate of its own. What differs from
# `ttc` in the choice of channels, or in their number or place, has the settings
# of `ttc`: one thing tells these runs apart.
_STAGE2 = dict(settings_of="layernorm", grid=dict(stage2_lr=(0.01, 0.1, 1.0)))
_ABLATION = dict(settings_of="ttc")
# To which a file adds what differs: with the rates of `ttc`, or with a search
# of its own for that of stage 2.
ABLATION = VARIANTS["ttc"] | _ABLATION
OWN_STAGE2 = VARIANTS["ttc"] | _STAGE2
SETTINGS: dict[str, dict[str, Any]] = {
    # All of them move, so the smallest rates of the others destroy the model.
    "full": dict(grid=dict(lr=(6e-5, 2e-4, 6.7e-4))),
    "layernorm_2x": dict(settings_of="layernorm"),
    "ttc": _STAGE2, "ttc_map": _STAGE2, "ttc_rows": _STAGE2,
    **{f"ttc_{name}": _ABLATION for name in (
        "random", "l2", "taylor_abs", "taylor_square", "block", "mhsa",
        "both")},
}


class Failure(NamedTuple):
  """A run of the test set that failed, or for seed None a whole search."""
  task: str
  variant: str
  seed: int | None


class Results(NamedTuple):
  """What an experiment is drawn from.

  Attributes:
    title: of the experiment.
    rows: the finished runs, of all protocols.
    tasks: names of the tasks, also of those without a run.
    workdir: where the measures are.
    failed: what `failures` returns, of the variants that are shown.
    session: `(config, base)` of the session, for what is drawn without runs.
  """
  title: str
  rows: Sequence[Row]
  tasks: Sequence[str]
  workdir: WorkDir
  failed: Sequence[Failure] = ()
  session: tuple[ml_collections.ConfigDict, Base] | None = None

  def final(self, variant: str, task: str | None = None) -> list[Row]:
    """Returns a variant's rows of the test set, of one task or all, by seed."""
    return sorted((r for r in self.rows if r["protocol"] == "final"
                   and r["variant"] == variant and task in (None, r["task"])),
                  key=lambda r: r["seed"])

  def measured(self, name: str, variant: str,
               task: str | None = None) -> list[dict[str, Any]]:
    """Returns a measure of the variant's runs, as its file describes it."""
    found = (self.workdir.measure(r["run"], name)
             for r in self.final(variant, task))
    return [x for x in found if x is not None]

  def by_seed(self, name: str, variant: str,
              task: str) -> dict[int, dict[str, Any]]:
    """Returns {seed: measure} of the variant's runs of a task."""
    found = {r["seed"]: self.workdir.measure(r["run"], name)
             for r in self.final(variant, task)}
    return {seed: x for seed, x in found.items() if x is not None}

  def common_seeds(self, name: str, variants: Iterable[str],
                   task: str) -> list[int]:
    """Returns the seeds that all variants with a measure of a task have."""
    found = [of for v in variants if (of := self.by_seed(name, v, task))]
    return sorted(set.intersection(*map(set, found))) if found else []

  @property
  def variants(self) -> list[str]:
    """Names of the variants with a run of the test set."""
    return [*dict.fromkeys(
        r["variant"] for r in self.rows if r["protocol"] == "final")]

  @property
  def setting(self) -> str:
    """Sentences on backbone, size, device, epochs, seeds and grid, and on what
    failed."""
    failed = f"Failed, so in no number: {lost(self.failed)}." * bool(
        self.failed)
    if not self.rows:
      return f"No finished run yet. {failed}".rstrip()

    def values(key, rows=self.rows):
      return _listed(r[key] for r in rows)
    tried = [r for r in self.rows if r["protocol"] == "val"]
    said = [f"learning rates tried on val: {values('lr', tried) or 'none'}"]
    for what, key in _FACTORS.items():
      by_variant: dict[str, set[float]] = {}
      for r in tried:
        by_variant.setdefault(r["variant"], set()).add(
            1.0 if r.get(key) is None else r[key])
      if found := [x for of in by_variant.values() if len(of) > 1 for x in of]:
        said.append(f"factors of {what}: {_listed(found)}")
    jax = _listed(r.get("versions", {}).get("jax", "?") for r in self.rows)
    files = {f"{r['weights']} (sha256 {r['weights_sha256'][:12]})"
             for r in self.rows}
    few = [f"only the first {n:,} images of each split" if key == "limit" else
           f"only {n} training images a class" for key in ("limit", "few_shot")
           for n in sorted({r[key] for r in self.rows if r.get(key)})]
    few += [f"trained with {x}" for x in sorted({*map(
        _augmentation, self.rows)} - {""})]
    return (f"{values('backbone')} at {values('image_size')} px, weights "
            f"{', '.join(sorted(files))}, {values('dtype')}, "
            f"{_listed(r.get('device', '?') for r in self.rows)}, JAX {jax}, "
            f"epochs of a stage {values('epochs')}, seeds {values('seed')}"
            f"{''.join(f'; {x}' for x in few)}; "
            f"{'; '.join(said)}. {failed}").rstrip()


def failures(workdir: WorkDir) -> list[Failure]:
  """Returns the failed runs of the test set that no later one made good, and
  the searches on val that found no setting, so that nothing was tested."""
  found: dict[tuple, Failure] = {}
  rows = workdir.rows()
  tested = {(r["task"], r["variant"], r["seed"]) for r in rows
            if r["protocol"] == "final"}
  settled = {(r["task"], r["variant"]) for r in rows}
  for given in workdir.failures():
    task, variant = given.get("task"), given.get("variant")
    parts = parts_of(given["run"])
    if not parts or not isinstance(task, str) or not isinstance(variant, str):
      continue
    _, protocol, seed = parts
    final = protocol == "final"
    one = Failure(task, variant, seed if final else None)
    if one not in tested and (final or one[:2] not in settled):
      found[one] = one
  return sorted(found.values(),
                key=lambda f: (f.variant, f.task, f.seed or 0))


def lost(failed: Sequence[Failure]) -> str:
  """Says what failed: "ttc on gtsrb (seed 0, 2), ssf on dtd (all settings)"."""
  seeds: dict[tuple, list[int | None]] = {}
  for f in failed:
    seeds.setdefault((f.variant, f.task), []).append(f.seed)
  return ", ".join(
      f"{variant} on {task} (" + (
          "all settings" if None in of else f"seed {', '.join(map(str, of))}")
      + ")" for (variant, task), of in seeds.items())


# Factors on the learning rate, and their keys in rows.
_FACTORS = {"stage 2": "stage2_lr", "the map": "adapter_lr"}


def _augmentation(row):
  """What a row states of it; "" for none, and where it states nothing."""
  said = ["flips"] if row.get("flip") else []
  if row.get("crop_from"):
    said.append(f"crops of images of {row['crop_from']} px")
  if row.get("smallest_crop", 1) < 1:
    said.append(f"crops of {row['smallest_crop']:g} of the area and more")
  return ", ".join(filter(None, [*said, rows_lib.augmentation(row)]))


def _listed(values):
  return ", ".join(f"{x:g}" if isinstance(x, float) else f"{x}"
                   for x in sorted(set(values)))


class Picture(NamedTuple):
  """A drawn figure and the numbers behind it.

  Attributes:
    figure: of matplotlib.
    numbers: the same as a table.
  """
  figure: Any
  numbers: Grid


def names() -> tuple[str, ...]:
  """Returns the names of all experiments, sorted."""
  return tuple(m.name for m in pkgutil.iter_modules(__path__)
               if not m.name.startswith("_"))


def load(name: str) -> Any:
  """Returns the module of an experiment; UserError for an unknown name."""
  check_known("experiment", name, names())
  return importlib.import_module(f"{__name__}.{name}")


def title(name: str) -> str:
  """Returns the first sentence of an experiment, without the full stop."""
  text = load(name).__doc__.split("\n\n")[0]
  return " ".join(text.split()).rstrip(".")


def trains(name: str) -> bool:
  """Tells whether an experiment is drawn from runs."""
  return getattr(load(name), "TRAINS", True)


def weights(name: str) -> str:
  """Returns the file of `checkpoints/` that is an experiment's default."""
  return getattr(load(name), "WEIGHTS", "vit_ti16_64.safetensors")


def variants(name: str, epochs: Any) -> dict[str, dict[str, Any]]:
  """Returns {variant: configuration values} of an experiment.

  The variants whose settings others take are among them.

  Args:
    epochs: of one stage; may be a reference of a configuration.
  """
  module = load(name)
  given = module.VARIANTS
  if not isinstance(given, Mapping):
    given = {label: VARIANTS[label] for label in given}
  found = settled(with_sources(
      {label: SETTINGS.get(label, {}) | values
       for label, values in given.items()}), epochs)
  for label, measures in getattr(module, "MEASURES", {}).items():
    found[label]["measures"] = tuple(measures)
  return found


def with_sources(given: Mapping[str, Mapping[str, Any]],
                 known: Mapping[str, Mapping[str, Any]] | None = None
                 ) -> dict[str, Mapping[str, Any]]:
  """Adds, in front, the variants whose settings others take.

  Args:
    given: as `VARIANTS`.
    known: where they are; `VARIANTS` with `SETTINGS` by default.
  """
  if known is None:
    known = {label: SETTINGS.get(label, {}) | values
             for label, values in VARIANTS.items()}
  lacking = {source: known[source] for values in given.values()
             if (source := values.get("settings_of")) and source not in given}
  return with_sources({**lacking, **given}, known) if lacking else dict(given)


def some(known: Mapping[str, Mapping[str, Any]],
         names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
  """Returns the variants with these names and those whose settings they take.

  Args:
    names: none for all.

  Raises:
    UserError: an unknown name.
  """
  return with_sources({name: known[check_known("method", name, known)]
                       for name in names or known}, known)


def settled(given: Mapping[str, Mapping[str, Any]],
            epochs: Any) -> dict[str, dict[str, Any]]:
  """Returns variants with the epochs of both stages as a number.

  Args:
    given: as `VARIANTS`.
    epochs: of one stage; may be a reference of a configuration.
  """
  # Copies: a configuration keeps what it is given, and one that several
  # variants have would be set for all of them at once.
  return {label: {**copy.deepcopy(dict(values)), **({"epochs": 2 * epochs}
                               if values.get("epochs") == BOTH else {})}
          for label, values in given.items()}


def show(name: str, results: Results) -> list[Grid | Picture]:
  """Returns what an experiment shows of its finished runs.

  Raises:
    UserError: a row or a measure has not the form that this program writes.
  """
  with reading(results.workdir, title(name)):
    return load(name).draw(results)


@contextlib.contextmanager
def reading(workdir: WorkDir | str, what: str) -> Iterator[None]:
  """Says what was read when a row or a measure turns out to be another's."""
  try:
    yield
  except (LookupError, TypeError, ValueError, AttributeError) as e:
    raise UserError(
        f"'{workdir}': '{what}' cannot be told: a row or a measure in runs/ "
        f"has not the form that this program writes ({type(e).__name__}: {e}); "
        "remove it and start the experiment again") from e


def write(name: str, shown: Sequence[Grid | Picture],
          workdir: WorkDir) -> list[str]:
  """Writes tables and pictures into the work directory; returns the paths.

  Tables as text, Markdown, LaTeX, CSV and JSON; pictures as PNG, SVG and CSV.
  """
  folder = workdir.experiment(name)
  with workdir.output(folder) as scratch:
    for i, one in enumerate(shown):
      stem = os.path.join(scratch, name + (f"-{i + 1}" if i else ""))
      table = one.numbers if isinstance(one, Picture) else one
      for suffix, writer in grid.WRITERS.items():
        if suffix == "csv" or isinstance(one, Grid):
          files.write_text(f"{stem}.{suffix}", writer(table))
      if isinstance(one, Picture):
        from ttc_jax import plots  # an extra
        plots.save(one.figure, stem)
    return [workdir.store.place(f"{folder}/{file}")
            for file in sorted(os.listdir(scratch))]


def read(name: str, workdir: WorkDir) -> list[Grid]:
  """Returns the table that `write` has put there; none if it has not."""
  found = grid.from_fields(workdir.table(name) or {})
  return [found] if found else []


# --- Cells and tables of accuracy ---------------------------------------------

def cell(values: Sequence[float]) -> str:
  """Formats the mean over seeds and its standard deviation."""
  if not values:
    return "-"
  return formats.number(tables.Score(float(np.mean(values)), tuple(values)))


def accuracy(results: Results,
             paper: Mapping[str, float | str] | None = None,
             labels: Mapping[str, str] | None = None,
             notes: Sequence[str] = ()) -> Grid:
  """Returns the table of test accuracy: a line per variant, a column per task.

  Args:
    paper: the paper's number for some variants, the mean of VTAB-1K's tasks
      unless a note says otherwise.
    labels: how some variants are called in the first column.
    notes: further sentences under the table.
  """
  shown = [r for r in results.rows if r["protocol"] == "final"]
  tasks = [*dict.fromkeys([*results.tasks, *(r["task"] for r in shown)])]
  lines = []
  for variant in results.variants:
    mine = results.final(variant)
    own = {r["task"] for r in mine}
    means = report.by_seed(shown, variant)
    tried = [sum(r["task"] == task for r in results.rows if (
        r["protocol"], r["variant"]) == ("val", variant))
             for task in own]
    lines.append([
        (labels or {}).get(variant, variant),
        *(cell([r["test_top1"] for r in results.final(variant, task)])
          for task in tasks),
        *([cell(means)] if len(tasks) > 1 else []),
        *([f"{paper[variant]}" if variant in paper else "-"] if paper else []),
        *formats.counts(mine)[:2],
        _from_to([len({r["seed"] for r in results.final(variant, task)})
                  for task in own]), _rates(mine),
        _from_to(tried) + (f"; an end on {edges}" if (
            edges := sum(_at_an_end(results, variant, task)
                         for task in tasks)) else "")])
  finished = len({r["task"] for r in shown})
  header = ["", *tasks, *([f"mean of {finished}"] if len(tasks) > 1 else []),
            *(["paper"] if paper else []), "module", "norm", "seeds", "lr",
            "tried"]
  under = ["Top-1 (%) on the test set at the last epoch; the learning rate was "
           "chosen on val, for this variant or the one whose settings it "
           "has. ±: standard deviation over seeds; a mean over tasks is of the "
           "seeds that all tasks have. Columns module, norm: tuned "
           "parameters; tried: how many settings the variant itself had on "
           "val, by task; \"an end on 1\": on one task the best was the "
           "smallest or the largest of them.", results.setting]
  if paper:
    under.append("paper: Zhao et al., 2023, ViT-B/16 of ImageNet-21K at 224 px "
                 "on VTAB-1K, as printed or derived from its text.")
  return Grid(results.title, header, lines, [*under, *notes])


def _at_an_end(results, variant, task):
  """Whether the chosen setting is at an end of those tried."""
  tried = [r for r in results.rows if (r["protocol"], r["variant"], r["task"])
           == ("val", variant, task)]
  for key in ("lr", *_FACTORS.values()):
    values = {r[key] for r in tried if r.get(key) is not None}
    chosen = {r.get(key) for r in results.final(variant, task)}
    if len(values) > 1 and chosen & {min(values), max(values)}:
      return True
  return False


def _rates(rows):
  """The learning rates that were chosen, and the factors on them."""
  said = _from_to([r["lr"] for r in rows])
  for what, key in _FACTORS.items():
    factors = [1 if r.get(key) is None else r[key] for r in rows]
    if set(factors) != {1}:
      said += f", {what} x {_from_to(factors)}"
  return said


def _from_to(values):
  return " to ".join(dict.fromkeys(
      f"{value:g}" for value in (min(values), max(values))))
