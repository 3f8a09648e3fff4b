"""Cost of a tuned model at inference, and memory of a training step."""
from typing import Any

import jax
import jax.numpy as jnp

from ttc_jax import trees
from ttc_jax.errors import UserError
from ttc_jax.model import Model


def counter() -> jax.Device:
  """Returns the device for which `flops` counts: a CPU, wherever runs train.

  JAX counts a program before optimisation for no other one, and a GPU's kernel
  of attention would be left out.

  Raises:
    UserError: JAX was told to use none.
  """
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    raise UserError(
        "FLOPs are counted on the CPU, which JAX was told not to use: add it "
        "to JAX_PLATFORMS, e.g. cuda,cpu") from None


def shapes(tree: trees.Tree) -> trees.Tree:
  """Returns the tree with every array replaced by its shape and dtype."""
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def flops(model: Model, params: trees.Tree, buffers: trees.Tree) -> float:
  """Returns the FLOPs of the logits of one image.

  As XLA counts them in the program before optimisation: matrix products, sums
  and all elementwise operations, without transcendental functions. Nothing is
  computed: the leaves of `params` and `buffers` may be shapes.
  """
  size = model.backbone.image_size
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
  with jax.default_device(counter()):
    analysis = jax.jit(lambda *args: model.logits(*args)).lower(
        shapes(params), image, shapes(buffers)).cost_analysis()
  assert analysis is not None  # on a CPU
  return analysis["flops"]


def step_bytes(program: Any) -> int | None:
  """Returns the bytes that a compiled program needs on one device.

  The sum of its inputs, outputs and temporary buffers, without outputs that
  reuse an input. None if the platform gives no memory analysis, or the program
  spans hosts.
  """
  if not hasattr(program, "memory_analysis"):  # see `step.compiled`
    return None
  memory = program.memory_analysis()
  return memory and (
      memory.argument_size_in_bytes + memory.output_size_in_bytes
      + memory.temp_size_in_bytes - memory.alias_size_in_bytes)
