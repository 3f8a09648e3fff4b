"""Weights: files of known formats -> the parameters of a backbone, and back.

  sources.py      where a file comes from: a path, a URL, hf://, or "random"
  containers.py   how files hold tensors: .npz, .safetensors, .pth
  formats/        how families of files name and lay out our parameters
  reader.py       an opened file; its tensors are read one by one
  identity.py     which backbone a file is of
  fitting.py      tensors -> the parameters of a module
  resampling.py   positions, bias tables and patch embeddings of another size
  writer.py       parameters -> tensors and files
  convert.py      files described, converted, compared: the command's work

  python -m ttc_jax.weights inspect FILE...
"""
from typing import Any

import flax.linen as nn

from ttc_jax import backbones, trees
from ttc_jax.weights import sources
from ttc_jax.weights.containers import Tensor
from ttc_jax.weights.fitting import check_fields, fit, settled
from ttc_jax.weights.identity import identify, native_size
from ttc_jax.weights.reader import Weights, read
from ttc_jax.weights.sources import Source, locate, open_source, sha256
from ttc_jax.weights.writer import cast, to_tensors, write

__all__ = (
    "Source", "Tensor", "Weights", "cast", "check_fields", "fit", "identify",
    "load", "load_opened", "locate", "native_size", "open_source", "read",
    "settled", "sha256", "to_tensors", "write")


def load(name: str, weights: str | Source, image_size: int,
         resample_patch: bool = False,
         **fields: Any) -> tuple[nn.Module, trees.Tree]:
  """Returns a backbone and its pretrained parameters.

  Args:
    name: e.g. "vit_b16".
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
  module = backbones.make(name, image_size, **fields)  # before any download
  source = weights.source if isinstance(weights, Source) else weights
  if source == sources.RANDOM:
    return module, backbones.init(module)
  path = weights.path if isinstance(weights, Source) else None
  return load_opened(read(path or locate(source)), name, image_size,
                     resample_patch, **fields)


def load_opened(opened: Weights, name: str, image_size: int,
                resample_patch: bool = False,
                **fields: Any) -> tuple[nn.Module, trees.Tree]:
  """Returns what `load` returns, of a file that is open already."""
  module = backbones.make(name, image_size, **fields)
  check_fields(opened, module, name)
  module = module.clone(**settled(opened, fields))
  return module, fit(opened, backbones.shapes(module), name, resample_patch)
