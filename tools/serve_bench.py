"""What a batch of many tasks costs, compared with one task after another.

Images a second of the bare backbone, of a batch of one task, of a batch of T
tasks in one pass, and of the same batch as T calls; random weights, the best of
several rounds of all four.

  python tools/serve_bench.py --backbone=vit_s16 --size=96 --batch=64 --tasks=8
"""
import os
import sys
import tempfile
import time

from absl import flags
import jax
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tests import made_bundles  # noqa: E402
from ttc_jax import backbones, bundles, cli, evaluate, parallel, serve  # noqa: E402
from ttc_jax.model import Model  # noqa: E402

_BACKBONE = flags.DEFINE_string("backbone", "vit_s16", "name")
_SIZE = flags.DEFINE_integer("size", 96, "of the images, pixels a side")
_BATCH = flags.DEFINE_integer("batch", 64, "images", lower_bound=1)
_TASKS = flags.DEFINE_integer("tasks", 8, "in the batch", lower_bound=1)
_METHODS = flags.DEFINE_list("methods", ["ttc", "lora", "ssf"], "names")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "the best counts", lower_bound=1)


def server(method, weights):
  """Returns a server with T tasks of a method, of 10 to 100 classes."""
  model = serve.load(weights, _BATCH.value)
  k = backbones.make(_BACKBONE.value, _SIZE.value).default_k
  for i in range(_TASKS.value):
    classes = [str(c) for c in range(10 + 90 * i // _TASKS.value)]
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, "task.safetensors")
      bundles.pack(path, made_bundles.make(
          weights, method, _BACKBONE.value, _SIZE.value, seed=i,
          classes=classes, config={"k": k}))
      model.add(f"task{i}", path)
  return model


def bare(weights, images):
  """Returns a function that runs the backbone alone, under the same pmap."""
  module, params = backbones.load(_BACKBONE.value, weights, _SIZE.value)
  params = parallel.replicate({"backbone": params, "adapter": {}})
  return lambda: evaluate.features(
      Model(module, "half"), params, {}, images, _BATCH.value)


def best(ways):
  """Returns {way: seconds}, the least of all rounds."""
  for call in ways.values():
    call()  # compiles
  seconds = dict.fromkeys(ways, np.inf)
  for _ in range(_ROUNDS.value):
    for name, call in ways.items():
      begin = time.perf_counter()
      call()
      seconds[name] = min(seconds[name], time.perf_counter() - begin)
  return seconds


def measure(method, weights):
  rng, B, T = np.random.default_rng(0), _BATCH.value, _TASKS.value
  images = rng.integers(0, 256, (B, _SIZE.value, _SIZE.value, 3), np.uint8)
  names = [f"task{i % T}" for i in range(B)]
  model = server(method, weights)
  seconds = best({
      "bare": bare(weights, images),
      "one task": lambda: model.predict(images, task="task0"),
      "mixed": lambda: model.predict(images, task=names),
      "one by one": lambda: [model.predict(images[i::T], task=names[i])
                             for i in range(min(T, B))]})
  print(f"{method:12}" + "  ".join(
      f"{name} {B / s:.1f} ({s / seconds['bare']:.2f})"
      for name, s in seconds.items()), flush=True)


def main(argv):
  del argv
  print(f"{_BACKBONE.value} at {_SIZE.value} px, {_BATCH.value} images, "
        f"{_TASKS.value} tasks, {len(parallel.devices())} x "
        f"{jax.devices()[0].device_kind}; images/s, and times the bare "
        "backbone's seconds")
  with tempfile.TemporaryDirectory() as folder:
    weights = made_bundles.save_base(
        os.path.join(folder, "base.safetensors"), _BACKBONE.value)
    for method in _METHODS.value:
      measure(method, weights)


if __name__ == "__main__":
  cli.run(main)
