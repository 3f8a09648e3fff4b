"""A third family of backbones is one file: made, written, inspected, loaded
and tuned, with no line changed elsewhere."""
import importlib
import sys

import jax
import numpy as np
import pytest

from tests.random_trees import random_params
from ttc_jax import backbones, methods, trees, weights
from ttc_jax.config import default
from ttc_jax.errors import UserError
from ttc_jax.model import Model, init_head
from ttc_jax.weights import convert, formats

# The whole family: blocks of token-wise MLPs on patches, with positions.
FILE = '''
import re
import flax.linen as nn
import jax.numpy as jnp
from ttc_jax.backbones import layers
from ttc_jax.backbones.layers import Dense, Field, Identity, Site, Work

FIELDS = {"slope": Field((0.1, 0.2), required=True)}
PARAMETERS = {"places": "grid", "stem/kernel": "patch"}


class Toy(nn.Module):
  width: int
  patch: int
  image_size: int
  slope: float = 0.1
  gelu: str = "exact"
  epsilon: float = 1e-6
  drop_path: float = 0.0
  every_token: bool = True
  dtype: type = jnp.float32

  depth, prefix, pool, default_blocks = 2, 0, "gap", 2
  takes_prompts = pads = False

  @property
  def default_k(self):
    return self.width // 4

  @property
  def fields(self):
    return {"slope": self.slope}

  @property
  def sites(self):
    D = self.width
    return {"embedding": (Site(3 * self.patch ** 2, D, "stem"),),
            "fc2": tuple(Site(D, D, f"mix_{i}") for i in range(2))}

  @property
  def norms(self):
    return {"norm1": ("norm_0", "norm_1")}

  @property
  def work(self):
    N, D = (self.image_size // self.patch) ** 2, self.width
    return Work(3 * self.image_size ** 2 * D, 2 * N * D * D, 0, (N, N))

  def block_of(self, name):
    match = re.search(r"(?:mix|norm)_(\\d)/", name)
    return int(match[1]) if match else -1

  @nn.compact
  def __call__(self, images, mask=None, tap=None, train=False, start=0):
    mask, tap = mask or {}, tap or layers.no_tap
    p, D = self.patch, self.width
    x = layers.patches(images, p, self.image_size)
    x = Dense((p, p, 3, D), contract=3, name="stem")(x)
    x = x + self.param("places", nn.initializers.normal(), (1, x.shape[1], D))
    for i in range(2):
      here = layers.at_block(tap, i)
      z = here("norm1", layers.LayerNorm(self.epsilon, name=f"norm_{i}")(x), x)
      z = jnp.where(z > 0, z, self.slope * z)
      rows = mask["fc2"][i] if "fc2" in mask else None
      x = x + here("fc2", Dense((D, D), name=f"mix_{i}")(z, rows), z)
    return x.mean(1)


def make(name, image_size, **fields):
  match = re.fullmatch(r"toy_(8|16)_p(\\d+)", name)
  return match and Toy(int(match[1]), int(match[2]), image_size, **fields)


def canonical(name):
  return None


def examples():
  return ("toy_8_p4", "toy_16_p4")


def identify(shape):
  stem = shape("stem/kernel")
  if stem is None:
    return None
  p, _, _, D = stem
  places = shape("places")
  return Identity("a toy", {"width": D, "patch": p},
                  f"toy_{D}_p{p}" if D in (8, 16) else None,
                  image_size=places and p * round(places[1] ** 0.5))
'''
NAME, SIZE, CLASSES = "toy_8_p4", 16, 3


@pytest.fixture
def toy(tmp_path, monkeypatch):
  (tmp_path / "toy.py").write_text(FILE)
  monkeypatch.setattr(backbones, "__path__",
                      [*backbones.__path__, str(tmp_path)])
  importlib.invalidate_caches()
  yield backbones.make(NAME, SIZE)
  sys.modules.pop("ttc_jax.backbones.toy", None)
  vars(backbones).pop("toy", None)


@pytest.fixture
def file(toy, tmp_path):
  """Its weights in our own format, (path, parameters)."""
  params, path = random_params(toy), str(tmp_path / "toy.safetensors")
  weights.write(path, params, toy.fields)
  return path, params


def test_its_file_is_described(toy, file):
  found = convert.describe(file[0])
  assert (found["format"], found["backbone"], found["image_size"]) == (
      "ttc_jax", NAME, SIZE)
  assert found["fields"] == {"slope": 0.1}


def test_its_file_loads_on_another_grid_and_patch(file, tmp_path):
  path, params = file
  _, same = backbones.load(NAME, path, SIZE)
  for name, value in trees.flatten(params).items():
    assert (trees.flatten(same)[name] == value).all(), name
  module, larger = backbones.load(NAME, path, 32)
  assert larger["places"].shape == (1, 64, 8)
  assert module.apply({"params": larger}, np.ones((1, 32, 32, 3))).shape == (
      1, 8)
  with pytest.raises(UserError, match="a toy of width 8, patch 4; toy_8_p8 has"
                     ".*backbone=toy_8_p4"):
    backbones.load("toy_8_p8", path, 32)
  convert.convert(path, other := str(tmp_path / "p8.safetensors"), patch=8)
  found = convert.describe(other)
  assert (found["backbone"], found["image_size"]) == ("toy_8_p8", 32)


def test_its_fields_are_checked(toy):
  for fields, words in (({"slope": 0.3}, "0.1 or 0.2"), ({}, "is missing"),
                        ({"slope": 0.1, "tilt": 1}, "unknown field 'tilt'")):
    with pytest.raises(UserError, match=words):
      formats.check_fields(fields, "a file", [
          f for f in backbones.families() if "slope" in f.FIELDS])
  with pytest.raises(UserError, match="toy_8_p4"):
    backbones.make("toy_8_q4", SIZE)


def test_ttc_takes_a_step_on_it(toy, file):
  """Scores are gradients of the mask, and the map's gradient is not 0."""
  config = default()
  config.k = 2
  method = methods.load("ttc", config, toy)
  _, backbone = backbones.load(NAME, file[0], SIZE)
  model = Model(toy, "half", method.handlers)
  params = {"backbone": backbone, "adapter": {},
            "head": jax.tree.map(np.asarray, init_head(8, CLASSES, 0))}
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)

  @jax.jit
  def loss(adapter, mask, buffers):
    logits = model.logits(params | {"adapter": adapter}, images, buffers,
                          mask=mask)
    return -jax.nn.log_softmax(logits)[:, 0].sum()
  ones = {"fc2": [np.ones(8, np.float32)] * 2}
  scores = jax.grad(loss, argnums=1)({}, ones, {})["fc2"]
  assert all(np.abs(score).max() > 0 for score in scores)
  buffers = {"fc2": {str(i): {
      "channels": np.argsort(-np.abs(score))[:2], "scale": np.float32(1)}
      for i, score in enumerate(scores)}}
  adapter = {"fc2": {str(i): {"kernel": np.zeros((2, 2), np.float32)}
                     for i in range(2)}}
  before, gradient = jax.value_and_grad(loss)(adapter, ones, buffers)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
  step = jax.tree.map(lambda a, g: a - 1e-3 * g, adapter, gradient)
  assert loss(step, ones, buffers) < before
