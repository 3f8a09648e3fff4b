"""A session in a bucket: the same rows and bundles as on a disk."""
import os
import random
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

from tests import gcs_emulator
from tests.command import run_command, start_command
from tests.test_bucket import upload
from tests.test_main import SMALL, arguments, data, small, weights  # noqa: F401
from ttc_jax import bundles
from ttc_jax.runs.workdir import WorkDir

TIMES = {"seconds_train", "seconds_test", "images_per_second",
         "test_images_per_second", "compile_seconds", "bundle_bytes",
         "finished", "step_memory_bytes"}


@pytest.fixture
def objects(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  with gcs_emulator.running() as (objects, environment):
    with mock.patch.dict(os.environ, environment):
      yield objects


def results(workdir):
  """{run: (row without times, bundle)}."""
  place = WorkDir(workdir)
  return {row["run"]: (
      {k: v for k, v in row.items() if k not in TIMES},
      bundles.load(place.bundle(row["run"]))) for row in place.rows()}


def check_equal(one, two):
  assert one.keys() == two.keys() and one
  for run, (row, bundle) in one.items():
    other_row, other = two[run]
    assert row == other_row
    for a, b in ((bundle.tuned, other.tuned), (bundle.buffers, other.buffers)):
      assert a.keys() == b.keys()
      assert all((a[name] == b[name]).all() for name in a)


@pytest.mark.slow
def test_a_bucket_gives_what_a_disk_gives(
    objects, data, weights, tmp_path):  # noqa: F811
  upload(objects, data, "data")
  local = arguments(data, weights, tmp_path / "images", tmp_path / "work")
  there = arguments("gs://b/data", weights, tmp_path / "images",
                    "gs://b/work")
  for args in (local, there):
    done = run_command("main", *args)
    assert done.returncode == 0, done.stderr
  check_equal(results(tmp_path / "work"), results("gs://b/work"))
  names = {name.removeprefix("work/") for name in objects.contents
           if name.startswith("work/")}
  assert {"config.json", "plan.json", "results.jsonl", "results.md"} <= names
  assert sum(name.endswith("/bundle.safetensors") for name in names) == 1
  assert not any(name.startswith("claims/runs/") for name in names)
  assert not os.path.exists("gs:")
  # Again: nothing is trained, and the report reads the same rows.
  generations = {name: generation for name, (generation, _) in
                 objects.contents.items() if name.startswith("work/runs/")}
  assert run_command("main", *there).returncode == 0
  assert generations == {name: generation for name, (generation, _) in
                         objects.contents.items()
                         if name.startswith("work/runs/")}
  tables = [run_command("report", place).stdout
            for place in ("gs://b/work", tmp_path / "work")]
  assert tables[0] == tables[1] and "colours" in tables[0]
  run, = results("gs://b/work")
  image = next((data / "colours").glob("*.png"))
  said = run_command("predict", f"--bundle=gs://b/work/runs/{run}/bundle",
                     f"--weights={weights}", image)
  assert said.returncode == 0, said.stderr


def test_compiled_programs_are_kept_in_a_bucket(objects):
  code = """
import jax
from ttc_jax import compilation
compilation.start("gs://b/programs")
# On a GPU XLA would write beside JAX, and knows no gs://.
assert jax.config.values["jax_persistent_cache_enable_xla_caches"] == "none"
jax.jit(lambda x: x * 3 + 1)(2.0)
print(compilation.count().compiled)
"""
  said = [subprocess.run([sys.executable, "-c", code], text=True, check=True,
                         capture_output=True).stdout for _ in range(2)]
  assert int(said[0]) > 0 and int(said[1]) == 0
  assert any(name.startswith("programs/") for name in objects.contents)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("place", ["disk", "gs"])
def test_processes_that_are_killed_at_random_give_the_same(
    place, processes, objects, data, weights, tmp_path):  # noqa: F811
  """Each run is done once; rows and bundles are those of one process."""
  more = dict(epochs=30, save_seconds=0.0, seeds="0,1,2", keep_stages=False,
              lease_seconds=3.0)
  alone = arguments(data, weights, tmp_path / "images", tmp_path / "alone",
                    **more)
  assert run_command("main", *alone).returncode == 0
  workdir = "gs://b/w" if place == "gs" else str(tmp_path / "work")
  args = arguments(data, weights, tmp_path / "images", workdir, **more)
  rng, begin = random.Random(processes), time.monotonic()
  running = [start_command("main", *args, before=SMALL)
             for _ in range(processes)]
  for _ in range(2 * processes):
    time.sleep(rng.uniform(3, 8))
    victim = rng.randrange(processes)
    running[victim].send_signal(signal.SIGKILL)
    running[victim].communicate()
    running[victim] = start_command("main", *args, before=SMALL)
  for process in running:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
  assert time.monotonic() - begin < 600
  check_equal(results(tmp_path / "alone"), results(workdir))
  assert not WorkDir(workdir).store.names("stages")
