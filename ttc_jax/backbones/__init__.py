"""Backbones: `module, params = load("vit_s14", weights=PATH, image_size=70)`.

The folder is the registry: one file adds a family of backbones, and no other
file names it. `vit.py` and `swin.py` are the examples. The file declares:

  make(name, image_size, **fields)
      Returns the Linen module of that name, or None if the family does not
      have the name. A field that is not given keeps its default.
  canonical(name)
      Returns the family's name for a name that another library has, or None.
  examples()
      Names to show a user.
  FIELDS: {field: layers.Field}
      The module's fields that belong to its weights, with the values they may
      have: our own weights files and bundles keep them.
  PARAMETERS: {pattern of names: kind}
      Parameters that are fitted to the module; all others are taken as they
      are. The kinds:
        "tokens"  (1, T, D), learnt tokens before the patches; the file's
                  tokens fill these parameters in this order
        "grid"    (1, n * n, D), positions of n x n patches, resized to the
                  module's grid; positions of tokens are added to the tokens
        "window"  ((2 w - 1)^2, H), biases by offset, resized to its window
        "patch"   (p, p, 3, D), the patch embedding, resized if the user asks
  identify(shape)
      Returns a `layers.Identity`, or None where the shapes are not of this
      family. `shape(name)` is the shape of one of our parameters in a file, or
      None; head axes are merged, (D, D) for (D, H, D / H), in fused files.

The module is a dataclass whose attributes are those of `vit.ViT`: image_size,
patch, gelu, epsilon, drop_path, every_token, dtype, and the properties width,
depth, prefix, pool, fields, sites, norms, work, block_of, default_k,
default_blocks, takes_prompts and pads. Methods read nothing else of it.
"""
import functools
import importlib
import pkgutil
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttc_jax import trees
from ttc_jax.errors import UserError, check_known


def families() -> list[ModuleType]:
  """Returns the modules of this folder that make backbones."""
  modules = [importlib.import_module(f"{__name__}.{m.name}")
             for m in pkgutil.iter_modules(__path__)]
  return [m for m in modules if hasattr(m, "make")]


def make(name: str, image_size: int, **fields: Any) -> nn.Module:
  """Returns a backbone without parameters.

  Args:
    name: e.g. "vit_b16" or "swin_ti", or one that `canonical` knows.
    image_size: pixels a side, a multiple of the patch.
    **fields: of the module, e.g. gelu="exact", drop_path=0.1.

  Raises:
    UserError: no family has the name, the module lacks a field, or the patch
      does not divide the image.

  Example:
    >>> module = backbones.make("vit_s16", 224)
    >>> params = backbones.init(module)
    >>> features = module.apply({"params": params}, images)  # (B, 384)
  """
  name = canonical(name)
  for family in families():
    module = family.make(name, image_size)
    if module is not None:
      for field in fields:
        if not hasattr(module, field):
          raise UserError(f"{name} has no field {field!r}")
      _check_size(name, module.patch, image_size)
      return family.make(name, image_size, **fields)
  check_known("backbone", name, [n for f in families() for n in f.examples()])
  raise ValueError(f"a family has the example {name!r}, but does not make it")


def canonical(name: str) -> str:
  """Returns our name of a backbone that timm, Hugging Face or Big Vision name
  in another way; names that no family knows are returned as they are.

  The name stands for the sizes alone. Weights, and all that depends on them,
  come from a file.

  Example:
    >>> [backbones.canonical(name) for name in (
    ...     "vit_base_patch16_224", "ViT-B/16", "google/vit-base-patch16-224")]
    ['vit_b16', 'vit_b16', 'vit_b16']
  """
  found = (family.canonical(name) for family in families())
  return next((ours for ours in found if ours), name)


def _check_size(name, patch, image_size):
  if image_size >= 1 and image_size % patch == 0:
    return
  below = max(0, image_size // patch * patch)
  near = [size for size in (below, below + patch) if size > 0]
  raise UserError(
      f"image_size {image_size} is not divisible by the patch {patch} of "
      f"{name}; the nearest is {' or '.join(map(str, near))}")


def init(module: nn.Module, seed: int = 0) -> trees.Tree:
  """Returns random parameters of a backbone, float32."""
  return jax.jit(module.init)(jax.random.key(seed), _images(module))["params"]


def shapes(module: nn.Module) -> trees.Tree:
  """Returns the tree of `jax.ShapeDtypeStruct` of a backbone's parameters,
  without computing any."""
  return jax.eval_shape(
      functools.partial(module.init, jax.random.key(0)),
      _images(module))["params"]


def _images(module):
  return jnp.zeros((1, module.image_size, module.image_size, 3))


def load(name: str, weights: str, image_size: int,
         **options: Any) -> tuple[nn.Module, trees.Tree]:
  """Returns a backbone and its pretrained parameters: `weights.load`.

  The function lives above this folder, in `ttc_jax.weights`, which reads
  files. It is looked up by name because imports go down only.

  Example:
    >>> module, params = backbones.load("vit_b16", "ViT-B_16.npz", 224)
    >>> features = module.apply({"params": params}, images)  # (B, 768)
  """
  return importlib.import_module("ttc_jax.weights").load(
      name, weights, image_size, **options)
