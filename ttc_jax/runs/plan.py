"""From a configuration to runs, and from a run to its row."""
import functools
import itertools
import os
import platform
import time
from typing import Any, NamedTuple
import zlib

from absl import logging
import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from ttc_jax import backbones, bundles, checkpoint, cost, evaluate, files
from ttc_jax import methods
from ttc_jax import optim, parallel, tasks, train, trees
from ttc_jax.config import check
from ttc_jax.errors import UserError, check_known
from ttc_jax.model import Model, trim_head
from ttc_jax.tasks import folder
from ttc_jax.tasks import vtab as vtab_family
from ttc_jax.tasks.images import NORMALISATIONS
from ttc_jax.vtab import rows as vtab
from ttc_jax.weights import sources

# Keys that choose which runs there are or where things lie, but change no
# run's result.
_PLACES = ("tasks", "data", "seeds", "variants", "per_task", "grid", "weights",
           "cache", "cache_gib", "save_seconds", "protocol", "plots",
           "compilation_cache", "eval_every")


class Run(NamedTuple):
  """A row to be: one task, one variant, one setting, one seed."""
  task: str
  variant: str
  config: ml_collections.ConfigDict  # the variant's, with the setting
  protocol: str                      # "val" or "final"
  seed: int
  data: str                          # the task's digest

  @property
  def name(self) -> str:
    """Of its folder; the hash tells settings apart."""
    task = self.task.replace("/", "-")
    return (f"{task}-{self.variant}-{self.protocol}-s{self.seed}-"
            f"{checkpoint.digest(self.identity)[:8]}")

  @property
  def identity(self) -> dict[str, Any]:
    """JSON of what decides the result, but for the files' contents."""
    others = methods.option_keys() - {*methods.options_of(self.config.method)}
    keys = {k: v for k, v in self.config.items()
            if k not in _PLACES and k not in others}
    return {"task": self.task, "data": self.data, "protocol": self.protocol,
            "seed": self.seed, "config": keys}


class Base(NamedTuple):
  """The pretrained backbone that all runs start from."""
  backbone: Any
  params: trees.Tree      # on every device
  file: str
  sha256: str


def variants(config, task: str = "") -> dict[str, ml_collections.ConfigDict]:
  """{label: configuration} of the rows that are compared, on a task.

  Later ones win: the configuration, its `per_task`, the variant, its own
  `per_task`.
  """
  given = dict(config.variants.items()) or {config.method: {}}
  out = {}
  for label, overrides in given.items():
    out[label] = c = config.copy_and_resolve_references()
    where, own = f"config.variants.{label}", dict(overrides.items())
    per_task = own.pop("per_task", {})
    _override(c, f"config.per_task.{task}", _of_task(config.per_task, task))
    _override(c, where, own)
    _override(c, f"{where}.per_task.{task}", _of_task(per_task, task))
  return out


def _of_task(per_task, task):
  return per_task.get(task, per_task.get(vtab.canonical(task), {}))


def _override(config, where, values):
  try:
    with config.unlocked():
      config.update(values)
  except (TypeError, ValueError) as error:
    raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def _tasks_set_apart(config) -> dict[str, None]:
  """The names in any `per_task`."""
  tables = [config.per_task, *(v.get("per_task", {})
                               for v in config.variants.values())]
  return dict.fromkeys(name for table in tables for name in table)


def settings(config) -> list[dict[str, float]]:
  """The settings of the grid, smallest values first.

  A scale is tried with the methods that have one only.
  """
  keys = ["lr", "weight_decay"]
  if "scale" in methods.options_of(config.method):
    keys.append("scale")
  grid = {k: sorted(config.grid[k]) for k in keys if config.grid[k]}
  return [dict(zip(grid, values))
          for values in itertools.product(*grid.values())]


def task_names(config) -> tuple[str, ...]:
  """The tasks that are asked for.

  "all" means those of the data folder, "vtab" the 19 of VTAB-1K.
  """
  if tuple(config.tasks) != ("all",):
    return tuple(dict.fromkeys(name for given in config.tasks for name in (
        vtab.ROWS if given == "vtab" else (given,))))
  if not config.data:
    raise UserError("task=all needs a folder of tasks: add data=DIR")
  names = (*folder.names(config.data), *vtab_family.names(config.data))
  if not names:
    raise UserError(f"no task in the folder '{config.data}': a task is a "
                    "folder with train800.txt, or a VTAB data set that TFDS "
                    "prepared")
  return names


def load_task(config, name: str) -> tasks.Task:
  """A task with every split checked, nothing decoded yet."""
  return tasks.load(
      name, size=config.image_size, data=config.data or None,
      resample=config.resample, cache=config.cache or None,
      cache_gib=config.cache_gib)


