"""What is to be run: tasks, variants, settings and seeds -> runs."""
from collections.abc import Iterable, Mapping
import itertools
from typing import Any, NamedTuple

import ml_collections

from ttc_jax import checkpoint, methods, normalisation, tasks
from ttc_jax.config import check, default
from ttc_jax.errors import UserError, check_known
from ttc_jax.runs.workdir import Expected, stem
from ttc_jax.vtab import rows as vtab

# Keys that choose which runs there are or where files lie; they change no
# run's result.
_PLACES = ("tasks", "data", "seeds", "variants", "per_task", "grid",
           "grid_steps", "settings_of", "weights", "cache", "cache_gib",
           "save_seconds", "lease_seconds", "hosts", "in_memory_gib", "workers",
           "protocol", "plots", "compilation_cache", "eval_every",
           "keep_stages", "method", "experiment", "measures")


# Of the grid, which goes on beyond an edge that is best.
RATES = ("lr", "stage2_lr", "adapter_lr")


class Run(NamedTuple):
  """A row to be: one task, one variant, one setting, one seed.

  Attributes:
    config: the variant's, with the setting.
    method: its method, options resolved.
    protocol: "val" or "final".
    data: digest of the images and labels.
    weights: `inputs.Base.identity` of the pretrained model.
  """
  task: str
  variant: str
  config: ml_collections.ConfigDict
  method: methods.Method
  protocol: str
  seed: int
  data: str
  weights: str

  @property
  def name(self) -> str:
    """Directory name of the run; the hash distinguishes settings."""
    return (f"{stem(self.task, self.variant)}-{self.protocol}-s{self.seed}-"
            f"{checkpoint.digest(self.identity)[:8]}")

  @property
  def identity(self) -> dict[str, Any]:
    """JSON of what decides the result."""
    return {"task": self.task, "variant": self.variant, "data": self.data,
            "protocol": self.protocol, "seed": self.seed,
            "weights": self.weights, "config": common_keys(self.config),
            "method": self.method.name, "options": self.method.options}


