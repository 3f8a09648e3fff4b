"""Several processes as hosts of a pod, joined by jax.distributed (gloo)."""
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.command import run_command, start_command
from tests.test_main import SMALL, arguments, data, small, weights  # noqa: F401
from ttc_jax import bundles, stores
from ttc_jax.errors import UserError
from ttc_jax.runs.workdir import WorkDir


def free_port():
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def devices(count):
  """Code that gives a process so many CPU devices."""
  return (f"import jax\njax.config.update('jax_num_cpu_devices', {count})\n"
          + SMALL)


# Code after which a process takes itself for a host of a TPU slice, where JAX
# joins hosts that take runs of their own too.
ON_TPU = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: (
    "found" if name == "libtpu" else find_spec(name, *args))
"""


def start(count, args, each=None, before="", **config):
  """Starts the processes of a pod, one device each.

  Args:
    each: {process: other arguments}.
    before: code that each process runs first.
  """
  port = free_port()
  more = [f"--config.{k}={v}" for k, v in config.items()]
  return [start_command(
      "main", *(each or {}).get(i, args), *more,
      f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}",
      f"--process_id={i}", before=before + devices(1)) for i in range(count)]


def finish(processes):
  said = [p.communicate(timeout=300) for p in processes]
  assert all(p.returncode == 0 for p in processes), said
  return [out for out, _ in said]


def curve(workdir):
  place = WorkDir(workdir)
  row, = place.rows()
  return row, place.curve(row["run"]), bundles.load(place.bundle(row["run"]))


@pytest.mark.slow
@pytest.mark.parametrize("count, in_memory_gib", [(2, 4.0), (4, 4.0), (2, 0.0)])
def test_a_batch_over_hosts_is_a_batch_over_devices(
    count, in_memory_gib, data, weights, tmp_path):  # noqa: F811
  """The same losses, scores and accuracy; one host writes and speaks.

  The pod's training set streams where none fits in memory, the other's not.
  """
  def args(name):
    return arguments(data, weights, tmp_path / "images", tmp_path / name,
                     epochs=3)
  alone = start_command("main", *args("alone"), before=devices(count))
  finish([alone])
  said = finish(start(count, args("pod"), hosts="batch",
                      in_memory_gib=in_memory_gib))
  assert "colours" in said[0] and "colours" not in "".join(said[1:])
  (row, losses, bundle), (other, theirs, other_bundle) = (
      curve(tmp_path / name) for name in ("alone", "pod"))
  assert [r["epoch"] for r in losses] == [r["epoch"] for r in theirs]
  np.testing.assert_allclose([r["loss"] for r in losses],
                             [r["loss"] for r in theirs], atol=1e-5)
  assert row["test_top1"] == other["test_top1"]
  assert row["run"] == other["run"]
  for name, x in bundle.buffers.items():  # the selected channels
    assert (x == other_bundle.buffers[name]).all()
  for name, x in bundle.tuned.items():
    np.testing.assert_allclose(x, other_bundle.tuned[name], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("before, in_memory_gib", [
    ("", 4.0), (ON_TPU, 4.0), (ON_TPU, 0.0)])
def test_hosts_that_take_runs_share_them(
    before, in_memory_gib, data, weights, tmp_path):  # noqa: F811
  """Each writes what it does: rows, states and bundles."""
  settings = dict(method="layernorm", epochs=2, seeds="0,1,2,3")
  args = arguments(data, weights, tmp_path / "images", tmp_path / "pod",
                   **settings)
  said = finish(start(2, args, before=before, in_memory_gib=in_memory_gib))
  for seed in range(4):  # each run is one host's
    line = f"colours  layernorm  seed {seed}"
    assert sum(line in out for out in said) == 1, said
  assert all("seed" in out for out in said)
  alone = arguments(data, weights, tmp_path / "images", tmp_path / "alone",
                    **settings)
  finish([start_command("main", *alone, before=devices(1))])
  pod, other = (WorkDir(tmp_path / name) for name in ("pod", "alone"))
  rows = {row["run"]: row["test_top1"] for row in pod.rows()}
  assert rows == {row["run"]: row["test_top1"] for row in other.rows()}
  assert len(rows) == 4
  for run in rows:
    found, expected = (bundles.load(w.bundle(run)) for w in (pod, other))
    for name, x in expected.tuned.items():
      np.testing.assert_allclose(found.tuned[name], x, atol=1e-4)


@pytest.mark.slow
def test_the_end_of_one_host_is_no_other_s_where_they_take_runs(
    data, weights, tmp_path):  # noqa: F811
  """The first one, too: what it held is taken over."""
  args = arguments(data, weights, tmp_path / "images", tmp_path / "pod",
                   method="layernorm", epochs=60, seeds="0,1,2,3",
                   save_seconds=0.0, lease_seconds=5.0)
  pod = start(2, args)
  wait_for_states(tmp_path / "pod")
  pod[0].send_signal(signal.SIGKILL)
  pod[0].communicate()
  _, errors = pod[1].communicate(timeout=300)
  assert pod[1].returncode == 0, errors
  assert len(WorkDir(tmp_path / "pod").rows()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_host_that_fails_ends_the_other(
    wrong, data, weights, tmp_path):  # noqa: F811
  """It has no data: its own sentence, and one of the other host."""
  bad = arguments(tmp_path / "none", weights, tmp_path / "images",
                  tmp_path / "pod")
  good = arguments(data, weights, tmp_path / "images", tmp_path / "pod")
  pod = start(2, good, hosts="batch", each={wrong: bad})
  for i, process in enumerate(pod):
    _, errors = process.communicate(timeout=100)
    assert process.returncode in (1, 2) and "Traceback" not in errors
    assert ("another host has ended" if i != wrong else "none") in errors


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_dies_ends_the_other_and_a_restart_resumes(
    victim, data, weights, tmp_path):  # noqa: F811
  args = arguments(data, weights, tmp_path / "images", tmp_path / "pod",
                   method="layernorm", epochs=4000, save_seconds=0.0,
                   eval_every=4000)
  pod = start(2, args, hosts="batch")
  wait_for_states(tmp_path / "pod")
  pod[victim].send_signal(signal.SIGKILL)
  begin = time.monotonic()
  _, errors = pod[1 - victim].communicate(timeout=60)
  assert time.monotonic() - begin < 60
  assert pod[1 - victim].returncode != 0
  assert "another host has ended" in errors
  assert "Traceback" not in errors
  pod[victim].communicate()
  stage, = (tmp_path / "pod" / "stages").iterdir()
  before = max(int(p.name) for p in stage.iterdir() if p.name.isdecimal())
  pod = start(2, args, hosts="batch")
  time.sleep(1)
  wait_for_states(tmp_path / "pod", before)
  pod[0].send_signal(signal.SIGTERM)  # asked once, both end
  for process in pod:
    process.communicate(timeout=120)
    assert process.returncode == 0
  assert not WorkDir(tmp_path / "pod").rows()


def wait_for_states(workdir, after=0):
  """Until an epoch beyond `after` is saved."""
  end = time.monotonic() + 120
  while time.monotonic() < end:
    found = [int(p.name) for p in workdir.glob("stages/*/*")
             if p.name.isdecimal()]
    if found and max(found) > after:
      return
    time.sleep(0.05)
  pytest.fail("no state was saved")


@pytest.mark.parametrize("flags, config, message", [
    (["--coordinator=h:1"], [], "together, or none of them"),
    (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], [],
     "--process_id=2 is not between 0 and"),
    ([], ["--config.hosts=pod"], "unknown hosts 'pod'"),
])
def test_wrong_flags_are_one_sentence(
    flags, config, message, data, weights, tmp_path):  # noqa: F811
  args = arguments(data, weights, tmp_path / "images", tmp_path / "w")
  done = run_command("main", *args, *flags, *config)
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert message in done.stderr


def test_a_batch_over_hosts_needs_hosts(tmp_path):
  process = start_command("main", "--config=configs/demo.py",
                          f"--workdir={tmp_path}", "--config.hosts=batch")
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 2 and "Traceback" not in errors
  assert "JAX knows no cluster here: give --coordinator" in errors


def test_the_command_does_not_use_jax_before_it_joins():
  code = """
