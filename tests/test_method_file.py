"""A method is one new file; its options resolve to themselves."""
import json

import ml_collections
import numpy as np
import pytest

from tests.test_train import make_job, run
from ttc_jax import backbones, methods, trees
from ttc_jax.config import default
from ttc_jax.errors import UserError

TOY = '''
"""Scale (a test, 2026): a factor on every channel of the MLP's output."""
import numpy as np

from ttc_jax.methods import TUNE_ADAPTER, Method, Stage


def scale(p, y, x):
  return y * p["factor"]


def prepare(context):
  layers = context.model.backbone.sites["fc2"]
  return {"fc2": {str(i): {"factor": np.ones(layer.width, np.float32)}
                  for i, layer in enumerate(layers)}}, {}


def make(config, backbone):
  return Method((Stage("scale", TUNE_ADAPTER, prepare),),
                handlers=(("fc2", scale),), cannot_merge="it is a toy")
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
  (tmp_path / "toy.py").write_text(TOY)
  monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])


def test_a_new_file_is_a_method_that_trains(
    toy, config, model, params, split, tmp_path):
  assert "toy" in methods.names()
  assert methods.described("toy") == (
      "a test, 2026", "a factor on every channel of the MLP's output.")
  assert methods.options_of("toy") == ()
  job = make_job(config, model, split, "toy")
  outcome, flat = run(job, params, tmp_path / "run")
  assert len(outcome.history) == job.config.epochs
  for name, leaf in flat.items():
    if name.startswith("adapter/"):
      assert (leaf != 1).any(), name
    elif name.startswith("backbone/"):
      before = trees.flatten(params)[name]
      np.testing.assert_array_equal(leaf, before)
  assert sum(name.startswith("adapter/") for name in flat) == 3


def test_the_file_s_docstring_is_the_documentation(tmp_path, monkeypatch):
  (tmp_path / "silent.py").write_text("def make(config, backbone): ...")
  monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
  with pytest.raises(ValueError, match="silent.py: its docstring"):
    methods.described("silent")


# --- Options ------------------------------------------------------------------

@pytest.mark.parametrize("name", methods.names())
def test_options_are_json_and_resolve_to_themselves(name):
  """A bundle makes its method again from nothing else."""
  vit = backbones.make("vit_b16", 224)
  made = methods.load(name, default(), vit)
  assert set(made.options) == (
      set(methods.options_of(name)) - methods.ADDED.keys())
  options = json.loads(json.dumps(made.options, allow_nan=False))
  assert options == made.options  # no tuples, which JSON does not have
  again = methods.load(name, ml_collections.ConfigDict(options), vit)
  assert (again.options, again.handlers) == (made.options, made.handlers)
  assert [s[:2] for s in again.stages] == [s[:2] for s in made.stages]


@pytest.mark.parametrize("name, backbone, key, value", [
    ("ttc", "vit_b16", "k", 96), ("ttc", "vit_b16", "blocks", 12),
    ("ttc", "swin_b", "k", 96), ("ttc", "swin_b", "blocks", 11),
    ("sct", "vit_b16", "k", 96),
    ("adapter", "vit_b16", "adapter.scale", 0.1),
    ("noah", "vit_b16", "noah.budget", 543_840 // 2)])
def test_defaults_that_depend_on_the_backbone_are_resolved(
    name, backbone, key, value):
  """k = 0 and k = 96 are one run."""
  module = backbones.make(backbone, 224)
  one = methods.load(name, default(), module)
  config = default()
  config.update_from_flattened_dict({key: value})
  section, _, leaf = key.rpartition(".")
  assert (one.options[section] if section else one.options)[leaf] == value
  assert one.options == methods.load(name, config, module).options


def test_a_k_that_does_not_fit_says_what_does():
  with pytest.raises(UserError, match="give 1 to 768, or 0 for the paper's"):
    config = default()
    config.k = 769
    methods.load("ttc", config, backbones.make("vit_b16", 224))
