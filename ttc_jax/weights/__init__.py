"""Weights in: a file of a known format (`formats`) -> one parameter tree; out.

Tensors stay in the file until their shape has been compared with the module's,
so a wrong or hostile file costs no memory.
"""
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from ttc_jax import backbones, trees
from ttc_jax.backbones import layers, swin, vit
from ttc_jax.errors import UserError
from ttc_jax.weights import containers, formats, resampling
from ttc_jax.weights.containers import Tensor
from ttc_jax.weights.formats import Format, layout
from ttc_jax.weights.sources import locate, sha256  # for our callers

_LARGEST_GRID = 256  # patches a side of a believable position embedding


class Weights(NamedTuple):
  """An opened file.

  Attributes:
    fields: of the variant, as far as the file settles them; None: in doubt.
    tensors: by the names they have in the format.
    outside: names of what is no part of the format: heads, another tower.
  """
  path: str
  format: Format
  fields: dict[str, Any]
  tensors: Mapping[str, Tensor]
  outside: tuple[str, ...] = ()


# --- Reading ------------------------------------------------------------------

def read(path: str) -> Weights:
  """Opens a local file; the tensors stay in it.

  Args:
    path: of an `.npz`, `.safetensors` or `.pth` file, or of the index of
      sharded safetensors. A `config.json` beside it is read too.

  Raises:
    UserError: missing, damaged, of no known format, or of an architecture
      that is not ours.
  """
  everything, metadata = containers.open_file(path)
  format_, fields, tensors = formats.recognise(
      everything, metadata, _config(path), path)
  for pattern, what in format_.refused.items():
    for name in filter(re.compile(pattern).fullmatch, tensors):
      raise UserError(
          f"weights file '{path}' has {what} ({name!r}), which is not "
          "supported: use a plain ViT or Swin")
  taken = {id(t.whole or t) for t in tensors.values()}
  outside = tuple(n for n, t in everything.items() if id(t) not in taken)
  return Weights(path, format_, fields, tensors, outside)


def _config(path):
  """What config.json beside the file holds."""
  beside = os.path.join(os.path.dirname(path), "config.json")
  try:
    with open(beside, encoding="utf-8") as f:
      config = json.load(f)
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise UserError(f"'{beside}', beside the weights, cannot be read "
                    f"({error}): mend it or move it away") from error
  return config if isinstance(config, dict) else {}


# --- A backbone with its weights --------------------------------------------

def load(name: str, weights: str, image_size: int,
         resample_patch: bool = False,
         **fields: Any) -> tuple[nn.Module, trees.Tree]:
  """Returns a backbone and its pretrained parameters.

  Args:
    name: e.g. "vit_b16".
    weights: path, gs://, https:// or hf:// source of a file, see `sources`,
      in a format that `weights` knows.
    image_size: pixels a side; the position embeddings are resized to it.
    resample_patch: resizes the patch embedding too, where the file has another
      patch than the name; else that is an error.
    **fields: of the module, to override what the file says, e.g.
      gelu="tanh", drop_path=0.1, dtype=jnp.bfloat16.

  Returns:
    The Linen module, for `module.apply({"params": params}, images)` with
    images (B, S, S, 3) normalised float32 -> features (B, D), and params.

  Raises:
    UserError: with the one thing to change.
  """
  backbones.make(name, image_size, **fields)  # a wrong name costs no download
  return load_opened(read(locate(weights)), name, image_size,
             resample_patch, **fields)


def load_opened(opened: Weights, name: str, image_size: int,
                resample_patch: bool = False,
                **fields: Any) -> tuple[nn.Module, trees.Tree]:
  """`load` of a file that is open already."""
  module = backbones.make(name, image_size, **fields)
  check_fields(opened, module, name)
  module = module.clone(**settled(opened, fields))
  return module, fit(opened, backbones.shapes(module), name, resample_patch)


# --- Into a module ------------------------------------------------------------

_TOKENS = ("cls", "registers", "pos_embedding")
_KERNEL = "embedding/kernel"
_BIAS_TABLE = "/relative_position_bias"


