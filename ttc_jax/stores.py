"""Where a work directory lies: a folder of this machine, or a bucket.

A `Store` holds contents by name ("runs/RUN/row.json"). A content appears whole
or not at all; `create` makes one only if there is none, the single step on
which `claims` and rows that are written once rest. Names are what this package
gives; nothing is read from a store but data.

  Disk    files; any folder that processes share
  Bucket  objects of Google Cloud Storage, gs://, through fsspec and gcsfs
  Shared  one of these, for hosts that do the same at the same time
"""
import abc
from collections.abc import Callable, Iterator
import contextlib
import errno
import io
import json
import os
import re
import shutil
import tempfile
import time
from typing import Any
import uuid
import zipfile

from ttc_jax import files
from ttc_jax.errors import UserError, printable

# File systems on which links of files do not work: FAT, some of FUSE.
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


class Store(abc.ABC):
  """Contents by name, below one place.

  Attributes:
    address: of the place, as messages show it.
    writes: whether this process is the one that writes.
  """
  address: str
  writes = True

  @property
  def direct(self) -> "Store":
    """The store without other hosts."""
    return self

  def agreed(self, question: str, answer: Callable[[], bool]) -> bool:
    """Returns the answer; of several hosts, the first one's."""
    del question
    return answer()

  def exists(self) -> bool:
    """Tells whether there is anything at the place."""
    return bool(self.names(""))

  @abc.abstractmethod
  def read(self, name: str) -> bytes | None:
    """Returns a content; None where there is none."""

  @abc.abstractmethod
  def write(self, name: str, content: bytes) -> None:
    """Writes a content, in place of one that is there."""

  @abc.abstractmethod
  def create(self, name: str, content: bytes) -> bool:
    """Writes a content if there is none of that name.

    Returns:
      Whether it is ours: of several processes that create it, one gets True.
    """

  @abc.abstractmethod
  def names(self, folder: str) -> list[str]:
    """Returns the names directly below a folder, sorted; perhaps none."""

  @abc.abstractmethod
  def delete(self, name: str) -> None:
    """Deletes a content, or all below a folder; what is not there is no
    error."""

  def tidy(self, folder: str) -> None:
    """Deletes what a killed process has half written directly in a folder,
    where no other process writes; a bucket has no such thing."""
    del folder

  @abc.abstractmethod
  def place(self, name: str) -> str:
    """Returns the address of a content or folder."""

  @abc.abstractmethod
  def write_folder(self, name: str) -> contextlib.AbstractContextManager[str]:
    """Gives an empty folder of this machine; at the end of the block what is
    in it appears as `name`, unless an error left the block or another process
    has written it."""

  @abc.abstractmethod
  def read_folder(self, name: str) -> contextlib.AbstractContextManager[str]:
    """Gives a folder of this machine with what `write_folder` wrote.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """


def open_store(address: str | os.PathLike[str]) -> Store:
  """Returns the store at a path or gs:// address; creates nothing.

  Raises:
    UserError: another scheme, a path that is not UTF-8, or gcsfs is missing.
  """
  address = os.fspath(address)
  scheme, mark, rest = address.partition("://")
  if not mark:
    return Disk(address)
  if (scheme != "gs" or not re.match(r"[\w.-]+(/|$)", rest) or "::" in rest
      or re.search(r"[*?\[\]]", rest)):  # fsspec would expand them
    raise UserError(f"'{address[:100]}': a work directory is a path or "
                    "gs://BUCKET/PATH")
  return Bucket(address)


