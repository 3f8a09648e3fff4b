"""Checks an accelerator against the CPU, and measures how fast it trains.

Equality first: features and gradients of a small ViT and Swin on the device and
on the CPU, attention by the device's fused kernel and by the formula. Then
images/s of both stages, their share of the ceiling (the faster library's matrix
product), memory and seconds of compilation, with attention fused and not,
beside PyTorch on the same device where it has CUDA. Minutes on one GPU or TPU.

  python tools/accelerator.py --json=accelerator.json

The exit status is 1 if something is not equal.
"""
import importlib.util
import json
import os
import sys
from unittest import mock

# PyTorch shares the device, which JAX would otherwise reserve.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from absl import flags  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from ttc_jax import backbones, cli  # noqa: E402
from ttc_jax.backbones import layers  # noqa: E402
from ttc_jax.backbones.swin import Swin  # noqa: E402
from ttc_jax.backbones.vit import ViT  # noqa: E402
from ttc_jax.bench import programs, suite, text, timing  # noqa: E402

_BACKBONE = flags.DEFINE_string("backbone", "vit_b16", "name")
_SIZE = flags.DEFINE_integer("size", 224, "of the images, pixels a side")
_BATCH = flags.DEFINE_integer("batch", 64, "images a step, on all devices")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "float32 or bfloat16")
_STEPS = flags.DEFINE_integer("steps", 8, "of an epoch, in one dispatch")
_SECONDS = flags.DEFINE_float("seconds", 3.0, "of timing for each program")
_JSON = flags.DEFINE_string("json", "", "file to write the numbers to")

# Greatest difference, in parts of the greatest value.
_LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
_SMALL = {
    "ViT": ViT(64, 2, 2, 128, patch=8, image_size=32),
    "Swin": Swin(32, (1, 1), 2, image_size=32, window=4)}


def difference(a, b):
  """Returns the greatest difference of two trees' leaves.

  In parts of the leaf's greatest value, or of a hundredth of the tree's where
  that is more: the gradient of a key's bias is 0, and what is found is noise.
  """
  a, b = ([np.asarray(x, np.float32) for x in jax.tree.leaves(tree)]
          for tree in (a, b))
  least = max(1e-30, max(np.abs(y).max() for y in b) / 100)
  return float(max(np.abs(x - y).max() / max(np.abs(y).max(), least)
                   for x, y in zip(a, b, strict=True)))


def gradients(module, device, noise=0.0):
  """Returns (gradients, features) of four images on a device, in float32.

  `noise` makes the images so much larger, in parts of their own size.
  """
  params = backbones.init(module)
  rng = np.random.default_rng(0)
  images = (1 + noise) * rng.normal(
      size=(4, module.image_size, module.image_size, 3))
  # Not the mean square: after a norm that is 1, and its gradient rounding.
  direction = rng.normal(size=module.width).astype(np.float32)

  def loss_fn(params, images):
    y = module.apply({"params": params}, images)
    return (y @ direction).mean(), y
  arguments = jax.device_put((params, images.astype(np.float32)), device)
  with jax.default_matmul_precision("highest"):
    return jax.jit(jax.grad(loss_fn, has_aux=True))(*arguments)


def beside_cpu(module):
  """Returns the difference of features and gradients, device and CPU."""
  return max(map(difference, gradients(module, jax.local_devices()[0]),
                 gradients(module, jax.devices("cpu")[0])))


def beside_formula(dtype):
  """Returns the difference of attention, fused and not, with its gradients;
  None where it is not fused."""
  q, k, v, g = np.random.default_rng(0).normal(
      size=(4, 2, 197, 128)).astype(dtype)
  if not layers.fused(dtype, 64):
    return None

  def run():
    y, pull = jax.vjp(lambda *x: layers.attention(*x, 2), q, k, v)
    return y, pull(jnp.asarray(g))
  found = run()
  with mock.patch.object(layers, "fused", lambda *_: None):
    return difference(found, run())


def checks(dtype):
  """Returns {name: {"difference", "limit", "equal"}}; None is not checked."""
  found = {f"{name}, float32, device and CPU":
           (beside_cpu(module), _LIMITS["float32"])
           for name, module in _SMALL.items()}
  found[f"attention, {dtype}, fused and formula"] = (
      beside_formula(jnp.dtype(dtype)), _LIMITS[dtype])
  return {name: {"difference": d, "limit": limit,
                 "equal": None if d is None else d <= limit}
          for name, (d, limit) in found.items()}


def other():
  """Returns "torch" where PyTorch can use the device, else ""."""
  if jax.default_backend() != "gpu" or not importlib.util.find_spec("torch"):
    return ""
  import torch
  return "torch" if torch.cuda.is_available() else ""


def measure(against):
  """Returns `timing.measure`'s result of the flags' shape."""
  config = programs.settings(
      backbone=_BACKBONE.value, image_size=_SIZE.value, gelu="exact",
      batch_size=_BATCH.value, dtype=_DTYPE.value)
  return timing.measure(config, against, _STEPS.value, _SECONDS.value)


def keep(found):
  """Writes what there is by now: a lent device may be gone before the end."""
  if _JSON.value:
    suite.write(_JSON.value, found)


def main(argv):
  cli.check_no_arguments(argv)
  found = {"checks": checks(_DTYPE.value)}
  print(json.dumps(found["checks"], indent=2), flush=True)
  keep(found)
  found["measured"] = measure(other())
  print(text.table(found["measured"]), flush=True)
  keep(found)
  if found["checks"][f"attention, {_DTYPE.value}, fused and formula"][
      "equal"] is not None:
    with mock.patch.object(layers, "fused", lambda *_: None):
      found["not fused"] = measure("")
    print("\nattention by the formula:\n" + text.table(found["not fused"]))
    keep(found)
  return int(any(c["equal"] is False for c in found["checks"].values()))


if __name__ == "__main__":
  cli.run(main)
