"""Images on their way to the model: decode, resize, cache, normalise.

Pixels follow the PyTorch PEFT repositories: the aspect ratio is not kept and
the EXIF orientation is not applied. Unlike there, transparency is not dropped
but composited over white, and 16-bit grey is scaled, not clipped, to 8 bits.
"""
import contextlib
import errno
import glob
import hashlib
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from ttc_jax import errors, files, interrupt

RESAMPLES = {"bicubic": Image.Resampling.BICUBIC,
             "bilinear": Image.Resampling.BILINEAR}

_FORMAT = "1"     # raise it when the same source gives other pixels
_CHUNK = 256      # rows in memory at a time while the cache is written
_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
_STD = np.array((0.229, 0.224, 0.225), np.float32)

NORMALISATIONS = {
    "half": lambda x: (x - 127.5) / 127.5,
    "imagenet": lambda x: (x / 255 - _MEAN) / _STD,
    "none": lambda x: x / 255,
}

_log = logging.getLogger(__name__)


class Source(NamedTuple):
  """Images by number, before they have a size.

  count: N > 0.
  read: row i -> an RGB PIL image; called from several threads.
  key: lines that change whenever the images do; None: cheap, do not cache.
  """
  count: int
  read: Callable[[int], Image.Image]
  key: Callable[[], Iterable[str]] | None = None


def normalise(images: Any, how: Any) -> Any:
  """uint8 (..., 3), of numpy or jax, to float32 as the backbone expects it.

  Args:
    how: a name, or the pair (mean, std) of the channels of pixels in 0..1.
  """
  if isinstance(how, tuple):
    mean, std = (np.asarray(x, np.float32) for x in how)
    return (images.astype("float32") / 255 - mean) / std
  errors.check_known("normalisation", how, NORMALISATIONS)
  return NORMALISATIONS[how](images.astype("float32"))


def read(path: str) -> Image.Image:
  """Decodes a file to RGB; a bad or huge one raises errors.UserError."""
  try:
    with Image.open(path) as image:
      # Pillow only warns up to twice the limit, and warning filters are not
      # safe under threads: hence our own check.
      limit = Image.MAX_IMAGE_PIXELS
      if limit and image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels are over the "
                         f"limit of {limit} (a decompression bomb?)")
      return to_rgb(image)
  except Exception as error:  # Pillow's decoders raise nearly every type
    raise errors.DataError(
        f"cannot decode image {path} ({error}): replace the file, or leave it "
        "out") from error


def to_rgb(image: Image.Image) -> Image.Image:
  """Any 8- or 16-bit mode to RGB, alpha over white; ValueError for floats."""
  if image.mode == "F":
    raise ValueError("float pixels have no known range; store 8-bit ones")
  if image.mode.startswith("I"):
    levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    grey = (levels * 255 + 32767) // 65535
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
  if image.has_transparency_data:
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image.convert("RGBA"))
  return image.convert("RGB")


def resize(image: Image.Image, size: int, resample: str) -> np.ndarray:
  """RGB image to uint8 (size, size, 3), antialiased, aspect not kept."""
  return np.asarray(image.resize((size, size), RESAMPLES[resample]))


def prepare(image: Any, size: int, resample: str) -> np.ndarray:
  """Anything that shows an image -> uint8 (size, size, 3), as `resize` does it.

  Args:
    image: a path, a PIL image, or a uint8 array (H, W, 3), which is handed on
      where it has the size already.
  """
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
      raise errors.UserError(
          f"an image is {image.dtype} of shape {image.shape}; expected uint8 "
          "(H, W, 3)")
    if image.shape[:2] == (size, size):
      return image
    image = Image.fromarray(image)
  elif isinstance(image, Image.Image):
    image = to_rgb(image)
  else:
    image = read(image)
  return resize(image, size, resample)


def check_batch(images: Any, size: int) -> np.ndarray:
  """Returns the images if they are uint8 (N, size, size, 3), else UserError."""
  images = np.asarray(images)
  if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
    raise errors.UserError(
        f"the images are {images.dtype} of shape {images.shape}; expected "
        f"uint8 (N, {size}, {size}, 3)")
  return images


def file_key(path: str) -> str:
  """A line that changes when the file does: path, bytes, time of change."""
  try:
    stat = os.stat(path)
  except OSError as error:
    raise errors.DataError(
        f"cannot read image {path} ({error.strerror}): put it back, or take "
        "it out of the lists") from error
  return f"{path}\t{stat.st_size}\t{stat.st_mtime_ns}"


