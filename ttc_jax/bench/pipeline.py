"""A training set that streams: reading alone, the step alone, both together.

Pictures are drawn and written as JPEGs of the size that ImageNet's are on
average, then read as `train` reads them: `feed.Feed`, and stage 2 in chunks.
"""
from collections.abc import Iterator
import contextlib
import os
import tempfile
import time
from typing import Any

import jax
import numpy as np
from PIL import Image

from ttc_jax import backbones, feed, methods, parallel, quantisation, step
from ttc_jax.bench import programs
from ttc_jax.model import Model
from ttc_jax.tasks import images as images_lib

_WIDTH, _HEIGHT, _FILES = 500, 375, 64
_CHUNKS, _TURNS = 4, 3  # of the epoch that is timed; the best turn counts


def measure(config: Any, steps: int, workers: int = 0) -> dict[str, Any]:
  """Returns images a second: {"feed", "step", "together"}, and what was read.

  Args:
    config: as `programs.settings` returns it.
    steps: of a chunk, in one dispatch.
    workers: threads that decode; 0: one for each core.
  """
  backbone = programs.make_backbone(config)
  with drawn(backbone.image_size, config.batch_size * steps) as stream:
    labels = np.zeros(len(stream), np.int32)
    source = feed.Feed(stream, labels, config.batch_size, workers)
    devices = len(parallel.devices())
    order = np.tile(np.arange(len(stream)), _CHUNKS).reshape(
        -1, devices, config.batch_size // devices)
    run = _runner(config, backbone, steps, source)
    chunk = next(source.chunks(order))
    turns = [(_timed(source.chunks(order)), _timed(run([chunk] * _CHUNKS)),
              _timed(run(source.chunks(order)))) for _ in range(_TURNS)]
  seconds = dict(zip(("feed", "step", "together"), map(min, zip(
      *turns, strict=True)), strict=True))
  return {name: order.size / t for name, t in seconds.items()} | {
      "steps": source.steps, "workers": workers or os.cpu_count()}


@contextlib.contextmanager
def drawn(size: int, count: int) -> Iterator[images_lib.Stream]:
  """Yields a Stream of JPEGs in a temporary folder, some of them repeated."""
  rng = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as folder:
    paths = [os.path.join(folder, f"{i}.jpg") for i in range(_FILES)]
    for path in paths:
      small = rng.integers(0, 256, (_HEIGHT // 8, _WIDTH // 8, 3), np.uint8)
      Image.fromarray(small).resize((_WIDTH, _HEIGHT)).save(path, quality=95)
    source = images_lib.from_files(paths, paths)
    with contextlib.closing(images_lib.Stream(
        count, size, lambda i: images_lib.resize(
            source.read(i % _FILES), size, "bicubic"))) as stream:
      yield stream


def _runner(config, backbone, steps, source):
  """chunks -> the generator of `feed.run`, compiled."""
  method = methods.load("ttc", config, backbone)
  stage = method.stages[-1]
  model = Model(backbone, "half", method.handlers)
  base = quantisation.store(
      backbones.init(backbone), backbone, config.frozen_dtype)
  plan, *trained = programs.training(
      model, stage, base, config.batch_size, steps)
  learner, fixed, key = parallel.replicate(
      (*trained, jax.random.key_data(jax.random.key(0))))
  fn, _ = step.compiled(step.make_chunk_fn, model, stage.rules, plan, (
      learner, fixed, source.shapes(), key,
      parallel.replicate((np.int32(0),) * 3)))

  def run(chunks):
    start = jax.tree.map(lambda x: x.copy(), learner)  # it is donated
    return feed.run(fn, start, fixed, key, 0, iter(chunks))
  return run


def _timed(results):
  """Seconds of all results."""
  begin = time.perf_counter()
  for _ in results:
    pass
  return time.perf_counter() - begin


def text(found: dict[str, Any]) -> str:
  """Returns what is printed of `measure`'s result."""
  slower = min(found["feed"], found["step"])
  return "\n".join([
      f"{found['workers']} workers, {found['steps']} steps a chunk; images/s:",
      f"reading alone   {found['feed']:10.1f}",
      f"the step alone  {found['step']:10.1f}",
      f"both together   {found['together']:10.1f}, "
      f"{100 * found['together'] / slower:.0f} % of the slower one"])
