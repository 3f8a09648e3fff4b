"""Weights in: a file of a known format (`formats`) -> one parameter tree; out.

Tensors stay in the file until their shape has been compared with the module's,
so a wrong or hostile file costs no memory.
"""
import contextlib
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from ttc_jax import trees
from ttc_jax.backbones import formats, vit
from ttc_jax.backbones.formats import Format
from ttc_jax.backbones.sources import locate, sha256  # for our callers
from ttc_jax.errors import UserError

# As the containers spell them; "|V2" is how numpy stores bfloat16.
_FLOATS = ("F16", "BF16", "F32", "F64", "<f2", "<f4", "<f8", "|V2")
_LARGEST_GRID = 256  # patches a side of a believable position embedding


class Tensor(NamedTuple):
  """A tensor that is still in its file."""
  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]


class Weights(NamedTuple):
  """An opened file.

  Attributes:
    fields: of the variant, as far as the file settles them.
    tensors: by the names they have in the file.
  """
  path: str
  format: Format
  fields: dict[str, Any]
  tensors: dict[str, Tensor]


# --- Reading ------------------------------------------------------------------

def read(path: str) -> Weights:
  """Opens a local `.npz` or `.safetensors` file; the tensors stay in it.

  Raises:
    UserError: missing, damaged, of no known format, or of an architecture
      that is not ours.
  """
  with _readable(path):
    with open(path, "rb") as f:
      is_zip = f.read(2) == b"PK"
    tensors, metadata = (_open_npz if is_zip else _open_safetensors)(path)
  format_, fields, tensors = formats.recognise(tensors, metadata, path)
  for pattern, what in format_.refused.items():
    for name in filter(re.compile(pattern).fullmatch, tensors):
      raise UserError(
          f"weights file '{path}' has {what} ({name!r}), which is not "
          "supported: use a plain ViT or Swin")
  return Weights(path, format_, fields, tensors)


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
  try:
    yield
  except FileNotFoundError as e:
    raise UserError(f"weights file '{path}' does not exist") from e
  except (OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError,
          zipfile.BadZipFile, zlib.error, safetensors.SafetensorError) as e:
    reason = " ".join(str(e).split())[:200]  # Some quote the whole header.
    raise UserError(
        f"weights file '{path}' cannot be read ({reason}): is it truncated, "
        "or no .npz or .safetensors file? fetch it again") from e


def _open_safetensors(path):
  def reader(name):
    def read_tensor():
      with safetensors.safe_open(path, framework="numpy") as file:
        return file.get_tensor(name)
    return read_tensor

  with safetensors.safe_open(path, framework="numpy") as file:
    slices = {name: file.get_slice(name) for name in file.keys()}
    return {name: Tensor(tuple(s.get_shape()), s.get_dtype(), reader(name))
            for name, s in slices.items()}, file.metadata() or {}


def _open_npz(path):
  def reader(member):
    def read_tensor():
      with zipfile.ZipFile(path) as archive, archive.open(member) as f:
        array = np.lib.format.read_array(f, allow_pickle=False)
      return array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array
    return read_tensor

  tensors = {}
  with zipfile.ZipFile(path) as archive:
    for member in archive.infolist():
      if not member.filename.endswith(".npy"):
        continue
      with archive.open(member) as f:
        shape, dtype = _npy_header(f)
        declared = f.tell() + math.prod(shape) * dtype.itemsize
      if not dtype.hasobject and declared != member.file_size:
        raise ValueError(f"{member.filename} has {member.file_size} bytes, "
                         f"its header declares {declared}")
      name = member.filename.removesuffix(".npy")
      tensors[name] = Tensor(shape, dtype.str, reader(member.filename))
  return tensors, {}


def _npy_header(f):
  version = np.lib.format.read_magic(f)
  if version == (1, 0):
    shape, _, dtype = np.lib.format.read_array_header_1_0(f)
  else:
    shape, _, dtype = np.lib.format.read_array_header_2_0(f)
  return shape, dtype


# --- Into a module ------------------------------------------------------------

def fit(weights: Weights, expected: trees.Tree, name: str) -> trees.Tree:
  """Returns the parameters of a module, numpy float32.

  Position embeddings are resized to the module's grid; a position of the
  class token is added to the token.

  Args:
    expected: tree of the module's shapes (`jax.eval_shape` of its `init`).
    name: of the backbone, for messages.

  Raises:
    UserError: the file is of another variant; a tensor is missing, left
      over, of another shape or type, or not finite.
  """
  want = {n: leaf.shape for n, leaf in trees.flatten(expected).items()}
  _check_variant(weights, want, name)
  found = {n: _find(weights, n) for n in want}
  left = sorted(n for n in weights.tensors.keys() - set(found.values())
                if not re.fullmatch(weights.format.ignored, n))
  if left:
    raise UserError(
        f"weights file '{weights.path}' has {len(left)} tensors that {name} "
        f"has no place for, first {left[0]!r}")
  out = {n: _tensor(weights, n, shape) for n, shape in want.items()
         if n != "pos_embedding"}
  if "pos_embedding" in want:
    _, tokens, width = want["pos_embedding"]
    of_cls, grid = _positions(weights, width)
    if "cls" in out:
      out["cls"] += of_cls
    out["pos_embedding"] = resize_positions(grid, tokens)
  return trees.unflatten({n: out[n] for n in want})


