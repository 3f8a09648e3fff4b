"""Compiled programs: the cache on disk, and how many were compiled."""
import collections
import contextlib
import hashlib
import os
import platform
import tempfile
from typing import NamedTuple
import warnings

from absl import logging
import jax

from ttc_jax import files
from ttc_jax.errors import UserError

# Events of jax.monitoring. The first also covers programs from the cache.
_PROGRAM = "/jax/core/compile/backend_compile_duration"
_CACHED = "/jax/compilation_cache/cache_hits"
_seen: collections.Counter[str] = collections.Counter()
_seconds: list[float] = []


class Count(NamedTuple):
  """Programs of this process.

  Attributes:
    programs: number of programs, compiled or read from the cache.
    compiled: number of those that were not in the cache.
    seconds: time spent on compiling and reading.
  """
  programs: int
  compiled: int
  seconds: float

  def __str__(self):
    return (f"{self.programs} compiled programs in {self.seconds:.0f} s: "
            f"{self.compiled} new, {self.programs - self.compiled} from the "
            "cache")


def count() -> Count:
  """Counts the programs since the first call of `start`."""
  return Count(_seen[_PROGRAM], _seen[_PROGRAM] - _seen[_CACHED],
               sum(_seconds))


def start(cache: str) -> None:
  """Starts to count programs, and to keep them in a folder.

  A folder that was configured in JAX itself takes precedence.

  Args:
    cache: the folder, or a gs:// address; "" for
      $XDG_CACHE_HOME/ttc_jax/programs, by default ~/.cache/ttc_jax/programs;
      "none" for no cache.
  """
  if not _seen["started"]:
    _seen["started"] = 1
    jax.monitoring.register_event_listener(_on_event)
    jax.monitoring.register_event_duration_secs_listener(_on_duration)
  if folder := keep(cache):
    warnings.showwarning = _mending(folder, warnings.showwarning)


def keep(cache: str) -> str | None:
  """Lets JAX keep compiled programs in a folder; arguments as of `start`.

  It sets JAX's own `jax_compilation_cache_dir`, and that small programs are
  kept too, for the whole process. Nothing else is changed.

  Returns:
    The folder; None if it is in a bucket, or nothing was changed: JAX has a
    folder, there shall be none, or it cannot be written.
  """
  if cache == "none" or jax.config.values["jax_compilation_cache_dir"]:
    return None
  if "://" in cache:
    _keep_in(f"{_address(cache)}/{_host()}")
    # Those that XLA itself writes: its file system knows no gs://.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    return None
  folder = os.path.join(files.cache_folder("programs", cache), _host())
  try:
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    logging.warning("compiled programs are not kept: %s: %s", folder,
                    error.strerror)
    return None
  _keep_in(folder)
  return folder


def _address(cache):
  """The address of a cache in a bucket; JAX writes there through etils."""
  if not cache.startswith("gs://"):
    raise UserError(f"config.compilation_cache is '{cache[:100]}': give a "
                    "folder, gs://BUCKET/PATH, or none")
  return cache.rstrip("/")


def _keep_in(folder):
  jax.config.update("jax_compilation_cache_dir", folder)
  # Small programs too: together they take as long as a large one.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _mending(folder, show):
  """Returns a `warnings.showwarning` that empties a damaged cache.

  JAX itself warns of a damaged entry in every process and leaves it there.
  """
  def on_warning(message, *args, **kwargs):
    if "reading persistent compilation cache" not in str(message):
      return show(message, *args, **kwargs)
    logging.warning("the cache of compiled programs %s is damaged: it is made "
                    "anew", folder)
    for name in os.listdir(folder):
      with contextlib.suppress(OSError):
        os.remove(os.path.join(folder, name))
  return on_warning


def precision(how: str) -> contextlib.AbstractContextManager[None]:
  """Within the block, float32 products are as said: "high" or "highest"; "" or
  "default": as JAX's own setting."""
  return (contextlib.nullcontext() if how in ("", "default")
          else jax.default_matmul_precision(how))


def _host() -> str:
  """Returns a name for this kind of CPU.

  Hosts share home folders, but a program runs only on a CPU with the
  instructions that it uses.
  """
  what = platform.machine() + platform.processor()
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as f:
      what += next((line for line in f if line.startswith(
          ("flags", "Features"))), "")
  except OSError:  # not Linux
    pass
  return hashlib.sha256(what.encode()).hexdigest()[:8]


def _on_event(event, **_):
  _seen[event] += 1


def _on_duration(event: str, duration_secs: float, **_: str | int) -> None:
  if event == _PROGRAM:
    _seen[event] += 1
    _seconds.append(duration_secs)
