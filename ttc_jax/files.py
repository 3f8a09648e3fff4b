"""Files that appear whole or not at all, and locks between processes."""
from collections.abc import Iterator
import contextlib
import errno
import importlib.util
import json
import logging
import os
import sys
from typing import Any, BinaryIO
import uuid

from ttc_jax.errors import Busy, UserError

# Windows has no locks of this kind: run one process at a time there.
fcntl = (importlib.import_module("fcntl") if importlib.util.find_spec("fcntl")
         else None)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def use_utf8_names() -> None:
  """Starts this command again in Python's UTF-8 mode if names of files are not
  UTF-8 in its locale (LC_ALL=C without coercion, Latin-1).

  TensorStore and safetensors take a path as UTF-8 in any locale: one with an
  umlaut would fail, or be another file. What is printed stays in the encoding
  of the terminal.
  """
  if sys.getfilesystemencoding() == "utf-8" or not sys.executable:
    return
  if sys.stdout:
    os.environ.setdefault("PYTHONIOENCODING",
                          f"{sys.stdout.encoding}:backslashreplace")
  os.execv(sys.executable,
           [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def expand(path: str) -> str:
  """Returns the path with a leading `~` or `~user` expanded."""
  return os.path.expanduser(path)


def utf8(path: str) -> str:
  """Returns the absolute path, `~` expanded.

  Raises:
    UserError: it is not UTF-8; TensorStore and safetensors cannot open it.
  """
  path = os.path.abspath(expand(path))
  try:
    path.encode()
  except UnicodeEncodeError as error:
    raise UserError(f"the path '{path}' is not UTF-8: rename that file or "
                    "folder") from error
  return path


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
  """Opens a temporary file and renames it to `path` at the end of the block.

  After an error, `path` is as it was before and the temporary file is gone.

  Example:
    with replacing("scores.npz") as file:
      np.savez(file, scores=scores)
  """
  temporary = f"{path}.{uuid.uuid4().hex}.tmp"
  try:
    with open(temporary, "xb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())  # or a power cut leaves an empty file
    os.replace(temporary, path)
  except BaseException:  # Ctrl-C too
    with contextlib.suppress(OSError):
      os.remove(temporary)
    raise


def new(path: str) -> str:
  """Returns the absolute path of an output, `~` expanded; creates nothing.

  Raises:
    UserError: the path exists already, is not UTF-8, or cannot be written.
  """
  path = utf8(path)
  if os.path.lexists(path):
    raise UserError(f"'{path}' exists and is not overwritten: delete "
                    "it, or give another path")
  folder = os.path.dirname(path)
  while not os.path.lexists(folder):
    folder = os.path.dirname(folder)
  try:
    with open(os.path.join(folder, f".{uuid.uuid4().hex}.tmp"), "xb") as probe:
      os.remove(probe.name)
  except OSError as error:
    raise UserError(f"'{path}' cannot be written ({error.strerror}): give "
                    "another path") from error
  return path


def cache_folder(name: str, chosen: str | None = None) -> str:
  """Returns the folder of a cache, which may be deleted at any time.

  Args:
    name: "programs", "images", ...
    chosen: the folder that the user chose, if any.

  Returns:
    `chosen`, else $XDG_CACHE_HOME/ttc_jax/NAME, by default
    ~/.cache/ttc_jax/NAME.
  """
  if chosen:
    return expand(chosen)
  home = os.environ.get("XDG_CACHE_HOME") or expand("~/.cache")
  return os.path.join(home, "ttc_jax", name)


def size(path: str) -> int:
  """Returns the bytes of all files in a folder and its subfolders."""
  return sum(os.path.getsize(os.path.join(folder, name))
             for folder, _, names in os.walk(path) for name in names)


def read_json(path: str) -> Any:
  """Returns what a JSON file holds.

  Raises:
    OSError: it cannot be read.
    ValueError: as of `from_json`.
  """
  with open(path, "rb") as file:
    return from_json(file.read())


def from_json(text: str | bytes) -> Any:
  """Returns the value of a file's JSON, in UTF-8.

  Raises:
    ValueError: it is none, or is nested deeper than Python reads.
  """
  try:
    return json.loads(text.decode() if isinstance(text, bytes) else text)
  except RecursionError as error:
    raise ValueError("its values are nested too deep") from error


def write_text(path: str, text: str) -> None:
  """Writes a UTF-8 text file as a whole."""
  with replacing(path) as file:
    file.write(text.encode())


@contextlib.contextmanager
def lock(path: str, wait: bool = False) -> Iterator[None]:
  """Holds a lock file during the block.

  The system releases the lock when the process ends in any way. Hosts that
  share a folder need a file system with locks, such as NFS 4.

  Args:
    path: the lock file; it and its folder are created.
    wait: wait for another process that holds the lock.

  Raises:
    Busy: another process holds it, and `wait` is off.
    UserError: the file system has no locks.
  """
  os.makedirs(os.path.dirname(path), exist_ok=True)
  descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
  try:
    try:
      if fcntl:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      raise Busy(path) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      raise UserError(f"'{path}': this file system has no locks "
                      f"({error.strerror}); choose another folder") from error
    yield
  finally:
    os.close(descriptor)


def remote(address: str, **options: Any) -> tuple[Any, str]:
  """Returns (fsspec's file system, path in it) of an address.

  Args:
    **options: of the file system.

  Raises:
    ImportError: the library of its scheme is not installed (the extra `hub`).
  """
  import fsspec
  # gcsfs logs the traceback of what it raises; our sentences have the cause.
  if (logger := logging.getLogger("gcsfs")).level == logging.NOTSET:
    logger.setLevel(logging.CRITICAL)
  return fsspec.core.url_to_fs(address, **options)