def check_fields(weights: Weights, module: nn.Module, name: str) -> None:
  """Raises UserError if the module lacks a field that the file settles."""
  for field in weights.fields:
    if not hasattr(module, field):
      raise UserError(
          f"weights file '{weights.path}' is of another architecture: it "
          f"settles the field '{field}', which {name} does not have")


def _find(weights, name):
  """The name in the file of our parameter."""
  names = weights.format.names(name) or (name,)
  for theirs in names:
    if theirs in weights.tensors:
      return theirs
  raise UserError(
      f"weights file '{weights.path}' lacks the tensor {names[0]!r} "
      f"({len(weights.tensors)} others are there)")


def _shape(weights, name):
  """The shape in our layout of our parameter, from the header alone."""
  shape = weights.tensors[_find(weights, name)].shape
  with _readable(weights.path):  # numpy refuses to imagine some shapes
    return weights.format.view(name, np.broadcast_to(0, shape)).shape


def _tensor(weights, name, shape):
  """Our parameter, float32, of exactly that shape."""
  theirs = _find(weights, name)
  in_file = shape if weights.format.heads else _merge_heads(name, shape)
  found = _shape(weights, name)
  if found != in_file:
    raise UserError(
        f"weights file '{weights.path}': {theirs!r} has the shape "
        f"{weights.tensors[theirs].shape}, so {name!r} would have {found} "
        f"instead of {in_file}")
  return weights.format.view(name, _values(weights, theirs)).reshape(shape)


def _merge_heads(name, shape):
  """(D, H, D/H) -> (D, D) and the like, of an attention's parameter."""
  if re.search("/(query|key|value)/", name):
    return shape[:-2] + (shape[-2] * shape[-1],)
  if name.endswith("/out/kernel"):
    return (shape[0] * shape[1], shape[2])
  return shape


def _values(weights, theirs):
  """A tensor of the file, float32 and finite."""
  tensor = weights.tensors[theirs]
  where = f"weights file '{weights.path}': {theirs!r}"
  if tensor.dtype not in _FLOATS:
    raise UserError(f"{where} has the type {tensor.dtype}, expected floats "
                    "of 16, 32 or 64 bits")
  with _readable(weights.path):
    array = tensor.read()
  with np.errstate(over="ignore"):
    array = array.astype(np.float32)
  if not np.isfinite(array).all():
    raise UserError(f"{where} holds values that are not finite")
  return array


def _positions(weights, width):
  """-> the class token's position (1, 0 or 1, D), the patches' (1, n n, D)."""
  theirs = _find(weights, "pos_embedding")
  shape = weights.tensors[theirs].shape
  tokens = shape[1] if len(shape) == 3 else 0
  side = math.isqrt(max(tokens, 0))
  extra = tokens - side ** 2
  if (shape != (1, tokens, width) or not 1 <= side <= _LARGEST_GRID
      or extra > ("cls" in weights.tensors or "cls_token" in weights.tensors)):
    raise UserError(
        f"weights file '{weights.path}': {theirs!r} has the shape {shape}, "
        f"expected (1, n * n, {width}), or one more for a class token")
  position = _values(weights, theirs)
  return (position[:, :extra] if extra else np.zeros((1, 1, width), "f4"),
          position[:, extra:])


def resize_positions(position: np.ndarray, tokens: int) -> np.ndarray:
  """(1, N, D) -> (1, tokens, D) by antialiased bicubic resampling, as timm.

  N and `tokens` are squares. vision_transformer interpolates linearly; this
  is closer to what the embedding was trained as.
  """
  if position.shape[1] == tokens:
    return position
  old, new = math.isqrt(position.shape[1]), math.isqrt(tokens)
  grid = np.asarray(position, np.float32).reshape(1, old, old, -1)
  shape = (1, new, new, grid.shape[-1])
  grid = jax.image.resize(grid, shape, "cubic", antialias=True)
  return np.asarray(grid).reshape(1, tokens, -1)


# --- Which variant ------------------------------------------------------------

class _Variant(NamedTuple):
  width: int
  patch: int
  depth: int
  heads: int | None  # unknown to fused files
  hidden: int


