"""SIGTERM as a request: what is half done is finished and saved first."""
from collections.abc import Iterator
import contextlib
import signal
import threading

from ttc_jax.errors import Stopped

_asked = threading.Event()
_holds = [0]


def listen() -> None:
  """From now on SIGTERM asks; the second one kills, as ever."""
  def on_signal(number, frame):
    _asked.set()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
  _asked.clear()
  signal.signal(signal.SIGTERM, on_signal)


def asked() -> bool:
  return _asked.is_set()


def check() -> None:
  """Raises Stopped if this process was asked to end, unless `held`."""
  if _asked.is_set() and not _holds[0]:
    raise Stopped("stopped by SIGTERM")


@contextlib.contextmanager
def held() -> Iterator[None]:
  """Within this block `check` lets go on."""
  _holds[0] += 1
  try:
    yield
  finally:
    _holds[0] -= 1
