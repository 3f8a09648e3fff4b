"""What the benchmark times, compiled, and the FLOPs that it needs."""
from collections.abc import Callable
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttc_jax import (
  backbones,
  methods,
  optim,
  parallel,
  quantisation,
  step,
  trees,
)
from ttc_jax import config as config_lib
from ttc_jax.errors import UserError, check_known
from ttc_jax.model import Model, init_head

CLASSES = 100
_PRODUCTS = {"cpu": (1024, 2048)}  # sizes; other platforms have the larger ones
_LARGE = (4096, 8192)


class Program(NamedTuple):
  """A program to time.

  Attributes:
    run: runs all steps once and waits for the result.
    work: FLOPs that a step needs, see `flops_needed`.
    steps: training steps, or 1, of a run.
    compile_seconds, temp_bytes, argument_bytes, flops: of the compiled program
      on all devices; None where nothing is compiled or the backend does not
      say. The arguments are the weights, the images, and of a stage the
      optimiser's state; `temp_bytes` of PyTorch is the peak of all. XLA counts
      the FLOPs of a loop's body once: they are those of a step.
  """
  run: Callable[[], Any]
  work: float
  steps: int = 1
  compile_seconds: float | None = None
  temp_bytes: int | None = None
  argument_bytes: int | None = None
  flops: float | None = None


def settings(**values: Any) -> Any:
  """Returns the checked configuration of a TTC run.

  Args:
    **values: of the configuration's keys: backbone, image_size, batch_size,
      dtype, frozen_dtype and gelu.

  Raises:
    UserError: a value that does not fit.
  """
  config = config_lib.default()
  config.update(values | {"score": "random"})
  config_lib.check(config)
  check_known("gelu", config.gelu, ("exact", "tanh"))
  if config.batch_size % len(parallel.devices()):
    raise UserError(f"--batch={config.batch_size} does not divide among the "
                    f"{len(parallel.devices())} devices")
  return config


def make_backbone(config: Any) -> Any:
  """Returns the Linen module; sets `config.k` to the backbone's default."""
  backbone: Any = backbones.make(
      config.backbone, config.image_size, gelu=config.gelu,
      dtype=jnp.dtype(config.dtype))
  config.k = backbone.default_k
  return backbone


def flops_needed(backbone: Any, k: int, classes: int) -> dict[str, float]:
  """Returns FLOPs an image: {"forward", "stage 1", "stage 2"}.

  Twice the multiply-adds of the matrix products, of the backbone's `work` and
  a head D C:

    forward    2 (patches + linear + attention + D C)
    stage 1    forward + 2 (linear + 2 attention + 2 D C)
    stage 2    stage 1 + 3 * 2 T K^2, T the tokens of the adapted blocks

  The backward pass needs the gradients of the activations, twice those of
  attention and the head since both factors have one, and no gradient of a
  frozen weight. Those of the first block's q, k, v go down to its norm, none
  to the patches. The adapter has all three products.
  """
  work, head = backbone.work, backbone.width * classes
  forward = 2 * (work.patches + work.linear + work.attention + head)
  stage_1 = forward + 2 * (work.linear + 2 * work.attention + 2 * head)
  adapted = sum(work.outputs[-backbone.default_blocks:])
  return {"forward": forward, "stage 1": stage_1,
          "stage 2": stage_1 + 3 * 2 * adapted * k * k}


def of_backbone(backbone: Any, config: Any,
                steps: int) -> dict[str, Program]:
  """Compiles {"forward", "stage 1", "stage 2"}, on random weights."""
  method = methods.load("ttc", config, backbone)
  align, adapt = method.stages
  batch = config.batch_size
  model = Model(backbone, "half")
  adapted = model._replace(handlers=method.handlers)
  work = {name: batch * flops
          for name, flops in flops_needed(backbone, config.k, CLASSES).items()}
  base = quantisation.store(
      backbones.init(backbone), backbone, config.frozen_dtype)
  return {
      "forward": forward(model, base, batch, work["forward"]),
      "stage 1": epoch(model, align, base, batch, steps, work["stage 1"]),
      "stage 2": epoch(adapted, adapt, base, batch, steps, work["stage 2"])}


