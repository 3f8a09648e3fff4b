"""A third family of backbones is one file: made, written, inspected, loaded
and tuned, with no line changed elsewhere."""
import importlib
import sys

import jax
import numpy as np
import pytest

from tests.command import ROOT
from tests.random_trees import random_params
from ttc_jax import backbones, methods, taps, trees, weights
from ttc_jax.config import default
from ttc_jax.errors import UserError
from ttc_jax.model import Model, init_head
from ttc_jax.weights import convert, formats

# The documentation's example.
FILE = ROOT / "docs" / "examples" / "backbones" / "toy.py"
NAME, SIZE, CLASSES = "toy_8_p4", 16, 3


@pytest.fixture
def toy(monkeypatch):
  monkeypatch.setattr(backbones, "__path__",
                      [*backbones.__path__, str(FILE.parent)])
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


def test_it_goes_on_from_the_tokens_of_a_block(toy, file):
  params, tokens = {"params": file[1]}, {}
  images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3))
  want = toy.apply(params, images, tap=taps.record(("input",), tokens))
  found = toy.apply(params, tokens["input", 1], start=1)
  np.testing.assert_allclose(found, want, rtol=1e-6)


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