def common_keys(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the values that decide a result and belong to no method.

  Those that are the default are left out: a key that a later version adds
  renames no finished run. A default must therefore never be changed.
  """
  options, usual = methods.option_keys(), default()
  return {k: v for k, v in config.items()
          if k not in _PLACES and k not in options and v != usual[k]}


def variants(config, task: str = "") -> dict[str, ml_collections.ConfigDict]:
  """{label: configuration} of the rows that are compared, on a task.

  Later ones win: the configuration, its `per_task`, the variant, its own
  `per_task`. What a variant takes from another one's search is no longer in its
  grid, unless it sets that itself.
  """
  given = dict(config.variants.items()) or {config.method: {}}
  out, set_itself = {}, {}
  for label, overrides in given.items():
    out[label] = c = config.copy_and_resolve_references()
    where, own = f"config.variants.{label}", dict(overrides.items())
    per_task = own.pop("per_task", {})
    _override(c, f"config.per_task.{task}", _of_task(config.per_task, task))
    _override(c, where, own)
    _override(c, f"{where}.per_task.{task}", _of_task(per_task, task))
    set_itself[label] = {*own.get("grid", ()),
                         *_of_task(per_task, task).get("grid", ())}
  for label, c in out.items():
    if c.settings_of:
      taken = searched(out, c.settings_of) - set_itself[label]
      c.grid.update(dict.fromkeys(taken, ()))
  return out


def _of_task(per_task, task):
  return per_task.get(task, per_task.get(vtab.canonical(task), {}))


def _override(config, where, values):
  try:
    with config.unlocked():
      config.update(values)
  except (TypeError, ValueError) as error:
    raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def tasks_set_apart(config) -> dict[str, None]:
  """The names in any `per_task`."""
  tables = [config.per_task, *(v.get("per_task", {})
                               for v in config.variants.values())]
  return dict.fromkeys(name for table in tables for name in table)


def settings(config) -> list[dict[str, float]]:
  """The settings of the grid, smallest values first.

  The keys of the grid that a method has as options are tried with it only, and
  what decides its training where it trains.
  """
  known = set(methods.options_of(config.method))
  if not methods.is_solved(config.method):
    known |= {"lr", "weight_decay"}
  grid = {k: sorted(values) for k, values in config.grid.items()
          if values and k in known}
  return [dict(zip(grid, values, strict=True))
          for values in itertools.product(*grid.values())]


def searched(found: dict[str, ml_collections.ConfigDict],
             label: str) -> set[str]:
  """Returns the keys whose values a search chooses for a variant.

  Args:
    found: `variants` of a task.
  """
  own = set(settings(found[label])[0])
  source = found[label].settings_of
  return own | searched(found, source) if source else own


def further_settings(config, tried: Iterable[ml_collections.ConfigDict],
                     best: Mapping[str, Any]) -> list[dict[str, float]]:
  """The settings with a rate beyond those tried, or none.

  There is one while the best rate is the lowest or the highest one and fewer
  than `config.grid_steps` were added; the distance is that of the grid. The
  rate is the first of `RATES` that the grid has two values of.

  Args:
    tried: configurations of the settings.
    best: values of the best one.
  """
  # A rate of 0 has no distance to others.
  grid = {k: sorted({x for x in config.grid[k] if x > 0}) for k in RATES
          if k in settings(config)[0]}
  key = next((k for k, values in grid.items() if len(values) > 1), None)
  if not key:
    return []
  given, rates = grid[key], sorted({c[key] for c in tried})
  if len(rates) - len(set(config.grid[key])) >= config.grid_steps:
    return []
  if best[key] == rates[-1]:
    new = rates[-1] * given[-1] / given[-2]
  elif best[key] == rates[0]:
    new = rates[0] * given[0] / given[1]
  else:
    return []
  new = float(f"{new:.2g}")
  if new in rates:  # 0, or of a grid finer than two digits
    return []
  wider = config.copy_and_resolve_references()
  wider.grid[key] = (new,)
  return settings(wider)


def expected(config) -> Expected:
  """Returns the runs that a variant's configuration stands for, per task."""
  tried = 0 if takes_all(config) else len(settings(config))
  return Expected(tried, list(config.seeds), config.protocol, config.epochs)


def takes_all(config) -> bool:
  """Tells whether a variant takes its settings and tries none itself."""
  return bool(config.settings_of) and settings(config) == [{}]


def task_names(config) -> tuple[str, ...]:
  """Returns the tasks that are asked for.

  "all" means those that `config.data` holds; words as "vtab" are
  `tasks.sets`.
  """
  if tuple(config.tasks) != ("all",):
    sets = tasks.sets()
    return tuple(dict.fromkeys(name for given in config.tasks
                               for name in sets.get(given, (given,))))
  if not config.data:
    raise UserError("task=all needs a folder of tasks: add data=DIR")
  return tasks.in_data(config.data)


def check_config(config) -> None:
  """Checks all values that need no file."""
  check(config)
  if config.settings_of:
    raise UserError("config.settings_of is of a variant; set "
                    "config.variants.NAME.settings_of")
  for task in ("", *tasks_set_apart(config)):
    try:
      for c in variants(config, task).values():
        check(c)
        if c.normalisation:
          normalisation.mean_and_std(c.normalisation)
        check_known("method", c.method, methods.names())
        if (c.protocol == "select" and not c.settings_of
            and any(c.grid.values()) and settings(c) == [{}]):
          keys = ", ".join(f"config.grid.{key}" for key in config.grid
                           if key in methods.options_of(c.method))
          raise UserError(f"method {c.method} reads no key of config.grid that "
                          f"is set: give it {keys}")
    except UserError as error:
      raise UserError(f"of task '{task}': {error}" if task else str(error)
                      ) from error
