"""The memory of a training step, from the compiled program's own numbers.

The epoch of TTC's second stage is compiled from shapes; nothing is computed.
What it needs on a device is linear in the depth L and in the images b that go
through the model at a time (B / n / accumulate):

  bytes(L, b) = p + q L + b (r + s L)

p and q L are weights, gradients and the optimiser's state, r and s L what the
backward pass keeps. Four small compilations (L = 2, 4; b = 8, 16) give p, q, r
and s of a backbone, and so the largest b for a device.
"""
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttc_jax import (
  backbones,
  cost,
  methods,
  parallel,
  quantisation,
  step,
  trees,
)
from ttc_jax.bench import programs
from ttc_jax.errors import UserError
from ttc_jax.model import Model

DEPTHS, BATCHES = (2, 4), (8, 16)
SHARE = 0.9  # of a device's memory that XLA may have; the driver needs some


def of_step(config: Any, depth: int, batch: int, remat: bool,
            accumulate: int = 1) -> int:
  """Returns the bytes that stage 2 needs on one device, compiled.

  A training set of one step's images is among them.

  Args:
    config: as `programs.settings` returns it.
    depth: of the backbone; 0: its own.
    batch: images a step on one device.
  """
  whole = programs.make_backbone(config)
  backbone = whole.clone(remat=remat, depth=depth or whole.depth)
  method = methods.load("ttc", config, backbone)
  stage, model = method.stages[-1], Model(backbone, "half", method.handlers)
  devices = len(parallel.devices())
  plan, learner, fixed = programs.training(
      model, stage, kept_shapes(backbone, config.frozen_dtype),
      batch * devices, 1, accumulate=accumulate)
  args = (learner, fixed, programs.pictures(backbone, batch * devices),
          jax.random.key_data(jax.random.key(0)), np.int32(0))
  program = step.make_epoch_fn(model, stage.rules, plan).lower(*jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((devices, *jnp.shape(x)), x.dtype),
      args)).compile()
  found = cost.step_bytes(program)
  if found is None:
    raise RuntimeError("XLA gives no memory analysis on this platform")
  return found


def kept_shapes(backbone: Any, dtype: str) -> trees.Tree:
  """Returns the shapes of a backbone's parameters as `quantisation.store` keeps
  them."""
  flat = dict(trees.flatten(backbones.shapes(backbone)))
  if dtype == "float32":
    return trees.unflatten(flat)
  for name, inputs in quantisation.kernels(backbone).items():
    shape = flat[name].shape
    flat[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    if dtype == "int8":
      flat[quantisation.scale_of(name)] = jax.ShapeDtypeStruct(
          shape[inputs:], jnp.float32)
  return trees.unflatten(flat)


def line(config: Any, remat: bool) -> np.ndarray:
  """Returns (p, q, r, s) of the formula above, in bytes."""
  rows = [(1, depth, batch, batch * depth)
          for depth in DEPTHS for batch in BATCHES]
  found = [of_step(config, depth, batch, remat)
           for depth in DEPTHS for batch in BATCHES]
  return np.linalg.solve(np.array(rows, float), np.array(found, float))


def total(terms: np.ndarray, depth: int, batch: int) -> float:
  """Returns bytes(L, b)."""
  return float(terms @ (1, depth, batch, batch * depth))


def largest(terms: np.ndarray, depth: int, limit: float) -> int:
  """Returns the largest power of two b that needs at most `limit` bytes; 0
  where not even one image fits."""
  if total(terms, depth, 1) > limit:
    return 0
  batch = 1
  while total(terms, depth, 2 * batch) <= limit:
    batch *= 2
  return batch


# --- What is printed ----------------------------------------------------------

def report(config: Any, of: str, remat: bool,
           accumulate: int) -> tuple[dict[str, Any], str]:
  """Returns (JSON, text) of `--memory`.

  Args:
    of: sizes of devices in GB (10^9 bytes), as "16,80"; or "step".

  Raises:
    UserError: another text, or a batch that does not divide.
  """
  if of == "step":
    batch, parts = config.batch_size // len(parallel.devices()), accumulate
    if parts < 1 or batch % parts:
      raise UserError(f"{batch} images a device do not divide into "
                      f"--accumulate={parts} parts")
    found = of_step(config, 0, batch, remat, parts)
    return {"bytes": found}, (
        f"{batch} images in {parts} parts, {'with' if remat else 'without'} "
        f"remat: {found / 1e9:.2f} GB on each device")
  sizes = _sizes(of)
  rows = [_row(config, remat, sizes) for remat in (False, True)]
  lines = [f"{row['remat']!s:>6}{row['fixed'] / 1e9:11.2f}"
           f"{row['image'] / 1e6:13.1f}" + "".join(
               f"{row[f'{size:g}']:13}" for size in sizes) for row in rows]
  head = f"{'remat':>6}{'fixed GB':>11}{'MB an image':>13}" + "".join(
      f"{f'b in {size:g} GB':>13}" for size in sizes)
  return {"rows": rows}, "\n".join([head, *lines])


def _sizes(text):
  try:
    sizes = [float(part) for part in text.split(",")]
  except ValueError:
    sizes = []
  if not sizes or min(sizes) <= 0:
    raise UserError(f"--memory={text!r}: give GB of devices, as 16,80, or step")
  return sizes


def _row(config, remat, sizes):
  """Fixed bytes, bytes an image, and the largest b of each size, in GB."""
  depth, terms = programs.make_backbone(config).depth, line(config, remat)
  fixed, one = total(terms, depth, 0), total(terms, depth, 1)
  return {"remat": remat, "fixed": fixed, "image": one - fixed} | {
      f"{size:g}": largest(terms, depth, SHARE * size * 1e9) for size in sizes}
