"""Stores: contents whole or not at all, created once."""
import os
import threading
import time

import pytest

from tests import made_stores
from ttc_jax import stores
from ttc_jax.errors import UserError


@pytest.fixture(params=made_stores.KINDS)
def again(request, tmp_path):
  """Opens the same store, as another process would."""
  with made_stores.opened(request.param, tmp_path) as open_again:
    yield open_again


def test_contents_are_what_was_written_last(again):
  one, two = again(), again()
  assert one.read("a/b") is None and one.names("") == one.names("a") == []
  for content in (b"1\r\n\0", b"", b"x" * 1000):
    one.write("a/b", content)
    assert two.read("a/b") == content
  one.write("a/c/d", b"2")
  assert two.names("a") == ["b", "c"] and two.names("") == ["a"]
  two.delete("a/c")
  two.delete("a/never")
  assert one.names("a") == ["b"] and one.read("a/c/d") is None


def test_of_many_that_create_a_content_one_does(again):
  wins, places = [], [again() for _ in range(4)]

  def compete(number):
    for i in range(5):
      if places[number].create(f"f/{i}", f"{number}".encode()):
        wins.append((i, number))
  threads = [threading.Thread(target=compete, args=(n,)) for n in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(i for i, _ in wins) == list(range(5))
  for i, number in wins:
    assert again().read(f"f/{i}") == f"{number}".encode()


def test_a_folder_appears_whole_or_not_at_all(again):
  with pytest.raises(KeyError):
    with again().write_folder("s/1") as folder:
      (open(os.path.join(folder, "half"), "w")).close()
      raise KeyError
  assert again().names("s") == []
  with pytest.raises(FileNotFoundError):
    with again().read_folder("s/1"):
      pass
  for text in ("first", "second"):  # of two that write the same, either
    with again().write_folder("s/1") as folder:
      os.makedirs(os.path.join(folder, "in", "side"))
      with open(os.path.join(folder, "in", "side", "f"), "w") as file:
        file.write(text)
  with again().read_folder("s/1") as folder:
    with open(os.path.join(folder, "in", "side", "f")) as file:
      assert file.read() in ("first", "second")


def test_what_is_deleted_while_others_write_there_is_no_error(tmp_path):
  """As claims are, when a run is done and another process looks again."""
  stop, errors = threading.Event(), []

  def busy(act):
    store = stores.open_store(tmp_path)
    try:
      while not stop.is_set():
        act(store)
    except Exception as error:  # shown by the test's thread
      errors.append(error)
  threads = [threading.Thread(target=busy, args=(act,)) for act in (
      lambda s: (s.delete("claims/runs/r"), time.sleep(0.01)),
      lambda s: s.create("claims/runs/r/1", b"x"),
      lambda s: s.write("claims/runs/r/1", b"y"),
      lambda s: (s.names("claims/runs/r"), s.read("claims/runs/r/1")))]
  for thread in threads:
    thread.start()
  stop.wait(2)
  stop.set()
  for thread in threads:
    thread.join()
  assert not errors


def test_a_killed_save_leaves_nothing_for_ever(tmp_path):
  store = stores.open_store(tmp_path)
  (tmp_path / "s" / "3.ab.tmp").mkdir(parents=True)
  (tmp_path / "s" / "2").mkdir()
  store.tidy("s")
  assert os.listdir(tmp_path / "s") == ["2"]


def test_a_damaged_zip_is_a_value_error(tmp_path):
  with made_stores.opened("memory", tmp_path) as again:
    with again().write_folder("s") as folder:
      with open(os.path.join(folder, "f"), "w") as file:
        file.write("x" * 100)
    content = again().read("s.zip")
    for bad in (content[:50], b"", content[::-1],
                content.replace(b"x" * 100, b"y" * 100)):
      again().write("s.zip", bad)
      with pytest.raises(ValueError):
        with again().read_folder("s"):
          pass


@pytest.mark.parametrize("address", [
    "s3://b/x", "gs://", "gs:///", "http://h/x", "file:///x", "gs://a::b://c",
    "gs://b/x[1]", "gs://b/*", "memory://x"])
def test_other_addresses_are_one_sentence(address):
  with pytest.raises(UserError, match="a work directory is a path or gs://"):
    stores.open_store(address)


@pytest.mark.parametrize("error, calls, message", [
    (OSError("the line is dead"), stores.Bucket.attempts,
     "cannot be used .*the line is dead"),
    (PermissionError("no"), 1, "may read and write it")])  # as the next time
def test_a_bucket_that_fails_is_one_sentence(
    error, calls, message, tmp_path, monkeypatch):
  asked = []

  def fail(path):
    asked.append(path)
    raise error
  with made_stores.opened("memory", tmp_path) as again:
    store = again()
    store.pause = 0.0
    monkeypatch.setattr(store, "_read", fail)
    with pytest.raises(UserError, match=message):
      store.read("x")
  assert len(asked) == calls