from jax._src import xla_bridge
from ttc_jax import launch
assert launch and not xla_bridge.backends_are_initialized()
"""
  subprocess.run([sys.executable, "-c", code], check=True)


ROWS = """
import jax
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize("127.0.0.1:{port}", 2, {process})
from ttc_jax import parallel
parallel.span_hosts()
import numpy as np
from ttc_jax import evaluate
squares = parallel.pmap_rows(lambda x: x * x)
print(evaluate.over(squares, (np.arange(7),), 4).tolist())
"""


def test_every_host_has_the_rows_of_all():
  port = free_port()
  hosts = [subprocess.Popen(
      [sys.executable, "-c", ROWS.format(port=port, process=process)],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      for process in range(2)]
  said = [host.communicate(timeout=120) for host in hosts]
  assert [out.splitlines()[-1:] for out, _ in said] == [
      ["[0, 1, 4, 9, 16, 25, 36]"]] * 2, said


# --- A store that hosts share -------------------------------------------------

class Line:
  """What the first host tells, for a follower that asks afterwards."""

  def __init__(self):
    self.said = []

  def lead(self, content):
    self.said.append(content)
    return content

  def follow(self, content):
    return self.said.pop(0)


def test_followers_see_what_the_first_host_sees_and_write_nothing(tmp_path):
  one, two = (stores.open_store(tmp_path / name) for name in ("a", "b"))
  line = Line()
  leader = stores.Shared(one, True, line.lead)
  follower = stores.Shared(two, False, line.follow)

  def both(call):
    return call(leader), call(follower)
  both(lambda s: s.write("x/y", b"1\n2"))
  assert both(lambda s: s.read("x/y")) == (b"1\n2",) * 2
  assert both(lambda s: s.read("none")) == (None,) * 2
  assert both(lambda s: s.create("x/y", b"2")) == (False,) * 2
  assert both(lambda s: s.create("x/z", b"2")) == (True,) * 2
  assert both(lambda s: s.names("x")) == (["y", "z"],) * 2
  for store in (leader, follower):
    with store.write_folder("f") as folder:
      with open(os.path.join(folder, "n"), "w") as file:
        file.write("hi")
  for store in (leader, follower):
    with store.read_folder("f") as folder:
      with open(os.path.join(folder, "n")) as file:
        assert file.read() == "hi"
  assert both(lambda s: s.agreed("q", lambda: s is leader)) == (True,) * 2
  assert not os.path.exists(tmp_path / "b")


def test_hosts_that_went_apart_learn_it(tmp_path):
  line = Line()
  stores.Shared(stores.open_store(tmp_path), True, line.lead).read("a")
  follower = stores.Shared(stores.open_store(tmp_path), False, line.follow)
  with pytest.raises(UserError, match="the hosts do not do the same: .*'read a'"
                     ".*'read b'"):
    follower.read("b")


def test_a_failure_of_the_first_host_is_every_host_s(tmp_path, monkeypatch):
  line, store = Line(), stores.open_store(tmp_path)

  def fail(name):
    raise OSError("the disk is gone")
  monkeypatch.setattr(store, "read", fail)
  with pytest.raises(OSError, match="the disk is gone"):
    stores.Shared(store, True, line.lead).read("a")
  with pytest.raises(UserError, match="first host failed: the disk is gone"):
    stores.Shared(store, False, line.follow).read("a")