class Disk(Store):
  """A folder; it may be shared by processes and hosts."""

  def __init__(self, path: str):
    self.address = files.utf8(path)

  def exists(self):
    return os.path.isdir(self.address)

  def place(self, name):
    parts = name.split("/")
    if ".." in parts or os.path.isabs(name):
      raise UserError(f"{printable(name)!r} leads out of '{self.address}'")
    return os.path.join(self.address, *parts)

  def read(self, name):
    def attempt():
      with open(self.place(name), "rb") as file:
        return file.read()
    try:
      return _again(attempt, lambda error: error.errno == errno.ESTALE)
    except (FileNotFoundError, NotADirectoryError):
      return None

  def write(self, name, content):
    def attempt():
      with files.replacing(self._made(name)) as file:
        file.write(content)
    _again(attempt, _folder_went)

  def create(self, name, content):
    return _again(lambda: self._create(name, content), _folder_went)

  def _create(self, name, content):
    path = self._made(name)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
      with open(temporary, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
      os.link(temporary, path)  # fails where the name is taken
    except FileExistsError:
      # A link that NFS asked for twice, since the first answer was lost, is
      # ours all the same.
      return os.stat(temporary).st_nlink == 2
    except OSError as error:
      if error.errno not in _NO_LINKS:
        raise
      return self._create_in_place(path, content)
    finally:
      with contextlib.suppress(OSError):
        os.remove(temporary)
    return True

  @staticmethod
  def _create_in_place(path, content):
    """`create` without links: others may see the file before it is whole."""
    try:
      with open(path, "xb") as file:
        file.write(content)
        os.fsync(file.fileno())
    except FileExistsError:
      return False
    return True

  def names(self, folder):
    try:
      return sorted(name for name in os.listdir(self.place(folder))
                    if not name.endswith(".tmp"))
    except (FileNotFoundError, NotADirectoryError):
      return []

  def delete(self, name):
    path = self.place(name)
    try:
      os.remove(path)
    except FileNotFoundError:
      pass
    except (IsADirectoryError, PermissionError):  # the second on macOS
      if not os.path.isdir(path):
        raise
      # Another process may delete it too, or just write there.
      shutil.rmtree(path, ignore_errors=True)

  def tidy(self, folder):
    place = self.place(folder)
    with contextlib.suppress(FileNotFoundError):
      for name in os.listdir(place):
        if name.endswith(".tmp"):
          self.delete(f"{folder}/{name}")

  @contextlib.contextmanager
  def write_folder(self, name):
    path = self._made(name)
    scratch = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
      os.mkdir(scratch)
      yield scratch
      try:
        os.rename(scratch, path)
      except OSError:  # of two that write the same, the first is kept
        if not os.path.isdir(path):
          raise
    finally:
      shutil.rmtree(scratch, ignore_errors=True)

  @contextlib.contextmanager
  def read_folder(self, name):
    path = self.place(name)
    if not os.path.isdir(path):
      raise FileNotFoundError(path)
    yield path

  def _made(self, name):
    """The path of a name, its folder made."""
    path = self.place(name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path


def _again(attempt: Callable[[], Any],
           passes: Callable[[OSError], bool]) -> Any:
  """Calls; some times more, ever later, after an error that passes."""
  for i in range(20):
    try:
      return attempt()
    except OSError as error:
      if not passes(error):
        raise
      time.sleep(1e-3 * i)
  return attempt()


def _folder_went(error: OSError) -> bool:
  """Tells whether another process has deleted a folder just before."""
  return isinstance(error, (  # the last: of makedirs, which looked too late
      FileNotFoundError, NotADirectoryError, FileExistsError))


class Bucket(Store):
  """Objects below an address.

  An object's name is taken once and its content replaced as a whole by the
  store itself. Every call is tried again when the connection fails; a `create`
  that had arrived after all knows its own content.
  """
  attempts = 5
  pause = 1.0  # seconds before the second attempt, then twice as many

  def __init__(self, address: str):
    self.address = address.rstrip("/")
    try:
      # Listings of a moment ago would show claims that are gone.
      self._fs, self._root = files.remote(
          self.address, use_listings_cache=False)
    except ImportError as error:
      raise UserError(f"'{address}' needs a library that is not installed "
                      f"({error}): pip install -e '.[hub]'") from error
    except Exception as error:  # credentials; each library has its own errors
      raise UserError(_failed(self.address, error)) from error

  def place(self, name):
    return f"{self.address}/{name}"

  def read(self, name):
    return self._try(lambda: self._read(self._path(name)))

  def write(self, name, content):
    self._try(lambda: self._write(self._path(name), content))

  def create(self, name, content):
    def attempt():
      path = self._path(name)
      # A lost answer to the attempt before would look like another's content.
      return self._create(path, content) or self._read(path) == content
    return self._try(attempt)

  def names(self, folder):
    return self._try(lambda: sorted(self._names(self._path(folder))))

  def delete(self, name):
    self._try(lambda: self._delete(self._path(name)))

  @contextlib.contextmanager
  def write_folder(self, name):
    with tempfile.TemporaryDirectory() as scratch:
      yield scratch
      self.write(f"{name}.zip", _zipped(scratch))

  @contextlib.contextmanager
  def read_folder(self, name):
    content = self.read(f"{name}.zip")
    if content is None:
      raise FileNotFoundError(self.place(name))
    with tempfile.TemporaryDirectory() as scratch:
      _unzip(content, scratch)
      yield scratch

  def _path(self, name):
    return f"{self._root}/{name}" if name else self._root

  def _try(self, call: Callable[[], Any]) -> Any:
    """Calls; again, with pauses, after an error that may pass."""
    for attempt in range(self.attempts):
      try:
        return call()
      except Exception as error:  # every file system has errors of its own
        if attempt + 1 == self.attempts or _is_refusal(error):
          raise UserError(_failed(self.address, error)) from error
        time.sleep(self.pause * 2 ** attempt)

  # --- What the store does, in one request each -------------------------------

  def _read(self, path):
    try:
      return self._fs.cat_file(path)
    except FileNotFoundError:
      return None

  def _write(self, path, content):
    self._fs.pipe_file(path, content)

  def _create(self, path, content):
    try:
      self._fs.pipe_file(path, content, mode="create")
      return True
    except FileExistsError:
      return False

  def _names(self, path):
    try:
      found = self._fs.ls(path, detail=False)
    except FileNotFoundError:
      return []
    return [name.rstrip("/").rpartition("/")[2] for name in found
            if name.rstrip("/") != path]

  def _delete(self, path):
    with contextlib.suppress(FileNotFoundError):
      self._fs.rm(path, recursive=True)


class Shared(Store):
  """A store for hosts that run the same program in step.

  The first host reads and writes; all get its answers, so that they decide
  alike. What is read is compared by name: hosts that went apart, by other data
  say, learn it before they wait for each other for ever.

  Args:
    leads: whether this is the first host.
    tell: gives the first host's bytes to all; all hosts call it together.
  """

  def __init__(self, store: Store, leads: bool, tell: Callable[[bytes], bytes]):
    self._store, self.writes, self._tell = store, leads, tell
    self.address = store.address

  @property
  def direct(self):
    return self._store

  def agreed(self, question, answer):
    return self._ask(question, lambda: b"1" if answer() else b"") == b"1"

  def exists(self):
    return self.agreed("exists", self._store.exists)

  def place(self, name):
    return self._store.place(name)

  def read(self, name):
    return self._ask(f"read {name}", lambda: self._store.read(name))

  def names(self, folder):
    return json.loads(self._ask(
        f"names in {folder}",
        lambda: json.dumps(self._store.names(folder)).encode()))

  def create(self, name, content):
    return self.agreed(
        f"create {name}", lambda: self._store.create(name, content))

  def write(self, name, content):
    if self.writes:
      self._store.write(name, content)

  def delete(self, name):
    if self.writes:
      self._store.delete(name)

  def tidy(self, folder):
    if self.writes:
      self._store.tidy(folder)

  @contextlib.contextmanager
  def write_folder(self, name):
    if self.writes:
      with self._store.write_folder(name) as folder:
        yield folder
    else:
      with tempfile.TemporaryDirectory() as scratch:
        yield scratch

  @contextlib.contextmanager
  def read_folder(self, name):
    def content():
      try:
        with self._store.read_folder(name) as folder:
          return _zipped(folder)
      except FileNotFoundError:
        return None
    found = self._ask(f"folder {name}", content)
    if found is None:
      raise FileNotFoundError(self.place(name))
    with tempfile.TemporaryDirectory() as scratch:
      _unzip(found, scratch)
      yield scratch

  def _ask(self, question, answer: Callable[[], bytes | None]) -> Any:
    """The first host's answer, on all hosts."""
    error, found = None, None
    if self.writes:
      try:
        found = answer()
      except (OSError, UserError, ValueError) as failed:
        error = failed
    head = {"question": question, "none": found is None,
            "error": str(error) if error else ""}
    told = self._tell(json.dumps(head).encode() + b"\n" + (found or b""))
    line, _, content = told.partition(b"\n")
    head = json.loads(line)
    if head["question"] != question:
      raise UserError(
          f"the hosts do not do the same: the first asks '{head['question']}', "
          f"this one '{question}'; start them with the same command, data, "
          "weights and versions")
    if head["error"]:
      raise error or UserError(f"the first host failed: {head['error']}")
    return None if head["none"] else content


def _is_refusal(error: Exception) -> bool:
  """Tells whether the answer will be the same the next time."""
  return (isinstance(error, (PermissionError, TypeError, NotImplementedError))
          or str(getattr(error, "code", "")) in ("400", "401", "403"))


def _failed(address, error):
  cause = error.__cause__ or error
  reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
  return (f"the bucket '{address}' cannot be used ({reason}): check the "
          "address and that this machine may read and write it, then start "
          "the same command again")


def _zipped(folder: str) -> bytes:
  """Returns a folder's files as a zip, not compressed."""
  content = io.BytesIO()
  with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
    for path in _walk(folder):
      archive.write(path, os.path.relpath(path, folder))
  return content.getvalue()


def _walk(folder: str) -> Iterator[str]:
  for parent, _, names in os.walk(folder):
    yield from (os.path.join(parent, name) for name in names)


def _unzip(content: bytes, folder: str) -> None:
  """Unpacks what `_zipped` returned; ValueError if it is damaged.

  What is not compressed cannot be larger than what was read.
  """
  try:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()):
        raise ValueError("a zip that is compressed")
      archive.extractall(folder)  # names cannot leave the folder
  except (zipfile.BadZipFile, EOFError) as error:
    raise ValueError(str(error)) from error
