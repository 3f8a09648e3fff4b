"""Describes files of weights, converts them, and compares two of them."""
import math
import os
import re
from typing import Any, NamedTuple

import flax.linen as nn
import ml_dtypes
import numpy as np

from ttc_jax import backbones, files, normalisation, trees
from ttc_jax.errors import UserError, check_known
from ttc_jax.weights import (
  containers,
  formats,
  identity,
  loading,
  reader,
  sources,
  writer,
)
from ttc_jax.weights.formats import Format
from ttc_jax.weights.reader import Weights

# The formats of a target are tried in this order; the first that holds the
# variant is written.
TARGETS = {
    "ttc_jax": (formats.OURS,),
    "bigvision": (formats.BIGVISION,),
    "timm": (formats.TIMM, formats.TIMM_DINOV3, formats.SWIN_TIMM),
    "hf": (formats.HF_VIT, formats.HF_DINOV2, formats.HF_DINOV3,
           formats.HF_CLIP, formats.HF_SIGLIP, formats.SWIN_HF),
}
DTYPES = ("float32", "float16", "bfloat16")
_SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin")
_LARGEST_PATCH = 64
_SIZE = 224  # of a backbone whose positions fit any image size


class Difference(NamedTuple):
  """The difference of two files.

  Attributes:
    notes: sentences on the architectures, e.g. "gelu: exact, tanh".
    tensors: {our name: largest difference}, inf where shapes differ.
  """
  notes: list[str]
  tensors: dict[str, float]


def describe(source: str) -> dict[str, Any]:
  """Returns a description of a file, JSON.

  Args:
    source: as in `sources`.

  Returns:
    The keys file, format, backbone (None if no backbone has its size, with the
    reason), fields,
    image_size (None if any), normalisation (mean and deviation, None if
    unknown), parameters, dtypes, sha256 and ignored (names of tensors that are
    not of the backbone).

  Raises:
    UserError: no file of weights of a known format.
  """
  path = sources.locate(source)
  opened = reader.read(path)
  backbone, reason = None, ""
  try:
    backbone = identity.identify(opened)
  except UserError as error:
    reason = str(error)
  ignored = [n for n in opened.tensors
             if re.fullmatch(opened.format.ignored, n)]
  used = [t for n, t in opened.tensors.items() if n not in ignored]
  return {
      "file": sources.public(source), "format": opened.format.name,
      "backbone": backbone, **({"reason": reason} if reason else {}),
      "fields": opened.fields,
      "image_size": identity.native_size(opened),
      "normalisation": (opened.normalisation._asdict()
                        if opened.normalisation else None),
      "parameters": sum(math.prod(t.shape) for t in used),
      "dtypes": sorted({t.dtype for t in used}),
      "sha256": sources.sha256(path),
      "ignored": sorted([*ignored, *opened.outside])}


def _guessed(opened, other):
  """Fields that a file leaves open: those of the other file, else any, for
  they only have to make the tensors readable."""
  guess = {"gelu": "exact", "rope": 0.0, "pool": "gap",
           "registers": reader.count_tokens(opened)}
  return {name: guess[name] if other.fields.get(name) is None
          else other.fields[name]
          for name, value in opened.fields.items() if value is None}


def load(opened: Weights, patch: int = 0,
         **fields: Any) -> tuple[nn.Module, trees.Tree]:
  """Returns the backbone that a file is of, on its native grid, and its
  parameters.

  Args:
    patch: pixels a side to resize the patch embedding to; 0: the file's.
    **fields: replace the file's; needed if the file does not say them.
  """
  if patch and not 1 <= patch <= _LARGEST_PATCH:
    raise UserError(f"--patch={patch} is not possible: give the pixels of a "
                    f"patch's side, up to {_LARGEST_PATCH}")
  name, size = identity.identify(opened), identity.native_size(opened)
  size = size or _SIZE
  if patch:
    side = size // backbones.make(name, size).patch
    name, size = identity.identify(opened, patch), side * patch
  return loading.load_opened(
      opened, name, size, resample_patch=bool(patch), **fields)


