"""Which process works on what, without locks.

A claim of NAME is a content `claims/NAME/N` of the store that its holder
created, where none was; the largest N counts. The holder rewrites it every few
seconds. Whoever sees the same content for as long as a lease lasts takes over,
by creating N + 1: so of several that try, one succeeds. Nobody compares
clocks of two hosts.

A process that stood still longer than a lease may go on beside the one that
took over. It learns so from `Claim.check`, before it saves. Should both pass
it, they write the same: a run's result does not depend on who computes it, and
its row is created once.
"""
from collections.abc import Iterator
import contextlib
import json
import os
import threading
import time
import uuid

from absl import logging

from ttc_jax import files
from ttc_jax.errors import Busy, UserError
from ttc_jax.stores import Store

LEASE_SECONDS = 60.0
FOLDER = "claims"


class Claim:
  """What this process holds."""

  def __init__(self, store: Store, name: str, number: int, seconds: float):
    self._store, self.name, self.number = store, name, number
    self._content = {**_process(), "token": uuid.uuid4().hex,
                     "seconds": seconds}
    self._lock = threading.Lock()  # of the thread that renews it
    self._over = False

  def create(self) -> bool:
    """Returns whether the number was free, and is ours now."""
    return self._store.create(self._file, self._encoded())

  def renew(self) -> None:
    """Shows that the holder is alive."""
    with self._lock:
      if not self._over:
        self._store.write(self._file, self._encoded())

  def release(self) -> None:
    """Lets others take the name at once."""
    with self._lock:
      self._over = True
      self._store.write(self._file, self._encoded(released=True))

  def check(self) -> None:
    """Raises Busy if another process has taken over."""
    if _last(self._store, self.name) != self.number:
      raise Busy(self.name)

  def lost(self) -> bool:
    """Tells whether another process has taken over, as this host sees it."""
    return _last(self._store.direct, self.name) > self.number

  @property
  def _file(self):
    return f"{FOLDER}/{self.name}/{self.number}"

  def _encoded(self, released=False):
    return json.dumps({**self._content, "released": released,
                       "time": time.time()}).encode()


class Claims:
  """The claims in a store.

  Args:
    seconds: a lease lasts; the holder renews it four times in that time.
  """

  def __init__(self, store: Store, seconds: float = LEASE_SECONDS):
    self._store, self._seconds = store, seconds
    self._held: set[Claim] = set()
    self._guard = threading.Lock()  # of the one above and the one below
    self._done: threading.Event | None = None  # ends the thread that renews
    # {file: (content, when it was first seen)}
    self._seen: dict[str, tuple[bytes | None, float]] = {}

  @contextlib.contextmanager
  def hold(self, name: str) -> Iterator[Claim]:
    """Holds a name during the block.

    Raises:
      Busy: another process holds it.
    """
    claim = self._take(name)
    self._keep(claim)
    try:
      yield claim
    finally:
      self._drop(claim)
      with contextlib.suppress(UserError, OSError):  # else the lease ends
        claim.release()

  def held(self, folder: str) -> list[str]:
    """Names FOLDER/... that some process seems to hold, by this machine's
    clock."""
    return [name for last in self._store.names(f"{FOLDER}/{folder}")
            if self._seems_held(name := f"{folder}/{last}")]

  def forget(self, name: str) -> None:
    """Deletes the claims of a name that nobody will need any more."""
    self._store.delete(f"{FOLDER}/{name}")

  def _take(self, name):
    last = _last(self._store, name)
    file = f"{FOLDER}/{name}/{last}"
    if last and not self._store.agreed(
        f"is {file} free", lambda: self._is_free(file)):
      raise Busy(name)
    claim = Claim(self._store, name, last + 1, self._seconds)
    if not claim.create():
      raise Busy(name)
    claim.check()  # others may have gone on since `last` was looked up
    for number in range(max(1, last - 1), last + 1):
      self._store.delete(f"{FOLDER}/{name}/{number}")
    return claim

  def _is_free(self, file):
    """Tells whether the newest claim of a name is over."""
    content = self._store.direct.read(file)
    found = _decoded(content)
    if found.get("released") is True or _is_dead(found):
      return True
    now = time.monotonic()
    seen, since = self._seen.get(file, (None, now))
    if seen != content:
      since = now
    self._seen[file] = content, since
    theirs = found.get("seconds")
    return now - since >= max(
        self._seconds, theirs if isinstance(theirs, (int, float)) else 0)

  def _seems_held(self, name):
    last = _last(self._store, name)
    found = _decoded(self._store.read(f"{FOLDER}/{name}/{last}"))
    then = found.get("time")
    return (found.get("released") is False and isinstance(then, float)
            and time.time() - then < self._seconds and not _is_dead(found))

  def _keep(self, claim):
    """Renews a claim from now on, in a thread that all of them share."""
    with self._guard:
      self._held.add(claim)
      if self._done is None:
        self._done = threading.Event()
        threading.Thread(
            target=self._renew, args=(self._done,), daemon=True).start()

  def _drop(self, claim):
    with self._guard:
      self._held.discard(claim)
      if not self._held and self._done:
        self._done.set()
        self._done = None

  def _renew(self, done):
    while not done.wait(self._seconds / 4):
      for claim in list(self._held):
        try:
          claim.renew()
        except (UserError, OSError) as error:
          logging.warning("the claim of %s cannot be renewed: %s", claim.name,
                          error)


def _last(store: Store, name: str) -> int:
  """The newest claim's number; 0 where there is none."""
  return max((int(n) for n in store.names(f"{FOLDER}/{name}") if n.isdecimal()),
             default=0)


def _decoded(content: bytes | None) -> dict:
  try:
    found = files.from_json(content or b"{}")
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}


def _process() -> dict[str, str | int]:
  """What tells this process from all others, also those of its number before
  and after it; on Linux. Elsewhere leases alone tell."""
  try:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
      host = file.read().strip() + os.readlink("/proc/self/ns/pid")
  except OSError:
    return {"host": "", "pid": os.getpid(), "started": "", "uid": -1}
  return {"host": host, "pid": os.getpid(), "started": _started(os.getpid()),
          "uid": os.getuid()}


def _started(pid: int) -> str:
  """When a process of this machine started; "" if it is none or a zombie."""
  try:
    with open(f"/proc/{pid}/stat", "rb") as file:
      fields = file.read().rpartition(b")")[2].split()
  except OSError:
    return ""
  return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


def _is_dead(found: dict) -> bool:
  """Tells whether the holder was a process of this machine that has ended."""
  here = _process()
  # Processes of another user may be hidden.
  return (here["host"] != "" and found.get("host") == here["host"]
          and found.get("uid") == here["uid"]
          and isinstance(found.get("pid"), int)
          and _started(found["pid"]) != found.get("started"))