def forward(model: Model, base: trees.Tree, batch: int, work: float) -> Program:
  """The logits of a batch by the backbone parameters `base`, not adapted."""
  params = _params(model.backbone, base)
  images, _ = pictures(model.backbone, batch)
  program, measured = compiled(
      parallel.pmap(lambda params, images: model.logits(params, images, {})),
      args := (parallel.replicate(params), *parallel.shard((images,))))
  return Program(
      lambda: jax.block_until_ready(program(*args)), work, 1, *measured)


def epoch(model: Model, stage: methods.Stage, base: trees.Tree, batch: int,
          steps: int, work: float) -> Program:
  """An epoch of a stage, the program that `train` runs: all steps in one
  dispatch."""
  plan, learner, fixed = training(model, stage, base, batch, steps)
  images, labels = pictures(model.backbone, batch * steps)
  learner, *rest = parallel.replicate((
      learner, fixed, (images, labels),
      jax.random.key_data(jax.random.key(0)), np.int32(0)))
  program, measured = compiled(
      step.make_epoch_fn(model, stage.rules, plan), (learner, *rest))

  def run():
    nonlocal learner  # donated: the next run continues from its result
    learner, losses = program(learner, *rest)
    jax.block_until_ready(losses)
  return Program(run, work, steps, *measured)


def training(model: Model, stage: methods.Stage, base: trees.Tree, batch: int,
             steps: int, **settings: Any
             ) -> tuple[step.Plan, step.Learner, step.Fixed]:
  """Returns what a stage starts from, before it is copied to the devices.

  Args:
    base: the backbone's parameters, or their shapes: then what depends on them
      is shapes too.
    steps: of an epoch.
    **settings: further keys of the configuration, as accumulate.
  """
  params = _params(model.backbone, base)
  buffers: trees.Tree = {}
  if stage.prepare:  # it draws at random: no image is read
    params["adapter"], buffers = stage.prepare(methods.Context(
        model, params, buffers, *pictures(model.backbone, 0), 0))
  names = trees.label(params, stage.rules)
  tuned, frozen = trees.split(params, names, "tune")
  zero = jnp.zeros(())
  init = optim.make_tx(names, lambda step: zero, zero).init
  of_shapes = isinstance(jax.tree.leaves(base)[0], jax.ShapeDtypeStruct)
  opt_state = jax.eval_shape(init, params) if of_shapes else init(params)
  config = config_lib.resolved(config_lib.default())
  config.update(dict(batch_size=batch, **settings))
  return (step.make_plan(config), step.Learner(tuned, opt_state),
          step.Fixed(frozen, buffers, step.make_hyper(config, steps, CLASSES)))


def products(dtype: Any) -> dict[str, Program]:
  """Square matrix products on every device, which set the ceiling."""
  return {f"product {size}": _product(size, dtype) for size in product_sizes()}


def product_sizes() -> tuple[int, ...]:
  """Returns the sizes of the matrix products of this platform."""
  return _PRODUCTS.get(jax.default_backend(), _LARGE)


def _product(size, dtype):
  x = np.random.default_rng(0).normal(size=(2, size, size)).astype(dtype)
  args = parallel.replicate(tuple(x))
  program, measured = compiled(parallel.pmap(jnp.matmul), args)
  return Program(lambda: jax.block_until_ready(program(*args)),
                 2 * size ** 3 * len(parallel.devices()), 1, *measured)


def compiled(fn: Any, args: tuple) -> tuple[Callable, tuple]:
  """Compiles a pmapped function.

  Returns:
    The program, and (seconds, temp_bytes, argument_bytes, flops) as in
    `Program`.
  """
  begin = time.perf_counter()
  program = fn.lower(*args).compile()
  seconds = time.perf_counter() - begin
  memory, cost = program.memory_analysis(), program.cost_analysis()
  devices = len(parallel.devices())
  return program, (
      seconds, memory and memory.temp_size_in_bytes * devices,
      memory and memory.argument_size_in_bytes * devices,
      cost and cost.get("flops") and cost["flops"] * devices)


def _params(backbone, base):
  return {"backbone": base, "adapter": {},
          "head": init_head(backbone.width, CLASSES, 0)}


def pictures(backbone: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns random images (N, S, S, 3) uint8 and labels (N,)."""
  rng, size = np.random.default_rng(0), backbone.image_size
  return (rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
          rng.integers(0, CLASSES, count, dtype=np.int32))
