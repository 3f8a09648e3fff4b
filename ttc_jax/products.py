"""The product of activations and a kernel, as the device computes it fast."""
import math
from typing import Any

import jax


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns x @ kernel: (..., I) and (I, O) -> (..., O).

  On CPU the axes before the last are made one first. Else the gradient of the
  kernel, a sum over several axes, is a product for which XLA of JAX 0.12 has
  no fast code in bfloat16: full tuning of a ViT-Ti/16 is three times as slow.
  Elsewhere the axes stay: on TPU such a change of shape is a copy.
  """
  device = default_device()
  if x.ndim < 3 or getattr(device, "platform", device) != "cpu":
    return x @ kernel
  *rows, inputs = x.shape
  y = x.reshape(math.prod(rows), inputs) @ kernel
  return y.reshape(*rows, kernel.shape[-1])


def default_device() -> Any:
  """Returns the device that is computed on, or the name of its platform, where
  `jax_default_device` is one."""
  config: Any = jax.config  # of whose keys JAX 0.10 declares few
  return config.jax_default_device or jax.local_devices()[0]