def convert(source: str, out: str, to: str = "ttc_jax", dtype: str = "float32",
            gelu: str = "", patch: int = 0) -> tuple[str, dict[str, Any]]:
  """Writes a file's backbone in another format.

  Args:
    to: a key of `TARGETS`.
    dtype: one of `DTYPES`.
    gelu: replaces the file's, if given.
    patch: as of `load`.

  Returns:
    The format's name, and what its readers have to be told: fields, and the
    normalisation where they would take another one.

  Raises:
    UserError: `out` exists or ends as another kind of file; the format cannot
      hold the backbone, or not in that type.
  """
  check_known("--to", to, TARGETS)
  check_known("--dtype", dtype, DTYPES)
  suffix = ".npz" if to == "bigvision" else ".safetensors"
  if os.path.splitext(out)[1].lower() in {*_SUFFIXES} - {suffix}:
    raise UserError(f"--out={out}: the format {to} is written as {suffix}; "
                    "give a name that ends so")
  out = files.new(out)
  opened = reader.read(sources.locate(source))
  module, params = load(opened, patch, **({"gelu": gelu} if gelu else {}))
  os.makedirs(os.path.dirname(out), exist_ok=True)
  if to == "ttc_jax":
    writer.write(out, params, module.fields, dtype,
                 _normalisation(opened) if opened.normalisation else "")
    return to, {}
  format_, tensors = _first_that_holds(TARGETS[to], module, params)
  tensors = writer.cast(tensors, dtype, f"weights file '{out}'")
  _write(out, format_, tensors)
  assumed = formats.recognise(tensors, {}, {}, out)
  untold = {k: v for k, v in module.fields.items()
            if assumed.fields.get(k) != v}
  if opened.normalisation != assumed.normalisation:
    untold["normalisation"] = _normalisation(opened)
  return format_.name, untold


def _normalisation(opened):
  """What a file says about pixels."""
  known = opened.normalisation
  return normalisation.name(*known) if known else "unknown"


def _first_that_holds(candidates: tuple[Format, ...], module: nn.Module,
                      params: trees.Tree
                      ) -> tuple[Format, dict[str, np.ndarray]]:
  errors = []
  for format_ in candidates:
    try:
      return format_, writer.to_tensors(params, format_, module)
    except UserError as error:
      errors.append(error)
  raise UserError("; ".join(map(str, errors)))


def _write(out, format_, tensors):
  if format_.torch:
    containers.write_safetensors(out, tensors, {"format": "pt"})
    return
  # numpy has no bfloat16; Big Vision's files keep it as two bytes of any kind.
  arrays: dict[str, Any] = {
      n: x.view("V2") if x.dtype == ml_dtypes.bfloat16 else x
      for n, x in tensors.items()}
  with files.replacing(out) as file:
    np.savez(file, **arrays)


def compare(one: str, two: str) -> Difference:
  """Compares two files of any formats by our names.

  Raises:
    UserError: one of them is no file of a whole backbone.
  """
  opened = [reader.read(sources.locate(s)) for s in (one, two)]
  loaded = [load(o, **_guessed(o, other))
            for o, other in (opened, opened[::-1])]
  fields = [{"backbone": identity.identify(o), **module.fields, **o.fields}
            for o, (module, _) in zip(opened, loaded, strict=True)]
  if all(o.normalisation for o in opened):
    fields = [f | {"normalisation": _normalisation(o)}
              for f, o in zip(fields, opened, strict=True)]
  notes = [f"{k}: {fields[0].get(k)}, {fields[1].get(k)}"
           for k in dict.fromkeys((*fields[0], *fields[1]))
           if fields[0].get(k) != fields[1].get(k)]
  flats = [trees.flatten(params) for _, params in loaded]
  differences = {}
  for name in dict.fromkeys((*flats[0], *flats[1])):
    x, y = (flat.get(name) for flat in flats)
    differences[name] = math.inf if (
        x is None or y is None or x.shape != y.shape) else float(
            np.abs(np.asarray(x) - np.asarray(y)).max())
  return Difference(notes, differences)
