"""Runs one session with several Ray workers, which share its work directory.

  python examples/pods/ray_runs.py --workers=8 --gpus=1 -- \
      --workdir=DIR --config=configs/controls.py

What follows "--" are the flags of ttc_jax.main. Needs `pip install ray`.
"""
import argparse
import subprocess
import sys

import ray


def run(flags: list[str]) -> int:
  """Takes runs until none is left; returns the exit code."""
  # A process of its own: Ray's workers may have used JAX before.
  return subprocess.run(
      [sys.executable, "-m", "ttc_jax.main", "--config.hosts=alone", *flags],
      check=False).returncode


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--gpus", type=float, default=0, help="of a worker")
  parser.add_argument("--cpus", type=float, default=1, help="of a worker")
  parser.add_argument("--address", help="of a cluster; default: this machine")
  parser.add_argument("flags", nargs=argparse.REMAINDER)
  options = parser.parse_args()
  flags = [flag for flag in options.flags if flag != "--"]
  ray.init(address=options.address, logging_level="ERROR")
  remote = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus)(run)
  codes = ray.get([remote.remote(flags) for _ in range(options.workers)])
  sys.exit(next((code for code in codes if code), 0) and 1)


if __name__ == "__main__":
  main()
