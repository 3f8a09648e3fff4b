"""Images: decoding, resizing, caching, normalising.

Pixels follow the PyTorch PEFT repositories: the aspect ratio is not kept and
the EXIF orientation is not applied. Unlike there, transparency is not dropped
but composited over white, and 16-bit grey is scaled, not clipped, to 8 bits.
"""
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import errno
import functools
import glob
import hashlib
import io
import json
import logging
import math
import os
import struct
import threading
import time
from typing import Any, BinaryIO
import warnings

import numpy as np
import PIL
from PIL import Image

from ttc_jax import errors, files, interrupt

RESAMPLES = {"bicubic": Image.Resampling.BICUBIC,
             "bilinear": Image.Resampling.BILINEAR}

# What Pillow may open. Others read no pixels, or run programs as EPS does.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF",
           "WEBP")

_FORMAT = "2"     # raise it when the same source gives other pixels
_CHUNK = 256      # rows in memory at a time while the cache is written
_TILE = 1024      # side in pixels of what is converted at a time
_SAMPLE = 64      # rows of a Stream that its digest decodes
_SHOWN = 20       # damaged images that a sentence lists

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
  """Images by number, before they have a size.

  count: N > 0.
  read: row i -> an RGB PIL image; called from several threads.
  key: lines that change whenever the pixels do, which name the cache; None:
    reading is cheap, nothing is cached.
  stamp: lines that change in all likelihood when the pixels do, and cost
    little even where N is large; None: those of `key`.
  name: row i -> a name that is the same for the same image in another split.
  """
  count: int
  read: Callable[[int], Image.Image]
  key: Callable[[], Iterable[str]] | None = None
  stamp: Callable[[], Iterable[str]] | None = None
  name: Callable[[int], str] | None = None


def from_files(paths: Sequence[str], names: Sequence[str]) -> Source:
  """Returns the source of image files.

  Args:
    paths: the files, as they are opened.
    names: the same files as their list calls them, wherever it lies.
  """
  return Source(
      count=len(paths),
      read=lambda i: read(paths[i]),
      key=lambda: digests(paths),
      stamp=lambda: map(file_stamp, paths, names),
      name=paths.__getitem__)


def subset(source: Source, rows: Sequence[int]) -> Source:
  """Returns the source of some rows of another, in the given order."""
  rows = [int(row) for row in rows]
  chosen = hashlib.sha256(str(rows).encode()).hexdigest()

  def lines(of):
    return of and (lambda: (*of(), chosen))

  def at(of):
    return lambda i: of(rows[i])
  return Source(
      count=len(rows), read=at(source.read), key=lines(source.key),
      stamp=lines(source.stamp), name=source.name and at(source.name))


def chain(first: Source, second: Source) -> Source:
  """Returns the source of all rows of two sources, one after the other."""
  def of(a, b):
    return lambda i: a(i) if i < first.count else b(i - first.count)

  def both(a, b):
    return a and b and (lambda: (*a(), *b()))
  return Source(
      count=first.count + second.count, read=of(first.read, second.read),
      key=both(first.key, second.key),
      stamp=both(first.stamp or first.key, second.stamp or second.key),
      name=first.name and second.name and of(first.name, second.name))


class ImageError(errors.DataError):
  """One image cannot be decoded.

  what: the file. why: what the decoder said.
  """

  def __init__(self, what: str, why: str):
    super().__init__(f"cannot decode image {what} ({why}): replace the file, "
                     "or leave it out")
    self.what, self.why = what, why


def read(path: str) -> Image.Image:
  """Decodes a file to RGB; ImageError for a bad or huge one."""
  try:
    with _warnings_of(path), open(path, "rb") as file:
      return decode(file)
  except Exception as error:  # Pillow's decoders raise nearly every type
    why = getattr(error, "strerror", None) or str(error)
    raise ImageError(path, why) from error


