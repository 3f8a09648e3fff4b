"""What a tuned model costs where it is used."""
from typing import Any

import jax
import jax.numpy as jnp

from ttc_jax import trees
from ttc_jax.model import Model


def shapes(tree: trees.Tree) -> trees.Tree:
  """Shapes and dtypes in place of arrays."""
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def flops(model: Model, params: trees.Tree, buffers: trees.Tree) -> float:
  """FLOPs of the logits of one image, as XLA counts the program before it
  optimises: products, sums and all elementwise work, no transcendentals.

  Nothing is computed: `params` and `buffers` may be shapes.
  """
  size = model.backbone.image_size
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
  lowered = jax.jit(lambda *args: model.logits(*args)).lower(
      shapes(params), image, shapes(buffers))
  return lowered.cost_analysis()["flops"]


def step_bytes(program: Any) -> int | None:
  """Memory of a compiled program on one device: what goes in, what comes out
  and what it needs meanwhile; None where the backend does not say."""
  memory = program.memory_analysis()
  return memory and (
      memory.argument_size_in_bytes + memory.output_size_in_bytes
      + memory.temp_size_in_bytes - memory.alias_size_in_bytes)
