"""The base weights of a bundle: which file, the right one, loaded."""
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ttc_jax import backbones, trees
from ttc_jax.errors import UserError
from ttc_jax.weights import sources

Meta = Mapping[str, Any]


def sha256(source: str) -> str:
  """Returns the hash by which a bundle knows its base weights."""
  if source == "random":
    return source
  try:
    return sources.sha256(sources.locate(source))
  except UserError as error:
    raise UserError(
        f"{error}; give the base weights (--weights=FILE)") from error


def check(bundle: str, meta: Meta, source: str, found: str) -> None:
  """Raises UserError if the bundle was tuned on weights of another hash."""
  if found != meta["weights_sha256"]:
    raise UserError(
        f"bundle '{bundle}' was tuned on weights with sha256 "
        f"{meta['weights_sha256']}, but '{source}' has {found}; give the "
        "right file (--weights=FILE)")


def load(meta: Meta, source: str) -> tuple[Any, trees.Tree]:
  """Returns the backbone that a bundle was tuned on, and its pretrained
  parameters."""
  fields = meta["fields"] | {"dtype": jnp.dtype(meta["dtype"])}
  if source == "random":
    module = backbones.make(meta["backbone"], meta["image_size"], **fields)
    return module, backbones.init(module)
  return backbones.load(
      meta["backbone"], source, meta["image_size"], **fields)
