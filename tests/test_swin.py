"""Swin: against Hugging Face's, its files, its shapes, and every method."""
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.conftest import features, import_transformers, random_adapter
from tests.random_trees import random_params
from ttc_jax import (
  backbones,
  checkpoint,
  importance,
  methods,
  parallel,
  stores,
  train,
  trees,
)
from ttc_jax import model as model_lib
from ttc_jax import weights as weights_lib
from ttc_jax.backbones import swin
from ttc_jax.errors import UserError
from ttc_jax.tasks import Split

# Windows of 4 divide 32 px (grids of 8 and 4), and not 40 px (10 and 5).
TINY = dict(embed=16, depths=(2, 2), heads=2, window=4)
METHODS = ("full", "linear", "bias", "layernorm", "adapter", "lora", "ssf",
           "sct", "ttc")


def tiny(size=32, **more):
  return swin.Swin(**{**TINY, "image_size": size, **more})


def images(size, count=2, seed=0):
  return np.random.default_rng(seed).normal(
      size=(count, size, size, 3)).astype(np.float32)


# --- Against Hugging Face's ---------------------------------------------------

VARIANTS = {
    "window 7": dict(embed=16, depths=(2, 2, 2, 2), heads=2, window=7),
    "window 4": dict(embed=24, depths=(2, 2, 4, 2), heads=3, window=4),
}


def hugging_face(size, embed, depths, heads, window):
  torch = pytest.importorskip("torch")
  transformers = import_transformers()
  model = transformers.SwinModel(transformers.SwinConfig(
      image_size=size, embed_dim=embed, depths=list(depths),
      num_heads=[heads * 2 ** i for i in range(4)], window_size=window)).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      spread = 0.1 if p.ndim == 1 else (
          0.5 if "relative" in name else p[0].numel() ** -0.5)
      p.normal_(0, spread, generator=generator)
      if "norm" in name and name.endswith("weight"):
        p.add_(1)
  return model


# Grids of 7 * 2^k, and grids that the windows do not divide.
@pytest.mark.parametrize("variant, size", [
    ("window 7", 224), ("window 7", 288), ("window 4", 128),
    ("window 4", 160)])
@pytest.mark.sweep(keep=2)
def test_features_are_hugging_face_s(variant, size, tmp_path, monkeypatch):
  import torch
  fields = VARIANTS[variant]
  theirs = hugging_face(size, **fields)
  theirs.save_pretrained(tmp_path)
  monkeypatch.setitem(swin.SIZES, "b", (
      fields["embed"], fields["depths"], fields["heads"]))
  module, params = backbones.load(
      "swin_b", str(tmp_path / "model.safetensors"), size)
  assert module.window == fields["window"]
  assert module.pads == (size in (288, 160))
  x = images(size)
  got = jax.jit(module.apply)({"params": params}, x)
  with torch.no_grad():
    want = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).pooler_output.numpy()
  assert np.abs(want).max() > 0.5
  np.testing.assert_allclose(got, want, atol=1e-5)


# --- Files --------------------------------------------------------------------

PARTS = {"LayerNorm_0": "norm1", "LayerNorm_1": "norm2",
         "attention/out": "attn.proj", "mlp/Dense_0": "mlp.fc1",
         "mlp/Dense_1": "mlp.fc2"}


def fused(params, merged_before):
  """As timm (1) and the authors (0) name and lay out the parameters."""
  flat, out = trees.flatten(params), {}
  leaf_of = {"kernel": "weight", "scale": "weight", "bias": "bias"}

  def torch_layout(x, width):
    if x.ndim == 4:
      return x.transpose(3, 2, 0, 1)
    return x.reshape(-1, width).T if x.ndim > 1 else x

  for name, x in flat.items():
    stem, _, leaf = name.rpartition("/")
    block = re.match(r"stage_(\d+)_block_(\d+)/(.*)", stem)
    if block:
      s, i, part = block.groups()
      prefix = f"layers.{s}.blocks.{i}."
      D = 16 * 2 ** int(s)
      if part == "attention":
        out[prefix + "attn.relative_position_bias_table"] = x
      elif part == "attention/query":
        rows = [flat[f"{stem.replace('query', p)}/{leaf}"]
                for p in ("query", "key", "value")]
        out[f"{prefix}attn.qkv.{leaf_of[leaf]}"] = np.concatenate(
            [r.reshape(D, D).T if leaf == "kernel" else r.reshape(D)
             for r in rows])
      elif part in PARTS:
        out[f"{prefix}{PARTS[part]}.{leaf_of[leaf]}"] = torch_layout(
            x, 4 * D if part == "mlp/Dense_0" else D)
    elif merge := re.match(r"merge_(\d+)/(.*)", stem):
      s = int(merge[1]) + merged_before
      out[f"layers.{s}.downsample.{merge[2]}.{leaf_of[leaf]}"] = torch_layout(
          x, x.shape[-1])
    else:
      out[{"embedding": "patch_embed.proj", "embedding_norm":
           "patch_embed.norm", "norm": "norm"}[stem] + f".{leaf_of[leaf]}"] = (
               torch_layout(x, x.shape[-1]))
  out["head.fc.weight"] = np.zeros((3, 32), np.float32)
  out["layers.0.blocks.1.attn_mask"] = np.zeros((4, 16, 16), np.float32)
  return {k: np.ascontiguousarray(v) for k, v in out.items()}


