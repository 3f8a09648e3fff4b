"""Zip files of pictures, unpacked into the cache, where they are folders.

The folder is named by the archive's directory (names, sizes and checksums), so
that a changed archive is another folder.
"""
import contextlib
import functools
import hashlib
import os
import posixpath
import shutil
import stat
import uuid
import zipfile
import zlib

from ttc_jax import errors, files, interrupt

# More is refused: a mistake, or an archive made to fill the disk.
MAX_FILES = 2_000_000
MAX_FILE = 2**30
MAX_TOTAL = 2**39
_MAX_RATIO, _FREE_OF_RATIO = 200, 2**30
_BLOCK = 2**20
_TIMES = 2**31 - 1  # seconds since 1970 that every file system knows


def is_archive(data: str) -> bool:
  """Tells whether `data` is a file called .zip."""
  path = files.expand(data)
  return path.lower().endswith(".zip") and os.path.isfile(path)


def unpacked(data: str) -> str:
  """Returns the folder of an archive's files, called as the archive.

  Raises:
    errors.UserError: it is no zip file, damaged, encrypted or too large, or a
      name leads out of the folder.
  """
  path = os.path.realpath(files.expand(data))
  status = os.stat(path)
  return _unpacked(data, path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _unpacked(data: str, path: str, size: int, time: int) -> str:
  del size, time  # of the key only
  try:
    with zipfile.ZipFile(path) as archive:
      members = _members(data, archive)
      lines = [f"{m.filename}\t{m.file_size}\t{m.CRC}" for m in members]
      key = hashlib.sha256("\n".join(lines).encode(
          "utf-8", "surrogateescape")).hexdigest()[:24]
      stem = os.path.splitext(os.path.basename(files.expand(data)))[0]
      parent = os.path.join(files.cache_folder("unpacked"), key)
      target = os.path.join(parent, stem)
      if not os.path.isdir(target):
        with files.lock(os.path.join(files.cache_folder("unpacked"), ".locks",
                                     key), wait=True):
          if not os.path.isdir(target):
            _unpack(data, archive, members, parent, target)
      return target
  except zipfile.BadZipFile as error:
    raise errors.UserError(f"{data} is no whole zip file ({error}): get or "
                           "make it again") from error
  except OSError as error:
    raise errors.UserError(
        f"{data} cannot be unpacked into {files.cache_folder('unpacked')} "
        f"({error.strerror}): free space there, set XDG_CACHE_HOME, or give "
        "the unpacked folder") from error


def _members(data: str, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
  """Returns the files to unpack, checked."""
  found = [m for m in archive.infolist()
           if not m.is_dir() and not _is_hidden(m.filename)]
  for member in found:
    why = _fault(member)
    if why:
      raise errors.UserError(f"{data}: {member.filename!r} {why}: unpack the "
                             "archive yourself and give the folder")
  total = sum(m.file_size for m in found)
  packed = sum(m.compress_size for m in found)
  if len(found) > MAX_FILES or total > MAX_TOTAL or (
      total > _FREE_OF_RATIO and total > _MAX_RATIO * packed):
    raise errors.UserError(
        f"{data} would unpack to {len(found):,} files of {total:,} bytes, from "
        f"{packed:,}: that is no archive of pictures; give the folder")
  names = [m.filename for m in found]
  if len(set(names)) < len(names):
    raise errors.UserError(f"{data} holds a name twice: make it again")
  return found


def _fault(member: zipfile.ZipInfo) -> str:
  """Why a file is not unpacked, or an empty string."""
  name = member.filename
  parts = name.split("/")
  if (posixpath.isabs(name) or ".." in parts or "\\" in name or "\0" in name
      or parts[0][1:2] == ":"):
    return "leads out of its folder"
  if stat.S_ISLNK(member.external_attr >> 16):
    return "is a symbolic link"
  if member.flag_bits & 1:
    return "is encrypted"
  if member.file_size > MAX_FILE:
    return f"has {member.file_size:,} bytes, more than {MAX_FILE:,}"
  return ""


def _is_hidden(name: str) -> bool:
  return any(part.startswith(".") and part not in (".", "..")
             or part == "__MACOSX" for part in name.split("/"))


def _unpack(data: str, archive: zipfile.ZipFile,
            members: list[zipfile.ZipInfo], parent: str, target: str) -> None:
  """Unpacks all members, whole or not at all."""
  os.makedirs(parent, exist_ok=True)
  total = sum(m.file_size for m in members)
  free = shutil.disk_usage(parent).free
  if total > free:
    raise errors.UserError(
        f"{data} needs {total:,} bytes in {parent}, where {free:,} are free: "
        "free some, set XDG_CACHE_HOME, or give the unpacked folder")
  scratch = os.path.join(parent, f".{uuid.uuid4().hex}.tmp")
  try:
    for member in members:
      interrupt.check()
      path = os.path.join(scratch, *member.filename.split("/"))
      os.makedirs(os.path.dirname(path), exist_ok=True)
      with archive.open(member) as source, open(path, "xb") as file:
        shutil.copyfileobj(source, file, _BLOCK)  # at most `file_size` bytes
      # A file's stamp is its size and time: so the time tells the contents, and
      # hosts that unpacked at other times have the same task.
      os.utime(path, (member.CRC & _TIMES, member.CRC & _TIMES))
    os.makedirs(scratch, exist_ok=True)
    os.rename(scratch, target)
  except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError,
          RuntimeError, zlib.error) as error:
    raise errors.UserError(f"{data} is damaged ({error}): get or make it "
                           "again") from error
  except FileExistsError as error:
    raise errors.UserError(f"{data}: {error.filename} is both a file and a "
                           "folder: make the archive again") from error
  finally:
    with contextlib.suppress(OSError):
      shutil.rmtree(scratch)