def fit(weights: Weights, expected: trees.Tree, name: str,
        resample_patch: bool = False) -> trees.Tree:
  """Returns the parameters of a module, numpy float32.

  Position embeddings are resized to the module's grid, Swin's tables of biases
  to its window; the positions of tokens before the patches are added to the
  tokens.

  Args:
    expected: tree of the module's shapes (`jax.eval_shape` of its `init`).
    name: of the backbone, for messages.
    resample_patch: resizes the patch embedding of another patch size.

  Raises:
    UserError: the file is of another variant; a tensor is missing, left
      over, of another shape or type, or not finite.
  """
  want = {n: leaf.shape for n, leaf in trees.flatten(expected).items()}
  _check_variant(weights, want, name, resample_patch)
  found = {n: _find(weights, n) for n in want
           if n not in _TOKENS[:2] and not _is_zero(weights, n)}
  left = sorted(n for n in weights.tensors.keys() - set(found.values())
                - set(weights.format.tokens)
                if not re.fullmatch(weights.format.ignored, n))
  if left:
    raise UserError(
        f"weights file '{weights.path}' has {len(left)} tensors that {name} "
        f"has no place for, first {left[0]!r}")
  out = {n: np.zeros(shape, np.float32) if n not in found else
         _bias_table(weights, n, shape) if n.endswith(_BIAS_TABLE) else
         _tensor(weights, n, shape)
         for n, shape in want.items() if n not in (*_TOKENS, _KERNEL)}
  patch = (_shape(weights, _KERNEL) if resample_patch else want[_KERNEL])[0]
  out[_KERNEL] = resampling.resize_patch(
      _tensor(weights, _KERNEL, (patch, patch, *want[_KERNEL][2:])),
      want[_KERNEL][0])
  if want.keys() & set(_TOKENS):
    out |= _tokens(weights, want, name)
  return trees.unflatten({n: out[n] for n in want})


def _is_zero(weights, name):
  """Whether the file lacks a parameter because it is 0."""
  format_ = weights.format
  lacking = not weights.tensors.keys() & set(format_.names(name))
  return lacking and (bool(re.fullmatch(format_.optional, name))
                      or formats.is_zero(format_, name, weights.fields))


def check_fields(weights: Weights, module: nn.Module, name: str) -> None:
  """Raises UserError if the module lacks a field that the file settles."""
  for field in weights.fields:
    if not hasattr(module, field):
      raise UserError(
          f"weights file '{weights.path}' is of another architecture: it "
          f"settles the field '{field}', which {name} does not have")