@pytest.fixture
def named(monkeypatch):
  monkeypatch.setitem(swin.SIZES, "b", (16, (2, 2), 2))


@pytest.mark.parametrize("merged_before", [0, 1])
def test_timm_s_and_the_authors_files_give_every_parameter(
    named, merged_before, tmp_path):
  want = random_params(tiny())
  path = str(tmp_path / "w.safetensors")
  safetensors.numpy.save_file(fused(want, merged_before), path)
  module, got = backbones.load("swin_b", path, 32)
  assert module == tiny()
  flat = trees.flatten(got)
  for name, value in trees.flatten(want).items():
    np.testing.assert_array_equal(flat[name], value, err_msg=name)


def test_our_own_file_round_trips_with_its_window(named, tmp_path):
  module, path = tiny(), str(tmp_path / "w.safetensors")
  params = random_params(module)
  weights_lib.write(path, params, module.fields)
  again, got = backbones.load("swin_b", path, 96)
  assert again == tiny(96)
  assert all((a == b).all() for a, b in zip(
      jax.tree.leaves(got), jax.tree.leaves(params), strict=False))


def test_a_swin_file_is_no_vit_s_and_v2_is_refused(named, tmp_path):
  path = str(tmp_path / "w.safetensors")
  arrays = fused(random_params(tiny()), 1)
  safetensors.numpy.save_file(arrays, path)
  with pytest.raises(UserError, match="settles the field 'window', which vit_"):
    backbones.load("vit_ti16", path, 64)
  arrays["layers.0.blocks.0.attn.logit_scale"] = np.zeros((2, 1, 1), "f4")
  safetensors.numpy.save_file(arrays, path)
  with pytest.raises(UserError, match="the attention of Swin V2"):
    backbones.load("swin_b", path, 64)


# --- Shapes -------------------------------------------------------------------

def test_parameters_are_the_paper_s():
  """Liu et al., 2021, Table 1: 88M for Swin-B with 1000 classes."""
  count = trees.count(backbones.shapes(backbones.make("swin_b", 224)))
  assert count + 1024 * 1000 + 1000 == 87_768_224
  assert trees.count(
      backbones.shapes(backbones.make("swin_ti", 224))) == 27_519_354


def test_another_window_has_the_same_biases_where_they_are_even(tmp_path):
  """A table of slope: in a window twice as wide half the slope, but at its rim,
  where a resampling ends."""
  module, large = tiny(window=4), tiny(window=8)
  params = random_params(module)
  dy, dx = np.meshgrid(np.arange(-3, 4), np.arange(-3, 4), indexing="ij")
  def slope(name, x):
    if not name.endswith("relative_position_bias"):
      return x
    return np.repeat((dy + 3 * dx).reshape(-1, 1), x.shape[1], 1).astype("f4")
  params = trees.map_with_names(slope, params)
  path = str(tmp_path / "swin.safetensors")
  weights_lib.write(path, params, module.fields)
  found = trees.flatten(weights_lib.fit(
      weights_lib.read(path), backbones.shapes(large), "tiny"))
  table = found["stage_0_block_0/attention/relative_position_bias"]
  assert table.shape[0] == 15 ** 2
  table = table[:, 0].reshape(15, 15)[3:-3, 3:-3]
  dy, dx = np.meshgrid(np.arange(-4, 5), np.arange(-4, 5), indexing="ij")
  np.testing.assert_allclose(table, (dy + 3 * dx) * 7 / 15, atol=1e-3)
  again = trees.flatten(weights_lib.fit(
      weights_lib.read(path), backbones.shapes(module), "tiny"))
  assert all((again[n] == x).all() for n, x in trees.flatten(params).items())


