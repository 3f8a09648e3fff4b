"""A training set that streams gives what it gives in memory."""
import pathlib

import jax
import numpy as np
from PIL import Image
import pytest

from tests.test_train import Killed, make_job, run
from ttc_jax import feed, parallel, step, train
from ttc_jax.errors import DataError
from ttc_jax.tasks import Split, images


def rows(count, size=4):
  """Images whose pixels tell which row they are."""
  return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None],
                         (count, size, size, 3))


def order_of(count, batch, epoch=0):
  plan = step.Plan(batch, 0.0, False, 1.0, False, "adamw")
  order, _ = step.shuffled(
      jax.random.key_data(jax.random.key(3)), epoch, count, plan)
  return np.asarray(order)


@pytest.fixture
def short_chunks(monkeypatch):
  """Chunks of two steps of 16 images of 8 px or 4 px."""
  def cut(size):
    monkeypatch.setattr(feed, "_CHUNK_BYTES", 2 * 16 * size * size * 3)
  cut(8)
  return cut


@pytest.mark.parametrize("first", [0, 1, 4])
@pytest.mark.parametrize("workers", [1, 3])
def test_chunks_are_the_rows_of_the_order(short_chunks, first, workers):
  """Against numpy's own indexing, on two devices."""
  short_chunks(4)
  order = order_of(87, 16)
  labels = np.arange(87, dtype=np.int32)
  read = feed.Feed(rows(87), labels, 16, workers)
  assert read.steps == 2
  seen = []
  for chunk in read.chunks(order, first):
    assert chunk.first == first + len(seen)
    got, theirs = (np.asarray(x)[:, :chunk.steps] for x in chunk.batches)
    want = order[chunk.first:chunk.first + chunk.steps].swapaxes(0, 1)
    assert (got == rows(87)[want]).all() and (theirs == want).all()
    assert (chunk.batches[0].shape, chunk.batches[1].shape) == tuple(
        x.shape for x in read.shapes())
    seen += [1] * chunk.steps
  assert first + len(seen) == 5
  assert read.seconds > 0


def test_a_host_reads_the_rows_of_its_devices_only(short_chunks, monkeypatch):
  short_chunks(4)
  monkeypatch.setattr(parallel, "here", lambda: [1])
  monkeypatch.setattr(parallel, "put", lambda tree: tree)
  order, asked = order_of(87, 16), []

  class Recorded(np.ndarray):
    def __getitem__(self, i):
      asked.append(i)
      return super().__getitem__(i)
  read = feed.Feed(rows(87).view(Recorded), np.arange(87), 16, 1)
  chunks = list(read.chunks(order))
  assert sorted(asked) == sorted(order[:, 1].reshape(-1))
  assert chunks[0].batches[0].shape == (1, read.steps, 8, 4, 4, 3)


@pytest.mark.parametrize("method", ["ttc", "linear"])
def test_a_streamed_run_has_the_losses_of_one_in_memory(
    config, model, params, tmp_path, short_chunks, method):
  """Of a Stream, in chunks; linear's features are fed as an array."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (87, 8, 8, 3), dtype=np.uint8)
  split = Split(pixels, rng.integers(0, 4, 87).astype(np.int32))
  stream = Split(images.Stream(87, 8, pixels.__getitem__), split.labels)
  settings = dict(in_memory_gib=0.0, flip=method == "ttc")
  want, kept = run(make_job(config, model, split, method, settings | dict(
      in_memory_gib=1.0)), params, tmp_path / "memory")
  got, flat = run(make_job(config, model, stream, method, settings,
                           val=split, holdout=None), params, tmp_path / "feed")
  assert len(got.history) == len(want.history)
  for one, other in zip(got.history, want.history, strict=True):
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6)
    assert one["val_top1"] == other["val_top1"]
    assert one["step_images_per_second"] > 0
    assert one["feed_images_per_second"] > 0
  for name, x in kept.items():
    np.testing.assert_allclose(flat[name], x, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("in_memory_gib", [0.0, 1.0])
def test_a_run_killed_within_an_epoch_goes_on_to_the_same_bits(
    config, model, params, split, tmp_path, short_chunks, monkeypatch,
    in_memory_gib):
  """Also where the images now fit into memory."""
  split = Split(np.tile(split.images, (3, 1, 1, 1)), np.tile(split.labels, 3))
  job = make_job(config, model, split, "layernorm", dict(
      in_memory_gib=0.0, save_seconds=0.0))
  want, kept = run(job, params, tmp_path / "a")
  save, names = train.StageRun._save, []

  def kill(self, done, buffers, progress):
    save(self, done, buffers, progress)
    names.extend(p.name for p in pathlib.Path(self.store.path).iterdir())
    if (done, len(progress.losses)) == (1, 4):
      raise Killed
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(train.StageRun, "_save", kill)
    run(job, params, tmp_path / "b")
  assert names == ["0-2", "0-4", "1", "1-2", "1-4"]
  job.config.in_memory_gib = in_memory_gib
  got, flat = run(job, params, tmp_path / "b")
  assert [r["loss"] for r in got.history] == [r["loss"] for r in want.history]
  assert all((flat[name] == x).all() for name, x in kept.items())


def test_the_centres_of_a_stream_are_those_of_the_array():
  pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
  stream = images.Stream(5, 8, pixels.__getitem__)
  found = train._centre(stream, 4)
  assert found.shape == (5, 4, 4, 3)
  assert (found[1:4] == train._centre(pixels, 4)[1:4]).all()
  assert (found[:] == pixels[:, 2:6, 2:6]).all()


def test_a_damaged_image_is_one_sentence(short_chunks, tmp_path):
  paths = []
  for i in range(40):
    paths.append(str(tmp_path / f"{i}.png"))
    Image.fromarray(rows(40)[i]).save(paths[-1])
  pathlib.Path(paths[7]).write_bytes(b"no image")
  source = images.from_files(paths, paths)
  stream = images.Stream(
      40, 8, lambda i: images.resize(source.read(i), 8, "bicubic"))
  order = np.arange(32).reshape(2, 2, 8)
  with pytest.raises(DataError, match="cannot decode image .*7.png"):
    list(feed.Feed(stream, np.zeros(40), 16).chunks(order))
