"""The configuration: every key with its default, and the `:key=value` grammar.

A config file has a function `get_config(arg)`; `arg` is the text after the
colon, as in Big Vision: `--config=configs/vtab.py:task=dtd,method=ttc`.
"""
from collections.abc import Iterator
import functools
import math
import re
from typing import Any

import ml_collections
from ml_collections import config_dict

from ttc_jax.errors import UserError, check_known

PROTOCOLS = ("val", "final", "select")
OPTIMISERS = ("adamw", "sgd")
FROZEN_DTYPES = ("float32", "bfloat16", "int8")
HEAD_INITS = ("normal", "zeros")
HOSTS = ("runs", "batch", "alone")
# Keys that all runs share.
SHARED = ("tasks", "data", "few_shot", "variants", "experiment",
          "matmul_precision", "cache", "cache_gib", "plots",
          "compilation_cache", "keep_stages", "hosts", "lease_seconds")
# Keys that all tasks of a variant share.
OF_A_BASE = ("backbone", "weights", "gelu", "window", "dtype", "frozen_dtype",
             "image_size", "resample")


def default() -> ml_collections.ConfigDict:
  """Returns all keys with their defaults, locked: files change values only.

    config = default()
    config.lr = 3e-3
    config.learning_rate = 3e-3  # AttributeError
  """
  c = ml_collections.ConfigDict()

  # What: the runs are tasks x variants x seeds.

  c.tasks = ("all",)          # names, or "all" of a folder
  # Folder of tasks in the vtab-1k format, of pictures (CLASS/NAME.jpg) or of
  # VTAB's data sets; a zip of it; hf:NAME, tfds:NAME.
  c.data = ""
  c.few_shot = 0              # training images a class; 0: all
  c.method = "ttc"            # a file of ttc_jax/methods
  # {label: {key: value}}: several rows that differ in these keys. Empty: one
  # row, of `method`.
  c.variants = variants()
  # {task: {key: value}}: settings of single tasks, for all variants. What a
  # variant sets wins, and it may have a `per_task` of its own, which wins
  # over both.
  c.per_task = ml_collections.ConfigDict()
  c.seeds = (0,)              # of the head, the order of images, choices
  # A table or figure of the paper, see ttc_jax/experiments: it is made when
  # the runs are done. Experiments may share a work directory.
  c.experiment = ""
  c.measures = ()             # of final runs, see ttc_jax/measures
  # val: train on 800, report the 200. final: train on 1000, report the test
  # set. select: val for every setting of `grid`, then final with the best.
  c.protocol = "final"
  # Every combination is tried; the last four for the methods that have them.
  c.grid = ml_collections.ConfigDict(dict(
      lr=(),              # values of config.lr, as 1e-3,1e-2
      weight_decay=(),    # likewise
      scale=(),           # likewise
      adapter_lr=(),      # likewise
      stage2_lr=(),       # likewise
      l2=()))             # likewise
  # How many rates beyond grid.lr may be tried, at its spacing, while the best
  # one is the lowest or the highest; where the grid has one lr or none, beyond
  # grid.stage2_lr or grid.adapter_lr.
  c.grid_steps = 0
  # Of a variant: another variant. What the search chose for that one is taken,
  # but for the keys of the grid that this variant's own `grid` tries.
  c.settings_of = ""

  # Several hosts: "runs", each takes runs of its own; "batch", all train one
  # run, a batch over all devices; "alone", each as if there were no other.
  c.hosts = "runs"

  # The backbone and its arithmetic.

  c.backbone = ""             # e.g. "vit_b16"; empty: what the weights say
  c.weights = ""              # path, https://, gs://, hf://owner/name, "random"
  c.gelu = ""                 # exact, tanh, quick; empty: what the weights say
  c.window = 0                # of a Swin, tokens a side; 0: what they say
  c.dtype = "float32"         # or "bfloat16": of the computation
  # Or "bfloat16", "int8": in which frozen kernels are kept, see
  # ttc_jax/quantisation.py.
  c.frozen_dtype = "float32"
  # Of float32 matrix products: "", the device's default (TF32 on recent GPUs,
  # bfloat16 on TPUs), "high" or "highest", true float32.
  c.matmul_precision = ""
  c.drop_path = 0.0           # rate of the last block; rises in a line from 0
  # Training keeps the inputs of blocks only, and computes each block again for
  # its gradient: less memory, more time.
  c.remat = False

  # Images.

  c.image_size = 224          # pixels a side
  # Or "bilinear": the whole image is squashed to a square. "bicubic/256": the
  # short side is resized to 256 and the centre is cropped.
  c.resample = "bicubic"
  # Of pixels: "half", "imagenet", "clip", "none", or six numbers as
  # 0.5,0.5,0.5/0.25,0.25,0.25; empty: what the weights say.
  c.normalisation = ""
  c.flip = False              # half of the training images, left to right
  c.smallest_crop = 1.0       # random resized crops of at least that area
  c.crop_aspect = 1.0         # their longest side by the other; 1: squares
  # Training images have this size, from which crops of image_size are taken at
  # random places; 0: they have image_size.
  c.crop_from = 0
  # More augmentation in training, as timm's; 0: none.
  c.augment = ml_collections.ConfigDict(dict(
      jitter=0.0,         # brightness, contrast, saturation; 0.4 is usual
      randaugment=0.0,    # magnitude, 9 is usual; takes the place of jitter
      erasing=0.0,        # probability
      mixup=0.0,          # alpha; with cutmix: one of them for each batch
      cutmix=0.0))        # alpha

  # Per stage.

  c.epochs = 50               # of each stage
  c.warmup_epochs = config_dict.placeholder(float)  # None: a tenth
  c.batch_size = 64           # images a step, on all devices together
  # Parts of a step's batch, one after the other: the same update up to rounding
  # and to what is drawn at random, from the memory of one part.
  c.accumulate = 1
  c.lr = 1e-3                 # learning rate, at its highest
  c.warmup_lr = 0.0           # at the start: from here a line to lr
  c.min_lr = 0.0              # at the end: from lr half a cosine to here
  c.optimiser = "adamw"       # or "sgd", of momentum 0.9
  c.weight_decay = 1e-4       # adamw: decoupled; sgd: added to the gradient
  c.decay_all = False         # True: also decay norms and biases
  c.clip_norm = 0.0           # largest norm of the gradient; 0: any
  c.head_init = "normal"      # of deviation 0.02; or "zeros"
  c.label_smoothing = 0.0     # share of the target that all classes divide

  # TTC.

  c.k = 0                     # channels an insertion point; 0: the paper's
  c.position = "mlp"          # mhsa, both, stream_mlp, stream_mhsa
  # In the last blocks; 0: the paper's, all of a ViT, of a Swin the last half
  # of stage 3 and stage 4.
  c.blocks = 0
  # taylor_abs, taylor_square, block, l2, random; class_l2, SCT's
  c.score = "taylor"
  c.scale = 1.0               # s of Eq. 11, before the map
  c.bias = False              # the map has one
  c.stage1 = "norm"           # what stage 1 tunes beside the head; linear, none
  c.tune_norm = True          # the LayerNorms in stage 2
  c.tune = "channels"         # rows: the kernel's selected rows (Table 7)
  c.adapter_lr = 1.0          # learning rate of the map, in times of lr
  c.stage2_lr = 1.0           # all rates of stage 2, in times of stage 1's

  # The other methods, as published; k, blocks and scale are SCT's too.

  # AdaptFormer and its like.
  c.adapter = ml_collections.ConfigDict(dict(
      width=8,                           # of the bottleneck
      placement="parallel",              # or pfeiffer, houlsby, noah
      activation="relu",                 # silu; GELU: exact, tanh, quick
      # None: 0.1 for parallel, as AdaptFormer; else 1.
      scale=config_dict.placeholder(float),
      dropout=0.0))                      # of the hidden units
  # LoRA.
  c.lora = ml_collections.ConfigDict(dict(
      rank=8,                            # r, of A and B
      alpha=8.0,                         # the change is scaled by alpha / rank
      sites=("q", "v"),                  # linear layers, see ttc_jax/taps.py
      shared=False,                      # one A for q, k and v of a block
      dropout=0.0))                      # of the input
  # Both of VPT-Shallow and VPT-Deep.
  c.vpt = ml_collections.ConfigDict(dict(
      prompts=10,                        # tokens; of each block in VPT-Deep
      dropout=0.1))                      # of the prompts
  # fewshot_lsr.
  c.l2 = 1024.0               # factor of the squared weights in its loss
  # SSF.
  c.ssf = ml_collections.ConfigDict(dict(
      spread=0.02))                      # deviation at the start, from 1 and 0
  # SCT.
  c.sct = ml_collections.ConfigDict(dict(
      position="attention",              # or mlp, qv
      score="class_l2",                  # by which channels are selected
      scale_on_x=False))                 # `scale` multiplies the channels too
  # NOAH: a supernet, then a search for each block's sizes.
  c.noah = ml_collections.ConfigDict(dict(
      prompts=(0, 5, 10),                # numbers that a block may have
      rank=(0, 4, 8),                    # of LoRA, that a block may have
      width=(0, 4, 8),                   # of the adapter, that a block may have
      budget=0,                          # parameters; 0: half of the largest
      released=False,                    # the network of the authors' code
      dropout=0.0,                       # of all three modules
      population=50,                     # of the evolutionary search
      generations=15,                    # of the search
      parents=10,                        # that are kept of a generation
      mutations=25,                      # new ones of a generation
      crossovers=25,                     # new ones of a generation
      mutation_rate=0.2))                # of each block's sizes

  # Saving, reporting and caches.

  c.eval_every = 5            # epochs between validations
  # Test sets that lack some classes are compared among those they have.
  c.masked_tests = False
  c.save_seconds = 30.0       # least time between two saves within a stage
  # A host that shows no life for so long loses its run to another process.
  c.lease_seconds = 60.0
  c.keep_stages = False       # else deleted when a task's runs are done
  c.limit = 0                 # images of each split, 0: all
  c.plots = False             # accuracy against parameters, beside the table
  c.cache = ""                # decoded images; empty: ~/.cache/ttc_jax/images
  c.cache_gib = 8.0           # larger splits are decoded as they stream
  # Training sets up to this size are on every device; larger ones are read
  # chunk by chunk, in the same order.
  c.in_memory_gib = 4.0
  c.workers = 0               # threads that read then; 0: one for each core
  c.compilation_cache = ""    # empty: ~/.cache/ttc_jax/programs; or "none"
  c.lock()
  for section in (c.variants, c.per_task):
    section.unlock()
  return c


