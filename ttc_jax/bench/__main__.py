"""How fast a backbone trains, against what the machine could do.

  python -m ttc_jax.bench --backbone=vit_s14 --size=56 --against=torch

Times the forward pass, the epochs of TTC's two stages as `train` compiles
them (many steps in one dispatch), on random weights and images, and the matrix
products of the same dtype that set the ceiling. All take turns in one process,
and what is compared is compared within a turn, so that a machine which slows
down slows both sides.
The share of the ceiling counts the work that is needed (`flops_needed`), not
what the compiled program does, which is printed beside it.
"""
from collections.abc import Callable
import json
import os
import platform
import statistics
import time
from typing import Any, NamedTuple

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ttc_jax import backbones, cli, config as config_lib
from ttc_jax import methods, optim, parallel, train, trees
from ttc_jax.runs import plan as jobs
from ttc_jax.errors import UserError, check_known
from ttc_jax.model import Model, init_head

_BACKBONE = flags.DEFINE_string("backbone", "vit_s14", "name, as vit_s14")
_SIZE = flags.DEFINE_integer("size", 56, "of the images, pixels a side")
_BATCH = flags.DEFINE_integer("batch", 64, "images a step, on all devices")
_STEPS = flags.DEFINE_integer("steps", 8, "of an epoch, in one dispatch")
_DTYPE = flags.DEFINE_string("dtype", "float32", "float32 or bfloat16")
_GELU = flags.DEFINE_string("gelu", "exact", "exact or tanh")
_AGAINST = flags.DEFINE_string(
    "against", "", "torch: also times eager PyTorch doing the stage-2 step")
_SECONDS = flags.DEFINE_float("seconds", 3.0, "of timing for each program")
_JSON = flags.DEFINE_string("json", "", "file to write the numbers to")

CLASSES = 100
TURNS = 6      # each program's seconds are spread over so many turns
_PRODUCTS = {"cpu": (1024, 2048)}  # sizes; others have the larger ones
_LARGE = (4096, 8192)


class Program(NamedTuple):
  """Something to time.

  Attributes:
    run: does it once, all its steps, and waits for the result.
    work: FLOPs that a step needs.
    compile_seconds, temp_bytes, flops: of the compiled program on all
      devices; None where there is none or the backend does not say. XLA
      counts the FLOPs of a loop's body once: they are a step's.
  """
  run: Callable[[], Any]
  work: float
  steps: int = 1
  compile_seconds: float | None = None
  temp_bytes: int | None = None
  flops: float | None = None


def flops_needed(backbone: nn.Module, k: int,
                 classes: int) -> dict[str, float]:
  """FLOPs an image: {"forward", "stage 1", "stage 2"}.

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


def inputs(backbone: nn.Module, images: int) -> tuple[np.ndarray, np.ndarray]:
  """Random images (N, S, S, 3) uint8 and labels (N,)."""
  rng, size = np.random.default_rng(0), backbone.image_size
  return (rng.integers(0, 256, (images, size, size, 3), dtype=np.uint8),
          rng.integers(0, CLASSES, images, dtype=np.int32))


def forward(model: Model, base: trees.Tree, batch: int, work: float) -> Program:
  """The logits of a batch of the backbone `base`, nothing adapted."""
  params = {"backbone": base, "adapter": {},
            "head": init_head(model.backbone.width, CLASSES, 0)}
  images, _ = inputs(model.backbone, batch)
  program, cost = compiled(
      parallel.pmap(lambda params, images: model.logits(params, images, {})),
      args := (parallel.replicate(params), *parallel.shard((images,))))
  return Program(lambda: jax.block_until_ready(program(*args)), work, 1, *cost)


def epoch(model: Model, stage: methods.Stage, base: trees.Tree, batch: int,
          steps: int, work: float) -> Program:
  """The product's own epoch of a stage."""
  backbone = model.backbone
  params = {"backbone": base, "adapter": {},
            "head": init_head(backbone.width, CLASSES, 0)}
  images, labels = inputs(backbone, batch * steps)
  buffers = {}
  if stage.prepare:
    params["adapter"], buffers = stage.prepare(methods.Context(
        model, params, buffers, images, labels, 0))
  names = trees.label(params, stage.rules)
  tuned, frozen = trees.split(params, names, "tune")
  opt_state = optim.make_tx(names, lambda step: 0.0, 0.0).init(params)
  hyper = train.Hyper(np.float32(1e-3), np.float32(1e-4), np.int32(1),
                      np.int32(100), np.int32(CLASSES))
  state = parallel.replicate((tuned, opt_state))
  fixed = parallel.replicate((
      frozen, buffers, (images, labels), hyper,
      jax.random.key_data(jax.random.key(0)), np.int32(0)))
  plan = train.Plan(batch, 0.0, False, 1.0, False)
  program, cost = compiled(
      train.make_epoch_fn(model, stage.rules, plan), (*state, *fixed))

  def run():
    nonlocal state  # donated: the next run goes on from this one's
    *state, losses = program(*state, *fixed)
    jax.block_until_ready(losses)
  return Program(run, work, steps, *cost)


