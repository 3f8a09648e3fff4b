"""What runs start from: the backbone with its weights, and the tasks."""
import difflib
import itertools
import json
from typing import Any, NamedTuple

from absl import logging
import jax.numpy as jnp
import ml_collections

from ttc_jax import (
  backbones,
  measures,
  methods,
  normalisation,
  parallel,
  quantisation,
  tasks,
  trees,
  weights,
)
from ttc_jax import config as config_lib
from ttc_jax.errors import UserError, check_known, printable
from ttc_jax.model import Model
from ttc_jax.runs import plan
from ttc_jax.vtab import rows as vtab


class Base(NamedTuple):
  """The pretrained backbone that all runs start from.

  Attributes:
    name: of the backbone, e.g. "vit_b16".
    backbone: the Linen module.
    params: on every device, kernels kept as `config.frozen_dtype` says.
    source: of the weights, located and hashed.
    normalisation: that the weights were trained with; "" where they do not
      say.
  """
  name: str
  backbone: Any
  params: trees.Tree
  source: weights.Source
  normalisation: str

  @property
  def stated(self) -> str:
    """The fields where a config.json beside the file tells some, as JSON."""
    return json.dumps(self.backbone.fields, sort_keys=True) * (
        self.source.configured)

  @property
  def reading(self) -> str:
    """What decides the pretrained model beside the contents of the file: the
    part that is read, and `stated`; mostly ""."""
    return f"{self.source.part} {self.stated}".strip()

  @property
  def identity(self) -> str:
    """What decides the pretrained model, as runs and stages are named by it."""
    return f"{self.source.sha256} {self.reading}".rstrip()


class Inputs:
  """The bases and tasks of a session's variants, each loaded once.

  Attributes:
    tasks: {name: task} that can be read, at the general image size.
    missing: {name: why its data cannot be read}.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    self.tasks, self.missing = load_tasks(config)
    self._config = config
    self._bases: dict[tuple, Base] = {}
    self._sized: dict[tuple, tasks.Task] = {}

  def base(self, config: ml_collections.ConfigDict) -> Base:
    """Returns the base of a variant."""
    key = tuple(config[k] for k in config_lib.OF_A_BASE)
    if key not in self._bases:
      self._bases[key] = load_base(config)
    return self._bases[key]

  def task(self, name: str, config: ml_collections.ConfigDict) -> tasks.Task:
    """Returns a task that decodes its images at a variant's size."""
    return self._at(name, config, config.image_size)

  def training(self, name: str,
               config: ml_collections.ConfigDict) -> tasks.Task:
    """Returns a task that decodes its images as a variant trains on them: they
    are larger where crops of them are taken."""
    return self._at(name, config, config.crop_from or config.image_size)

  def _at(self, name, config, size):
    how = size, config.resample
    if how == (self._config.image_size, self._config.resample):
      return self.tasks[name]
    if (name, *how) not in self._sized:
      self._sized[name, *how] = tasks.at_size(
          self.tasks[name], size, resample=config.resample,
          cache=config.cache or None, cache_gib=config.cache_gib)
    return self._sized[name, *how]


def _fields(config):
  """What a configuration says of a backbone's fields."""
  said = {field: config[field] for field in ("gelu", "window")
          if config[field]}
  return {"dtype": jnp.dtype(config.dtype), **said}


def load_base(config) -> Base:
  """Reads the weights and puts them on every device."""
  fields = _fields(config)
  if not config.weights:
    raise UserError(
        f"{config.backbone or 'a run'} needs pretrained weights: add "
        "weights=FILE (.npz or .safetensors), or weights=random to try the "
        "machinery")
  source = weights.open_source(config.weights)
  name = _name(config.backbone, source)
  module, params = weights.load(name, source, config.image_size, **fields)
  params = quantisation.store(params, module, config.frozen_dtype)
  return Base(name, module, parallel.replicate(params), source,
              _normalisation(source))


def _name(backbone, source):
  """Our name of a backbone; by default the one that the weights are of."""
  if backbone:
    return backbones.canonical(backbone)
  if source.path is None:
    raise UserError("random weights do not say which backbone: add it, e.g. "
                    "backbone=vit_ti16")
  return weights.identify(weights.read(source.path))


def _normalisation(source):
  """The normalisation that weights say; random ones take any."""
  if source.path is None:
    return "half"
  found = weights.normalisation(source)
  return normalisation.name(*found) if found else ""


def resolved(config, base: Base) -> ml_collections.ConfigDict:
  """Returns a copy in which every value is settled.

  Raises:
    UserError: neither the configuration nor the weights say how pixels are
      normalised.
  """
  config = config_lib.resolved(config)
  config.backbone = base.name
  config.normalisation = config.normalisation or base.normalisation
  if not config.normalisation:
    raise UserError(
        f"the weights '{base.source.name}' do not say how pixels are "
        "normalised: add --config.normalisation=half (ImageNet-21K ViTs of "
        "Google), imagenet (DINO, DeiT, Swin) or clip")
  return config