def decode(file: BinaryIO, change: Callable[[Image.Image], Image.Image]
           | None = None) -> Image.Image:
  """Decodes an open file to RGB.

  Args:
    file: opened for reading, at its start.
    change: applied to the image as it is stored, before it becomes RGB.

  Raises:
    Exception: of any type, by Pillow's decoders, if the file is damaged.
  """
  try:
    return _decode(file, change)
  except ValueError as error:
    if "MAX_TEXT" not in str(error):
      raise
    file.seek(0)  # the pixels may be whole
    return _decode(io.BytesIO(without_text(file.read())), change)


def _decode(file, change):
  with open_image(file) as image:
    return to_rgb(change(image) if change else image)


def open_image(file: BinaryIO) -> Image.Image:
  """Opens an image in one of FORMATS, no pixel decoded yet.

  Raises:
    ValueError: another format, or more pixels than Pillow's limit.
  """
  try:
    image = Image.open(file, formats=_formats())
  except PIL.UnidentifiedImageError:
    raise ValueError("it is no image in a known format: "
                     f"{', '.join(_formats())}") from None
  # Pillow only warns up to twice the limit, and warning filters are not
  # safe under threads: hence our own check.
  limit = Image.MAX_IMAGE_PIXELS
  if limit and image.width * image.height > limit:
    raise ValueError(f"{image.width} x {image.height} pixels are over the "
                     f"limit of {limit} (a decompression bomb?)")
  return image


@functools.cache
def _formats() -> tuple[str, ...]:
  """Those of FORMATS that the installed Pillow can open."""
  Image.init()
  return tuple(name for name in FORMATS if name in Image.OPEN)


_reading = threading.local()  # path: the file that this thread decodes


@contextlib.contextmanager
def _warnings_of(path: str) -> Iterator[None]:
  """Within the block, warnings of this thread go to the log, with the file.

  Pillow warns of damaged EXIF data, say, without a word about the file.
  `warnings.catch_warnings` is not safe under threads, so the function that
  shows warnings is wrapped, for good.
  """
  if not getattr(warnings.showwarning, "names_images", False):
    warnings.showwarning = _naming(warnings.showwarning)
  _reading.path = path
  try:
    yield
  finally:
    _reading.path = None


def _naming(show: Callable) -> Callable:
  def show_named(message, *args, **kw):
    path = getattr(_reading, "path", None)
    if path is None:
      show(message, *args, **kw)
    else:
      _log.warning("image %s: %s", errors.printable(path), message)
  show_named.names_images = True  # type: ignore[attr-defined]
  return show_named


def without_text(data: bytes) -> bytes:
  """Returns a PNG file without its texts and colour profile.

  Pillow refuses large ones, although the pixels do not depend on them.
  """
  out, at = [data[:8]], 8
  while at + 8 <= len(data):
    length, kind = struct.unpack_from(">I4s", data, at)
    end = at + 12 + length  # length, kind, data, checksum
    if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
      out.append(data[at:end])
    at = end
  return b"".join(out)


def to_rgb(image: Image.Image) -> Image.Image:
  """Returns an image of any 8- or 16-bit mode as RGB, alpha over white.

  Raises:
    ValueError: the pixels are floats.
  """
  if image.mode == "F":
    raise ValueError("float pixels have no known range; store 8-bit ones")
  if image.mode.startswith("I"):
    return _in_tiles(image, _scaled)
  if image.has_transparency_data:
    return _in_tiles(image, _over_white)
  return image.convert("RGB")


def _in_tiles(image, convert):
  """Converts a tile at a time: these conversions take many bytes a pixel."""
  out = Image.new("RGB", image.size)
  for top in range(0, image.height, _TILE):
    for left in range(0, image.width, _TILE):
      box = (left, top, min(left + _TILE, image.width),
             min(top + _TILE, image.height))
      out.paste(convert(image.crop(box)), box)
  return out


