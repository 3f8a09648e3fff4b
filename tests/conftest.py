"""Two fake CPU devices and one empty cache for all tests, and a tiny problem.
"""
import atexit
import functools
import importlib.util
import os
import shutil
import tempfile

# Of images and compiled programs; the processes that tests start share it.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"],
                ignore_errors=True)
os.environ["JAX_PLATFORMS"] = "cpu"
# Several fake devices on few cores: programs in flight at once can wait for
# each other's collectives for ever.
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
# Programs run but once or twice, so that LLVM's time for them is not worth it.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") +
                           " --xla_force_host_platform_device_count=2"
                           " --xla_backend_optimization_level=0")

import jax
import numpy as np
import pytest

# Tests that differ in little compile much alike.
jax.config.update("jax_compilation_cache_dir", os.path.join(
    os.environ["XDG_CACHE_HOME"], "of_tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

from tests.random_trees import random_tree
from tests.torch_models import import_timm
from ttc_jax import backbones
from ttc_jax.backbones.vit import ViT
from ttc_jax.config import default
from ttc_jax.model import Model, init_head
from ttc_jax.tasks import Split

WIDTH, DEPTH, CLASSES, SIZE = 16, 3, 4, 8


@pytest.fixture
def vit():
  return ViT(width=WIDTH, depth=DEPTH, heads=2, hidden=32, patch=4,
             image_size=SIZE)


@pytest.fixture
def params(vit):
  """Random parameters, norms and biases included, none at a special value."""
  tree = {"backbone": backbones.shapes(vit), "adapter": {},
          "head": jax.eval_shape(lambda: init_head(WIDTH, CLASSES, 0))}
  return random_tree(tree, np.random.default_rng(1))


@pytest.fixture
def model(vit):
  return Model(vit, "half")


@pytest.fixture
def split():
  """37 images: no multiple of any batch or device count."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (37, SIZE, SIZE, 3), dtype=np.uint8)
  return Split(images, rng.integers(0, CLASSES, 37).astype(np.int32))


@pytest.fixture
def config():
  c = default()
  c.k = 4
  return c


def features(model, params, images, buffers, **kwargs):
  """In one program: run eagerly, every operation is one that is compiled."""
  fn = functools.partial(model.features, **kwargs)
  return jax.jit(fn)(params, images, buffers)


def numpy_tree(tree):
  return jax.tree.map(np.asarray, tree)


def random_adapter(adapter, seed=7):
  """The adapter with values that do something."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), adapter)


def import_transformers():
  """Hugging Face's, which imports the torchvision that timm needs if it is
  there."""
  if importlib.util.find_spec("torchvision"):
    import_timm()
  pytest.importorskip("torch")
  return pytest.importorskip("transformers")