def trained_model(config, base: Base) -> Model:
  """Returns the model that a run trains, without handlers.

  Raises:
    UserError: the backbone cannot be rematerialised.
  """
  fields = {"drop_path": config.drop_path}
  if config.remat:
    if not hasattr(base.backbone, "remat"):
      raise UserError(f"config.remat is True, but {base.name} cannot compute "
                      "its blocks again; leave it out")
    fields["remat"] = True
  return Model(base.backbone.clone(**fields), config.normalisation)


def load_task(config, name: str) -> tasks.Task:
  """A task with every split checked, nothing decoded yet."""
  task = tasks.load(
      name, size=config.image_size, data=config.data or None,
      resample=config.resample, cache=config.cache or None,
      cache_gib=config.cache_gib)
  return tasks.few_shot(task, config.few_shot) if config.few_shot else task


def load_tasks(config) -> tuple[dict[str, tasks.Task], dict[str, str]]:
  """Returns ({name: task}, {name: why its data cannot be read}).

  Raises:
    UserError: an unknown name, or no task can be read.
  """
  loaded, missing, last = {}, {}, None
  known = {*itertools.chain(*tasks.sets().values()),
           *tasks.names(config.data or None)}
  for name in plan.task_names(config):
    try:
      task = load_task(config, name)
      _ = task.labels["train"]  # the first look into the files
      loaded[name] = task
    except UserError as error:
      if name not in known:
        raise
      missing[name], last = str(error), error
  if last and not loaded:
    raise UserError(f"none of {len(missing)} tasks can be read; the last: "
                    f"{last}" if len(missing) > 1 else str(last)) from last
  return loaded, missing


def load_method(config, base: Base) -> methods.Method:
  """Returns the method of a variant, its options resolved for the backbone.

  Raises:
    UserError: an option does not fit, or the method tunes kernels that are
      kept in fewer bits.
  """
  method = methods.load(config.method, config, base.backbone)
  if config.frozen_dtype != "float32":
    _check_frozen(config, base, method)
  return method


def _check_frozen(config, base, method):
  """Only float32 can be trained: a step is smaller than what int8 resolves."""
  labels = trees.flatten(trees.label(
      {"backbone": base.params}, methods.tuned_rules(method)))
  for name in quantisation.kernels(base.backbone):
    if labels[f"backbone/{name}"] == "tune":
      raise UserError(
          f"config.frozen_dtype is {config.frozen_dtype}, but {config.method} "
          f"tunes kernels ({name}); give float32, or a method that keeps them "
          "frozen")


def settled(config, method: methods.Method) -> ml_collections.ConfigDict:
  """Returns a copy with what no stage of a method reads at its least value:
  the same head is not solved once for each number of epochs."""
  config = config.copy_and_resolve_references()
  if all(stage.solve for stage in method.stages):
    config.epochs, config.warmup_epochs = 1, 0.0
  return config


def check_values(config) -> None:
  """Checks what needs neither weights nor data: a typo costs no download.

  Options of methods are checked where the configuration names the backbone.

  Raises:
    UserError: with the value to change.
  """
  plan.check_config(config)
  for task in ("", *plan.tasks_set_apart(config)):
    for variant in plan.variants(config, task).values():
      for measure in variant.measures:
        check_known("measure", measure, measures.names())
      check_method(variant)


def check_method(config) -> None:
  """Checks the options of a method, where the backbone is named.

  Raises:
    UserError: with the value to change.
  """
  if config.backbone:
    methods.load(config.method, config_lib.resolved(config), backbones.make(
        config.backbone, config.image_size, **_fields(config)))


def check_runs(config, inputs: Inputs) -> None:
  """Checks, before any long work, that backbones, tasks and values fit.

  Raises:
    UserError: with the value to change.
  """
  for name, task in inputs.tasks.items():
    for variant in plan.variants(config, name).values():
      base = inputs.base(variant)
      load_method(resolved(variant, base), base)
      _check_batch_size(variant, task)
  apart = plan.tasks_set_apart(config)
  known = {*inputs.tasks, *map(vtab.canonical, inputs.tasks), *inputs.missing,
           *vtab.ROWS}
  for name in apart.keys() - known:
    if difflib.get_close_matches(name, inputs.tasks, cutoff=0.75):
      check_known("task in config.per_task", name, inputs.tasks)
    logging.warning("config.per_task.%s: no task of this session is called so",
                    printable(name))  # it may be of other data, run later
  general = [name for name in inputs.tasks
             if not {name, vtab.canonical(name)} & apart.keys()]
  if apart and general:
    logging.warning("config.per_task has nothing for %s: the general settings "
                    "are used there", printable(", ".join(general)))


def _check_batch_size(config, task):
  devices = len(parallel.devices())
  if config.batch_size % devices:
    raise UserError(f"config.batch_size {config.batch_size} does not divide "
                    f"among the {devices} devices")
  if config.batch_size % (devices * config.accumulate):
    raise UserError(
        f"config.batch_size {config.batch_size} does not divide into "
        f"config.accumulate={config.accumulate} parts on each of {devices} "
        f"devices; give a multiple of {devices * config.accumulate}")
  count = len(task.labels["train"])
  count = min(count, config.limit or count)
  if count < config.batch_size:
    raise UserError(
        f"config.batch_size is {config.batch_size}, but task '{task.name}' "
        f"has {count} training images; lower it")
