"""Kills a command at random moments and compares its results.

Runs the command undisturbed once. Then starts it in another work directory
and ends it by SIGKILL or SIGTERM after a random time, half of the time while a
state or a bundle is being written, --kills times over; the last start ends by
itself. Rows (except for times) and bundles of both directories must be equal
to the bit, and no finished run may be done again. With --processes=2 two
processes share the work directory.

  python tools/fault_test.py --kills=20 --config=configs/demo.py
"""
import glob
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

from absl import app, flags, logging
import numpy as np

from ttc_jax import bundles
from ttc_jax.runs.workdir import WorkDir

_CONFIG = flags.DEFINE_string("config", "configs/demo.py", "of ttc_jax.main")
_KILLS = flags.DEFINE_integer("kills", 20, "signals to send", lower_bound=1)
_LONGEST = flags.DEFINE_float("longest", 40, "most seconds before a signal")
_PROCESSES = flags.DEFINE_integer("processes", 1, "to share the directory")
_SEED = flags.DEFINE_integer("seed", 0, "of the random moments")
_WORKDIR = flags.DEFINE_string("workdir", None, "default: a temporary one")

# Keys of a row that depend on the machine and its load.
_TIMES = {"seconds_train", "seconds_test", "images_per_second",
          "test_images_per_second", "compile_seconds", "bundle_bytes",
          "finished"}


def start(workdir, more):
  """Starts the command; every epoch is saved."""
  return subprocess.Popen(
      [sys.executable, "-m", "ttc_jax.main", f"--config={_CONFIG.value}",
       "--config.save_seconds=0", f"--workdir={workdir}", *more],
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
  """Waits for the end; exits with the error of the command, if any."""
  _, errors = process.communicate()
  if process.returncode:
    sys.exit(f"exit code {process.returncode}: {errors}")


def disturb(workdir, rng, more):
  """Starts and ends the command again and again.

  Returns:
    The number of signals of each kind, and under "saving" of those sent while
    a state or a bundle was being written; {run: row} as they first appeared.
  """
  sent, rows = {"SIGKILL": 0, "SIGTERM": 0, "saving": 0}, {}
  while sent["SIGKILL"] + sent["SIGTERM"] < _KILLS.value:
    running = [start(workdir, more) for _ in range(_PROCESSES.value)]
    victim = rng.choice(running)
    name = rng.choice(["SIGKILL", "SIGTERM"])
    moment = time.monotonic() + rng.uniform(2, _LONGEST.value)
    wait_for_write = rng.random() < 0.5
    while time.monotonic() < moment and victim.poll() is None:
      time.sleep(0.001)
    while wait_for_write and victim.poll() is None and not writing(workdir):
      time.sleep(0.0005)
    if victim.poll() is not None:  # it had finished before the signal
      print("it ended by itself: give a smaller --longest", flush=True)
      for process in running:
        finish(process)
      break
    sent["saving"] += bool(writing(workdir))
    begin = time.monotonic()
    victim.send_signal(getattr(signal, name))
    victim.wait()
    sent[name] += 1
    rows = {row["run"]: row for row in WorkDir(workdir).rows()} | rows
    print(f"{sum(sent.values()) - sent['saving']:3} {name} "
          f"exit {victim.returncode} after {time.monotonic() - begin:.1f} s; "
          f"{len(rows)} rows", flush=True)
    for process in running:
      if process is not victim:
        process.send_signal(signal.SIGTERM)
        process.wait()
  return sent, rows


def writing(workdir):
  """Tells whether a state or a bundle is being written now."""
  paths = WorkDir(workdir)
  return (glob.glob(paths.store.place("stages/*/*.tmp"))
          or glob.glob(f"{paths.bundle('*')}.*.tmp"))


def contents(workdir):
  """Reads {run: (row, bundle)}."""
  paths = WorkDir(workdir)
  return {row["run"]: (row, bundles.load(paths.bundle(row["run"])))
          for row in paths.rows()}


def differences(one, two):
  """Lists the values that are not equal to the bit."""
  if one.keys() != two.keys():
    return [f"runs {sorted(one.keys() ^ two.keys())}"]
  found = []
  for run, (row, bundle) in one.items():
    other_row, other = two[run]
    found += [f"{run}: {k}" for k in row.keys() - _TIMES
              if row[k] != other_row.get(k)]
    for a, b in ((bundle.tuned, other.tuned),
                 (bundle.buffers, other.buffers)):
      found += [f"{run}: {name}" for name in a.keys() | b.keys()
                if name not in a or name not in b
                or not np.array_equal(a[name], b[name])]
  return found


def main(argv):
  logging.set_verbosity(logging.WARNING)
  more = argv[1:]  # flags of the command
  rng = random.Random(_SEED.value)
  root = _WORKDIR.value or tempfile.mkdtemp()
  whole, disturbed = os.path.join(root, "whole"), os.path.join(root, "killed")
  begin = time.monotonic()
  finish(start(whole, more))
  print(f"undisturbed: {time.monotonic() - begin:.0f} s", flush=True)
  sent, early = disturb(disturbed, rng, more)
  last = [start(disturbed, more) for _ in range(_PROCESSES.value)]
  for process in last:
    finish(process)
  wanted, got = contents(whole), contents(disturbed)
  found = differences(wanted, got)
  found += [f"{run}: done again" for run, row in early.items()
            if got[run][0] != row]  # its times differ then
  print(json.dumps(sent | {"runs": len(wanted), "differences": found}))
  sys.exit(bool(found))


if __name__ == "__main__":
  app.run(main)
