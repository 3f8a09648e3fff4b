"""Kills a command at random moments and compares what it ends with.

Runs it undisturbed once; then, in another work directory, starts it again and
again, each time ending it by SIGKILL or SIGTERM after a random time, until it
has been ended so many times and then ends by itself. Rows (but for times) and
bundles must be equal to the bit. With --processes=2 two share the directory.

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

from ttc_jax import bundles, report

_CONFIG = flags.DEFINE_string("config", "configs/demo.py", "of ttc_jax.main")
_KILLS = flags.DEFINE_integer("kills", 20, "how many times", lower_bound=1)
_LONGEST = flags.DEFINE_float("longest", 40, "seconds before a kill")
_PROCESSES = flags.DEFINE_integer("processes", 1, "that share the directory")
_SEED = flags.DEFINE_integer("seed", 0, "of the moments")
_WORKDIR = flags.DEFINE_string("workdir", None, "default: a temporary one")

# Of a row: what depends on the machine's mood.
_TIMES = ("seconds_train", "seconds_test", "images_per_second",
          "test_images_per_second", "compile_seconds", "bundle_bytes")


def start(workdir, more):
  return subprocess.Popen(
      [sys.executable, "-m", "ttc_jax.main", f"--config={_CONFIG.value}",
       "--config.save_seconds=0", f"--workdir={workdir}", *more],
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
  """Waits; an error of the command is an error here."""
  _, errors = process.communicate()
  if process.returncode:
    sys.exit(f"exit code {process.returncode}: {errors}")


def disturb(workdir, rng, more):
  """Starts and ends the command; returns how often each signal was sent."""
  sent = {"SIGKILL": 0, "SIGTERM": 0, "saving": 0}
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
    if victim.poll() is not None:  # it was done before
      print("it ended by itself: give a smaller --longest", flush=True)
      for process in running:
        finish(process)
      break
    sent["saving"] += bool(writing(workdir))
    begin = time.monotonic()
    victim.send_signal(getattr(signal, name))
    victim.wait()
    sent[name] += 1
    print(f"{sum(sent.values()) - sent['saving']:3} {name} "
          f"exit {victim.returncode} after {time.monotonic() - begin:.1f} s; "
          f"{len(report.read(workdir + '/results.jsonl'))} rows", flush=True)
    for process in running:
      if process is not victim:
        process.send_signal(signal.SIGTERM)
        process.wait()
  return sent


def writing(workdir):
  """Whether a checkpoint or bundle is being written just now."""
  return (glob.glob(f"{workdir}/stages/*/*orbax-checkpoint-tmp*")
          or glob.glob(f"{workdir}/runs/*/bundle.tmp*"))


def contents(workdir):
  """{run: (row without times, bundle)}, each run exactly once."""
  rows = report.read(os.path.join(workdir, "results.jsonl"))
  names = [row["run"] for row in rows]
  if len(set(names)) != len(names):
    sys.exit("a run was done twice")
  return {row["run"]: (
      {k: v for k, v in row.items() if k not in _TIMES},
      bundles.load(f"{workdir}/runs/{row['run']}/bundle"))
      for row in rows}


def differences(one, two):
  """Sentences on what is not the same to the bit."""
  if one.keys() != two.keys():
    return [f"runs {sorted(one.keys() ^ two.keys())}"]
  found = []
  for run, (row, bundle) in one.items():
    other_row, other = two[run]
    found += [f"{run}: {k}" for k in row if row[k] != other_row.get(k)]
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
  sent = disturb(disturbed, rng, more)
  last = [start(disturbed, more) for _ in range(_PROCESSES.value)]
  for process in last:
    finish(process)
  wanted = contents(whole)
  found = differences(wanted, contents(disturbed))
  print(json.dumps(sent | {"runs": len(wanted), "differences": found}))
  sys.exit(bool(found))


if __name__ == "__main__":
  app.run(main)
