"""A backbone with its weights: `load`."""
from typing import Any

import flax.linen as nn

from ttc_jax import backbones, trees
from ttc_jax.errors import UserError
from ttc_jax.weights import fitting, identity, reader, sources
from ttc_jax.weights.formats import Normalisation
from ttc_jax.weights.reader import Weights
from ttc_jax.weights.sources import Source


def load(name: str, weights: str | Source, image_size: int,
         resample_patch: bool = False,
         **fields: Any) -> tuple[nn.Module, trees.Tree]:
  """Returns a backbone and its pretrained parameters.

  Args:
    name: e.g. "vit_b16", see `backbones.canonical`; "" for the backbone that
      the file is of.
    weights: source of a file, see `sources`, or what `open_source` returned;
      "random" for random parameters.
    image_size: pixels a side; the position embeddings are resized to it.
    resample_patch: resizes the patch embedding too, if the file has another
      patch than the name; otherwise that is an error.
    **fields: of the module, to override what the file says, e.g.
      gelu="tanh", drop_path=0.1, dtype=jnp.bfloat16.

  Returns:
    The Linen module, for `module.apply({"params": params}, images)` with
    images (B, S, S, 3) normalised float32 -> features (B, D), and params.

  Raises:
    UserError: one sentence with the one thing to change.

  Example:
    >>> module, params = weights.load("vit_b16", "ViT-B_16.npz", 224)
    >>> features = module.apply({"params": params}, images)  # (B, 768)
  """
  source = weights.source if isinstance(weights, Source) else weights
  if source == sources.RANDOM:
    if not name:
      raise UserError("random weights need the name of a backbone, "
                      "e.g. vit_b16")
    module = backbones.make(name, image_size, **fields)
    return module, backbones.init(module)
  if name:
    backbones.make(name, image_size, **fields)  # before any download
  return load_opened(_open(weights), name, image_size, resample_patch, **fields)


def load_opened(opened: Weights, name: str, image_size: int,
                resample_patch: bool = False,
                **fields: Any) -> tuple[nn.Module, trees.Tree]:
  """Returns what `load` returns, of a file that is open already."""
  name = name or identity.identify(opened)
  module = backbones.make(name, image_size, **fields)
  fitting.check_fields(opened, module, name)
  settled = fitting.settled(opened, fields)
  module, opened = module.clone(**settled), opened._replace(fields=settled)
  return module, fitting.fit(
      opened, backbones.shapes(module), name, resample_patch)


def normalisation(weights: str | Source) -> Normalisation | None:
  """Returns (mean, std) that weights were trained with, of pixels in [0, 1];
  None if neither the format nor a configuration beside the file says it.

  Args:
    weights: as of `load`.

  Example:
    >>> weights.normalisation("ViT-B_16.npz")
    Normalisation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
  """
  source = weights.source if isinstance(weights, Source) else weights
  return (None if source == sources.RANDOM else _open(weights).normalisation)


def _open(weights: str | Source) -> Weights:
  if isinstance(weights, Source):
    return reader.read(weights.path or "")
  return reader.read(sources.locate(weights))