def variants(**labelled: dict[str, Any]) -> ml_collections.ConfigDict:
  """Returns {label: {key: value}} in the given order, that of the table.

    config.variants = variants(linear=dict(method="linear", lr=1e-2),
                               ttc=dict(method="ttc"))
  """
  return ml_collections.ConfigDict(labelled, sort_keys=False)


def parse_arg(arg: str | None, **known: Any) -> ml_collections.ConfigDict:
  """Parses "task=dtd,eurosat,method=ttc,runlocal" by Big Vision's grammar.

  Commas separate. A value with a comma stands in quotes, single or double
  (colons and blanks need none, but the shell wants quotes around blanks):

    --config='configs/vtab.py:task=pets,data="/data/cats, dogs"'

  Args:
    arg: the text after the colon of --config=FILE:...
    **known: the keys with their defaults; a value gets its default's type. A
      tuple takes a list: "seeds=0,1,2". A bare key is True.

  Returns:
    `known`, with the values of `arg`.

  Raises:
    UserError: an unknown key or a value of another type.
  """
  values: dict[str, list[str]] = {}
  last = None
  for key, value in _pieces(arg or ""):
    if key is None and value in known:
      key, value = value, "True"
    if key is not None:
      last = check_known("config argument", key, known)
      values[key] = [value]
    elif last and isinstance(known[last], tuple):
      values[last].append(value)  # the list goes on
    else:
      check_known("config argument", value, known)
  return ml_collections.ConfigDict(
      {k: _convert(k, values[k], v) if k in values else v
       for k, v in known.items()})


