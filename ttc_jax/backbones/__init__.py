"""Backbones: `module, params = load("vit_s14", weights=PATH, image_size=70)`.

The folder is the registry: a module with `make(name, image_size, **fields)`
that returns a Linen module for the names it knows, else None.
"""
import functools
import importlib
import pkgutil
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttc_jax import trees
from ttc_jax.errors import UserError, check_known


def families() -> list:
  """The modules of this folder that make backbones."""
  modules = [importlib.import_module(f"{__name__}.{m.name}")
             for m in pkgutil.iter_modules(__path__)]
  return [m for m in modules if hasattr(m, "make")]


def make(name: str, image_size: int, **fields: Any) -> nn.Module:
  """Returns the backbone of that name, e.g. "vit_b16", without weights.

  Raises:
    UserError: no family knows the name, or the patch does not divide the
      image.
  """
  for family in families():
    module = family.make(name, image_size)
    if module is not None:
      for field in fields:
        if not hasattr(module, field):
          raise UserError(f"{name} has no field {field!r}")
      if image_size < 1 or image_size % module.patch:
        below = image_size // module.patch * module.patch
        near = [size for size in (below, below + module.patch) if size > 0]
        raise UserError(
            f"image_size {image_size} is not divisible by the patch "
            f"{module.patch} of {name}; the nearest is "
            f"{' or '.join(map(str, near))}")
      return family.make(name, image_size, **fields)
  check_known("backbone", name, [n for f in families() for n in f.examples()])


def init(module: nn.Module, seed: int = 0) -> trees.Tree:
  """Random parameters of a backbone."""
  return jax.jit(module.init)(jax.random.key(seed), _images(module))["params"]


def shapes(module: nn.Module) -> trees.Tree:
  """The parameters' shapes, without computing them."""
  return jax.eval_shape(
      functools.partial(module.init, jax.random.key(0)),
      _images(module))["params"]


def _images(module):
  return jnp.zeros((1, module.image_size, module.image_size, 3))


def load(name: str, weights: str, image_size: int, **options: Any):
  """Returns a backbone and its pretrained parameters: `weights.load`.

  The function lives above this folder, in `ttc_jax.weights`, which knows files;
  it is looked up by name because imports go down only.
  """
  return importlib.import_module("ttc_jax.weights").load(
      name, weights, image_size, **options)
