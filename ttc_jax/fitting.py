"""Tuning from Python: `ttc_jax.fit`, without flags and work directories."""
from collections.abc import Mapping, Sequence
import contextlib
import functools
import os
import shutil
import tempfile
from typing import Any

import numpy as np

from ttc_jax import (
  bundles,
  checkpoint,
  compilation,
  export,
  files,
  parallel,
  stores,
  tasks,
  train,
)
from ttc_jax import config as config_lib
from ttc_jax.errors import UserError, check_known
from ttc_jax.methods import ALIGN, TUNE_HEAD
from ttc_jax.predict import Tuned, attach
from ttc_jax.runs import inputs, plan, row
from ttc_jax.runs.progress import Progress
from ttc_jax.tasks import images as images_lib

# What is of several runs, or of tasks by their names; `fit` makes one run.
_NOT_OF_FIT = (
    "data", "experiment", "few_shot", "grid", "grid_steps", "hosts",
    "keep_stages", "lease_seconds", "limit", "masked_tests", "measures",
    "per_task", "plots", "protocol", "seeds", "settings_of", "tasks",
    "variants")
_HELD_OUT = 5  # one image in five, for methods that need validation images


class PerBlock(dict[str, dict[int, np.ndarray]]):
  """{site: {block: array}} of a tuned model, with a picture of it."""

  def __init__(self, values: Mapping[str, Mapping[int, np.ndarray]],
               widths: Mapping[str, Mapping[int, int]]):
    super().__init__({site: dict(blocks) for site, blocks in values.items()})
    self._widths = widths

  def plot(self) -> Any:
    """Draws a panel for each site: blocks by channels; returns the Figure.

    Scores are divided by their largest magnitude in each block; selected
    channels are drawn as 1.
    """
    from ttc_jax import plots  # an extra
    figure, axes = plots.subplots(
        max(1, len(self)), 1, squeeze=False, figsize=(9, 3.2 * len(self) + .3))
    figure.set_layout_engine("constrained")
    for ax, (site, blocks) in zip(axes[:, 0], self.items(), strict=False):
      image = ax.imshow(
          _stacked([self._line(site, i, x) for i, x in blocks.items()]),
          aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1,
          interpolation="nearest")
      ax.set_yticks(range(len(blocks)), [str(i) for i in blocks])
      ax.set_ylabel("block")
      ax.set_xlabel("channel")
      ax.grid(visible=False)
      selected = all(map(_is_selection, blocks.values()))
      ax.set_title(f"{'Selected channels' if selected else 'Scores'} at {site}")
      bar = figure.colorbar(image, ax=ax, label="1: selected" if selected
                            else "score / largest of the block")
      bar.ax.set_ylim(0 if selected else -1, 1)
    return figure

  def _line(self, site, block, x):
    """One row of the picture, (D,) in [-1, 1]."""
    line = np.zeros(self._widths[site][block])
    if _is_selection(x):
      line[x] = 1
      return line
    return x / max(float(np.abs(x).max()), 1e-30)


def _stacked(lines):
  """Lines (D,) of blocks that differ in width, as of a Swin, one below the
  other; NaN, which is not drawn, fills the shorter ones."""
  widest = max(map(len, lines))
  return np.stack([np.pad(x, (0, widest - len(x)), constant_values=np.nan)
                   for x in lines])


def _is_selection(x):
  """Whether an array has indices of channels, and no score of each."""
  return np.issubdtype(x.dtype, np.integer)


