"""TFRecord files as a sequence, without TensorFlow.

A file is its records one after another, each as
  length (uint64), crc of the length, data, crc of the data
in little-endian, a crc being CRC-32C, rotated and shifted (`masked`). The file
has no index; the offsets are found by going from length to length.
"""
import array
from collections.abc import Iterable
import os
import struct
import threading
from typing import NamedTuple
import weakref

import google_crc32c
import numpy as np

from ttc_jax import errors

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
_AGAIN = "copy the file again, or prepare the data set again"


class Part(NamedTuple):
  """`take` records of a file, after the first `skip`.

  TFDS's file instructions have these fields too.
  """
  filename: str
  skip: int
  take: int


class Records:
  """The records of some parts, one after another; indices are whole numbers.

  Files are opened and indexed when a record of theirs is first asked for.
  Reads are safe from several threads.
  """

  def __init__(self, parts: Iterable[Part],
               files: "dict[str, File] | None" = None):
    """Sequences that are given the same dictionary share indices."""
    files = {} if files is None else files
    parts = [p for p in parts if p.take > 0]
    self._files = [files.setdefault(path, File(path))
                   for path in (os.fspath(p.filename) for p in parts)]
    self._skips = [p.skip for p in parts]
    self._ends = np.cumsum([p.take for p in parts], dtype=np.int64)

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, i: int) -> bytes:
    """Raises errors.UserError for a file that is missing or damaged."""
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of {len(self)}")
    part = int(np.searchsorted(self._ends, i, side="right"))
    start = int(self._ends[part - 1]) if part else 0
    return self._files[part].read(i - start + self._skips[part])


class File:
  """One file, with the offsets of the records read so far."""

  def __init__(self, path: str):
    self._path = path
    self._lock = threading.Lock()
    self._descriptor = -1  # not open yet
    self._offsets = array.array("q", [0])  # of the data, header before it

  def read(self, number: int) -> bytes:
    """Returns the data of record `number`, its checksum verified."""
    try:
      start, end = self._span(number)
      block = os.pread(self._descriptor, end + _FOOTER.size - start, start)
    except OSError as error:
      raise errors.DataError(
          f"{self._path} cannot be read ({error.strerror}); {_AGAIN}"
      ) from error
    data = block[:end - start]
    if masked(data) != _FOOTER.unpack(block[end - start:])[0]:
      self._damaged(number, "the checksum of its data is wrong")
    return data

  def _span(self, number):
    """Start and end of the data of record `number`."""
    with self._lock:
      if self._descriptor < 0:
        self._open()
      while len(self._offsets) < number + 2:
        self._offsets.append(self._next(len(self._offsets) - 1))
      start = self._offsets[number] + _HEADER.size
      return start, self._offsets[number + 1] - _FOOTER.size

  def _open(self):
    descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    weakref.finalize(self, os.close, descriptor)
    self._size = os.fstat(descriptor).st_size
    self._descriptor = descriptor

  def _next(self, number):
    """The offset at which record `number` ends."""
    at = self._offsets[number]
    header = os.pread(self._descriptor, _HEADER.size, at)
    if len(header) < _HEADER.size:
      self._damaged(number, "the file ends before it")
    length, crc = _HEADER.unpack(header)
    if masked(header[:8]) != crc:
      self._damaged(number, "the checksum of its length is wrong")
    end = at + _HEADER.size + length + _FOOTER.size
    if end > self._size:
      self._damaged(number, "the file ends within it")
    return end

  def _damaged(self, number, why):
    raise errors.DataError(
        f"{self._path}: record {number} is damaged ({why}); {_AGAIN}")


def masked(data: bytes) -> int:
  """Returns the CRC-32C of data as TFRecord stores it, rotated and shifted."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xa282ead8) & 0xffffffff