def _variant(shape: Callable[[str], tuple[int, ...]], depth: int):
  """Reads a ViT's sizes off shapes; ValueError if they contradict."""
  patch, rows, channels, width = shape("embedding/kernel")
  out = shape(f"{vit.ATTENTION.format(0)}/out/kernel")
  block = vit.BLOCK.format(0)
  inputs, hidden = shape(f"{block}/MlpBlock_0/Dense_0/kernel")
  if (patch, width, width, 3, width) != (
      rows, math.prod(out[:-1]), out[-1], channels, inputs):
    raise ValueError("no shapes of a ViT")
  return _Variant(
      width, patch, depth, out[0] if len(out) == 3 else None, hidden)


def _check_variant(weights, want, name):
  """One sentence instead of the first of a hundred wrong shapes."""
  def depth(names):
    found = (re.match(r"(?:Transformer/encoderblock_|blocks\.)(\d+)\D", n)
             for n in names)
    return max((int(m[1]) + 1 for m in found if m), default=0)

  try:
    file = _variant(lambda n: _shape(weights, n), depth(weights.tensors))
    mine = _variant(want.__getitem__, depth(want))
  except (UserError, KeyError, ValueError):
    return  # A tensor is missing or odd: `fit` names it.
  file = file._replace(heads=file.heads or mine.heads)
  if file == mine:
    return
  shown = file._fields[:3] if file[:3] != mine[:3] else file._fields
  def text(v):
    return ", ".join(f"{field} {getattr(v, field)}" for field in shown)
  size = next((size for size, (width, layers, heads, hidden)
               in vit.SIZES.items() if (width, layers, hidden) == (
                   file.width, file.depth, file.hidden)
               and (not weights.format.heads or heads == file.heads)), None)
  advice = (f"use backbone=vit_{size}{file.patch}" if size else
            "no backbone here has that size")
  raise UserError(f"weights file '{weights.path}' is a ViT of {text(file)}; "
                  f"{name} has {text(mine)}: {advice}")


# --- Weights out --------------------------------------------------------------

_FUSED = ("/query/", "/key/", "/value/")  # in this order, where in one tensor


def to_tensors(params: trees.Tree, format_: Format,
               module: nn.Module) -> dict[str, np.ndarray]:
  """A backbone's parameters as a format names and lays them out: `fit`'s
  inverse, bit for bit.

  GELU and epsilon are no tensors: whoever reads the file has to know them.

  Args:
    params: of the module, float32.

  Returns:
    {name: float32 array}, contiguous, without a head.

  Raises:
    UserError: the format cannot hold this variant of the module.
  """
  def place(name):
    return [part in name for part in _FUSED]
  flat, parts = trees.flatten(params), {}
  for name in sorted(flat, key=place, reverse=True):
    array = np.asarray(flat[name], np.float32)
    if name == "pos_embedding" and format_.cls_position and "cls" in flat:
      array = np.pad(array, ((0, 0), (1, 0), (0, 0)))  # it is in the token
    if not format_.heads:
      array = array.reshape(_merge_heads(name, array.shape))
    names = format_.names(name)
    if not names:
      raise UserError(f"the format '{format_.name}' has no place for the "
                      f"parameter {name!r} of a {type(module).__name__}")
    parts.setdefault(names[0], []).append(format_.store(name, array))
  tensors = {theirs: np.ascontiguousarray(np.concatenate(arrays))
             for theirs, arrays in parts.items()}
  _check_held(tensors, format_, module)
  return tensors


def _check_held(tensors, format_, module):
  """Whoever reads the tensors has to find the same architecture."""
  if format_ is formats.OURS:
    return
  _, fields, _ = formats.recognise(tensors, {}, f"of {format_.name}")
  for field, value in module.fields.items():
    if field not in ("gelu", "epsilon") and fields.get(field) != value:
      raise UserError(
          f"the format '{format_.name}' cannot hold {field}={value!r}: "
          "choose another, ttc_jax holds everything")


def write(path: str, params: trees.Tree, fields: Mapping[str, Any],
          dtype: str = "float32") -> None:
  """Writes a backbone's parameters in our own format, all or nothing.

  Args:
    fields: of the variant: "gelu" and "epsilon", and those of "pool",
      "final_norm", "layer_scale" and "window" that are not the module's
      defaults.
    dtype: "float32", "float16" or "bfloat16".

  Raises:
    UserError: an unknown field, or a parameter that does not fit the dtype.
  """
  fields = formats.check_fields(fields, f"weights file '{path}'")
  flat = {}
  for name, value in trees.flatten(params).items():
    with np.errstate(over="ignore"):
      flat[name] = np.asarray(value).astype(dtype, order="C")
    if not np.isfinite(flat[name]).all():
      raise UserError(f"weights file '{path}': {name!r} is not finite as "
                      f"{dtype}")
  part = f"{path}.{os.getpid()}.part"
  try:
    safetensors.numpy.save_file(
        flat, part, metadata={"ttc_jax": json.dumps(fields)})
    os.replace(part, path)
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.remove(part)
