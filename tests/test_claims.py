"""Claims: one holder, taken over when it is silent, rows written once."""
import json
import multiprocessing
import random
import threading
import time

import pytest

from tests import made_stores
from ttc_jax import claims, stores
from ttc_jax.claims import Claims
from ttc_jax.errors import Busy
from ttc_jax.runs.workdir import WorkDir


@pytest.fixture(params=made_stores.KINDS)
def again(request, tmp_path):
  with made_stores.opened(request.param, tmp_path) as open_again:
    yield open_again


def silent(name, store):
  """A claim whose holder shows no life: of another host, never renewed."""
  claim = claims.Claim(store, name, 1, 0.0)
  claim._content |= {"host": "another", "pid": 1}
  assert claim.create()
  return claim


def test_a_name_has_one_holder_and_is_free_after_it(again):
  one, two = Claims(again()), Claims(again())
  for holder, other in ((one, two), (two, one)):
    with holder.hold("runs/a") as claim:
      claim.check()
      for busy in (holder, other):
        with pytest.raises(Busy):
          with busy.hold("runs/a"):
            pass
      assert other.held("runs") == ["runs/a"]
      with other.hold("runs/b"):
        pass
    assert other.held("runs") == []
  one.forget("runs/a")
  assert again().names("claims/runs") == ["b"]


def test_no_thread_is_left(tmp_path):
  before = threading.active_count()
  for _ in range(5):
    holder = Claims(stores.open_store(tmp_path))
    with holder.hold("a"), holder.hold("b"):
      assert threading.active_count() == before + 1
  end = time.monotonic() + 10
  while threading.active_count() > before and time.monotonic() < end:
    time.sleep(0.01)
  assert threading.active_count() <= before


def test_an_error_frees_the_name(again):
  with pytest.raises(KeyError):
    with Claims(again()).hold("a"):
      raise KeyError
  with Claims(again()).hold("a"):
    pass


def test_a_silent_holder_loses_its_claim_after_a_lease(again):
  lost = silent("a", again())
  waiting = Claims(again(), seconds=0.3)
  begin = time.monotonic()
  while True:
    try:
      with waiting.hold("a"):
        assert time.monotonic() - begin >= 0.3
        with pytest.raises(Busy):
          lost.check()
      break
    except Busy:
      lost.check()  # still its own
      assert time.monotonic() - begin < 30
      time.sleep(0.01)


def test_a_holder_that_is_alive_keeps_its_claim_for_many_leases(again):
  lease = 0.4
  waiting = Claims(again(), lease)
  with Claims(again(), lease).hold("a") as claim:
    end = time.monotonic() + 4 * lease
    while time.monotonic() < end:
      with pytest.raises(Busy):
        with waiting.hold("a"):
          pass
      time.sleep(0.02)
    claim.check()


def test_an_end_that_tells_nobody_costs_no_lease_on_the_same_host(tmp_path):
  """The holder is a process that ended without a release, as by SIGKILL."""
  store = stores.open_store(tmp_path)
  child = multiprocessing.get_context("spawn").Process(
      target=_claim_and_end, args=(str(tmp_path),))
  child.start()
  child.join()
  assert child.exitcode == 9
  if claims._process()["host"]:  # Linux
    with Claims(store).hold("a"):
      pass


def _claim_and_end(path):
  import os
  Claims(stores.open_store(path)).hold("a").__enter__()
  os._exit(9)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b'{"released": 1}', 200_000 * b"["])
def test_a_damaged_claim_is_waited_out(content, tmp_path):
  store = stores.open_store(tmp_path)
  store.write("claims/a/7", content)
  waiting = Claims(store, seconds=0.05)
  with pytest.raises(Busy):
    with waiting.hold("a"):
      pass
  time.sleep(0.06)
  with waiting.hold("a") as claim:
    assert claim.number == 8


class Watched(dict):
  """Notes every write of a row."""

  def __init__(self):
    super().__init__()
    self.rows, self.lock = [], threading.Lock()

  def __setitem__(self, path, content):
    super().__setitem__(path, content)
    self._note(path)

  def setdefault(self, path, content):
    with self.lock:
      new = path not in self
      found = super().setdefault(path, content)
    if new:
      self._note(path)
    return found

  def _note(self, path):
    if path.endswith("row.json"):
      self.rows.append(path)


def row(run, who):
  return {"run": run, "who": who, "finished": f"{time.monotonic()}"}


@pytest.mark.parametrize("workers, stale", [
    (4, 0.05), *(pytest.param(*x, marks=pytest.mark.slow)
                 for x in ((2, 0.0), (2, 0.05), (4, 0.0)))])
def test_work_is_done_once_on_a_bad_line(stale, workers):
  """Workers claim runs, die without a word or stall past their lease, and go
  on; rows exist once and the derived file has all of them."""
  contents, lease = Watched(), 0.3
  runs = [f"r{i}" for i in range(8)]
  errors = []

  def work(number):
    rng = random.Random(number)
    try:
      place = open_workdir(contents, number, stale, lease)
      while not all(place.row(run) for run in runs):
        for run in rng.sample(runs, len(runs)):
          if place.row(run):
            continue
          fate = rng.random()
          try:
            if fate < 0.2:  # this "process" ends without a word
              claim = place.claims._take(f"runs/{run}")
              claim._content["host"] = "another"
              claim.renew()
              place = open_workdir(contents, 100 * rng.random(), stale, lease)
              continue
            with place.claim(run) as claim:
              if place.row(run):
                continue
              if fate < 0.3:  # it stands still, then goes on
                place.claims._held.discard(claim)
                claim._content["host"] = "another"
                claim.renew()
                time.sleep(2 * lease)
              else:
                time.sleep(rng.uniform(0, 0.05))
              claim.check()
              place.write_row(row(run, number))
          except Busy:
            time.sleep(0.01)
    except Exception as error:  # shown by the test's thread
      errors.append(error)
      raise
  threads = [threading.Thread(target=work, args=(n,)) for n in range(workers)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(120)
  assert not errors
  rows = {path: content for path, content in contents.items()
          if path.endswith("row.json")}
  assert len(rows) == len(runs)
  assert sorted(contents.rows) == sorted(rows)  # each once
  final = open_workdir(contents, 0, 0.0, lease)
  assert sorted(r["run"] for r in final.rows()) == runs
  lines = contents["x/results.jsonl"].decode().splitlines()
  if not stale:
    assert sorted(json.loads(line)["run"] for line in lines) == runs


def open_workdir(contents, seed, stale, lease):
  place = WorkDir.__new__(WorkDir)
  place.__init__("unused", lease)
  place.store = made_stores.Faulty(contents, seed, stale)
  place.claims = Claims(place.store, lease)
  return place