class Stream:
  """Rows uint8 (N, S, S, 3) that are decoded when they are indexed.

  Indices are numpy's for the first axis: a row, a slice, an array of rows.
  Slices asked for in order find the next one decoded in the background.
  """

  def __init__(self, count: int, size: int, row: Callable[[int], np.ndarray]):
    self.shape = (count, size, size, 3)
    self.dtype = np.dtype(np.uint8)
    self._row = row
    self._pool = futures.ThreadPoolExecutor(os.cpu_count() or 1)
    self._end = 0                                 # where the last slice ended
    self._ahead: tuple[range, list[futures.Future]] = (range(0), [])

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, index: Any) -> np.ndarray:
    if not isinstance(index, slice):
      rows = np.arange(len(self))[index]
      if rows.ndim == 0:
        return self._row(int(rows))
      return self._gather(self._submit(rows))
    rows = range(len(self))[index]
    expected, pending = self._ahead
    if rows != expected:
      _cancel(pending)
      pending = self._submit(rows)
    in_order, self._end = rows.start == self._end, rows.stop
    after = range(rows.stop, min(rows.stop + len(rows), len(self)))
    if not (in_order and rows.step == 1):
      after = range(0)
    self._ahead = after, self._submit(after)
    return self._gather(pending)

  def close(self) -> None:
    """Drops what is being decoded ahead and stops the threads."""
    self._pool.shutdown(wait=False, cancel_futures=True)

  def _submit(self, rows: Iterable[int]) -> list[futures.Future]:
    return [self._pool.submit(self._row, int(i)) for i in rows]

  def _gather(self, pending: list[futures.Future]) -> np.ndarray:
    try:
      out = [p.result() for p in pending]
    except BaseException:
      _cancel(pending)
      raise
    return np.stack(out) if out else np.empty((0, *self.shape[1:]), np.uint8)


def make_decoder(size: int, resample: str, cache: str | None,
                 cache_gib: float) -> Callable[[Source], np.ndarray | Stream]:
  """Checks the settings of `tasks.load` and returns source -> images.

  The result is a memmap of the cache; or an array, where the source is cheap;
  or a Stream, where the images would take more than `cache_gib`.
  """
  errors.check_known("resample", resample, RESAMPLES)
  if isinstance(size, bool) or not isinstance(size, int) or size < 1:
    raise errors.UserError(f"image size must be a whole number >= 1: {size!r}")
  if not cache_gib >= 0:
    raise errors.UserError(f"cache_gib must be >= 0 (GiB): {cache_gib!r}")

  def decode(source: Source) -> np.ndarray | Stream:
    stream = Stream(source.count, size,
                    lambda i: resize(source.read(i), size, resample))
    if math.prod(stream.shape) > cache_gib * 2**30:
      return stream
    with contextlib.closing(stream):
      if source.key is None:
        array = stream[:]
        array.setflags(write=False)
        return array
      lines = (_FORMAT, PIL.__version__, str(size), resample, *source.key())
      name = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
      return _cached(os.path.join(
          files.cache_folder("images", cache), f"{name}.npy"), stream)

  return decode


def _cached(path: str, stream: Stream) -> np.ndarray:
  """Opens the cache file of `stream`, after writing it where needed."""
  folder = os.path.dirname(path)
  try:
    array = _open_cache(path, stream.shape)
    if array is None:
      os.makedirs(folder, exist_ok=True)
      _write_or_wait(path, stream)
      array = _open_cache(path, stream.shape)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise errors.UserError(
          f"no space left for the image cache in {folder}: free some, or "
          "choose another folder with config.cache") from error
    raise errors.UserError(
        f"cannot use the image cache folder {folder} ({error.strerror}): "
        "choose a writable one with config.cache") from error
  if array is None:
    raise errors.UserError(f"the image cache {path} was written but cannot be "
                          "read back: choose another disk with config.cache")
  return array


def _open_cache(path: str, shape: tuple[int, ...]) -> np.ndarray | None:
  """The memmap, or None if there is none; a damaged file is deleted."""
  if not os.path.exists(path):
    return None
  try:
    with open(f"{path}.json", encoding="utf-8") as file:
      crc = json.load(file)["crc32"]
    array = np.lib.format.open_memmap(path, mode="r")  # refuses pickles
    whole = array.shape == shape and array.dtype == np.uint8
    if whole and _crc(array) == crc:
      return array
  except PermissionError:
    raise
  except Exception:  # a damaged file can make the readers raise anything
    pass
  _log.warning("the image cache %s is damaged: decoding again", path)
  for damaged in (path, f"{path}.json"):
    with contextlib.suppress(FileNotFoundError):
      os.remove(damaged)
  return None


def _write_or_wait(path: str, stream: Stream) -> None:
  """Writes the cache file, unless another process is at it."""
  folder, name = os.path.split(path)
  waited = False
  while not (waited and os.path.exists(path)):
    try:
      with files.lock(os.path.join(folder, ".locks", name)):
        return _write_cache(path, stream)
    except errors.Busy:
      waited = True
      interrupt.check()
      time.sleep(0.2)


def _write_cache(path: str, stream: Stream) -> None:
  """Decodes all rows into an .npy file and notes their checksum beside it.

  Plain writes, since a memory map on a full disk kills the process by SIGBUS.
  """
  for left in glob.glob(f"{glob.escape(path)}.*.tmp"):  # of a killed process
    os.remove(left)
  header = {"descr": "|u1", "fortran_order": False, "shape": stream.shape}
  crc = 0
  with files.replacing(path) as file:
    np.lib.format.write_array_header_1_0(file, header)
    for start in range(0, len(stream), _CHUNK):
      interrupt.check()
      rows = stream[start:start + _CHUNK]
      file.write(rows)
      crc = zlib.crc32(rows, crc)
    file.flush()
    # In place before the images are.
    with files.replacing(f"{path}.json") as note:
      note.write(json.dumps({"crc32": crc, "shape": stream.shape}).encode())


def _crc(array: np.ndarray) -> int:
  crc = 0
  for start in range(0, len(array), _CHUNK):
    crc = zlib.crc32(array[start:start + _CHUNK], crc)
  return crc


def _cancel(pending: list[futures.Future]) -> None:
  for future in pending:
    future.cancel()
