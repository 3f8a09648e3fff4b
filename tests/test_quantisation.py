"""Frozen kernels in bfloat16 and int8: their values, their bytes, and that all
else computes with them as with the float32 values that they stand for."""
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from tests.conftest import features
from tests.random_trees import random_params
from tests.test_methods import prepared
from tests.test_train import kill_after, make_job, run
from ttc_jax import (
  backbones,
  bundles,
  importance,
  methods,
  parallel,
  predict,
  quantisation,
  serve,
  trees,
)
from ttc_jax import config as config_lib
from ttc_jax.backbones import swin
from ttc_jax.backbones import vit as vit_lib
from ttc_jax.bench import programs
from ttc_jax.errors import UserError
from ttc_jax.model import Model
from ttc_jax.runs import inputs, plan

NARROW = ("bfloat16", "int8")
MAP = vit_lib.ViT(16, 2, 2, 32, 4, 8, pool="map", layer_scale=True)
SWIN = swin.Swin(16, (2, 2), 2, 32, window=4)


def stands_for(kernel, inputs, dtype):
  """The float32 values of a kernel kept in a dtype, in numpy."""
  if dtype == "bfloat16":
    return kernel.astype(ml_dtypes.bfloat16).astype(np.float32)
  rows = kernel.reshape(int(np.prod(kernel.shape[:inputs])), -1)
  scale = np.abs(rows).max(0) / np.float32(127)
  return (np.round(rows / scale) * scale).reshape(kernel.shape)


def whole(params, backbone, dtype):
  """The backbone's parameters with those values."""
  flat = trees.flatten(params)
  return trees.unflatten({
      n: stands_for(np.asarray(x), len(x.shape) - flat_outputs(n, x), dtype)
      if n.endswith("/kernel") else x for n, x in flat.items()})


def flat_outputs(name, kernel):
  """Number of output axes: heads and their width, of q, k and v."""
  return 2 if name.split("/")[-2] in ("query", "key", "value") else 1


def pair(params, vit, dtype):
  """(parameters kept in a dtype, those that they stand for)."""
  backbone = params["backbone"]
  return (params | {"backbone": quantisation.store(backbone, vit, dtype)},
          params | {"backbone": whole(backbone, vit, dtype)})


# --- The values ---------------------------------------------------------------

