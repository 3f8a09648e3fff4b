"""Ctrl-C, SIGTERM and SIGHUP: end at once, or finish and save first.

What a signal does depends on what the process is doing:

  `starting`  imports: the process ends at once.
  `ending`    a command: the main thread gets an exception, so that temporary
              files are removed; after a grace period the process ends anyway.
  `listen`    training: a request, which `check` answers when the epoch in
              progress is saved; a second signal ends the process at once.

A Python signal handler alone cannot do this: it runs in the main thread only,
between bytecodes, so never during a long XLA call; and an exception that it
raises inside a garbage collection (JAX has a callback there) is printed and
dropped. A thread that reads the wakeup descriptor sees every signal at once.
"""
from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import sys
import threading
from types import FrameType

from ttc_jax.errors import Stopped

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
            if hasattr(signal, name)]
_GRACE_SECONDS = 5.0

_received: list[int] = []  # numbers of the signals since the last `_handle`
_asked = threading.Event()
_holds = [0]
_watching: list[int] = []


# --- What a signal does -------------------------------------------------------

def starting() -> None:
  """Ends the process at once on a signal. Nothing is half done yet."""
  _handle(_leave_now)


def ending() -> None:
  """Raises KeyboardInterrupt or SystemExit on a signal, in the main thread."""
  _watch()
  _handle(_raise)


def listen() -> None:
  """Makes the first signal a request; the second ends the process."""
  _watch()
  _handle(_ask)


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
  """Sets the handlers; signals that were ignored (nohup) stay so."""
  _received.clear()
  _asked.clear()
  for number in _SIGNALS:
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, handler)


def _leave_now(number, frame):
  leave(number)


def _raise(number, frame):
  _ask(number, frame)
  raise (KeyboardInterrupt if number == signal.SIGINT
         else SystemExit(128 + number))


def _ask(number, frame):
  if not _asked.is_set():
    _number[0] = number
    _asked.set()


_number = [0]


# --- The thread ---------------------------------------------------------------

def _watch() -> None:
  """Starts the thread that sees signals while the main thread is in XLA."""
  if not _watching:
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    _watching.append(sender)
    threading.Thread(target=_read, args=(receiver,), daemon=True).start()
  signal.set_wakeup_fd(_watching[0], warn_on_full_buffer=False)


def _read(receiver):
  while True:
    number = os.read(receiver, 1)[0]
    handler = signal.getsignal(number)
    if handler not in (_ask, _raise):  # no longer ours
      continue
    _received.append(number)
    if len(_received) > 1:
      leave(number)
    _ask(number, None)
    if handler is _raise:
      threading.Timer(_GRACE_SECONDS, _leave_late, [number]).start()
    elif sys.stderr.isatty():
      print(f"\n{_name(number)}: this epoch ends and is saved first; once more "
            "ends at once", file=sys.stderr, flush=True)


def _leave_late(number):
  if _received and signal.getsignal(number) is _raise:
    leave(number)


def leave(number: int) -> None:
  """Ends the process with code 128 + `number`; what was saved is kept."""
  os.write(2, f"ended by {_name(number)}\n".encode())
  os._exit(128 + number)


def _name(number):
  return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


# --- Requests -----------------------------------------------------------------

def asked() -> bool:
  """Returns True if this process was asked to end."""
  return _asked.is_set()


def check() -> None:
  """Raises Stopped if this process was asked to end, unless `held`."""
  if _asked.is_set() and not _holds[0]:
    raise Stopped(f"stopped by {_name(_number[0])}")


def exit_code() -> int:
  """Returns the exit code after a request: 0 for SIGTERM, else 128 + signal.

  Batch systems send SIGTERM and start the command again later: no failure.
  """
  number = _number[0] if _asked.is_set() else 0
  return 0 if number in (0, signal.SIGTERM) else 128 + number


@contextlib.contextmanager
def held() -> Iterator[None]:
  """Makes `check` do nothing within the block."""
  _holds[0] += 1
  try:
    yield
  finally:
    _holds[0] -= 1