def _scaled(image):
  """16-bit grey to RGB."""
  levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
  grey = (levels * 255 + 32767) // 65535
  return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _over_white(image):
  white = Image.new("RGBA", image.size, "white")
  return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def resampling(resample: str) -> tuple[Image.Resampling, int]:
  """Returns (filter, short side) of "bicubic", "bilinear" or "bicubic/256".

  The short side is 0 where an image is squashed to the square; otherwise it is
  resized to that short side, its aspect kept, and the centre is cropped.

  Raises:
    errors.UserError: another text.
  """
  name, slash, short = resample.partition("/")
  if name not in RESAMPLES or slash and not (
      short.isascii() and short.isdecimal() and 0 < int(short) < 10_000):
    raise errors.UserError(
        f"unknown resample {resample!r}: give one of {', '.join(RESAMPLES)}, "
        "or with the short side before a centre crop, as bicubic/256")
  return RESAMPLES[name], int(short or 0)


def check_crop(size: int, resample: str) -> None:
  """errors.UserError where a crop would be larger than the image."""
  _, short = resampling(resample)
  if 0 < short < size:
    raise errors.UserError(f"resample {resample!r}: the short side is below "
                           f"the image size, {size}; give {size} or more")


def resize(image: Image.Image, size: int, resample: str) -> np.ndarray:
  """Returns an RGB image as uint8 (size, size, 3); see `resampling`."""
  how, short = resampling(resample)
  if not short:
    return np.asarray(image.resize((size, size), how))
  scale = short / min(image.size)
  wide, high = (max(short, round(scale * side)) for side in image.size)
  # The part of the image that the centre shows, so that no more is resized.
  left, top = (round((side - size) / 2) for side in (wide, high))
  box = (left * image.width / wide, top * image.height / high,
         (left + size) * image.width / wide,
         (top + size) * image.height / high)
  return np.asarray(image.resize((size, size), how, box))


def prepare(image: Any, size: int, resample: str) -> np.ndarray:
  """Returns an image of any kind as uint8 (size, size, 3); see `resize`.

  Args:
    image: a path, a PIL image, or a uint8 array (H, W, 3), of numpy, JAX or
      PyTorch.

  Raises:
    errors.UserError: another type or shape.
    errors.DataError: an image that cannot be read.
  """
  if not isinstance(image, (Image.Image, np.ndarray)) and hasattr(
      image, "__array__"):
    image = np.asarray(image)
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
      raise errors.UserError(
          f"an image is {image.dtype} of shape {image.shape}; expected uint8 "
          "(H, W, 3)")
    image = Image.fromarray(image)
  elif isinstance(image, Image.Image):
    try:
      image = to_rgb(image)
    except Exception as error:  # Pillow's decoders raise nearly every type
      raise ImageError(f"a PIL image of mode {image.mode}", str(error)
                       ) from error
  elif isinstance(image, (str, os.PathLike)):
    image = read(os.fspath(image))
  else:
    raise errors.UserError(
        f"an image is of type {type(image).__name__}; give a path, a PIL image "
        "or a uint8 array (H, W, 3)")
  return resize(image, size, resample)


def are_prepared(images: Any, size: int) -> bool:
  """Tells whether images are one array uint8 (N, size, size, 3)."""
  return (getattr(images, "dtype", None) == np.uint8
          and tuple(getattr(images, "shape", ()))[1:] == (size, size, 3))


def prepare_all(images: Any, size: int, resample: str) -> np.ndarray:
  """Returns images of any kind as uint8 (N, size, size, 3), on all cores.

  Args:
    images: a sequence of what `prepare` takes, or an array (N, H, W, 3). One
      array uint8 (N, size, size, 3) is taken for prepared images, and returned
      as it is; all others are resized, and cropped where `resample` crops.

  Raises:
    errors.UserError: not a sequence, or an image of another type or shape.
    errors.DataError: an image file that cannot be read.
  """
  if isinstance(images, (str, bytes, os.PathLike, Image.Image)):
    raise errors.UserError(f"images are one, {str(images)!r}; give a list of "
                           "images")
  check_crop(size, resample)
  if hasattr(images, "__array__"):
    images = np.asarray(images)
  if are_prepared(images, size):
    return images
  try:
    images = list(images)
  except TypeError as error:
    raise errors.UserError(f"images are of type {type(images).__name__}; give "
                           "a list of images, or an array (N, H, W, 3)"
                           ) from error
  found = list(in_order(lambda x: prepare(x, size, resample), images))
  return np.stack(found) if found else np.zeros((0, size, size, 3), np.uint8)