def test_any_image_size_takes_the_same_parameters():
  params = random_params(tiny())
  for size in (4, 12, 60):
    y = jax.jit(tiny(size).apply)({"params": params}, images(size))
    assert y.shape == (2, 32) and np.isfinite(y).all()
  with pytest.raises(UserError, match="not divisible by the patch 4"):
    backbones.make("swin_b", 30)


def test_a_window_on_a_smaller_grid_is_the_grid():
  """16 px: grids of 4 and 2. Windows of 7 and tables cut to 4 agree."""
  large = tiny(16, window=7)
  params = random_params(large)

  def cut(name, x):
    if not name.endswith("relative_position_bias"):
      return x
    return x.reshape(13, 13, -1)[3:10, 3:10].reshape(49, -1)
  small = trees.map_with_names(cut, params)
  np.testing.assert_allclose(
      jax.jit(large.apply)({"params": params}, images(16)),
      jax.jit(tiny(16, window=4).apply)({"params": small}, images(16)),
      atol=1e-6)


def test_position_index_by_hand():
  index = swin.position_index(2, 3)  # a 5 x 5 table, its centre is row 12
  assert (np.diag(index) == 12).all()
  # From the key at (0, 0) to the query at (1, 1): one down, one right.
  assert index[3, 0] == 12 + 5 + 1 and index[0, 3] == 12 - 5 - 1
  assert index[1, 0] == 13 and index[2, 0] == 17


def test_a_shifted_window_keeps_apart_what_is_no_neighbour():
  """8 x 8 rolled by 2, windows of 4: which pairs meet across the edge."""
  mask = swin.shift_mask(8, 4, 2)
  side = (np.arange(8) + 2) % 8  # where each rolled row was
  at = np.stack(np.meshgrid(side, side, indexing="ij"), -1)
  at = np.asarray(swin.windows(at[None], 4))
  far = np.abs(at[:, :, None] - at[:, None, :]).max(-1) >= 4
  np.testing.assert_array_equal(mask < 0, far)


def test_every_parameter_has_its_block():
  module = tiny()
  flat = trees.flatten(backbones.shapes(module))
  blocks = {name: module.block_of(name) for name in flat}
  assert blocks["stage_1_block_1/mlp/Dense_0/bias"] == 3
  assert blocks["merge_0/reduction/kernel"] == 1
  assert blocks["embedding/kernel"] == blocks["embedding_norm/scale"] == -1
  assert blocks["norm/bias"] == module.depth == 4
  for site, layers in module.sites.items():
    for layer in layers:
      shape = flat[f"{layer.path}/kernel"].shape
      assert np.prod(shape) == layer.inputs * layer.width, site
  listed = {path for paths in module.norms.values() for path in paths}
  assert listed == {name.removesuffix("/scale") for name in flat
                    if name.endswith("/scale")}


@pytest.mark.slow
def test_features_from_a_block_s_tokens_are_the_features():
  module = tiny(40)
  params = {"backbone": random_params(module), "adapter": {}}
  model = model_lib.Model(module, "none")
  x = np.random.default_rng(0).integers(
      0, 256, (2, 40, 40, 3), dtype=np.uint8)
  want = features(model, params, x, {})
  for block in (1, 2, 3):
    tokens = model.tokens(params, x, {}, block)
    got = features(model._replace(start=block), params, tokens, {})
    np.testing.assert_allclose(got, want, atol=1e-5, err_msg=str(block))


# --- Scores and methods -------------------------------------------------------

def test_the_gradient_of_the_mask_is_eq_10_in_every_stage():
  """S_i = sum_j dL/dw_ij w_ij, by the kernels' own gradients."""
  module = tiny(40)
  params = {"backbone": random_params(module), "adapter": {},
            "head": model_lib.init_head(32, 3, 0)}
  rng = np.random.default_rng(0)
  data = Split(rng.integers(0, 256, (6, 40, 40, 3), dtype=np.uint8),
               rng.integers(0, 3, 6).astype(np.int32))
  model = model_lib.Model(module, "half")
  scores = importance.score("taylor", model, parallel.replicate(params), {},
                            *data, ("fc2", "proj", "q"))

  def loss(backbone):
    logits = model.logits(params | {"backbone": backbone}, data.images, {})
    return -jax.nn.log_softmax(logits)[np.arange(6), data.labels].sum()
  grads = trees.flatten(jax.jit(jax.grad(loss))(params["backbone"]))
  flat = trees.flatten(params["backbone"])
  for site, values in scores.items():
    for value, layer in zip(values, module.sites[site], strict=False):
      name = f"{layer.path}/kernel"
      want = (grads[name] * flat[name]).reshape(-1, layer.width).sum(0)
      np.testing.assert_allclose(value, want, rtol=2e-3, atol=2e-4)


