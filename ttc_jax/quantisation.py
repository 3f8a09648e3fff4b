"""How frozen kernels are kept: in float32, in bfloat16, or in int8 with scales.

What is kept in fewer bits are the kernels of the backbone's linear layers
(`layers.Dense`), most of its bytes. Norms, biases, tokens and positions stay
float32, and so does all that is tuned: adapter, head, tuned leaves. A product
widens a kernel when it is computed.

  bfloat16  w rounded to 8 significant bits: half the bytes
  int8      weight-only, symmetric, by output channel i: w_ij = s_i q_ij with
            s_i = max_j |w_ij| / 127, so |w_ij - s_i q_ij| <= s_i / 2: a quarter
            of the bytes. The scale s_i is a factor on row i as the mask is:
            y = (x q) s + b, see `layers.Dense`

In a tree of parameters the kernel keeps its name and shape; an int8 kernel has
the leaf "kernel_scale" beside it, of the shape of the outputs.
"""
from collections.abc import Callable, Mapping
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ttc_jax import backbones, trees
from ttc_jax.backbones import layers

_LARGEST = 127  # of a symmetric int8


@functools.cache
def kernels(backbone: Any) -> Mapping[str, int]:
  """Returns {name: number of its first axes that are inputs} of the kernels of
  the linear layers of a backbone; nothing is computed."""
  found: dict[str, int] = {}

  def note(call, args, kwargs, context):
    if isinstance(context.module, layers.Dense):
      name = "/".join((*context.module.path, "kernel"))
      found[name] = context.module.contract
    return call(*args, **kwargs)
  with nn.intercept_methods(note):
    backbones.shapes(backbone)
  return found


def store(params: trees.Tree, backbone: Any, dtype: str) -> trees.Tree:
  """Returns a backbone's parameters with its kernels kept in a dtype.

  Args:
    params: of the backbone, float32; the arrays returned are numpy's.
    dtype: one of `config.FROZEN_DTYPES`.
  """
  if dtype == "float32":
    return params
  flat = dict(trees.flatten(params))
  for name, inputs in kernels(backbone).items():
    kernel = np.asarray(flat[name])
    if dtype == "bfloat16":
      flat[name] = kernel.astype(ml_dtypes.bfloat16)
    else:
      flat[name], flat[scale_of(name)] = quantise(kernel, inputs)
  return trees.unflatten(flat)


def scale_of(kernel: str) -> str:
  """Returns the name of the scales of a kernel's int8 values."""
  return f"{kernel.removesuffix('kernel')}{layers.SCALE}"


def quantise(kernel: np.ndarray, inputs: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (q, s), int8 of the kernel's shape and float32 of its outputs.

  Args:
    kernel: float32; its first `inputs` axes are inputs.
  """
  within = tuple(range(inputs))
  scale = (np.abs(kernel).max(within) / _LARGEST).astype(np.float32)
  scale = np.where(scale > 0, scale, np.float32(1))
  # In float64 the quotient is rounded to the nearest integer, whatever it is.
  q = np.rint(kernel.astype(np.float64) / scale)
  return q.clip(-_LARGEST, _LARGEST).astype(np.int8), scale


def restore(params: trees.Tree) -> trees.Tree:
  """Returns the parameters in float32, an int8 kernel as s q; the inverse of
  `store` but for its rounding. In numpy or traced, as the leaves are."""
  flat = trees.flatten(params)
  found = {}
  for name, x in flat.items():
    if name.endswith(f"/{layers.SCALE}"):
      continue
    if x.dtype == jnp.int8:
      x = x.astype(jnp.float32) * flat[scale_of(name)]
    found[name] = x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
  return trees.unflatten(found)


def merge(fold: Callable[..., trees.Tree], params: trees.Tree,
          buffers: trees.Tree, backbone: Any) -> trees.Tree:
  """Returns the merged parameters of a backbone whose kernels are kept.

  The kernels that the adapter folds into become float32, which holds the merged
  kernel exactly; all others stay as they are kept.

  Args:
    fold: `merge` of a method, which sees kernels in float32.
  """
  kept = trees.flatten(params["backbone"])
  whole = restore(params["backbone"])
  merged = trees.flatten(
      fold(params | {"backbone": whole}, buffers, backbone))
  before = trees.flatten(whole)
  found = {}
  for name, x in merged.items():
    found[name] = kept[name] if x is before[name] else x
    if found[name].dtype == jnp.int8:
      found[scale_of(name)] = kept[scale_of(name)]
  return trees.unflatten(found)