def settled(weights: Weights, given: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of the file, and those that are given in their place.

  Raises:
    UserError: one is in doubt, and not given.
  """
  fields = weights.fields | dict(given)
  for field, value in fields.items():
    if value is None:
      raise UserError(
          f"weights file '{weights.path}' does not say the field '{field}': "
          "put the model's config.json beside it, or give the field (as in "
          f"--config.{field}), for a GELU one of "
          f"{', '.join(layers.GELU)} (OpenAI's CLIP: quick, SigLIP: tanh)")
  return fields


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
  theirs = _find(weights, name)
  shape = weights.tensors[theirs].shape
  with containers.readable(weights.path):  # numpy refuses to imagine some
    imagined = np.broadcast_to(0, shape)
    return layout.view(weights.format, name, theirs, imagined).shape


def _tensor(weights, name, shape):
  """Our parameter, float32, of exactly that shape."""
  theirs = _find(weights, name)
  in_file = layout.merge_heads(name, shape) if weights.format.torch else shape
  found = _shape(weights, name)
  if found != in_file:
    raise UserError(
        f"weights file '{weights.path}': {theirs!r} has the shape "
        f"{weights.tensors[theirs].shape}, so {name!r} would have {found} "
        f"instead of {in_file}")
  array = layout.view(weights.format, name, theirs, _values(weights, theirs))
  return array.reshape(shape)


def _bias_table(weights, name, shape):
  """A Swin's, resized where another window than the file's was given."""
  found = _shape(weights, name)
  side = math.isqrt(found[0]) if found else 0
  if len(found) != 2 or not 0 < side < 2 * _LARGEST_GRID or (
      side ** 2 != found[0]):
    found = shape  # `_tensor` says what is wrong
  table = _tensor(weights, name, (found[0], shape[1]))
  return resampling.resize_positions(table[None], shape[0])[0]


def _values(weights, theirs):
  """A tensor of the file, float32 and finite."""
  tensor = weights.tensors[theirs]
  where = f"weights file '{weights.path}': {theirs!r}"
  if tensor.dtype not in containers.FLOATS:
    raise UserError(f"{where} has the type {tensor.dtype}, expected floats "
                    "of 16, 32 or 64 bits")
  with containers.readable(weights.path):
    array = tensor.read()
  with np.errstate(over="ignore"):
    array = array.astype(np.float32)
  if not np.isfinite(array).all():
    raise UserError(f"{where} holds values that are not finite")
  return array


# --- Tokens and positions -----------------------------------------------------

def _tokens(weights, want, name):
  """[CLS], registers and the positions of patches, as far as wanted."""
  width = want[_KERNEL][-1]
  there = [n for n in weights.format.tokens if n in weights.tensors]
  found = sum(_token_shape(weights, n, width)[1] for n in there)
  cls = int("cls" in want)
  wanted = cls + want.get("registers", (1, 0, width))[1]
  if found != wanted:
    raise UserError(
        f"weights file '{weights.path}' has {found} tokens before the patches, "
        f"{name} has {wanted}: leave the fields pool and registers to the file")
  prefix = np.concatenate([np.zeros((1, 0, width), np.float32), *(
      _values(weights, n).reshape(_token_shape(weights, n, width))
      for n in there)], axis=1)
  positions = {}
  if "pos_embedding" in want:
    of_prefix, grid = _positions(weights, width, found)
    prefix[:, :of_prefix.shape[1]] += of_prefix
    positions = {"pos_embedding": resampling.resize_positions(
        grid, want["pos_embedding"][1])}
  return {"cls": prefix[:, :cls], "registers": prefix[:, cls:], **positions}


def _token_shape(weights, theirs, width):
  shape = weights.tensors[theirs].shape
  found = (1,) * weights.format.squeezed.get(theirs, 0) + shape
  if len(found) != 3 or found[0] != 1 or found[2] != width:
    raise UserError(f"weights file '{weights.path}': {theirs!r} has the shape "
                    f"{shape}, expected (1, tokens, {width})")
  return found


def _positions(weights, width, prefix):
  """-> positions of the first tokens (1, 0 to prefix, D), the patches'."""
  extra, side = _grid(weights, width, prefix)
  position = _values(weights, _find(weights, "pos_embedding")).reshape(
      1, extra + side ** 2, width)
  return position[:, :extra], position[:, extra:]


def _grid(weights, width, prefix):
  """-> how many tokens before the patches have a position, patches a side."""
  shape = _shape(weights, "pos_embedding")
  tokens = shape[1] if len(shape) == 3 else 0
  # None of them has a position, [CLS] alone has one, or all have.
  for extra in sorted({0, min(prefix, 1), prefix}):
    side = math.isqrt(max(tokens - extra, 0))
    if (shape == (1, side ** 2 + extra, width)
        and 1 <= side <= _LARGEST_GRID):
      return extra, side
  theirs = _find(weights, "pos_embedding")
  raise UserError(
      f"weights file '{weights.path}': {theirs!r} has the shape "
      f"{weights.tensors[theirs].shape}, expected (1, n * n, {width}), or "
      "one more for a class token")


def native_size(weights: Weights) -> int | None:
  """Pixels a side that the position embedding of a file is made for; None if
  it has none."""
  if "window" in weights.fields or weights.fields.get("rope"):
    return None
  patch, *_, width = _shape(weights, "embedding/kernel")
  found = formats.count_tokens(weights.tensors, weights.format.tokens)
  return patch * _grid(weights, width, found)[1]


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


def _depth(names):
  """How many blocks tensors of a ViT have names of, in any format."""
  found = (re.match(r"(?:Transformer/encoderblock_|blocks\.|(?:encoder\.)?"
                    r"layers?\.)(\d+)\D", n) for n in names)
  return max((int(m[1]) + 1 for m in found if m), default=0)


def _size(weights, file):
  """The name of a ViT's size, None if there is none here."""
  return next((size for size, (width, depth, heads, hidden)
               in vit.SIZES.items() if (width, depth, hidden) == (
                   file.width, file.depth, file.hidden)
               and file.heads in (None, heads)), None)


def _check_variant(weights, want, name, resample_patch):
  """One sentence instead of the first of a hundred wrong shapes."""
  try:
    file = _variant(lambda n: _shape(weights, n), _depth(weights.tensors))
    mine = _variant(want.__getitem__, _depth(want))
  except (UserError, KeyError, ValueError):
    return  # A tensor is missing or odd: `fit` names it.
  size = _size(weights, file)
  file = file._replace(heads=file.heads or mine.heads)
  if file == mine or (
      resample_patch and file._replace(patch=mine.patch) == mine):
    return
  shown = file._fields[:3] if file[:3] != mine[:3] else file._fields
  def text(v):
    return ", ".join(f"{field} {getattr(v, field)}" for field in shown)
  advice = (f"use backbone=vit_{size}{file.patch}" if size else
            "no backbone here has that size")
  raise UserError(f"weights file '{weights.path}' is a ViT of {text(file)}; "
                  f"{name} has {text(mine)}: {advice}")


def identify(weights: Weights) -> str:
  """The name of the backbone that a file is of, e.g. "vit_s14", by its shapes.

  Raises:
    UserError: no backbone here has its size.
  """
  def refuse(what, cause=None):
    raise UserError(f"weights file '{weights.path}' is {what}: no backbone "
                    "here has that size") from cause
  if "window" in weights.fields:
    embed = _shape(weights, "embedding/kernel")[-1]
    heads = _shape(weights, f"{_SWIN_BLOCK.format(0, 0)}/attention/"
                   "relative_position_bias")[-1]
    depths = []
    while blocks := _count(weights, _SWIN_BLOCK.replace(
        "{}", str(len(depths)), 1)):
      depths.append(blocks)
    for size, parts in swin.SIZES.items():
      if parts == (embed, tuple(depths), heads):
        return f"swin_{size}"
    refuse(f"a Swin of width {embed}, depths {depths} and {heads} heads")
  try:
    file = _variant(lambda n: _shape(weights, n), _depth(weights.tensors))
  except ValueError as error:
    refuse("no whole ViT", error)
  if size := _size(weights, file):
    return f"vit_{size}{file.patch}"
  refuse(f"a ViT of width {file.width}, depth {file.depth} and hidden width "
         f"{file.hidden}")


_SWIN_BLOCK = "stage_{}_block_{}"


def _count(weights, block):
  """How many of the blocks 0, 1, ... are there."""
  count = 0
  while weights.format.names(
      f"{block.format(count)}/LayerNorm_0/scale")[0] in weights.tensors:
    count += 1
  return count


# --- Weights out --------------------------------------------------------------

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
  flat = {n: np.asarray(x, np.float32)
          for n, x in trees.flatten(params).items()}
  if "pos_embedding" in flat:  # that of a token is in the token already
    before = format_.positions("cls" in flat, getattr(module, "registers", 0))
    flat["pos_embedding"] = np.pad(
        flat["pos_embedding"], ((0, 0), (before, 0), (0, 0)))
  parts = {}
  for name, array in flat.items():
    if formats.is_zero(format_, name, module.fields):
      if array.any():
        raise UserError(f"the format '{format_.name}' has no place for "
                        f"{name!r} of such a backbone, unless it is 0")
      continue
    names = format_.names(name)
    if not names:
      raise UserError(f"the format '{format_.name}' has no place for the "
                      f"parameter {name!r} of a {type(module).__name__}")
    parts.setdefault(names[0], {})[name] = layout.store(
        format_, name, names[0], array)
  tensors = {theirs: np.ascontiguousarray(np.concatenate(
      [arrays[n] for n in layout.sharing(format_, next(iter(arrays)))]))
             for theirs, arrays in parts.items()}
  _check_held(tensors, format_, module)
  return tensors


def _check_held(tensors, format_, module):
  """Whoever reads the tensors has to find the same architecture."""
  if format_ is formats.OURS:
    return
  _, fields, _ = formats.recognise(tensors, {}, {}, f"of {format_.name}")
  for field, value in module.fields.items():
    if field not in ("gelu", "epsilon") and fields.get(field) != value:
      raise UserError(
          f"the format '{format_.name}' cannot hold {field}={value!r}: "
          "choose another, ttc_jax holds everything")


def cast(tensors: Mapping[str, Any], dtype: str,
         where: str) -> dict[str, np.ndarray]:
  """Tensors of another type; UserError where one does not fit it."""
  out = {}
  for name, value in tensors.items():
    with np.errstate(over="ignore"):
      out[name] = np.asarray(value).astype(dtype, order="C")
    if not np.isfinite(out[name]).all():
      raise UserError(f"{where}: {name!r} is not finite as {dtype}")
  return out


def write(path: str, params: trees.Tree, fields: Mapping[str, Any],
          dtype: str = "float32") -> None:
  """Writes a backbone's parameters in our own format, all or nothing.

  Args:
    fields: of the variant: "gelu" and "epsilon", and those of
      `module.fields` that are not the defaults.
    dtype: "float32", "float16" or "bfloat16".

  Raises:
    UserError: an unknown field, or a parameter that does not fit the dtype.
  """
  where = f"weights file '{path}'"
  fields = formats.check_fields(fields, where)
  flat = cast(trees.flatten(params), dtype, where)
  containers.write_safetensors(path, flat, {"ttc_jax": json.dumps(fields)})