def load_base(config) -> Base:
  """Reads the weights and puts them on every device."""
  fields = {"dtype": jnp.dtype(config.dtype)}
  for field in ("gelu", "window"):
    if config[field]:
      fields[field] = config[field]
  if config.matmul_precision:
    jax.config.update(
        "jax_default_matmul_precision", config.matmul_precision)
  if not config.weights:
    raise UserError(
        f"{config.backbone} needs pretrained weights: add weights=FILE (.npz "
        "or .safetensors), or weights=random to try the machinery")
  if config.weights == "random":
    module = backbones.make(config.backbone, config.image_size, **fields)
    params, sha256 = backbones.init(module), "random"
  else:
    module, params = backbones.load(
        config.backbone, config.weights, config.image_size, **fields)
    sha256 = sources.sha256(sources.locate(config.weights))
  return Base(module, parallel.replicate(params),
              os.path.basename(config.weights), sha256)


def check_config(config) -> None:
  """Checks all values that need no file."""
  check(config)
  for task in ("", *_tasks_set_apart(config)):
    try:
      for c in variants(config, task).values():
        check(c)
        check_known("normalisation", c.normalisation, NORMALISATIONS)
        check_known("method", c.method, methods.names())
    except UserError as error:
      raise UserError(f"of task '{task}': {error}" if task else str(error)
                      ) from error


def load_tasks(config) -> tuple[dict[str, tasks.Task], dict[str, str]]:
  """Returns ({name: task}, {name: why its data cannot be read}).

  Raises:
    UserError: a name that nobody knows, or not one task is left.
  """
  loaded, missing, error = {}, {}, None
  known = {*vtab.ROWS, *tasks.names(config.data or None)}
  for name in task_names(config):
    try:
      loaded[name] = load_task(config, name)
      loaded[name].labels["train"]  # the first look into the files
    except UserError as e:
      if name not in known:
        raise
      missing[name], error = str(e), e
      loaded.pop(name, None)
  if error and not loaded:
    raise UserError(f"none of {len(missing)} tasks can be read; the last: "
                    f"{error}" if len(missing) > 1 else str(error)) from error
  return loaded, missing


def check_runs(config, base: Base, loaded: dict[str, tasks.Task]) -> None:
  """Checks, before any long work, that backbone, tasks and values fit."""
  devices = len(parallel.devices())
  for name, task in loaded.items():
    for variant in variants(config, name).values():
      methods.load(variant.method, resolved(variant, base), base.backbone)
      if variant.batch_size % devices:
        raise UserError(f"config.batch_size {variant.batch_size} does not "
                        f"divide among the {devices} devices")
      count = len(task.labels["train"])
      count = min(count, variant.limit or count)
      if count < variant.batch_size:
        raise UserError(
            f"config.batch_size is {variant.batch_size}, but task "
            f"'{task.name}' has {count} training images; lower it")
  apart = _tasks_set_apart(config)
  general = [name for name in loaded
             if not {name, vtab.canonical(name)} & apart.keys()]
  if apart and general:
    logging.warning("config.per_task has nothing for %s: the general settings "
                    "are used there", ", ".join(general))


def resolved(config, base: Base) -> ml_collections.ConfigDict:
  """The configuration with what depends on the rest settled."""
  config = config.copy_and_resolve_references()
  config.k = config.k or base.backbone.default_k
  if config.warmup_epochs is None:
    config.warmup_epochs = 0.1 * config.epochs
  return config


def _split(task, name, limit):
  split = task.split(name)
  if not limit:
    return split
  return tasks.Split(split.images[:limit], split.labels[:limit])


def make_job(run: Run, base: Base, task: tasks.Task, report) -> train.Job:
  """Settles everything about a run and decodes all images that it needs.

  A corrupt test image is found here, before the training, unless the test set
  is so large that it streams.
  """
  c = resolved(run.config, base)
  final = run.protocol == "final"
  split = "trainval" if final else "train"
  data = _split(task, split, c.limit)
  data = tasks.Split(np.ascontiguousarray(data.images[:]), data.labels)
  if final:
    task.split("test")
  method = methods.load(c.method, c, base.backbone)
  val = None if final else _split(task, "val", c.limit)
  holdout = None
  if any(stage.holdout for stage in method.stages):
    part = _split(task, "train", c.limit)
    holdout = (tasks.Split(np.ascontiguousarray(part.images[:]), part.labels),
               _split(task, "val", c.limit))
  # The method's own options enter with the stage that first uses them.
  own = methods.option_keys() | {"method"}
  identity = run.identity | {
      "config": {k: v for k, v in run.identity["config"].items()
                 if k not in own},
      "weights": base.sha256, "devices": len(parallel.devices()),
      "images": [zlib.crc32(np.ascontiguousarray(split.images[:]))
                 for split in (data, *(holdout or ()))],
      "classes": len(task.classes)}
  return train.Job(
      identity=identity,
      model=Model(base.backbone.clone(drop_path=c.drop_path), c.normalisation),
      method=method,
      plan=train.Plan(c.batch_size, c.label_smoothing, c.flip,
                      c.smallest_crop, c.decay_all, c.optimiser),
      train=data, val=val, holdout=holdout,
      classes=len(task.classes), seed=run.seed, epochs=c.epochs,
      warmup_epochs=c.warmup_epochs, lr=c.lr, weight_decay=c.weight_decay,
      eval_every=c.eval_every, save_seconds=c.save_seconds, report=report,
      warmup_lr=c.warmup_lr, min_lr=c.min_lr)