_PIECE = re.compile(r"""(?:([^,="']*)=)?("[^"]*"|'[^']*'|[^,]*)(?:,|$)""")


def _pieces(arg: str) -> Iterator[tuple[str | None, str]]:
  """Yields (key or None, value without its quotes) of "key=value,value"."""
  for key, value in _PIECE.findall(arg):
    if value[:1] in ("'", '"') and value[-1:] == value[:1] and len(value) > 1:
      value = value[1:-1]
    if key or value:
      yield key or None, value


def _convert(key, texts, like):
  if isinstance(like, tuple):
    return tuple(texts)
  if len(texts) > 1:
    raise UserError(f"config argument '{key}' takes one value, got {texts}")
  try:
    if isinstance(like, bool):
      return {"true": True, "false": False, "1": True, "0": False}[
          texts[0].lower()]
    value = type(like)(texts[0])
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError
    return value
  except (KeyError, ValueError) as e:
    raise UserError(f"config argument '{key}={texts[0]}': expected "
                    f"{type(like).__name__}") from e


def run_locally(config: ml_collections.ConfigDict) -> None:
  """Shrinks a configuration: it runs on a laptop in a minute."""
  config.update(dict(
      backbone="vit_ti16", weights="random", image_size=32, limit=64,
      epochs=2, warmup_epochs=1.0, batch_size=16, seeds=(0,), eval_every=1,
      grid={key: values[:1] for key, values in config.grid.items()}))


