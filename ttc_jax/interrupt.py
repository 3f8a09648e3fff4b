"""Ctrl-C, SIGTERM and SIGHUP: end at once, or finish and save first.

What a signal does depends on what the process is doing:

  `starting`  imports: the process ends at once.
  `ending`    a command: the main thread gets an exception, so that temporary
              files are removed.
  `listen`    training: a request; `check` raises Stopped when the epoch in
              progress is saved.

A second signal ends the process at once. So does a grace period in which the
main thread did not get to it (it compiles, say), unless an epoch is `held`.

A Python signal handler alone cannot do this: it runs in the main thread only,
between bytecodes, so never during a long XLA call; and an exception that it
raises inside a garbage collection (JAX has a callback there) is printed and
dropped. A thread that reads the wakeup descriptor sees every signal at once.
"""
from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import stat
import sys
import threading
from types import FrameType

from ttc_jax.errors import Stopped

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
            if hasattr(signal, name)]
_GRACE_SECONDS = 5.0

_received: list[int] = []  # numbers of the signals since the last `_handle`
_asked = threading.Event()
_answered = threading.Event()
_number = [0]  # of the first signal
_holds = [0]
_wakeup: list[int] = []


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
  _answered.clear()
  for number in _SIGNALS:
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, handler)


def _leave_now(number, frame):
  _number[0] = number
  leave(128 + number)


def _raise(number, frame):
  _ask(number, frame)
  raise (KeyboardInterrupt if number == signal.SIGINT
         else SystemExit(128 + number))


def _ask(number, frame):
  if not _asked.is_set():
    _number[0] = number
    _asked.set()
  _leave_dead_terminals()


def _leave_dead_terminals():
  """Makes writes to a terminal that was closed (SIGHUP) no error."""
  for descriptor in (1, 2):
    with contextlib.suppress(OSError):
      mode = os.fstat(descriptor).st_mode
      if stat.S_ISCHR(mode) and not os.isatty(descriptor):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


# --- The thread ---------------------------------------------------------------

def _watch() -> None:
  """Starts the thread that sees signals while the main thread is in XLA."""
  if not _wakeup:
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    _wakeup.append(sender)
    threading.Thread(target=_read, args=(receiver,), daemon=True).start()
  signal.set_wakeup_fd(_wakeup[0], warn_on_full_buffer=False)


def _read(receiver):
  while True:
    number = os.read(receiver, 1)[0]
    handler = signal.getsignal(number)
    if handler not in (_ask, _raise):  # no longer ours
      continue
    _received.append(number)
    if len(_received) > 1:
      leave(128 + number)
    _ask(number, None)
    if handler is _ask and _holds[0] and sys.stderr.isatty():
      print(f"\n{_name(number)}: this epoch ends and is saved first; once more "
            "ends at once", file=sys.stderr, flush=True)
    _leave_later(_GRACE_SECONDS, handler)


def _leave_later(seconds, handler):
  """Ends the process after so many seconds if nothing else ends it."""
  def leave_now():
    if signal.getsignal(_number[0]) is not handler or _answered.is_set():
      return
    if _holds[0]:
      _leave_later(1.0, handler)
    else:
      leave(exit_code() if handler is _ask else 128 + _number[0])
  timer = threading.Timer(seconds, leave_now)
  timer.daemon = True
  timer.start()


def leave(code: int) -> None:
  """Ends the process at once; saved epochs and finished rows are kept."""
  with contextlib.suppress(OSError):
    os.write(2, f"ended by {_name(_number[0])}; start the same command again "
             "to go on\n".encode())
  os._exit(code)


def _name(number):
  return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


# --- Requests -----------------------------------------------------------------

def asked() -> bool:
  """Returns True if this process was asked to end."""
  return _asked.is_set()


def check() -> None:
  """Raises Stopped if this process was asked to end, unless `held`."""
  if _asked.is_set() and not _holds[0]:
    stop()


def stop() -> None:
  """Raises Stopped: this process, or another host of its run, was asked to
  end."""
  if threading.current_thread() is threading.main_thread():
    _answered.set()
  raise Stopped(f"stopped by {_name(_number[0])}" if _asked.is_set()
                else "stopped: another host was asked to end")


def hold() -> None:
  """Makes `check` do nothing from now on: hosts that train together stop at
  the same point, see `stop`."""
  _holds[0] += 1


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