def compiled(fn: Callable, args: tuple) -> tuple[Callable, tuple]:
  """-> (the compiled pmapped function, (seconds, temp_bytes, flops))."""
  begin = time.perf_counter()
  program = fn.lower(*args).compile()
  seconds = time.perf_counter() - begin
  memory, cost = program.memory_analysis(), program.cost_analysis()
  devices = len(parallel.devices())
  return program, (
      seconds, memory and memory.temp_size_in_bytes * devices,
      cost and cost.get("flops") and cost["flops"] * devices)


def product(size: int, dtype: Any) -> Program:
  """A square matrix product on every device."""
  x = np.random.default_rng(0).normal(size=(2, size, size)).astype(dtype)
  args = parallel.replicate(tuple(x))
  program, cost = compiled(parallel.pmap(jnp.matmul), args)
  return Program(lambda: jax.block_until_ready(program(*args)),
                 2 * size ** 3 * len(parallel.devices()), 1, *cost)


def settings() -> Any:
  """The configuration of a TTC run, with the flags' values; checked."""
  config = config_lib.default()
  config.update(dict(
      backbone=_BACKBONE.value, image_size=_SIZE.value, batch_size=_BATCH.value,
      dtype=_DTYPE.value, gelu=_GELU.value, score="random"))
  config_lib.check(config)
  check_known("gelu", config.gelu, ("exact", "tanh"))
  if config.batch_size % len(parallel.devices()):
    raise UserError(f"--batch={config.batch_size} does not divide among the "
                    f"{len(parallel.devices())} devices")
  return config


def make_backbone(config: Any) -> nn.Module:
  """The backbone; settles `config.k`."""
  backbone = backbones.make(
      config.backbone, config.image_size, gelu=config.gelu,
      dtype=jnp.dtype(config.dtype))
  config.k = backbone.default_k
  return backbone


def backbone_programs(backbone: nn.Module, config: Any,
                      steps: int) -> dict[str, Program]:
  """{"forward", "stage 1", "stage 2"}, compiled."""
  method = methods.load("ttc", config, backbone)
  align, adapt = method.stages
  batch = config.batch_size
  model = Model(backbone, config.normalisation)
  adapted = model._replace(handlers=method.handlers)
  work = {name: batch * flops
          for name, flops in flops_needed(backbone, config.k, CLASSES).items()}
  base = backbones.init(backbone)
  return {
      "forward": forward(model, base, batch, work["forward"]),
      "stage 1": epoch(model, align, base, batch, steps, work["stage 1"]),
      "stage 2": epoch(adapted, adapt, base, batch, steps, work["stage 2"])}


def timings(programs: dict[str, Program],
            seconds: float) -> dict[str, list[list[float]]]:
  """{name: seconds a step of every run, turn by turn}; the first warms up."""
  times = {name: [] for name in programs}
  for _ in range(TURNS):
    for name, program in programs.items():
      program.run()
      times[name].append([])
      end = time.perf_counter() + seconds / TURNS
      while not times[name][-1] or time.perf_counter() < end:
        begin = time.perf_counter()
        program.run()
        seconds_run = time.perf_counter() - begin
        times[name][-1].append(seconds_run / program.steps)
  return times


def measure(config: Any, against: str, steps: int,
            seconds: float) -> dict[str, Any]:
  """Everything that is printed, as JSON.

  The ceiling is in FLOP/s and, like a row's share of it, the median over the
  turns; a number that there is not is None.
  """
  if against:
    from ttc_jax.bench import torch as bench_torch  # an extra; missed before the long work
  backbone = make_backbone(config)
  ours, theirs = backbone_programs(backbone, config, steps), {}
  if against:
    theirs = {"stage 2, torch": Program(
        bench_torch.make_step(backbone, config, CLASSES), ours["stage 2"].work)}
  sizes = _PRODUCTS.get(jax.default_backend(), _LARGE)
  products = {f"product {n}": product(n, jnp.dtype(config.dtype))
              for n in sizes}
  everything = products | ours | theirs
  times = timings(everything, seconds)
  ceilings = [max(rates) for rates in zip(*(
      _rates(p, times[name]) for name, p in products.items()))]
  rows = [_row(name, everything[name], times[name], config.batch_size,
               ceilings) for name in ours | theirs]
  return {"machine": _machine(), "versions": _versions(against),
          "settings": config.to_dict() | {"against": against, "steps": steps},
          "ceiling_by_turn": ceilings, "ceiling": statistics.median(ceilings),
          "rows": rows,
          "times_as_fast": _times_as_fast(
              times["stage 2"], times["stage 2, torch"]) if theirs else None}