def file_digest(path: str) -> str:
  """Returns the SHA-256 of a file's bytes, in hexadecimal."""
  with _readable(path), open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def digests(paths: Sequence[str]) -> Iterator[str]:
  """Yields the SHA-256 of files, computed on all cores."""
  return in_order(file_digest, paths)


def file_stamp(path: str, name: str, timed: bool = True) -> str:
  """Returns what changes in all likelihood when a file does.

  Args:
    name: that stands for the file, wherever it lies.
    timed: with the time of its last change.
  """
  with _readable(path):
    stat = os.stat(path)
  return f"{name}\t{stat.st_size}" + f"\t{stat.st_mtime_ns}" * timed


@contextlib.contextmanager
def _readable(path):
  try:
    yield
  except OSError as error:
    raise ImageError(path, error.strerror or str(error)) from error


def in_order(function: Callable[[Any], Any], items: Iterable[Any]
             ) -> Iterator[Any]:
  """Yields function(item) in order, computed on all cores, a few ahead."""
  items = list(items)
  with futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
    for start in range(0, len(items), _CHUNK):
      interrupt.check()
      yield from pool.map(function, items[start:start + _CHUNK])


def damaged(sources: Iterable[Source]) -> list[errors.DataError]:
  """Reads every image once; returns the errors of those that are damaged."""
  found: dict[str, errors.DataError] = {}
  seen: set[str] = set()
  for source in sources:
    rows: Sequence[int] = range(source.count)
    if source.name:
      named = {source.name(i): i for i in rows}
      rows = [i for name, i in named.items() if name not in seen]
      seen.update(named)
    for error in in_order(functools.partial(_damage, source), rows):
      if error:
        found.setdefault(str(error), error)
  return list(found.values())


def _damage(source: Source, i: int) -> errors.DataError | None:
  try:
    source.read(i)
    return None
  except errors.DataError as error:
    return error


def together(found: Sequence[errors.DataError]) -> errors.DataError:
  """Returns one error that lists the first 20 of several, and their number."""
  if len(found) == 1:
    return found[0]
  listed = "; ".join(f"{e.what} ({e.why})" if isinstance(e, ImageError)
                     else str(e) for e in found[:_SHOWN])
  more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
  return errors.DataError(
      f"cannot decode {len(found)} images: {listed}{more}: replace the files, "
      "or leave them out")


class Stream:
  """Rows uint8 (N, S, S, 3) that are decoded when they are indexed.

  Indices are numpy's for the first axis: a row, a slice, an array of rows.
  Slices asked for in order find the next one decoded in the background.
  """

  def __init__(self, count: int, size: int, row: Callable[[int], np.ndarray],
               stamp: Callable[[], Iterable[str]] | None = None):
    """See `Source` for count and stamp; row: row i -> uint8 (S, S, 3)."""
    self.stamp = stamp
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

  def changed(self, size: int,
              change: Callable[[np.ndarray], np.ndarray]) -> "Stream":
    """Returns a Stream of `change` of each row, (size, size, 3)."""
    return Stream(len(self), size, lambda i: change(self._row(i)), self.stamp)

  def close(self) -> None:
    """Cancels the decoding ahead and stops the threads."""
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


Images = np.ndarray | Stream
# A source -> its images, and their SHA-256 where reading them has told it.
Decoder = Callable[[Source], tuple[Images, str]]


def digest(images: Images) -> str:
  """Returns the SHA-256 of uint8 rows, in hexadecimal.

  Of a Stream that has a stamp: of the stamp and 64 rows.
  """
  sha = hashlib.sha256()
  if isinstance(images, Stream) and images.stamp:
    for line in images.stamp():
      sha.update(_bytes(f"{line}\n"))
    rows = np.unique(np.linspace(0, len(images) - 1, _SAMPLE).astype(int))
    sha.update(images[rows].data)
    return sha.hexdigest()
  for start in range(0, len(images), _CHUNK):
    sha.update(np.ascontiguousarray(images[start:start + _CHUNK]).data)
  return sha.hexdigest()