class Fitted:
  """What `fit` returns: a tuned model and how it came about.

  Attributes:
    classes: names, by label.
    history: a record for each epoch: stage, epoch, loss, images_per_second.
      Every `eval_every` epochs and at the last one of a stage it has val_top1
      too, where there are validation images.
    scores: {site: {block: (D,)}} by which channels were selected; empty for
      methods that select none.
    channels: {site: {block: (K,) indices}}, likewise.
    tests: {test set: top-1 in percent}, where a folder gave the images.
    meta: what a bundle says of it.
  """

  def __init__(self, bundle: bundles.Bundle, base: inputs.Base,
               history: list[dict[str, Any]], scores: PerBlock):
    self._bundle, self._base = bundle, base
    self.history, self.scores, self.meta = history, scores, bundle.meta
    self.tests: dict[str, float] = {}
    self.classes: tuple[str, ...] = tuple(bundle.meta["classes"])
    self.channels = _channels(bundle, base)
    # Unmerged: the numbers of training.
    loaded = self._attach(merge=False)
    self._tuned = Tuned(loaded.model, parallel.replicate(loaded.params),
                        parallel.replicate(loaded.buffers), self.meta)

  def __repr__(self) -> str:
    counts = ", ".join(f"{part} {self.meta[f'{part}_params']:,}"
                       for part in ("module", "norm", "head"))
    return (f"Fitted({self.meta['method']} on {self.meta['backbone']}, "
            f"{len(self.classes)} classes; tuned parameters: {counts})")

  def _attach(self, merge):
    pretrained = parallel.unreplicate(self._base.params)
    return attach("fit", self._bundle, self._base.backbone, pretrained, merge)

  def logits(self, images: Any) -> np.ndarray:
    """Returns logits (N, C), float32, before the softmax.

    Column i is the class `classes[i]`.

    Args:
      images: a sequence of paths, PIL images and uint8 arrays (H, W, 3) of any
        size, or one array (N, H, W, 3).

    Raises:
      UserError: an image that cannot be read.
    """
    return self._tuned.logits(images)

  def predict(self, images: Any) -> np.ndarray:
    """Returns probabilities (N, C), the softmax of `logits`."""
    return self._tuned.predict(images)

  def classify(self, images: Any) -> list[str]:
    """Returns the likeliest class of each image; images as of `predict`."""
    return self._tuned.classify(images)

  def accuracy(self, images: Any, labels: Sequence[Any]) -> float:
    """Returns the top-1 accuracy in percent.

    Args:
      labels: names of classes, or their numbers; one for each image.

    Raises:
      UserError: other labels, or another number of them; no image.
    """
    known = _numbers(list(labels), self.classes)
    found = self.predict(images).argmax(-1)
    _check_counts(found, known)
    return 100 * float((found == known).mean())

  def features(self, images: Any) -> np.ndarray:
    """Returns features (N, D) of the tuned backbone, before the head."""
    return self._tuned.features(images)

  def save(self, path: str) -> str:
    """Writes a bundle: one file if `path` ends in .safetensors, else a folder.

    `ttc_jax.predict.load(path)` and `ttc_jax.serve` open both.

    Raises:
      UserError: the path exists, or cannot be written.
    """
    path = files.new(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write = bundles.pack if path.endswith(".safetensors") else bundles.save
    write(path, self._bundle)
    return path

  def export(self, to: str, path: str) -> str:
    """Writes the model as another library loads it; returns the folder.

    Args:
      to: bigvision, timm, hf, stablehlo, onnx or tf-saved-model.
      path: of a new folder.

    Raises:
      UserError: unknown target, or one that cannot hold the model exactly.
    """
    targets = export.targets()
    if to not in targets:
      raise UserError(f"unknown target {to!r}; there are {', '.join(targets)}")
    return export.write(export.in_float32(self._attach(merge=True)),
                        targets[to], path)


def fit(images: Any, labels: Sequence[Any] | None = None, *, weights: str,
        method: str = "ttc", backbone: str = "", image_size: int = 224,
        val: tuple[Any, Sequence[Any]] | None = None,
        classes: Sequence[str] | None = None, seed: int = 0,
        progress: bool = True, **settings: Any) -> Fitted:
  """Tunes a pretrained backbone on labelled images.

    result = ttc_jax.fit(paths, labels, weights="ViT-B_16.npz")
    result.accuracy(other_paths, other_labels)
    result.classify(["cat.jpg"])
    result.save("pets.safetensors")

  Args:
    images: a sequence of paths, PIL images and uint8 arrays (H, W, 3) of any
      size, or one array (N, H, W, 3). Without labels a folder, with pictures
      in a folder for each class, or what else `data=` takes on the command
      line: its training and validation images are trained on, and `tests` has
      the accuracy on its test sets.
    labels: the class of each image, names or numbers.
    weights: source of the pretrained weights, as on the command line.
    method: one of `python -m ttc_jax.methods`.
    backbone: e.g. "vit_b16"; may be left out where the weights say it.
    image_size: pixels a side, to which images are resized.
    val: (images, labels) for the learning curve; never trained on.
    classes: all names, in the order of the numbers; by default those that
      occur, sorted. A folder names its own.
    seed: of the head, the order of images and random choices.
    progress: shows a bar on stderr.
    **settings: any key of the configuration that is of one run: epochs, lr,
      batch_size, k, ... Of sections a dict: lora=dict(rank=4). `batch_size`
      is lowered to the number of training images where there are fewer.

  Calls of one process share what they begin with: after method="layernorm",
  method="ttc" with the same images, settings and seed starts at its stage 2.
  Until the process ends, such stages lie in a temporary folder. Compiled
  programs are kept in `compilation_cache`, a folder under ~/.cache by default
  ("none": nowhere), by JAX's own setting, which then holds for the process. A
  folder of pictures that is not divided yet gets its lists of training,
  validation and test images. Nothing else is written.

  Returns:
    The tuned model.

  Raises:
    UserError: a value, an image or the weights cannot be used; the sentence
      says what to change.
    RunError: training diverged.
  """
  config = _config(method, backbone, weights, image_size, seed, settings)
  inputs.check_method(config)
  compilation.keep(config.compilation_cache)
  with compilation.precision(config.matmul_precision):
    return _fit(config, images, labels, val, classes, seed, progress)


def _fit(config, images, labels, val, classes, seed, progress):
  """`fit` with a checked configuration."""
  base = inputs.load_base(config)
  config = inputs.resolved(config, base)
  task = _task(images, labels, config)
  if task:
    if classes is not None:
      raise UserError("fit: the classes are those of the data; leave classes= "
                      "out, or give images and labels")
    names = task.classes
    train_split = _at(task, config, _size(config)).split("trainval")
  else:
    names, train_split = _split(images, labels, classes, config, _size(config))
  val_split = None
  if val is not None:
    if not isinstance(val, (tuple, list)) or len(val) != 2:
      raise UserError("fit: val is no pair: give (images, labels)")
    val_split = _split(val[0], val[1], names, config)[1]
  job, scores = _job(config, base, names, train_split, val_split, seed)
  config = job.config
  with (tempfile.TemporaryDirectory() as scratch,
        Progress("fit", lambda records: None, show=progress) as bar):
    bar.expect(len(job.method.stages) * config.epochs)
    _take_stages(job, scratch)
    outcome = train.run(job._replace(report=bar.update), base.params,
                        checkpoint.Stages(stores.open_store(scratch)))
    _keep_stages(job, scratch)
  bundle = row.make_bundle(job, base, names, outcome,
                           {"task": "fit", "group": "Other"})
  found = Fitted(bundle, base, outcome.history, _per_block(scores))
  for test in task.tests if task else ():
    found.tests[test] = found.accuracy(*task.split(test))
  return found


def _config(method, backbone, weights, image_size, seed, settings):
  """The checked configuration."""
  config = config_lib.default()
  for key in _NOT_OF_FIT:
    if key in settings:
      raise UserError(f"fit makes one run and reads no {key}: leave it out, or "
                      "run python -m ttc_jax.main --config=...")
  if weights is None:
    raise UserError("fit: weights is None; give a file, a name or a URL, or "
                    "'random'")
  values = dict(method=method, backbone=backbone, weights=os.fspath(weights),
                image_size=image_size, seeds=(seed,), **settings)
  for key, value in values.items():
    if key in settings:
      check_known("setting of fit", key, {*config} - {*_NOT_OF_FIT})
    if hasattr(config[key], "items") and isinstance(value, Mapping):
      for part, one in value.items():
        check_known(f"key of {key}", part, config[key])
        _set(config[key], part, one, f"{key}.{part}")
    else:
      _set(config, key, value, key)
  config_lib.check(config)
  return config


def _set(config, key, value, name):
  """Sets a key to a value of its type."""
  if hasattr(config[key], "items"):
    raise UserError(f"fit: {name} is {value!r}; give a dictionary of "
                    f"{', '.join(config[key])}")
  try:
    config[key] = value.item() if isinstance(value, np.generic) else value
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f"fit: {name} is {value!r}; give "
                    f"{_KINDS.get(type(config[key]), 'a value')}, for example "
                    f"{config[key]!r}") from error


