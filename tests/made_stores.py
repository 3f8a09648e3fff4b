"""Stores for tests: of every kind, and one that fails as networks do."""
import contextlib
import os
import random
import threading
import time
from unittest import mock

from tests import gcs_emulator
from ttc_jax import stores


class Faulty(stores.Bucket):
  """Objects in a dictionary that processes (threads) share, behind a bad line.

  A call is late, or its answer is lost after it was done (or before), or a
  listing is some moments old. A content and `create` are always of now, as in
  every object store.
  """
  attempts = 12
  pause = 1e-4

  def __init__(self, contents, seed, stale=0.0):
    self.address, self._root = "faulty://x", "x"
    self._contents, self._rng, self._stale = contents, random.Random(seed), (
        stale)
    self._old: dict[str, tuple[float, list[str]]] = {}

  @contextlib.contextmanager
  def _line(self):
    time.sleep(self._rng.uniform(0, 2e-3))
    fate = self._rng.random()
    if fate < 0.1:
      raise ConnectionError("the request is lost")
    yield
    if fate > 0.9:
      raise ConnectionError("the answer is lost")

  def _read(self, path):
    with self._line():
      return self._contents.get(path)

  def _write(self, path, content):
    with self._line():
      self._contents[path] = content

  def _create(self, path, content):
    with self._line():
      return self._contents.setdefault(path, content) is content

  def _delete(self, path):
    with self._line():
      for name in list(self._contents):
        if name == path or name.startswith(f"{path}/"):
          self._contents.pop(name, None)

  def _names(self, path):
    with self._line():
      then, found = self._old.get(path, (-1.0, []))
      if time.monotonic() - then > self._stale:
        found = sorted({name[len(path) + 1:].partition("/")[0]
                        for name in list(self._contents)
                        if name.startswith(f"{path}/")})
        self._old[path] = time.monotonic(), found
      return found


@contextlib.contextmanager
def opened(kind, folder):
  """Gives a function that opens the same store again and again."""
  if kind == "disk":
    yield lambda: stores.open_store(folder / "store")
  elif kind == "no links":  # as on FAT
    with mock.patch.object(os, "link", side_effect=OSError(1, "no links")):
      yield lambda: stores.open_store(folder / "store")
  elif kind == "memory":
    yield lambda: stores.Bucket(f"memory://{folder}")
  elif kind == "faulty":
    contents, seeds = {}, iter(range(1000))
    lock = threading.Lock()

    def another():
      with lock:
        return Faulty(contents, next(seeds))
    yield another
  else:
    with gcs_emulator.running() as (_, environment):
      with mock.patch.dict(os.environ, environment):
        yield lambda: stores.open_store("gs://b/some where")


KINDS = ("disk", "no links", "memory", "faulty", "gs")
