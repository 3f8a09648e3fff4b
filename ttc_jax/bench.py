"""How fast a backbone trains, against what the machine could do.

  python -m ttc_jax.bench --backbone=vit_s14 --size=56 --against=torch

Times the forward pass and the steps of TTC's two stages as `train` compiles
them, on random weights and images, and the matrix products of the same dtype
that set the ceiling. All take turns in one process, so a machine that slows
down slows all of them. The share of the ceiling counts the work that is
needed (`flops_needed`) per second of the median, whatever the program did.
"""
from collections.abc import Callable, Iterable
import functools
import json
import os
import platform
import statistics
import time
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from ttc_jax import backbones, config as config_lib, jobs, main as main_lib
from ttc_jax import methods, optim, parallel, train, trees
from ttc_jax.errors import UserError, check_known
from ttc_jax.model import Model, init_head

_BACKBONE = flags.DEFINE_string("backbone", "vit_s14", "name, as vit_s14")
_SIZE = flags.DEFINE_integer("size", 56, "of the images, pixels a side")
_BATCH = flags.DEFINE_integer("batch", 64, "images a step, on all devices")
_DTYPE = flags.DEFINE_string("dtype", "float32", "float32 or bfloat16")
_GELU = flags.DEFINE_string("gelu", "exact", "exact or tanh")
_AGAINST = flags.DEFINE_string(
    "against", "", "torch: also times eager PyTorch doing the stage-2 step")
_SECONDS = flags.DEFINE_float("seconds", 3.0, "of timing for each program")
_JSON = flags.DEFINE_string("json", "", "file to write the numbers to")

CLASSES = 100
TURNS = 6      # each program's seconds are spread over so many turns
_CEILINGS = {"cpu": (1024, 2048), "gpu": (4096, 8192), "tpu": (4096, 8192)}


class Program(NamedTuple):
  """Something to time.

  Attributes:
    run: does it once and waits for the result.
    work: FLOPs that are needed.
    compile_seconds, temp_bytes, flops: of the compiled program on all
      devices; None where there is none or the backend does not say.
  """
  run: Callable[[], Any]
  work: float
  compile_seconds: float | None = None
  temp_bytes: int | None = None
  flops: float | None = None


def flops_needed(vit: Any, k: int, classes: int) -> dict[str, float]:
  """FLOPs an image: {"forward", "stage 1", "stage 2"}.

  Twice the multiply-adds of the matrix products. With P patches of M = 3 p^2
  numbers, N tokens, L blocks, C classes:

    linear     L N (4 D^2 + 2 D F)     q, k, v, proj and the MLP
    attention  L 2 N^2 D               q k^T and weights v
    forward    2 (P M D + linear + attention + D C)
    stage 1    forward + 2 (linear + 2 attention + 2 D C)
    stage 2    stage 1 + 3 * 2 L N K^2

  The backward pass needs the gradients of the activations, twice those of
  attention and the head since both factors have one, and no gradient of a
  frozen weight. Those of the first block's q, k, v go down to its norm, none
  to the patches. The adapter has all three products.
  """
  patches = (vit.image_size // vit.patch) ** 2
  N, L, D, F = patches + (vit.pool == "cls"), vit.depth, vit.width, vit.hidden
  linear = L * N * (4 * D * D + 2 * D * F)
  attention = L * 2 * N * N * D
  head = D * classes
  forward = 2 * (patches * 3 * vit.patch ** 2 * D + linear + attention + head)
  stage_1 = forward + 2 * (linear + 2 * attention + 2 * head)
  return {"forward": forward, "stage 1": stage_1,
          "stage 2": stage_1 + 3 * 2 * L * N * k * k}


def stage_args(model: Model, stage: methods.Stage, batch: int) -> tuple:
  """What `step_fn` takes: random weights and images, on every device."""
  vit = model.backbone
  params = {"backbone": backbones.init(vit), "adapter": {},
            "head": init_head(vit.width, CLASSES, 0)}
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch, vit.image_size, vit.image_size, 3),
                        dtype=np.uint8)
  labels = rng.integers(0, CLASSES, batch, dtype=np.int32)
  selection = {}
  if stage.prepare:
    params["adapter"], selection = stage.prepare(methods.Context(
        model, params, selection, images, labels, 0))
  tuned, frozen = trees.split(
      params, trees.label(params, stage.rules), "tune")
  tx = optim.make_tx(trees.label(params, stage.rules), lambda step: 0.0, 0.0)
  hyper = train.Hyper(np.float32(1e-3), np.float32(1e-4), np.int32(1),
                      np.int32(100))
  return (*parallel.replicate((
      tuned, tx.init(params), frozen, selection, hyper)),
          *parallel.shard((images, labels)))