_KINDS = {int: "an integer", float: "a number", bool: "True or False",
          str: "a word", tuple: "a tuple"}


def _task(images, labels, config):
  """The task of a folder or another source of data; None for images."""
  if labels is not None or not isinstance(images, (str, os.PathLike)):
    return None
  data = os.fspath(images)
  found = tasks.in_data(data)
  if len(found) > 1:
    raise UserError(f"{data} holds {len(found)} tasks, {', '.join(found[:5])}: "
                    "give the folder of one of them")
  return _at(tasks.find(found[0], data), config, config.image_size)


def _at(task, config, size):
  return tasks.at_size(task, size, resample=config.resample,
                       cache=config.cache or None, cache_gib=config.cache_gib)


def _size(config):
  """Of the training images; others have config.image_size."""
  return config.crop_from or config.image_size


def _split(images, labels, classes, config, size=0):
  """(names of the classes, decoded split)."""
  if labels is None:
    raise UserError("fit needs labels: one class for each image")
  labels = list(labels)
  names = _names(labels) if classes is None else tuple(map(str, classes))
  if len(set(names)) < len(names):
    raise UserError(f"fit: classes= names {max(names, key=names.count)!r} more "
                    "than once")
  numbers = _numbers(labels, names)
  pixels = images_lib.prepare_all(
      images, size or config.image_size, config.resample)
  _check_counts(pixels, numbers)
  if len(names) < 2:
    raise UserError(f"fit: there is one class only, {names[0]!r}: a task needs "
                    "two or more")
  return names, tasks.Split(pixels, numbers)