def resolved(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns a copy in which every value is settled that no file decides."""
  config = config.copy_and_resolve_references()
  if config.warmup_epochs is None:
    config.warmup_epochs = 0.1 * config.epochs
  return config


def check(config: ml_collections.ConfigDict) -> None:
  """Checks the values that can be checked without any file.

  Raises:
    UserError: one value is wrong; the sentence says which are right.
  """
  _check_present("", config, _default_once())
  _check_words(config)
  _check_numbers(config)
  _check_crop_from(config)
  _check_per_task("config", config, config)
  _check_seeds_and_grid(config)
  _check_schedule(config)  # reads the grid
  for label, overrides in config.variants.items():
    where = f"config.variants.{label}"
    _check_keys(where, overrides, config, SHARED)
    _check_per_task(where, overrides, config)
  _check_settings_of(config)


_default_once = functools.cache(default)


def _check_words(config):
  """Checks the values that are one of a few words."""
  for key, words in (
      ("protocol", PROTOCOLS), ("hosts", HOSTS), ("optimiser", OPTIMISERS),
      ("head_init", HEAD_INITS), ("dtype", ("float32", "bfloat16")),
      ("frozen_dtype", FROZEN_DTYPES), ("gelu", ("", "exact", "tanh", "quick")),
      ("matmul_precision", ("", "high", "highest"))):
    check_known(key, config[key], words)
  check_known("resample", re.sub(r"/[1-9]\d{0,3}$", "", config.resample),
              ("bicubic", "bilinear"))


def _check_numbers(config):
  """Checks the range of each number by itself."""
  for key in ("epochs", "batch_size", "accumulate", "image_size",
              "eval_every"):
    if config[key] < 1:
      raise UserError(f"config.{key} is {config[key]}; give 1 or more")
  for key in ("lr", "warmup_lr", "min_lr", "weight_decay", "k", "blocks",
              "limit", "window", "cache_gib", "in_memory_gib", "workers",
              "adapter_lr", "stage2_lr", "grid_steps", "few_shot", "clip_norm",
              "crop_from", "l2"):
    if not config[key] >= 0:
      raise UserError(f"config.{key} is {config[key]}; give 0 or more")
  if not 0 <= config.label_smoothing < 1:
    raise UserError(f"config.label_smoothing is {config.label_smoothing}; "
                    "give 0 to below 1")
  if not 0 <= config.drop_path < 1:
    raise UserError(
        f"config.drop_path is {config.drop_path}; give 0 to below 1")
  if not 0 < config.smallest_crop <= 1:
    raise UserError(f"config.smallest_crop is {config.smallest_crop}; give "
                    "a share of the area above 0, 1 for no crops")
  if not 1 <= config.crop_aspect <= 10:
    raise UserError(f"config.crop_aspect is {config.crop_aspect}; give 1 to "
                    "10, 4/3 is usual")
  for key, most in (("jitter", 1), ("randaugment", 10), ("erasing", 1),
                    ("mixup", math.inf), ("cutmix", math.inf)):
    if not 0 <= config.augment[key] <= most:
      raise UserError(f"config.augment.{key} is {config.augment[key]}; give 0 "
                      + (f"to {most}" if most < math.inf else "or more"))


def _check_schedule(config):
  """Checks that the warm-up ends within the stage, and its ends lie below."""
  warmup = config.warmup_epochs
  if warmup is not None and not 0 <= warmup < config.epochs:
    raise UserError(f"config.warmup_epochs is {warmup}; give 0 to below "
                    f"config.epochs ({config.epochs}), or None for a tenth")
  if config.settings_of and not config.grid.lr:
    return  # the rate is another variant's, where it is checked
  lowest = min(config.grid.lr or (config.lr,))
  for key in ("warmup_lr", "min_lr"):
    if config[key] > lowest:
      raise UserError(f"config.{key} is {config[key]}, above the learning rate "
                      f"{lowest}; give at most that")


def _check_seeds_and_grid(config):
  """Checks the values of which each makes a run of its own."""
  if not config.seeds or not all(
      isinstance(s, int) and s >= 0 for s in config.seeds):
    raise UserError(f"config.seeds is {config.seeds}; give at least one "
                    "integer >= 0, e.g. --config.seeds=0,1,2")
  if len({*config.seeds}) < len(config.seeds):
    raise UserError(f"config.seeds is {config.seeds}; give each seed once")
  for key, values in config.grid.items():
    if not all(isinstance(v, (int, float)) and v >= 0 for v in values):
      raise UserError(f"config.grid.{key} is {values}; give numbers >= 0, "
                      f"e.g. --config.grid.{key}=1e-3,1e-2")
  grids = (config.grid, *(t.get("grid", {}) for t in config.per_task.values()))
  if config.protocol == "select" and not config.settings_of and not any(
      any(grid.values()) for grid in grids):
    raise UserError("config.protocol is 'select' but config.grid is empty; "
                    "give e.g. --config.grid.lr=1e-3,1e-2")


def _check_settings_of(config):
  """Checks that each variant takes the settings of another one, if any."""
  sources = {label: values.get("settings_of", "")
             for label, values in config.variants.items()}
  for label, source in sources.items():
    chain = [label]
    while source:
      check_known(f"config.variants.{chain[-1]}.settings_of", source, sources)
      if source in chain:
        raise UserError(
            f"config.variants.{label}.settings_of leads back to itself: "
            f"{' -> '.join([*chain, source])}; leave it out of one of them")
      chain.append(source)
      source = sources[source]


def _check_crop_from(config):
  """Checks that crops fit into the training images, and these into `resample`.
  """
  if not config.crop_from:
    return
  if config.crop_from < config.image_size:
    raise UserError(f"config.crop_from is {config.crop_from}, below "
                    f"config.image_size ({config.image_size}); give at least "
                    "that, or 0 for no crops")
  short = int(config.resample.partition("/")[2] or config.crop_from)
  if short < config.crop_from:
    raise UserError(f"config.crop_from is {config.crop_from}, above the short "
                    f"side of config.resample ({config.resample}); give at "
                    "most that")


def _check_present(where, values, like):
  """Checks that no number is nan or inf, and that None is allowed."""
  for key, value in values.items():
    name = f"{where}{key}"
    if hasattr(value, "items") and name in ("variants", "per_task"):
      continue  # checked where they are applied
    if hasattr(value, "items"):
      _check_present(f"{name}.", value, like[key])
    elif value is None and like[key] is not None:
      raise UserError(f"config.{name} is None; give a value, as {like[key]!r}")
    elif any(isinstance(x, float) and not math.isfinite(x)
             for x in (value if isinstance(value, tuple) else (value,))):
      raise UserError(f"config.{name} is {value}; give a finite number")


def _check_per_task(where, holder, config):
  for task, overrides in holder.get("per_task", {}).items():
    _check_keys(f"{where}.per_task.{task}", overrides, config,
                (*SHARED, *OF_A_BASE, "per_task", "method"))
    if "settings_of" in overrides:
      raise UserError(f"{where}.per_task.{task} sets settings_of, which is one "
                      "for all tasks; set config.variants.NAME.settings_of")


def _check_keys(where, overrides, config, refused):
  """Checks the keys of overrides, down to those of sections."""
  if not hasattr(overrides, "items"):
    raise UserError(f"{where} is {overrides!r}; give {{key: value}}")
  for key, value in overrides.items():
    check_known(f"key of {where}", key, config)
    if key in refused:
      raise UserError(f"{where} sets {key}, which all runs share; "
                      f"set config.{key}")
    if key != "per_task" and hasattr(config[key], "items"):
      _check_keys(f"{where}.{key}", value, config[key], ())
