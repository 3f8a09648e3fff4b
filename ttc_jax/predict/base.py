"""The base weights of a bundle: which file, the right one, loaded.

They come from the user's own words, or from a local file that the bundle names
and whose hash it knows. Nothing that a bundle names is fetched.
"""
import contextlib
import os
from typing import Any

import jax.numpy as jnp

from ttc_jax import (
  backbones,
  bundles,
  compilation,
  quantisation,
  trees,
  weights,
)
from ttc_jax.config import FROZEN_DTYPES
from ttc_jax.errors import UserError, check_known, printable
from ttc_jax.weights import Source, sources

Meta = dict[str, Any]

# No backbone comes near: ViT-g/14 has 1.0e9 parameters, and at 518 pixels
# 1,369 patches and 3e12 FLOPs an image.
_PATCHES = 2 ** 16
_PARAMETERS = 4e9
_FLOPS = 2e13
_LARGEST = 2 ** 36  # bytes of a file that a bundle names


def named(bundle: str, meta: Meta) -> Source:
  """Returns the local file that a bundle names, if it is the right one.

  Raises:
    UserError: the bundle names no local file, or it is missing or another.
  """
  source, wanted = meta["weights_source"], meta["weights_sha256"]
  shown = printable(bundles.public(source))
  if source == sources.RANDOM:
    return check(bundle, meta, sources.open_source(source))
  if "://" in source or "::" in source:
    raise UserError(
        f"bundle '{bundle}' was tuned on '{shown}' (sha256 {wanted}), and what "
        "a bundle names is never fetched: give the base weights "
        f"(--weights={shown})")
  path = _local_file(source.partition("#sha256=")[0])
  if path is None:
    raise UserError(
        f"bundle '{bundle}' was tuned on weights with sha256 {wanted}; the "
        f"weights file '{shown}' that it names does not exist here: give the "
        "base weights (--weights=FILE)")
  if sources.sha256(path) != wanted:  # its hash is not for others to see
    raise UserError(
        f"bundle '{bundle}' was tuned on weights with sha256 {wanted}, and the "
        f"file '{shown}' that it names holds something else: give the base "
        "weights (--weights=FILE)")
  return Source(source, path, wanted)


def _local_file(source):
  """The path of a file of sane size; devices and /proc have none. Else None."""
  try:
    path = sources.locate(source)
    size = os.path.getsize(sources.split_part(path)[0])
    return path if 0 < size < _LARGEST else None
  except (UserError, OSError, ValueError):
    return None


def check(bundle: str, meta: Meta, base: Source) -> Source:
  """Returns the base; UserError if the bundle was tuned on other weights."""
  if base.sha256 != meta["weights_sha256"]:
    raise UserError(
        f"bundle '{bundle}' was tuned on weights with sha256 "
        f"{meta['weights_sha256']}, but '{bundles.public(base.source)}' has "
        f"{base.sha256}; give the right file (--weights=FILE)")
  mine, given = (sources.split_part(x.partition("#sha256=")[0])[1]
                 for x in (meta["weights_source"], base.source))
  if mine and given and mine != given:  # a file of one model needs no part
    raise UserError(
        f"bundle '{bundle}' was tuned on the part {printable(mine)!r} of its "
        f"weights, not on {given!r}: give --weights=FILE.npz:"
        f"{printable(mine)}")
  return base


def precision(meta: Meta) -> contextlib.AbstractContextManager[None]:
  """Within the block, float32 products are as in the bundle's training."""
  return compilation.precision(meta.get("matmul_precision") or "")


def frozen_dtype(meta: Meta, wanted: str | None) -> str:
  """Returns in which dtype frozen kernels are kept: by default that of tuning.

  Raises:
    UserError: `wanted` is no such dtype.
  """
  if wanted is not None:
    return check_known("frozen_dtype", wanted, FROZEN_DTYPES)
  return meta.get("frozen_dtype") or "float32"


def load(bundle: str, meta: Meta, base: Source,
         kept: str | None = None) -> tuple[Any, trees.Tree]:
  """Returns the backbone that a bundle was tuned on, and its pretrained
  parameters.

  Args:
    kept: see `frozen_dtype`.

  Raises:
    UserError: the weights are of another backbone; or the bundle describes a
      model that is far larger than any real one.
  """
  fields = meta["fields"] | {"dtype": jnp.dtype(meta["dtype"])}
  size = meta["image_size"]
  try:
    module = backbones.make(meta["backbone"], size, **fields)
  except UserError as error:
    raise UserError(f"bundle '{bundle}': {error}") from error
  _check_size(bundle, meta, module)
  module, params = weights.load(meta["backbone"], base, size, **fields)
  return module, quantisation.store(params, module, frozen_dtype(meta, kept))


def _check_size(bundle, meta, module):
  """Refuses sizes that no real model has, before any array of them is made."""
  patches = (module.image_size // module.patch) ** 2
  parameters = patches * module.width + sum(
      site.inputs * site.width for sites in module.sites.values()
      for site in sites)
  flops = 2 * (module.work.patches + module.work.linear
               + module.work.attention)
  for value, largest, what in (
      (patches, _PATCHES, "patches an image"),
      (parameters, _PARAMETERS, "parameters"),
      (flops, _FLOPS, "FLOPs an image")):
    if value > largest:
      raise UserError(
          f"bundle '{bundle}': {meta['backbone']} at {meta['image_size']} px "
          f"has {value:.2g} {what}, and this version loads bundles with up to "
          f"{largest:.2g}: it is damaged or not meant to be used")
