"""Two fake CPU devices, one empty cache for all tests, and a tiny problem."""
import atexit
import collections
import functools
import gc
import importlib.util
import os
import shutil
import signal
import tempfile

# Images and compiled programs; processes that tests start use it too.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"],
                ignore_errors=True)
os.environ["JAX_PLATFORMS"] = "cpu"
# With several fake devices on few cores, programs that run at the same time
# can wait for each other's collectives for ever.
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
# Most programs run once or twice: optimising them takes longer than it saves.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") +
                           " --xla_force_host_platform_device_count=2"
                           " --xla_backend_optimization_level=0")

# A runner that ignores these (nohup) would hand that on to the processes that
# tests start.
for _name, _handler in (("SIGINT", signal.default_int_handler),
                        ("SIGHUP", signal.SIG_DFL)):
  if hasattr(signal, _name):
    _number = getattr(signal, _name)
    if signal.getsignal(_number) == signal.SIG_IGN:
      signal.signal(_number, _handler)

import jax
import numpy as np
import pytest

from tests.random_trees import random_tree
from tests.torch_models import import_timm
from ttc_jax import backbones, compilation, evaluate, importance, serve, step
from ttc_jax.backbones.vit import ViT
from ttc_jax.config import default
from ttc_jax.measures import removal
from ttc_jax.model import Model, init_head
from ttc_jax.tasks import Split


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
  """Marks the cases of a sweep as slow, but for the first ones."""
  seen = collections.Counter()
  for item in items:
    if marker := item.get_closest_marker("sweep"):
      test = item.nodeid.partition("[")[0]
      seen[test] += 1
      if seen[test] > marker.kwargs.get("keep", 1):
        item.add_marker("slow")


# Tests of the same shapes, and the commands that they start, share programs.
compilation.start("")


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
  """Lets the compiled programs of a file go when it is done.

  Each takes memory mappings, of which Linux allows a process 65,530: with those
  of thousands of tests XLA aborts. On disk they are kept.
  """
  yield
  for cached in (step.make_epoch_fn, step.make_chunk_fn, step.make_init_fn,
                 evaluate._pmapped, importance._accumulate, removal._losses,
                 serve._program):
    cached.cache_clear()
  step._COMPILED.clear()
  jax.clear_caches()
  gc.collect()

WIDTH, DEPTH, CLASSES, SIZE = 16, 3, 4, 8


@pytest.fixture
def vit():
  return ViT(width=WIDTH, depth=DEPTH, heads=2, hidden=32, patch=4,
             image_size=SIZE)


@pytest.fixture
def params(vit):
  """Random parameters, norms and biases too; no value is 0 or 1."""
  tree = {"backbone": backbones.shapes(vit), "adapter": {},
          "head": jax.eval_shape(lambda: init_head(WIDTH, CLASSES, 0))}
  return random_tree(tree, np.random.default_rng(1))


@pytest.fixture
def model(vit):
  return Model(vit, "half")


@pytest.fixture
def split():
  """37 images: not a multiple of any batch size or number of devices."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (37, SIZE, SIZE, 3), dtype=np.uint8)
  return Split(images, rng.integers(0, CLASSES, 37).astype(np.int32))


@pytest.fixture
def config():
  c = default()
  c.k = 4
  return c


def features(model, params, images, buffers, **kwargs):
  """Features in one program; eagerly, each operation would be compiled."""
  fn = functools.partial(model.features, **kwargs)
  return jax.jit(fn)(params, images, buffers)


def numpy_tree(tree):
  return jax.tree.map(np.asarray, tree)


def random_adapter(adapter, seed=7):
  """The adapter with random values, so that it changes the features."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), adapter)


def import_transformers():
  """Returns transformers, which imports torchvision where that is installed."""
  if importlib.util.find_spec("torchvision"):
    import_timm()
  pytest.importorskip("torch")
  return pytest.importorskip("transformers")