def test_ttc_is_the_paper_s_on_swin_b(config):
  """K = 96 in the last half of stage 3 and all of stage 4: 11 maps."""
  module = backbones.make("swin_b", 224)
  config.k, config.score = module.default_k, "random"
  method = methods.load("ttc", config, module)
  adapter, _ = method.stages[1].prepare(methods.Context(
      model_lib.Model(module, "half"), {}, {}, None, None, 0))
  assert list(adapter["fc2"]) == [str(i) for i in range(13, 24)]
  assert trees.count(adapter) == 11 * 96 * 96


def steps(name, config, module, tmp_path):
  """A short run of a method; its job and outcome."""
  rng = np.random.default_rng(0)
  data = Split(rng.integers(0, 256, (16, 40, 40, 3), dtype=np.uint8),
               rng.integers(0, 3, 16).astype(np.int32))
  config.update(dict(batch_size=8, epochs=1, warmup_epochs=0.0, lr=1e-2,
                     weight_decay=0.0, eval_every=1, save_seconds=1e9))
  method = methods.load(name, config, module)
  job = train.Job(
      identity={"test": name}, config=config,
      model=model_lib.Model(module, "half"), method=method, train=data,
      val=data, holdout=None, classes=3, seed=0, report=lambda *_: None)
  base = random_params(module)
  return base, data, method, train.run(
      job, parallel.replicate(base),
      checkpoint.Stages(stores.open_store(tmp_path)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.sweep(keep=1)
def test_a_method_takes_steps_and_merges(name, config, tmp_path):
  module = tiny(40)
  base, data, method, outcome = steps(name, config, module, tmp_path)
  params = parallel.unreplicate(outcome.state.params)
  before, after = trees.flatten(base), trees.flatten(params["backbone"])
  tuned = trees.flatten(trees.label(
      {"backbone": base}, methods.tuned_rules(method)))
  for leaf, value in after.items():
    moved = (value != before[leaf]).any()
    assert moved <= (tuned[f"backbone/{leaf}"] == "tune"), leaf
  assert name in ("full", "linear", "bias", "layernorm") or params["adapter"]
  if method.merge:
    params["adapter"] = random_adapter(params["adapter"])
    buffers = parallel.unreplicate(outcome.state.buffers)
    want = features(outcome.model, params, data.images, buffers)
    merged = method.merge(params, buffers, module)
    got = features(model_lib.Model(module, "half"),
                   {"backbone": merged, "adapter": {}}, data.images, {})
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_layer_norms_merge_where_no_window_is_padded(config):
  assert methods.load("layernorm", config, tiny(40)).cannot_merge
  module = tiny(32)
  method = methods.load("layernorm", config, module)
  params = {"backbone": random_params(module), "adapter": {}}
  merged = method.merge(params, {}, module)
  x = images(32)
  np.testing.assert_allclose(
      jax.jit(module.apply)({"params": merged}, x),
      jax.jit(module.apply)({"params": params["backbone"]}, x),
      rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vpt_shallow", "vpt_deep", "noah"])
def test_prompts_are_refused(name, config):
  with pytest.raises(UserError, match="prompts are tokens beside the patches"):
    methods.load(name, config, tiny())


@pytest.mark.slow
def test_frozen_stages_run_once_and_give_the_same(config, tmp_path):
  """Stage 4's maps on cached tokens, against a drop-path of almost nothing."""
  config.blocks, config.tune_norm, config.stage1 = 2, False, "none"
  outcomes = []
  for rate in (0.0, 1e-9):
    module = tiny(40, drop_path=rate)
    *_, outcome = steps("ttc", config, module, tmp_path / str(rate))
    outcomes.append(parallel.unreplicate(outcome.state.params))
  one, two = map(trees.flatten, outcomes)
  for name, value in one.items():
    np.testing.assert_allclose(value, two[name], rtol=1e-2, atol=1e-4)
