"""data=gs://BUCKET/PATH: copies of what a task needs, in the cache.

Lists and descriptions (.txt, .json) of the whole address are copied when it is
first looked at, the rest of a task's folder when the task is loaded; of a
folder of pictures, and of a file, everything. A copy is made again when the
object's size or generation changes, and goes when the object is no more. What a
killed process had copied is kept.

The copies have the objects' times, so that every host sees the same files.
"""
from collections.abc import Iterable, Mapping
import contextlib
import functools
import hashlib
import json
import os
import posixpath
import re
import time
from typing import Any

from ttc_jax import errors, files

SCHEME = "gs://"
_INDEX = (".txt", ".json", ".labels.txt")
_TELLING = ("train800.txt", "dataset_info.json", "train.json")
_AT_ONCE, _BYTES = 256, 2 ** 28  # objects and bytes of one request
_NOTE, _NOTE_SECONDS = ".copied.json", 30.0


def is_address(data: str) -> bool:
  """Tells whether `data` is in a bucket."""
  return data.startswith(SCHEME)


def local(data: str, folders: tuple[str, ...] = ()) -> str:
  """Returns the path of the copy of an address.

  Args:
    folders: below the address, which are to be whole if they are there; if
      none of them is, all is copied. Without any, lists are enough.

  Raises:
    errors.UserError: the bucket cannot be read, or holds nothing there.
  """
  objects, root = _objects(data.rstrip("/"))
  if (data, folders) in _whole:
    return root
  lists = [name for name in objects if name.endswith(_INDEX)]
  tells = any(posixpath.basename(name) in _TELLING for name in lists)
  inside = [name for name in objects
            if name.startswith(tuple(f"{folder}/" for folder in folders))]
  _copy(data, root, objects, lists + inside if tells and (
      inside or not folders) else list(objects))
  _whole.add((data, folders))
  return root


_whole: set[tuple[str, tuple[str, ...]]] = set()  # what this process copied


@functools.lru_cache(maxsize=32)
def _objects(data: str) -> tuple[Mapping[str, Mapping[str, Any]], str]:
  """({name below the address: what the store says of it}, the copy's path).

  The address may be of one object: its name is then "".
  """
  key = hashlib.sha256(data.encode()).hexdigest()[:16]
  root = os.path.join(files.cache_folder("buckets"), key,
                      posixpath.basename(data))
  fs, path = _opened(data)
  # In one lock, so that nothing goes that a process with a newer list copied.
  with files.lock(f"{root}.lock", wait=True):
    with _explained(data):
      found = fs.find(path, detail=True)
    named = _named(data, path, found)
    _drop(root, named)
  return named, root


def _named(data, path, found):
  """{name below the address: what the store says of it}, all of them paths."""
  named = {name[len(path):].removeprefix("/"): info
           for name, info in found.items()
           if not name.endswith("/")}
  if not named:
    raise errors.UserError(f"data={data} holds nothing: give an address of a "
                           "folder, or of a .zip, in a bucket")
  for name in named:
    if not _is_path(name):
      raise errors.UserError(
          f"data={data} has an object called {name[:100]!r}, which is no path "
          "of a file: rename it")
  return named


def _is_path(name):
  return not name or (posixpath.normpath(f"/{name}") == f"/{name}"
                      and "\\" not in name)


def _drop(root: str, objects: Mapping[str, Mapping[str, Any]]) -> None:
  """Removes the copies of objects that are no more, and nothing else: the lists
  of a division lie beside the copies."""
  known = _read(f"{root}{_NOTE}")
  gone = [name for name in known if name not in objects and _is_path(name)]
  for name in gone:
    place = _place(root, name)
    with contextlib.suppress(OSError):  # it is gone, or a folder by now
      os.remove(place)
    while name and (place := os.path.dirname(place)) != root:
      try:
        os.rmdir(place)
      except OSError:  # it is not empty
        break
  if gone:
    files.write_text(f"{root}{_NOTE}", json.dumps(
        {name: known[name] for name in known.keys() - set(gone)}))


def _copy(data: str, root: str, objects: Mapping[str, Mapping[str, Any]],
          wanted: Iterable[str]) -> None:
  """Copies the objects that are not there, or not as they are now."""
  note = f"{root}{_NOTE}"
  with files.lock(f"{root}.lock", wait=True):
    known = _read(note)
    missing = [name for name in dict.fromkeys(wanted)
               if known.get(name) != _version(objects[name])
               or not os.path.isfile(_place(root, name))]
    written = time.monotonic()
    try:
      for some in _portions(objects, missing):
        _get(data, root, objects, some)
        known |= {name: _version(objects[name]) for name in some}
        if time.monotonic() - written > _NOTE_SECONDS:
          files.write_text(note, json.dumps(known))
          written = time.monotonic()
    finally:
      if missing:
        files.write_text(note, json.dumps(known))


def _portions(objects, names):
  """Cuts the names into lists of what is fetched together."""
  some: list[str] = []
  total = 0
  for name in names:
    size = objects[name].get("size") or 0
    if some and (len(some) == _AT_ONCE or total + size > _BYTES):
      yield some
      some, total = [], 0
    some.append(name)
    total += size
  if some:
    yield some


def _get(data, root, objects, names):
  fs, path = _opened(data)
  with _explained(data):
    remotes = {name: f"{path}/{name}".rstrip("/") for name in names}
    # Several at once; fsspec would expand names with these letters.
    plain = [r for r in remotes.values() if not re.search(r"[*?\[\]]", r)]
    contents = fs.cat(plain) if len(plain) > 1 else {}
    for name, remote in remotes.items():
      place = _place(root, name)
      os.makedirs(os.path.dirname(place), exist_ok=True)
      with files.replacing(place) as file:
        file.write(contents[remote] if remote in contents
                   else fs.cat_file(remote))
      if (changed := _changed(objects[name])) is not None:
        os.utime(place, (changed, changed))


def _opened(data):
  try:
    return files.remote(data, use_listings_cache=False)
  except ImportError as error:
    raise errors.UserError(f"data={data} needs a library that is not installed "
                           f"({error}): pip install -e '.[hub]'") from error


class _explained:
  """Turns a store's errors into one sentence."""

  def __init__(self, data):
    self._data = data

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if isinstance(error, Exception) and not isinstance(error, errors.UserError):
      reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
      raise errors.UserError(
          f"data={self._data} cannot be read ({reason}): check the address and "
          "that this machine may read it, then start again; what was copied "
          "is kept") from error


def _place(root, name):
  return os.path.join(root, *name.split("/")) if name else root


def _version(info):
  """What changes when an object does."""
  return [info.get("size"), str(info.get("generation") or info.get("etag")
                                or info.get("created") or "")]


def _changed(info):
  """Seconds since 1970 of the last change, if the store says."""
  changed = info.get("mtime") or info.get("created")
  return changed.timestamp() if hasattr(changed, "timestamp") else None


def _read(path):
  try:
    return dict(files.read_json(path))
  except (OSError, TypeError, ValueError):
    return {}