def _rates(program, turns):
  """FLOP/s of the needed work, turn by turn."""
  return [program.work / statistics.median(runs) for runs in turns]


def _times_as_fast(ours, theirs):
  """Median over the turns of how much less time our median run takes."""
  return statistics.median(
      statistics.median(b) / statistics.median(a) for a, b in zip(ours, theirs))


def _row(name, program, turns, batch, ceilings):
  runs = sum(turns, [])
  median = statistics.median(runs)
  shares = [r / c for r, c in zip(_rates(program, turns), ceilings)]
  return {"name": name, "images_per_second": batch / median,
          "median_seconds": median, "min_seconds": min(runs),
          "runs": len(runs), "compile_seconds": program.compile_seconds,
          "temp_bytes": program.temp_bytes, "flops_compiled": program.flops,
          "flops_needed": program.work,
          "share_of_ceiling": statistics.median(shares)}


def _machine():
  device = parallel.devices()[0]
  return {"devices": len(parallel.devices()), "kind": device.device_kind,
          "platform": device.platform, "cores": os.cpu_count(),
          "processor": platform.processor() or platform.machine()}


def _versions(against):
  versions = dict(jobs.versions())
  if against:
    import torch
    versions["torch"] = torch.__version__
  return versions


_COLUMNS = (  # title, key, unit, decimals
    ("images/s", "images_per_second", 1, 1),
    ("median ms", "median_seconds", 1e-3, 1),
    ("min ms", "min_seconds", 1e-3, 1),
    ("compile s", "compile_seconds", 1, 1),
    ("temp MiB", "temp_bytes", 2 ** 20, 1),
    ("GFLOP compiled", "flops_compiled", 1e9, 2),
    ("GFLOP needed", "flops_needed", 1e9, 2),
    ("% of ceiling", "share_of_ceiling", 1e-2, 1),
)


def table(result: dict[str, Any]) -> str:
  """What is printed of `measure`'s result."""
  def cell(row, key, unit, decimals):
    value = row[key]
    return "n/a" if value is None else f"{value / unit:.{decimals}f}"
  cells = [["", *(title for title, *_ in _COLUMNS)]]
  cells += [[row["name"], *(cell(row, *column) for _, *column in _COLUMNS)]
            for row in result["rows"]]
  widths = [max(map(len, column)) for column in zip(*cells)]
  lines = ["  ".join([line[0].ljust(widths[0]),
                      *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
           for line in cells]
  return "\n".join([*_heading(result), "", *lines, *_verdict(result)])


def _heading(result):
  s, m, turns = (result[k] for k in ("settings", "machine", "ceiling_by_turn"))
  return [
      f"{s['backbone']} at {s['image_size']} px, batch {s['batch_size']}, "
      f"{s['dtype']}, {s['gelu']} GELU, K = {s['k']}; {m['devices']} x "
      f"{m['kind']}, {m['cores']} cores",
      f"ceiling: {result['ceiling'] / 1e9:.1f} GFLOP/s, the best matrix "
      f"product; {min(turns) / 1e9:.1f} to {max(turns) / 1e9:.1f} from turn to "
      "turn"]


def _verdict(result):
  if not result["times_as_fast"]:
    return []
  return ["", f"stage 2 is {result['times_as_fast']:.2f} times as fast as "
          f"eager PyTorch {result['versions']['torch']}"]


def main(argv: list[str]) -> int:
  del argv
  if _AGAINST.value:
    check_known("--against", _AGAINST.value, ("torch",))
  result = measure(
      settings(), _AGAINST.value, _STEPS.value, _SECONDS.value)
  print(table(result))
  if _JSON.value:
    try:
      with open(_JSON.value, "w", encoding="utf-8") as f:
        json.dump(result, f, indent=2)
    except OSError as e:
      raise UserError(f"--json={_JSON.value} cannot be written: {e}") from e
  return 0


if __name__ == "__main__":
  cli.run(main)