def _check_counts(images, labels):
  if len(images) != len(labels):
    raise UserError(f"{len(images)} images and {len(labels)} labels; give one "
                    "label for each image")
  if not len(images):
    raise UserError("give at least one image")


def _batch_size(config, split):
  """The configured batch size; of fewer images the largest one."""
  devices, count = len(parallel.devices()), len(split.labels)
  if count < devices:
    raise UserError(f"{count} images for {devices} devices; give at least one "
                    "each")
  parts = devices * config.accumulate
  size = min(config.batch_size, max(count // parts * parts, devices))
  if size % parts:
    raise UserError(f"a batch of {size} images does not divide into accumulate="
                    f"{config.accumulate} parts on each of {devices} devices")
  return size


def _names(labels):
  """The names of the classes that labels show."""
  if all(isinstance(x, str) for x in labels):
    return tuple(sorted(set(labels)))
  return tuple(map(str, range(max(map(_number, labels), default=-1) + 1)))


def _number(label):
  """A whole number as int."""
  try:
    number = int(label)
    if number == label:
      return number
  except (TypeError, ValueError, OverflowError):
    pass
  raise UserError(f"a label is {label!r}; give names of classes, or whole "
                  "numbers from 0 on")


def _numbers(labels, names):
  """int32 (N,) of labels that are names or numbers."""
  places = {name: i for i, name in enumerate(names)}
  found = [places.get(x, -1) if isinstance(x, str) else _number(x)
           for x in labels]
  for label, number in zip(labels, found, strict=True):
    if not 0 <= number < len(names):
      raise UserError(f"label {label!r} is none of the {len(names)} classes: "
                      f"{', '.join(names[:5])}{', ...' * (len(names) > 5)}")
  return np.asarray(found, np.int32)


def _job(config, base, classes, train_split, val_split, seed):
  """(job, {site: scores}), which the selection of channels fills."""
  scores: dict[str, Any] = {}
  method = inputs.load_method(config, base)
  config = inputs.settled(config, method)
  method = method._replace(stages=tuple(
      stage._replace(prepare=_recording(stage.prepare, scores))
      if stage.prepare else stage for stage in method.stages))
  digests = [x.digest for x in (train_split, val_split) if x]
  holdout = None
  if any(stage.holdout for stage in method.stages):
    holdout = (train_split, val_split) if val_split else _held_out(
        train_split, seed)
  config.batch_size = _batch_size(config, (holdout or [train_split])[0])
  return train.Job(
      identity={"fit": digests, "classes": list(classes), "seed": seed,
                "config": plan.common_keys(config),
                "weights": base.identity, "devices": len(parallel.devices())},
      config=config,
      model=inputs.trained_model(config, base),
      method=method, train=train_split, val=val_split, holdout=holdout,
      classes=len(classes), seed=seed, report=lambda *_: None), scores


@functools.cache
def _shared_stages():
  """The folder of this process's finished stages; it goes with the process."""
  return tempfile.TemporaryDirectory(prefix="ttc_jax-stages-")


def _shareable(job):
  """Names of the states of stages with which several methods begin."""
  keys = train.stage_keys(job)
  return [key for key, stage in zip(keys, job.method.stages, strict=True)
          if stage in (ALIGN, TUNE_HEAD)]


def _take_stages(job, scratch):
  """Copies what earlier calls have finished."""
  for key in _shareable(job):
    if os.path.isdir(kept := os.path.join(_shared_stages().name, key)):
      shutil.copytree(kept, os.path.join(scratch, "stages", key))


def _keep_stages(job, scratch):
  """Moves what later calls can begin with; the scratch folder is left."""
  for key in _shareable(job):
    kept = os.path.join(_shared_stages().name, key)
    with contextlib.suppress(OSError):  # another thread has kept it
      os.rename(os.path.join(scratch, "stages", key), kept)


def _held_out(split, seed):
  """(training, validation) images: one in five is held out."""
  order = np.random.default_rng(seed).permutation(len(split.labels))
  count = max(1, len(order) // _HELD_OUT)
  parts = order[count:], order[:count]
  return tuple(tasks.Split(split.images[rows], split.labels[rows])
               for rows in parts)


def _recording(prepare, into):
  """`prepare` whose scores are kept."""
  return lambda context: prepare(context._replace(keep=into.update))


def _per_block(scores):
  values = {site: {i: np.asarray(x) for i, x in enumerate(blocks)}
            for site, blocks in scores.items()}
  return PerBlock(values, {site: {i: len(x) for i, x in blocks.items()}
                           for site, blocks in values.items()})


def _channels(bundle, base):
  """The selected channels of a bundle."""
  layers = base.backbone.sites
  found: dict[str, dict[int, np.ndarray]] = {}
  for name, x in bundle.buffers.items():
    site, block, leaf = name.split("/")
    if leaf == "channels":
      found.setdefault(site, {})[int(block)] = np.asarray(x)
  return PerBlock(
      {site: dict(sorted(blocks.items())) for site, blocks in found.items()},
      {site: {i: layers.get(site, layers["fc2"])[i].width for i in blocks}
       for site, blocks in found.items()})
