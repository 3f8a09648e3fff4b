"""Several hosts: a pod slice, a cluster, or processes of one machine.

  config.hosts=runs    every host takes runs of its own, on its own devices.
                       They need not know each other, and the end of one is no
                       other's; only TPU hosts, whose devices start together,
                       are joined
  config.hosts=batch   one run over the devices of all hosts, in step; the
                       first host reads and writes
  config.hosts=alone   a process joins nobody

`jax.distributed` is the engine. It knows Cloud TPU, SLURM, Open MPI and
Kubernetes; others name a coordinator.
"""
import atexit
import contextlib
import importlib.util
import os
import secrets
import socket
import sys
import threading
from typing import NamedTuple

from absl import logging
import jax

from ttc_jax import interrupt, parallel
from ttc_jax.config import HOSTS
from ttc_jax.errors import UserError, check_known, printable
from ttc_jax.stores import Shared, Store

_BEAT, _SILENCE = 5.0, 30.0  # seconds between two signs of life, and without


class Address(NamedTuple):
  """Where the hosts meet, as the flags say; all None: JAX finds out."""
  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None


def join(mode: str, address: Address) -> None:
  """Joins the other hosts, if there are any; before JAX is used.

  Args:
    mode: one of `config.HOSTS`.

  Raises:
    UserError: flags that do not fit, or the others cannot be reached.
  """
  check_known("hosts", mode, HOSTS)
  coordinator, count, number = address
  named = [value is not None for value in address]
  if any(named) and not all(named):
    raise UserError("give --coordinator=HOST:PORT, --num_processes=N and "
                    "--process_id=I together, or none of them")
  if count is not None and number is not None and not 0 <= number < count:
    raise UserError(f"--process_id={number} is not between 0 and "
                    f"--num_processes={count} - 1")
  on_tpu = importlib.util.find_spec("libtpu") is not None
  if mode == "alone" or mode == "runs" and not on_tpu:
    if any(named):
      logging.warning("--coordinator is not used: hosts that take runs of "
                      "their own need not meet; for one run over all of them "
                      "add --config.hosts=batch")
    return
  try:
    jax.distributed.initialize(*address)
  except ValueError as error:
    if any(named):
      raise UserError(f"--coordinator={coordinator}: {error}") from error
    if mode == "batch":
      raise UserError(
          "config.hosts=batch, but JAX knows no cluster here: give "
          "--coordinator=HOST:PORT, --num_processes=N and --process_id=I"
      ) from error
    return  # one process, as on a laptop
  except RuntimeError as error:
    if not any(named) and mode == "runs":
      return  # a process that has used JAX before, a notebook say
    reason = " ".join(str(error).split())[:200]
    raise UserError(f"the other hosts cannot be reached ({reason}): are all "
                    "started, and is the coordinator's port open?") from error
  if mode == "batch" and jax.process_count() > 1:
    parallel.span_hosts()
    interrupt.hold()
    if not leads():
      sys.stdout = open(os.devnull, "w", encoding="utf-8")
    _watch(coordinator)


def leads() -> bool:
  """Tells whether this process writes: of hosts in step the first one does."""
  return not parallel.spans_hosts() or jax.process_index() == 0


def shared(store: Store) -> Store:
  """Returns a store through which hosts in step see the same."""
  if not parallel.spans_hosts():
    return store
  return Shared(store, leads(), parallel.tell)


def failed(error: BaseException) -> UserError | None:
  """Returns one sentence for an error that another host's end explains."""
  if (not parallel.spans_hosts() or "RESOURCE_EXHAUSTED" in str(error)
      or type(error).__name__ not in ("XlaRuntimeError", "JaxRuntimeError")):
    return None
  return UserError(_sentence())


def _sentence():
  return (f"host {jax.process_index()} of {jax.process_count()} ends: another "
          "host has ended or cannot be reached; start the same command again "
          "on all of them to go on")


# --- Signs of life ------------------------------------------------------------

# A collective operation with a host that has died may wait for minutes, and
# JAX's own end is a stack trace. So every host holds a connection to the first
# one: it breaks when a process ends, and is silent when a machine does.

def _watch(coordinator: str | None) -> None:
  """Ends this process with one sentence when another host ends."""
  try:
    others = _accept(coordinator) if leads() else [_connect()]
  except OSError as error:
    raise UserError(
        f"the hosts cannot watch each other ({error}): the first one has to be "
        "reachable from the others at any port") from error
  for other in others:
    other.settimeout(_SILENCE)
    threading.Thread(target=_listen, args=(other,), daemon=True).start()
  _ended.clear()
  threading.Thread(target=_beat, args=(others,), daemon=True).start()
  _connections.extend(others)


def _accept(coordinator):
  """The first host's connections to all others."""
  ipv6 = socket.has_dualstack_ipv6()
  with socket.create_server(
      ("", 0), family=socket.AF_INET6 if ipv6 else socket.AF_INET,
      dualstack_ipv6=ipv6) as listening:
    listening.settimeout(2 * _SILENCE)
    name = (coordinator or "").rpartition(":")[0] or socket.gethostname()
    token, port = secrets.token_bytes(16), listening.getsockname()[1]
    parallel.tell(token + f"{name.strip('[]')}:{port}".encode())
    found: list[socket.socket] = []
    while len(found) < jax.process_count() - 1:
      other = listening.accept()[0]
      other.settimeout(_SILENCE)
      if other.recv(len(token), socket.MSG_WAITALL) == token:
        found.append(other)
      else:  # a stranger
        other.close()
    return found


def _connect():
  """The connection of another host to the first one."""
  told = parallel.tell(b"")
  name, _, port = told[16:].decode().rpartition(":")
  other = socket.create_connection((name, int(port)), timeout=_SILENCE)
  other.sendall(told[:16])
  return other


_connections: list[socket.socket] = []
_ended = threading.Event()  # this process ends in an orderly way


def leave() -> None:
  """Tells the others that this process ends because it is done."""
  _ended.set()
  for other in _connections:
    with contextlib.suppress(OSError):
      other.sendall(b"!")


def abandon(code: int) -> None:
  """Ends the others too, since this process ends by an error.

  It leaves with `code` when its sentence is printed, and does not wait for
  the others, as JAX would at exit.
  """
  _ended.set()
  for other in _connections:
    with contextlib.suppress(OSError):
      other.close()

  def end():
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    os._exit(code)
  atexit.register(end)


def _beat(others):
  while not _ended.wait(_BEAT):
    for other in others:
      with contextlib.suppress(OSError):  # `_listen` sees it too
        other.sendall(b".")


def _listen(other):
  """Waits for the other's end; ends this process if it was not orderly."""
  with contextlib.suppress(OSError):
    while said := other.recv(64):
      if b"!" in said:
        return
  if not _ended.is_set():
    with contextlib.suppress(OSError):
      os.write(2, f"{printable(_sentence())}\n".encode())
    os._exit(1)
