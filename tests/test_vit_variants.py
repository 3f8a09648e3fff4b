"""The ViTs of other files: registers, attention pooling, norms elsewhere."""
import functools

import jax
import numpy as np
import pytest

from tests.conftest import (
  CLASSES,
  SIZE,
  WIDTH,
  features,
  numpy_tree,
  random_adapter,
)
from tests.random_trees import random_params
from tests.test_methods import prepared
from ttc_jax import backbones, optim, train, trees
from ttc_jax import model as model_lib
from ttc_jax.backbones import vit as vit_lib
from ttc_jax.methods import layernorm

FIELDS = {
    "registers": dict(registers=2),
    "gap": dict(pool="gap", registers=1, pool_norm=True, final_norm=False),
    "map": dict(pool="map", registers=1),
    "clip": dict(pre_norm=True, gelu="quick"),
    "dinov3": dict(registers=1, rope=100.0, layer_scale=True),
}


def tiny(name):
  return vit_lib.ViT(WIDTH, 2, 2, 32, 4, SIZE, **FIELDS[name])


def tuned_params(module):
  head = numpy_tree(model_lib.init_head(WIDTH, CLASSES, 0))
  return {"backbone": random_params(module), "adapter": {}, "head": head}


# --- Against formulas ---------------------------------------------------------

def norm(x, p):
  centred = x - x.mean(-1, keepdims=True)
  return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + (
      p["bias"])


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


def attention(q, x, p):
  """Flax's MultiHeadDotProductAttention of one image."""
  def project(x, p):
    return np.einsum("nd,dhe->nhe", x, p["kernel"]) + p["bias"]
  q, k, v = (project(y, p[name]) for y, name in (
      (q, "query"), (x, "key"), (x, "value")))
  scores = np.einsum("qhe,khe->hqk", q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  y = np.einsum("hqk,khe->qhe", weights, v)
  return np.einsum("qhe,hed->qd", y, p["out"]["kernel"]) + p["out"]["bias"]


def mlp(x, p):
  h = gelu(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
  return h @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


@pytest.mark.parametrize("pool", ["cls", "gap", "map"])
def test_big_vision_s_model_by_hand(pool):
  module = vit_lib.ViT(WIDTH, 2, 2, 32, 4, SIZE, pool=pool, gelu="tanh")
  params = random_params(module)
  image = np.random.default_rng(0).normal(size=(SIZE, SIZE, 3)).astype("f4")
  n = SIZE // 4
  x = np.stack([
      np.einsum("hwc,hwcd->d", image[4 * i:4 * i + 4, 4 * j:4 * j + 4],
                params["embedding"]["kernel"])
      for i in range(n) for j in range(n)]) + params["embedding"]["bias"]
  x = x + params["pos_embedding"][0]
  if pool == "cls":
    x = np.concatenate([params["cls"][0], x])
  for i in range(2):
    p = params["Transformer"][f"encoderblock_{i}"]
    y = norm(x, p["LayerNorm_0"])
    x = x + attention(y, y, p["MultiHeadDotProductAttention_0"])
    x = x + mlp(norm(x, p["LayerNorm_1"]), p["MlpBlock_0"])
  x = norm(x, params["Transformer"]["encoder_norm"])
  if pool == "map":
    p = params["MAPHead_0"]
    x = attention(p["probe"][0], x, p["MultiHeadDotProductAttention_0"])
    expected = (x + mlp(norm(x, p["LayerNorm_0"]), p["MlpBlock_0"]))[0]
  else:
    expected = x[0] if pool == "cls" else x.mean(0)
  got = jax.jit(module.apply)({"params": params}, image[None])[0]
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_register_that_nobody_reads_changes_nothing():
  """Every key of it far away from every query: no weight in the softmax."""
  plain = vit_lib.ViT(WIDTH, 2, 2, 32, 4, SIZE, pool="gap")
  more = plain.clone(registers=2)
  params = random_params(more)
  images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3))

  def hide(site, block, y, x):
    del block, x
    return y.at[..., :2].set(-1e9) if site == "scores" else y
  got = jax.jit(functools.partial(more.apply, tap=hide))(
      {"params": params}, images)
  alone = {n: x for n, x in params.items() if n != "registers"}
  np.testing.assert_allclose(
      got, jax.jit(plain.apply)({"params": alone}, images), rtol=1e-4,
      atol=1e-5)