def finish(run: Run, job: train.Job, base: Base, task: tasks.Task,
           outcome: train.Outcome, directory: str) -> dict[str, Any]:
  """Tests, saves the bundle and returns the row."""
  c = resolved(run.config, base)
  val = test = seconds_test = None
  count = 0
  if job.val:
    val = outcome.history[-1]["val_top1"]
  else:
    test, count, seconds_test = _test(run, task, outcome)
  state = outcome.state
  params = state.params | {
      "head": trim_head(state.params["head"], job.classes)}
  rules = methods.tuned_rules(job.method)
  tuned, _ = trees.split(params, trees.label(params, rules), "tune")
  tuned = parallel.unreplicate(tuned)
  counts = optim.counts(tuned)
  options = job.method.options
  row = {
      "task": run.task, "group": task.group, "method": c.method,
      "variant": run.variant, "protocol": run.protocol, "seed": run.seed,
      "backbone": c.backbone, "weights": base.file,
      "weights_sha256": base.sha256, "image_size": c.image_size,
      "normalisation": c.normalisation, "dtype": c.dtype,
      "matmul_precision": c.matmul_precision or "default",
      "data_digest": task.digest,
      "k": options.get("k"), "position": options.get("position"),
      "score": options.get("score"), "scale": options.get("scale"),
      "options": options, "optimiser": c.optimiser,
      "warmup_lr": c.warmup_lr, "min_lr": c.min_lr, "decay_all": c.decay_all,
      "drop_path": c.drop_path, "label_smoothing": c.label_smoothing,
      "lr": c.lr, "weight_decay": c.weight_decay, "epochs": c.epochs,
      "warmup_epochs": c.warmup_epochs, "batch_size": c.batch_size,
      "stages": [s.name for s in job.method.stages],
      "val_top1": val, "test_top1": test, "test_count": count,
      "train_count": len(job.train.labels),
      **{f"{part}_params": n for part, n in counts.items()},
      "seconds_train": outcome.seconds, "seconds_test": seconds_test,
      "images_per_second": outcome.images_per_second,
      "test_images_per_second": seconds_test and count / seconds_test,
      "step_memory_bytes": outcome.memory_bytes or None,
      **_flops(job, outcome.model, params, state.buffers),
      "compile_seconds": outcome.compile_seconds,
      "device": f"{len(parallel.devices())} x "
                f"{parallel.devices()[0].device_kind}",
      "versions": versions(), "run": run.name,
  }
  bundles.save(bundle := f"{directory}/bundle", bundles.Bundle(
      trees.flatten(tuned),
      trees.flatten(parallel.unreplicate(state.buffers)),
      row | {"classes": list(task.classes), "resample": c.resample,
             "weights_source": _source(c.weights),
             "fields": base.backbone.fields}))
  return row | {"bundle_bytes": files.size(bundle)}


def _test(run, task, outcome):
  split = _split(task, "test", run.config.limit)
  evaluate.compile_for(outcome.model, outcome.state.params,
                       outcome.state.buffers, split.images)
  begin = time.perf_counter()
  top1 = evaluate.top1(outcome.model, outcome.state.params,
                       outcome.state.buffers, *split)
  return top1, len(split.labels), time.perf_counter() - begin


def _flops(job, model, params, buffers):
  """Of one image at inference, with the adapter and, if it can be, merged."""
  params, buffers = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
      (params, buffers))
  tuned = cost.flops(model, params, buffers)
  merged = tuned if job.method.cannot_merge else cost.flops(
      job.model, params | {"adapter": {}}, {})
  return {"flops": tuned, "flops_merged": merged}


def _source(weights: str) -> str:
  """Where the weights are, from wherever the bundle is used."""
  return os.path.abspath(weights) if os.path.exists(weights) else weights


@functools.cache
def versions() -> dict[str, str]:
  """Of what a result depends on."""
  return {"python": platform.python_version(), "jax": jax.__version__,
          "flax": flax.__version__, "optax": optax.__version__,
          "numpy": np.__version__}