@pytest.mark.parametrize("shape, inputs", [
    ((7, 5), 1), ((6, 2, 3), 1), ((2, 3, 6), 2), ((4, 4, 3, 8), 3)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_int8_is_off_by_half_a_step_at_most(shape, inputs, size):
  rng = np.random.default_rng(0)
  kernel = (size * rng.standard_t(2, shape)).astype(np.float32)
  kernel[..., 0] = 0  # a channel without weights
  q, s = quantisation.quantise(kernel, inputs)
  assert (q.dtype, q.shape, s.dtype) == (np.int8, shape, np.float32)
  assert s.shape == shape[inputs:]
  w, q, s = (x.astype(np.float64) for x in (kernel, q, s))
  assert (np.abs(w - q * s) <= s / 2).all()  # exactly
  within = tuple(range(inputs))
  assert (np.abs(q).max(within)[..., 1:] == 127).all()
  assert (q[..., 0] == 0).all()


@pytest.mark.parametrize("backbone", [MAP, SWIN], ids=["map", "swin"])
@pytest.mark.parametrize("dtype", NARROW)
def test_every_kernel_is_kept_and_nothing_else(backbone, dtype):
  params = random_params(backbone)
  before = trees.flatten(params)
  kept = trees.flatten(quantisation.store(params, backbone, dtype))
  back = trees.flatten(quantisation.restore(trees.unflatten(kept)))
  assert back.keys() == before.keys()
  for name, x in before.items():
    if not name.endswith("/kernel"):
      assert kept[name] is x and back[name] is x, name
      continue
    assert kept[name].dtype == dtype and kept[name].shape == x.shape
    assert kept[name].nbytes == x.size * {"bfloat16": 2, "int8": 1}[dtype]
    outputs = x.ndim - flat_outputs(name, x)
    np.testing.assert_allclose(
        back[name], stands_for(x, outputs, dtype), rtol=1e-6, err_msg=name)


def test_float32_is_left_as_it_is(vit, params):
  backbone = params["backbone"]
  assert quantisation.store(backbone, vit, "float32") is backbone


# --- The computation ----------------------------------------------------------

def numpy_features(params, images, heads=2):
  """A ViT's features in numpy, from float32 kernels (Dosovitskiy et al.)."""
  flat = {name: np.asarray(x, np.float64)
          for name, x in trees.flatten(params).items()}

  def dense(x, path):
    bias = flat[f"{path}/bias"].reshape(-1)
    kernel = flat[f"{path}/kernel"].reshape(-1, bias.size)
    return x @ kernel + bias

  def norm(x, path):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
        x.var(-1, keepdims=True) + 1e-6)
    return x * flat[f"{path}/scale"] + flat[f"{path}/bias"]

  def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))

  B, p = len(images), 4
  x = (images / 255 - 0.5) / 0.5
  n = x.shape[1] // p
  x = x.reshape(B, n, p, n, p, 3).swapaxes(2, 3).reshape(B, n * n, -1)
  x = dense(x, "embedding") + flat["pos_embedding"]
  x = np.concatenate([np.repeat(flat["cls"], B, 0), x], 1)
  for i in range(3):
    block = f"Transformer/encoderblock_{i}"
    z = norm(x, f"{block}/LayerNorm_0")
    q, k, v = (dense(z, f"{block}/MultiHeadDotProductAttention_0/{part}")
               .reshape(B, -1, heads, 16 // heads).swapaxes(1, 2)
               for part in ("query", "key", "value"))
    scores = q @ k.swapaxes(2, 3) / np.sqrt(16 // heads)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ v
    y = y.swapaxes(1, 2).reshape(B, -1, 16)
    x = x + dense(y, f"{block}/MultiHeadDotProductAttention_0/out")
    z = norm(x, f"{block}/LayerNorm_1")
    h = gelu(dense(z, f"{block}/MlpBlock_0/Dense_0"))
    x = x + dense(h, f"{block}/MlpBlock_0/Dense_1")
  return norm(x, "Transformer/encoder_norm")[:, 0]


@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_features_are_numpy_s_with_the_values_that_are_kept(
    model, vit, params, split, dtype):
  kept = params | {
      "backbone": quantisation.store(params["backbone"], vit, dtype)}
  values = (params["backbone"] if dtype == "float32"
            else whole(params["backbone"], vit, dtype))
  np.testing.assert_allclose(
      features(model, kept, split.images, {}),
      numpy_features(values, split.images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", [MAP, SWIN], ids=["map", "swin"])
@pytest.mark.parametrize("dtype", NARROW)
def test_every_layer_of_other_backbones_reads_them(backbone, dtype):
  params = random_params(backbone)
  size = backbone.image_size
  images = np.random.default_rng(0).normal(size=(2, size, size, 3))
  kept, want = (jax.jit(backbone.apply)({"params": p}, images) for p in (
      quantisation.store(params, backbone, dtype),
      whole(params, backbone, dtype)))
  np.testing.assert_allclose(kept, want, rtol=1e-5, atol=1e-5)


def test_int8_costs_a_bfloat16_computation_no_more_than_its_rounding(
    model, vit, params, split):
  """All of q is exact in bfloat16, and s multiplies the float32 product."""
  half = model._replace(backbone=vit.clone(dtype=jnp.bfloat16))
  kept, want = pair(params, vit, "int8")
  exact = features(model, want, split.images, {})
  off, off_whole = (np.abs(features(half, p, split.images, {}) - exact).max()
                    for p in (kept, want))
  assert off < 2 * off_whole


def random_change(adapter):
  rng = np.random.default_rng(3)
  return jax.tree.map(
      lambda x: x + rng.normal(0, 0.1, x.shape).astype("f4"), adapter)


@pytest.mark.parametrize("dtype", NARROW[::-1])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.sweep(keep=2)
def test_gradients_are_those_of_the_values_that_are_kept(
    config, model, vit, params, split, dtype, remat):
  """Of norms, adapter and head, as stage 2 of TTC tunes them."""
  method, model, made, buffers = prepared(config, "ttc", model, params, split)
  params = params | {"adapter": random_change(made["adapter"])}
  model = model._replace(backbone=vit.clone(remat=remat))

  def gradient(params):
    labels = trees.label(params, method.stages[-1].rules)
    tuned, frozen = trees.split(params, labels, "tune")

    def loss(tuned):
      logits = model.logits(trees.join(tuned, frozen), split.images, buffers,
                            key=jax.random.key(0))
      return optax.softmax_cross_entropy_with_integer_labels(
          logits, split.labels).mean()
    return trees.flatten(jax.jit(jax.grad(loss))(tuned))
  kept, want = map(gradient, pair(params, vit, dtype))
  assert kept.keys() == want.keys()
  assert {n.split("/")[0] for n in kept} == {"backbone", "adapter", "head"}
  for name, value in want.items():
    np.testing.assert_allclose(kept[name], value, rtol=1e-4, atol=1e-6,
                               err_msg=name)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("score", sorted({*importance.SCORES} - {"random"}))
@pytest.mark.sweep(keep=3)
def test_scores_are_those_of_the_values_that_are_kept(
    model, vit, params, split, score, dtype):
  kept, want = (importance.score(
      score, model, parallel.replicate(p), {}, split.images, split.labels,
      ("fc2", "q")) for p in pair(params, vit, dtype))
  for site, blocks in want.items():
    for one, other in zip(kept[site], blocks, strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype, saved", [
    ("int8", 3), pytest.param("bfloat16", 2, marks=pytest.mark.slow)])
def test_products_widen_one_kernel_at_a_time(dtype, saved):
  """The compiled program has the narrow kernels alone: those of float32 come
  back nowhere, neither forward nor in an epoch (its loop, its gradients)."""
  backbone = vit_lib.ViT(64, 3, 2, 256, 8, 16)
  params = backbones.init(backbone)
  count = sum(site.inputs * site.width for sites in backbone.sites.values()
              for site in sites)

  def compiled(params):
    return (programs.forward(Model(backbone, "half"), params, 2, 1.0),
            programs.epoch(Model(backbone, "half"), methods.ALIGN, params, 2, 2,
                           1.0))
  for wide, narrow in zip(
      compiled(params), compiled(quantisation.store(params, backbone, dtype)),
      strict=True):
    devices = len(parallel.devices())
    less = (wide.argument_bytes - narrow.argument_bytes) / devices
    assert less == pytest.approx(saved * count, rel=0.02)
    # XLA of JAX 0.10 and 0.11 on CPU takes the barrier away, and widens all.
    if jax.__version_info__ >= (0, 12):
      assert narrow.temp_bytes - wide.temp_bytes < 0.3 * 4 * count * devices


# --- Training, merging --------------------------------------------------------

@pytest.mark.parametrize("name", sorted({*methods.names()} - {"full"}))
@pytest.mark.parametrize("dtype", NARROW[::-1])
@pytest.mark.sweep(keep=4)
def test_every_method_trains_and_leaves_the_kernels(
    config, model, vit, params, split, tmp_path, name, dtype):
  config.noah.update(population=4, generations=2, parents=2, mutations=1,
                     crossovers=1)
  kept, _ = pair(params, vit, dtype)
  outcome, flat = run(
      make_job(config, model, split, name, dict(epochs=1, warmup_epochs=0.0)),
      kept, tmp_path)
  assert np.isfinite(outcome.history[-1]["loss"])
  before = trees.flatten(kept)
  for leaf in (n for n in flat if n.endswith(("/kernel", "/kernel_scale"))
               and n.startswith("backbone/")):
    assert flat[leaf].dtype == before[leaf].dtype
    assert (flat[leaf] == before[leaf]).all(), leaf
  assert (flat["head/bias"] != 0).any()


def test_it_trains_as_the_values_that_are_kept(
    config, model, vit, params, split, tmp_path):
  losses = [[r["loss"] for r in run(
      make_job(config, model, split, "layernorm"), p, tmp_path / str(i)
      )[0].history] for i, p in enumerate(pair(params, vit, "int8"))]
  np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_killed_run_goes_on_to_the_same_bits(
    config, model, vit, params, split, tmp_path):
  kept, _ = pair(params, vit, "int8")
  job = make_job(config, model, split, "ttc", dict(save_seconds=0.0))
  _, want = run(job, kept, tmp_path / "whole")
  kill_after("adapt", 1, job, kept, tmp_path / "killed")
  _, found = run(job, kept, tmp_path / "killed")
  assert all((found[name] == x).all() for name, x in want.items())


@pytest.mark.parametrize("variant", [
    "ttc", "lora", "ssf", "layernorm", "sct/mlp"])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.sweep(keep=4)
def test_merged_equals_unmerged_and_other_kernels_stay(
    config, model, vit, params, split, variant, dtype):
  kept, _ = pair(params, vit, dtype)
  method, tuned, made, buffers = prepared(config, variant, model, params, split)
  kept |= {"adapter": random_change(made["adapter"])}
  merged = quantisation.merge(method.merge, kept, buffers, vit)
  np.testing.assert_allclose(
      features(model, kept | {"adapter": {}, "backbone": merged}, split.images,
               {}),
      features(tuned, kept, split.images, buffers), rtol=1e-4, atol=1e-4)
  before, after = map(trees.flatten, (kept["backbone"], merged))
  kernels = [n for n in after if n.endswith("/kernel")]
  changed = [n for n in kernels if after[n].dtype == np.float32]
  assert changed and all(
      after[n] is before[n] for n in kernels if n not in changed)
  scales = {n.removesuffix("_scale") for n in after if n.endswith("_scale")}
  assert scales == ({*kernels} - {*changed} if dtype == "int8" else set())


# --- What users say -----------------------------------------------------------

def settings(**values):
  config = config_lib.default()
  config.update(dict(weights="random", backbone="vit_ti16", image_size=32,
                     normalisation="half") | values)
  config_lib.check(config)
  return config


@pytest.fixture
def tiny(monkeypatch):
  monkeypatch.setitem(vit_lib.SIZES, "ti", (32, 2, 2, 64))


@pytest.mark.parametrize("dtype", NARROW)
def test_a_method_that_tunes_kernels_is_refused(tiny, dtype):
  config = settings(frozen_dtype=dtype, method="full")
  with pytest.raises(UserError, match=f"{dtype}, but full tunes kernels"):
    inputs.load_method(config, inputs.load_base(config))
  for method in {*methods.names()} - {"full"}:
    config.method = method
    inputs.load_method(config, inputs.load_base(config))


def test_an_unknown_dtype_names_the_known_ones():
  with pytest.raises(UserError, match="unknown frozen_dtype 'int4': did you"):
    settings(frozen_dtype="int4")
  with pytest.raises(UserError, match="frozen_dtype 'fp16'"):
    predict.base.frozen_dtype({}, "fp16")


def test_runs_of_float32_keep_their_names():
  assert "frozen_dtype" not in plan.common_keys(settings())
  named = plan.common_keys(settings(frozen_dtype="int8"))
  assert named["frozen_dtype"] == "int8"


@pytest.fixture
def tuned(tiny, tmp_path):
  """(weights, path of a bundle tuned on int8, images) and its result."""
  import ttc_jax
  from ttc_jax import weights
  module, source = backbones.make("vit_ti16", 32), str(
      tmp_path / "ti16.safetensors")
  weights.write(source, random_params(module), module.fields,
                normalisation="half")
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
  result = ttc_jax.fit(
      images, rng.integers(0, 3, 24), weights=source, image_size=32, epochs=1,
      batch_size=8, lr=1e-2, k=4, frozen_dtype="int8", progress=False)
  path = result.save(str(tmp_path / "bundle.safetensors"))
  return source, path, images, result


def test_a_bundle_says_its_storage_and_is_served_with_it_or_another(tuned):
  source, path, images, result = tuned
  assert bundles.load(path).meta["frozen_dtype"] == "int8"
  assert bundles.describe(bundles.load(path))["frozen_dtype"] == "int8"
  want = result.logits(images)

  def kernels(params):
    return {str(x.dtype) for n, x in trees.flatten(params["backbone"]).items()
            if n.endswith("/kernel")}
  same = predict.load(path, source, merge=False)
  assert kernels(same.params) == {"int8"}
  np.testing.assert_allclose(same.logits(images), want, rtol=1e-5, atol=1e-5)
  merged = predict.load(path, source)
  assert kernels(merged.params) == {"int8", "float32"}
  np.testing.assert_allclose(merged.logits(images), want, rtol=1e-3, atol=1e-3)
  other = predict.load(path, source, merge=False, frozen_dtype="float32")
  assert kernels(other.params) == {"float32"}
  assert np.abs(other.logits(images) - want).max() > 1e-4

  model = serve.load(source)
  model.add("pets", path)
  model.add("wide", path, merge=True)
  np.testing.assert_allclose(
      model.logits(images, "pets"), want, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(
      model.logits(images, "wide"), want, rtol=1e-3, atol=1e-3)
  both = model.logits(images, ["pets", "wide"] * 12)
  np.testing.assert_allclose(both, want, rtol=1e-3, atol=1e-3)
  wide = serve.load(source, frozen_dtype="float32")
  wide.add("pets", path)
  np.testing.assert_allclose(wide.logits(images, "pets"),
                             other.logits(images), rtol=1e-4, atol=1e-4)


def test_an_export_has_the_values_that_were_kept(tuned, tmp_path):
  source, _, images, result = tuned
  folder = result.export("bigvision", str(tmp_path / "out"))
  module, params = backbones.load(
      "vit_ti16", f"{folder}/model.npz", 32)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
  x = images.astype(np.float32) / 255 * 2 - 1
  np.testing.assert_allclose(
      module.apply({"params": params}, x), result.features(images),
      rtol=1e-3, atol=1e-3)


def test_what_is_tuned_is_never_narrow(tuned):
  _, path, *_ = tuned
  assert {x.dtype for x in bundles.load(path).tuned.values()} == {
      np.dtype("float32")}