# --- Laws ---------------------------------------------------------------------

@pytest.mark.parametrize("fields", FIELDS)
def test_the_parameters_that_it_names_are_there(fields):
  module = tiny(fields)
  flat = trees.flatten(backbones.shapes(module))
  for paths in module.norms.values():
    for path in paths:
      assert flat[f"{path}/scale"].shape == (WIDTH,)
  named = {path for paths in module.norms.values() for path in paths}
  assert named == {n.removesuffix("/scale") for n in flat
                   if n.endswith("/scale")}
  rules = (optim.NORM, optim.FREEZE)
  labels = trees.flatten(trees.label({"backbone": backbones.shapes(module)},
                                     rules))
  assert {n.removeprefix("backbone/").rpartition("/")[0]
          for n, label in labels.items() if label == "tune"} == named


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.sweep(keep=2)
def test_features_from_a_block_s_tokens_are_the_features(fields):
  module = tiny(fields)
  params = random_params(module)
  images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3))
  seen = {}

  def keep(site, block, y, x):
    del x
    if site == "input":
      seen[block] = y
    return y
  full = module.apply({"params": params}, images, tap=keep)
  np.testing.assert_array_equal(
      module.apply({"params": params}, seen[1], start=1), full)
  assert train.frozen_blocks(module, {"backbone": params, "head": {}}, (
      ("backbone/(MAPHead_0|pool_norm|Transformer/encoder_norm).*", "tune"),
      optim.FREEZE)) == 1


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("variant", [
    "ssf", "ttc", "sct/qv"])
@pytest.mark.sweep(keep=3)
def test_methods_merge_exactly(config, split, fields, variant):
  module = tiny(fields)
  params, model = tuned_params(module), model_lib.Model(module, "half")
  method, tuned, new, buffers = prepared(
      config, variant, model, params, split)
  new["adapter"] = random_adapter(new["adapter"])
  unmerged = features(tuned, new, split.images, buffers)
  plain = features(model, params, split.images, {})
  assert np.abs(unmerged - plain).max() > .01
  merged = method.merge(numpy_tree(new), buffers, module)
  np.testing.assert_allclose(
      features(model, {"backbone": merged, "adapter": {}}, split.images, {}),
      unmerged, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("fields", FIELDS)
def test_norms_fold(split, fields):
  module = tiny(fields)
  params, model = tuned_params(module), model_lib.Model(module, "half")
  folded = layernorm.merge(params, {}, module)
  np.testing.assert_allclose(
      features(model, {"backbone": folded, "adapter": {}}, split.images, {}),
      features(model, params, split.images, {}), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("variant", ["vpt_shallow", "vpt_deep"])
@pytest.mark.sweep(keep=4)
def test_prompts_stand_between_registers_and_patches(
    config, split, fields, variant):
  """Prompts that no query looks at change nothing."""
  module = tiny(fields)
  params, model = tuned_params(module), model_lib.Model(module, "half")
  _, tuned, new, buffers = prepared(config, variant, model, params, split)
  first, last = module.prefix, module.prefix + config.vpt.prompts

  def hide(site, block, y, x):
    del block, x
    return y.at[..., first:last].set(-1e9) if site == "scores" else y
  got = features(tuned, new, split.images, buffers, extra_tap=hide)
  np.testing.assert_allclose(
      got, features(model, params, split.images, {}), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", ["map", "clip"])
def test_the_gradient_of_the_mask_is_eq_10(fields):
  """sum of theta dL/dtheta over a row, in every layer."""
  module = tiny(fields)
  params = random_params(module)
  images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3))
  mask = {site: np.ones((len(layers), layers[0].width), np.float32)
          for site, layers in module.sites.items()}

  def loss(mask, params):
    return (module.apply({"params": params}, images, mask=mask) ** 2).sum()
  of_mask, of_params = jax.jit(jax.grad(loss, (0, 1)))(mask, params)
  flat, grads = trees.flatten(params), trees.flatten(of_params)
  for site, layers in module.sites.items():
    for i, layer in enumerate(layers):
      name = f"{layer.path}/kernel"
      expected = (flat[name] * grads[name]).reshape(-1, layer.width).sum(0)
      np.testing.assert_allclose(of_mask[site][i], expected, rtol=1e-3,
                                 atol=1e-3, err_msg=f"{site} {i}")
