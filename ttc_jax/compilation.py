"""Compiled programs: the cache that outlives a process, and their number."""
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

_PROGRAM = "/jax/core/compile/backend_compile_duration"  # got, either way
_CACHED = "/jax/compilation_cache/cache_hits"
_seen = collections.Counter()


class Count(NamedTuple):
  """Of programs that this process needed: all, and those not in the cache."""
  programs: int
  compiled: int
  seconds: float  # to compile or to read them

  def __str__(self):
    return (f"{self.programs} compiled programs in {self.seconds:.0f} s: "
            f"{self.compiled} new, {self.programs - self.compiled} from the "
            "cache")


def count() -> Count:
  """Since the first call of `start`."""
  return Count(_seen[_PROGRAM], _seen[_PROGRAM] - _seen[_CACHED],
               _seen["seconds"])


def start(cache: str) -> None:
  """Begins to count, and keeps programs in the folder `cache`.

  Args:
    cache: "" for $XDG_CACHE_HOME/ttc_jax/programs, by default
      ~/.cache/ttc_jax/programs; "none" for no cache.
  """
  if not _seen["started"]:
    _seen["started"] = 1
    jax.monitoring.register_event_listener(_on_event)
    jax.monitoring.register_event_duration_secs_listener(_on_duration)
  # Who has chosen a folder for JAX keeps it.
  if cache == "none" or jax.config.jax_compilation_cache_dir:
    return
  folder = os.path.join(files.cache_folder("programs", cache), _host())
  try:
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    logging.warning("compiled programs are not kept: %s: %s", folder,
                    error.strerror)
    return
  jax.config.update("jax_compilation_cache_dir", folder)
  warnings.showwarning = _mending(folder, warnings.showwarning)
  # The small ones too: together they take as long as a large one.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _mending(folder, show):
  """JAX warns of a damaged entry and leaves it there: off with them all."""
  def on_warning(message, *args, **kwargs):
    if "reading persistent compilation cache" not in str(message):
      return show(message, *args, **kwargs)
    logging.warning("the cache of compiled programs %s is damaged: it is made "
                    "anew", folder)
    for name in os.listdir(folder):
      with contextlib.suppress(OSError):
        os.remove(os.path.join(folder, name))
  return on_warning


def _host() -> str:
  """Home folders are shared, but a program may use what one CPU alone has."""
  what = platform.machine() + platform.processor()
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as f:
      what += next((line for line in f if line.startswith(
          ("flags", "Features"))), "")
  except OSError:  # no Linux
    pass
  return hashlib.sha256(what.encode()).hexdigest()[:8]


def _on_event(event, **_):
  _seen[event] += 1


def _on_duration(event, seconds, **_):
  if event == _PROGRAM:
    _seen[event] += 1
    _seen["seconds"] += seconds