def _bytes(text: str) -> bytes:
  """Returns UTF-8; surrogates (of other file names) give their bytes."""
  return text.encode("utf-8", "surrogateescape")


def make_decoder(size: int, resample: str, cache: str | None,
                 cache_gib: float) -> Decoder:
  """Checks the settings of `tasks.load` and returns source -> images.

  The images are a memmap of the cache; or an array, where the source is cheap;
  or a Stream, where they would take more than `cache_gib`.
  """
  if isinstance(size, bool) or not isinstance(size, int) or size < 1:
    raise errors.UserError(f"image size must be a whole number >= 1: {size!r}")
  check_crop(size, resample)
  if not cache_gib >= 0:
    raise errors.UserError(f"cache_gib must be >= 0 (GiB): {cache_gib!r}")

  def decode(source: Source) -> tuple[Images, str]:
    stream = Stream(source.count, size,
                    lambda i: resize(source.read(i), size, resample),
                    source.stamp or source.key)
    if math.prod(stream.shape) > cache_gib * 2**30:
      return stream, ""
    with contextlib.closing(stream):
      if source.key is None:
        array = stream[:]
        array.setflags(write=False)
        return array, ""
      lines = (_FORMAT, PIL.__version__, str(size), resample, *source.key())
      name = hashlib.sha256(_bytes("\n".join(lines))).hexdigest()[:32]
      return _cached(os.path.join(
          files.cache_folder("images", cache), f"{name}.npy"), stream)

  return decode


def _cached(path: str, stream: Stream) -> tuple[np.ndarray, str]:
  """Opens the cache file of `stream`, after writing it where needed."""
  folder = os.path.dirname(path)
  try:
    opened = _open_cache(path, stream.shape)
    if opened is None:
      os.makedirs(folder, exist_ok=True)
      _write_or_wait(path, stream)
      opened = _open_cache(path, stream.shape)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise errors.UserError(
          f"no space left for the image cache in {folder}: free some, or "
          "choose another folder with config.cache") from error
    raise errors.UserError(
        f"cannot use the image cache folder {folder} ({error.strerror}): "
        "choose a writable one with config.cache") from error
  if opened is None:
    raise errors.UserError(f"the image cache {path} was written but cannot be "
                           "read back: choose another disk with config.cache")
  return opened


def _open_cache(path: str, shape: tuple[int, ...]
                ) -> tuple[np.ndarray, str] | None:
  """The memmap and its checksum, or None; a damaged file is deleted."""
  if not os.path.exists(path):
    return None
  try:
    sha256 = files.read_json(f"{path}.json")["sha256"]
    array = np.lib.format.open_memmap(path, mode="r")  # refuses pickles
    whole = array.shape == shape and array.dtype == np.uint8
    if whole and digest(array) == sha256:
      return array, sha256
  except PermissionError:
    raise
  except Exception:  # a damaged file can make the readers raise anything
    pass
  _log.warning("the image cache %s is damaged: decoding again",
               errors.printable(path))
  for damaged_file in (path, f"{path}.json"):
    with contextlib.suppress(FileNotFoundError):
      os.remove(damaged_file)
  return None


def _write_or_wait(path: str, stream: Stream) -> None:
  """Writes the cache file, or waits for a process that is writing it."""
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
  sha = hashlib.sha256()
  with files.replacing(path) as file:
    np.lib.format.write_array_header_1_0(file, header)
    for start in range(0, len(stream), _CHUNK):
      interrupt.check()
      rows = stream[start:start + _CHUNK]
      file.write(rows.data)
      sha.update(rows.data)
    file.flush()
    # In place before the images are.
    with files.replacing(f"{path}.json") as note:
      note.write(json.dumps({"sha256": sha.hexdigest(),
                             "shape": stream.shape}).encode())


def _cancel(pending: list[futures.Future]) -> None:
  for future in pending:
    future.cancel()
