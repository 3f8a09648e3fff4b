"""Files that appear whole or not at all, and locks between processes."""
from collections.abc import Iterator
import contextlib
import errno
import os
from typing import BinaryIO
import uuid

try:
  import fcntl
except ImportError:  # Windows: one process at a time, atomic renaming has to do
  fcntl = None

from ttc_jax.errors import Busy, UserError

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def expand(path: str) -> str:
  """Returns the path with a leading `~` or `~user` expanded."""
  return os.path.expanduser(path)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
  """A file to write, renamed to `path` when the block ends well."""
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
  """The absolute path of what is to be written. Nothing is made yet.

  Raises:
    UserError: something is there already, or nothing can be written there.
  """
  path = os.path.abspath(expand(path))
  if os.path.lexists(path):
    raise UserError(f"'{path}' exists and is not overwritten: delete "
                    "it, or give another --out")
  folder = os.path.dirname(path)
  while not os.path.lexists(folder):
    folder = os.path.dirname(folder)
  try:
    with open(os.path.join(folder, f".{uuid.uuid4().hex}.tmp"), "xb") as probe:
      os.remove(probe.name)
  except OSError as error:
    raise UserError(f"'{path}' cannot be written ({error.strerror}): give "
                    "another --out") from error
  return path


def cache_folder(name: str, chosen: str | None = None) -> str:
  """Where what can be made again is kept: the folder that the user chose, else
  $XDG_CACHE_HOME/ttc_jax/NAME, by default ~/.cache/ttc_jax/NAME."""
  if chosen:
    return expand(chosen)
  home = os.environ.get("XDG_CACHE_HOME") or expand("~/.cache")
  return os.path.join(home, "ttc_jax", name)


def is_locked(path: str) -> bool:
  """Whether some process holds the lock."""
  if not fcntl or not os.path.exists(path):
    return False
  descriptor = os.open(path, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return False
  except BlockingIOError:
    return True
  finally:
    os.close(descriptor)


def size(path: str) -> int:
  """Bytes of the files in a folder."""
  return sum(os.path.getsize(os.path.join(folder, name))
             for folder, _, names in os.walk(path) for name in names)


def write_text(path: str, text: str) -> None:
  """Writes a UTF-8 text file."""
  with replacing(path) as file:
    file.write(text.encode())


@contextlib.contextmanager
def lock(path: str, wait: bool = False) -> Iterator[None]:
  """Holds a lock, which the system frees when the process ends in any way.

  Between hosts it needs a file system with locks, such as NFS 4.

  Raises:
    Busy: another process holds it, and `wait` is off.
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
