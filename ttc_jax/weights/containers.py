"""Files of tensors: names, shapes and types first, values when they are asked
for.

  .npz                    numpy
  .safetensors            one, or several with an index beside them
  .pth, .pt, .bin         PyTorch's (the extra `torch`)

Nothing is unpickled, except by PyTorch's own reader of tensors alone.
"""
from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import json
import math
import os
import pickle
import re
import tokenize
from typing import NamedTuple
import zipfile
import zlib

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from ttc_jax import files
from ttc_jax.errors import UserError
from ttc_jax.weights import sources

# As the containers spell them; "|V2" is how numpy stores bfloat16.
FLOATS = ("F16", "BF16", "F32", "F64", "<f2", "<f4", "<f8", "|V2",
          "torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")


class Tensor(NamedTuple):
  """A tensor that is still in its file.

  Attributes:
    whole: the tensor that this one is a part of, if it is.
  """
  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]
  whole: "Tensor | None" = None

  def unstacked(self) -> list["Tensor"]:
    """Returns the parts along the first axis; the file is read once."""
    read = functools.cache(self.read)

    def part(i):
      return lambda: read()[i]
    return [Tensor(self.shape[1:], self.dtype, part(i), self)
            for i in range(self.shape[0])]


Opened = tuple[dict[str, Tensor], Mapping[str, str]]


def open_file(path: str) -> Opened:
  """Returns (tensors by name, metadata) of a file, its kind by its content.

  Raises:
    UserError: missing, damaged, or of no known kind.
  """
  with readable(path):
    if path.endswith(sources.INDEX):
      return _open_shards(path)
    with open(path, "rb") as f:
      start = f.read(len(_LFS))
    if start == _LFS:
      raise UserError(f"weights file '{path}' is a Git LFS pointer, not the "
                      "file itself: run 'git lfs pull' in its repository")
    start = start[:9]
    if start.startswith(b"\x80\x02") and start[8:] != b"{":
      return _open_torch(path, mmap=False)  # before PyTorch wrote zip files
    if not start.startswith(b"PK"):
      return _open_safetensors(path)
    with zipfile.ZipFile(path) as archive:
      members = archive.infolist()
    if all(os.path.basename(m.filename) != "data.pkl" for m in members):
      return _open_npz(path)
    if any(m.compress_type for m in members):
      raise ValueError("PyTorch never compresses")  # a bomb does
    return _open_torch(path)


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
  """Turns the errors that damaged files cause into one sentence."""
  try:
    yield
  except FileNotFoundError as e:
    raise UserError(f"weights file '{path}' does not exist") from e
  except PermissionError as e:
    raise UserError(f"weights file '{path}' may not be read ({e.strerror}): "
                    "change its permissions") from e
  except (OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError,
          SyntaxError, tokenize.TokenError, pickle.UnpicklingError,
          zipfile.BadZipFile, zlib.error, safetensors.SafetensorError) as e:
    reason = " ".join(str(e).split())[:200]  # Some quote the whole header.
    raise UserError(
        f"weights file '{path}' cannot be read ({reason}): is it truncated, "
        "or no .npz, .safetensors or .pth file? fetch it again") from e


def write_safetensors(path: str, tensors: Mapping[str, np.ndarray],
                      metadata: Mapping[str, str]) -> None:
  """Writes a file, whole or not at all, with the user's usual permissions,
  which safetensors' own writer ignores. The same content gives the same bytes:
  safetensors writes the metadata in an order that changes."""
  content = memoryview(safetensors.numpy.save(
      dict(tensors), dict(metadata) or None))
  end = 8 + int.from_bytes(content[:8], "little")
  header = json.loads(bytes(content[8:end]))
  if metadata:
    header["__metadata__"] = dict(sorted(metadata.items()))
  text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
  text = text.ljust(-(-len(text) // 8) * 8)  # tensors begin at a multiple of 8
  with files.replacing(path) as file:
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    file.write(content[end:])


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


def _open_shards(path):
  """Opens every tensor in the shard that the index names."""
  tensors, opened = {}, {}
  for name, shard in sources.shards(path).items():
    if shard not in opened:
      opened[shard] = open_file(os.path.join(os.path.dirname(path), shard))[0]
    if name not in opened[shard]:
      raise UserError(f"weights file '{path}' places the tensor {name!r} in "
                      f"'{shard}', which does not have it")
    tensors[name] = opened[shard][name]
  return tensors, {}


_LFS = b"version https://git-lfs.github.com/spec/"
_TRAINING = re.compile(r"(optim|.*scheduler|scaler|amp|rng).*")
_DEEPEST = 4  # levels of a training checkpoint


def _states(value, path=()):
  """Yields (keys, state_dict) of every state_dict in a training checkpoint: a
  dictionary with a tensor of two or more axes."""
  if not isinstance(value, dict) or len(path) > _DEEPEST:
    return
  if any(getattr(v, "ndim", 0) >= 2 for v in value.values()):
    yield path, value
  for key, inner in value.items():
    # An optimiser's state is by number of parameter.
    if isinstance(key, str) and not _TRAINING.fullmatch(key):
      yield from _states(inner, (*path, key))


def _one_state(loaded, path):
  """The only state_dict of a checkpoint."""
  if not isinstance(loaded, dict):
    raise UserError(f"weights file '{path}' holds a {type(loaded).__name__}; "
                    "expected a state_dict")
  found = list(_states(loaded))
  if len(found) < 2:
    return found[0][1] if found else loaded
  names = [".".join(keys) or "the file itself" for keys, _ in found]
  keys = "".join(f"[{key!r}]" for key in found[-1][0])
  raise UserError(
      f"weights file '{path}' holds {len(found)} models, {', '.join(names)}: "
      f"save one alone, e.g. torch.save(torch.load(FILE){keys}, NEW)")


def _open_torch(path, mmap=True):
  try:
    import torch
  except ImportError as error:
    raise UserError(f"weights file '{path}' is PyTorch's, which is not "
                    "installed: pip install -e '.[torch]'") from error
  try:
    state = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
  except pickle.UnpicklingError as error:
    raise UserError(
        f"weights file '{path}' holds more than tensors, so it is not read: "
        "save the model's state_dict() alone") from error
  except Exception as error:  # of a damaged pickle it raises many kinds
    raise ValueError(f"{type(error).__name__}: {error}") from error
  state = _one_state(state, path)

  def reader(tensor):
    return lambda: tensor.detach().to(torch.float32).numpy()
  return {str(n): Tensor(tuple(t.shape), str(t.dtype), reader(t))
          for n, t in state.items() if isinstance(t, torch.Tensor)}, {}