def step_fn(model: Model, rules: trees.Rules, plan: train.Plan) -> Callable:
  """The product's own step, on every device."""
  update_fn = train.make_update_fn(model, rules, plan)
  return parallel.pmap(
      lambda *args: update_fn(*args, jax.random.key(0)))


def forward_fn(model: Model) -> Callable:
  """The logits, of the same arguments as a step."""
  def forward(tuned, opt_state, frozen, selection, hyper, images, labels):
    del opt_state, hyper, labels
    return model.logits(trees.join(tuned, frozen), images, selection)
  return parallel.pmap(forward)


def compiled(fn: Callable, args: Iterable, work: float) -> Program:
  """Compiles a pmapped function for its arguments."""
  begin = time.perf_counter()
  program = fn.lower(*args).compile()
  seconds = time.perf_counter() - begin
  memory, cost = program.memory_analysis(), program.cost_analysis()
  devices = len(parallel.devices())
  return Program(
      lambda: jax.block_until_ready(program(*args)), work, seconds,
      memory and memory.temp_size_in_bytes * devices,
      cost and cost.get("flops") and cost["flops"] * devices)


def product(size: int, dtype: Any) -> Program:
  """A square matrix product on every device."""
  x = np.random.default_rng(0).normal(size=(2, size, size)).astype(dtype)
  args = parallel.replicate(tuple(x))
  return compiled(parallel.pmap(jnp.matmul), args,
                  2 * size ** 3 * len(parallel.devices()))


def programs(config: Any, batch: int) -> tuple[methods.Method, dict]:
  """The backbone's programs by name: forward, stage 1, stage 2."""
  vit = backbones.make(config.backbone, config.image_size, gelu=config.gelu,
                       dtype=jnp.dtype(config.dtype))
  config.k = config.k or vit.width // 8
  method = methods.load("ttc", config, vit)
  align, adapt = method.stages
  plan = train.Plan(batch, 0.0, False, 1.0, False)
  model = Model(vit, config.normalisation)
  work = {name: batch * flops
          for name, flops in flops_needed(vit, config.k, CLASSES).items()}
  args = stage_args(model, align, batch)
  out = {"forward": compiled(forward_fn(model), args, work["forward"]),
         "stage 1": compiled(step_fn(model, align.rules, plan), args,
                             work["stage 1"])}
  model = model._replace(handlers=method.handlers)
  out["stage 2"] = compiled(
      step_fn(model, adapt.rules, plan), stage_args(model, adapt, batch),
      work["stage 2"])
  return vit, out


def timings(programs: dict[str, Program],
            seconds: float) -> dict[str, list[list[float]]]:
  """{name: seconds of every run, turn by turn}; a turn's first is warm-up."""
  times = {name: [] for name in programs}
  for _ in range(TURNS):
    for name, program in programs.items():
      program.run()
      times[name].append([])
      end = time.perf_counter() + seconds / TURNS
      while not times[name][-1] or time.perf_counter() < end:
        begin = time.perf_counter()
        program.run()
        times[name][-1].append(time.perf_counter() - begin)
  return times
