"""Weights: files of known formats -> the parameters of a backbone, and back.

  sources.py      where a file comes from: a path, a URL, hf://, or "random"
  released.py     short names of Big Vision's released weights
  containers.py   how files hold tensors: .npz, .safetensors, .pth
  formats/        how families of files name and lay out our parameters
  reader.py       an opened file; its tensors are read one by one
  identity.py     which backbone a file is of
  fitting.py      tensors -> the parameters of a module
  resampling.py   positions, bias tables and patch embeddings of another size
  loading.py      all of it: `load`
  writer.py       parameters -> tensors and files
  convert.py      files described, converted, compared: the command's work

  python -m ttc_jax.weights inspect FILE...
"""
from ttc_jax.weights.containers import Tensor
from ttc_jax.weights.convert import describe
from ttc_jax.weights.fitting import check_fields, fit, settled
from ttc_jax.weights.formats import Normalisation
from ttc_jax.weights.identity import identify, native_size
from ttc_jax.weights.loading import load, load_opened, normalisation
from ttc_jax.weights.reader import Weights, read
from ttc_jax.weights.sources import Source, locate, open_source, public, sha256
from ttc_jax.weights.writer import cast, to_tensors, write

__all__ = (
    "Normalisation", "Source", "Tensor", "Weights", "cast", "check_fields",
    "describe", "fit", "identify", "load", "load_opened", "locate",
    "native_size", "normalisation", "open_source", "public", "read", "settled",
    "sha256", "to_tensors", "write")
