"""Files of every format, whole and broken; and where they come from.

The same tiny random ViT is written by the tests' own hand in each format.
That the features are right is `test_vit.py`'s matter.
"""
import functools
import hashlib
import http.server
import json
import os
import re
import struct
import sys
import threading
import tracemalloc
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from ttc_jax import backbones, trees, weights
from ttc_jax.backbones import vit
from ttc_jax.config import default
from ttc_jax.errors import UserError
from ttc_jax.runs import inputs
from ttc_jax.weights import (
  containers,
  formats,
  released,
  resampling,
  sources,
)

D, L, H, F, P, S = 8, 2, 2, 16, 4, 16


def tiny(**fields):
  return vit.ViT(D, L, H, F, P, S, **fields)


@functools.cache
def _params(module):
  rng = np.random.default_rng(0)
  return {n: rng.normal(size=s.shape).astype(np.float32)
          for n, s in trees.flatten(backbones.shapes(module)).items()}


def flat_params(**fields):
  return {n: v.copy() for n, v in _params(tiny(**fields)).items()}


def as_timm(flat):
  """Our parameters -> timm's tensors."""
  of_cls = np.zeros((1, int("cls" in flat), D), np.float32)
  out = {"pos_embed": np.concatenate([of_cls, flat["pos_embedding"]], 1)}
  if "cls" in flat:
    out["cls_token"] = flat["cls"]
  out["patch_embed.proj.weight"] = np.einsum(
      "hwio->oihw", flat["embedding/kernel"])
  out["patch_embed.proj.bias"] = flat["embedding/bias"]
  for i in range(L):
    block, theirs = f"Transformer/encoderblock_{i}", f"blocks.{i}"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    for j in range(2):
      norm, dense = f"{block}/LayerNorm_{j}", f"{block}/MlpBlock_0/Dense_{j}"
      out[f"{theirs}.norm{j + 1}.weight"] = flat[f"{norm}/scale"]
      out[f"{theirs}.norm{j + 1}.bias"] = flat[f"{norm}/bias"]
      out[f"{theirs}.mlp.fc{j + 1}.weight"] = flat[f"{dense}/kernel"].T
      out[f"{theirs}.mlp.fc{j + 1}.bias"] = flat[f"{dense}/bias"]
      if f"{block}/layer_scale_{j}" in flat:
        out[f"{theirs}.ls{j + 1}.gamma"] = flat[f"{block}/layer_scale_{j}"]
    qkv = [f"{attention}/{x}" for x in ("query", "key", "value")]
    out[f"{theirs}.attn.qkv.weight"] = np.concatenate(
        [flat[f"{x}/kernel"].reshape(D, D).T for x in qkv])
    out[f"{theirs}.attn.qkv.bias"] = np.concatenate(
        [flat[f"{x}/bias"].reshape(D) for x in qkv])
    out[f"{theirs}.attn.proj.weight"] = (
        flat[f"{attention}/out/kernel"].reshape(D, D).T)
    out[f"{theirs}.attn.proj.bias"] = flat[f"{attention}/out/bias"]
  if "Transformer/encoder_norm/scale" in flat:
    out["norm.weight"] = flat["Transformer/encoder_norm/scale"]
    out["norm.bias"] = flat["Transformer/encoder_norm/bias"]
  return {n: np.ascontiguousarray(v) for n, v in out.items()}


def as_vision_transformer(flat):
  """Our parameters -> the names of ViT-B_16.npz."""
  out = {}
  for name, value in flat.items():
    name = name.replace("LayerNorm_1", "LayerNorm_2")
    name = name.replace("Attention_0", "Attention_1")
    out[name.replace("MlpBlock_0", "MlpBlock_3")] = value
  position = np.concatenate(
      [np.ones((1, 1, D), np.float32), out.pop("pos_embedding")], 1)
  out["Transformer/posembed_input/pos_embedding"] = position
  out["cls"] = out["cls"] - 1
  return out | {"head/kernel": np.zeros((D, 3)), "head/bias": np.zeros(3),
                "pre_logits/kernel": np.zeros((D, D)),
                "pre_logits/bias": np.zeros(D)}


def save(path, tensors, metadata=None):
  path = str(path)
  if path.endswith(".npz"):
    np.savez(path, **tensors)
  else:
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
  return path


def fit(path, **fields):
  file = weights.read(path)
  module = tiny(**(file.fields | fields))
  return trees.flatten(weights.fit(file, backbones.shapes(module), "vit_x4"))


def check_equal(found, flat, atol=1e-6):
  assert list(found) == list(flat)
  for name, value in flat.items():
    assert found[name].dtype == np.float32
    np.testing.assert_allclose(found[name], value, atol=atol, err_msg=name)


def test_the_same_content_gives_the_same_bytes(tmp_path):
  """safetensors writes metadata in an order that changes from call to call."""
  tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3),
             "a": np.ones(3, np.float16), "none": np.zeros((0, 2), np.int8)}
  metadata = {key: f"{key} \u00e4 \"" for key in "zyxwvut"}
  path = tmp_path / "x.safetensors"
  contents = set()
  for order in (metadata, dict(sorted(metadata.items()))) * 8:
    containers.write_safetensors(str(path), tensors, order)
    contents.add(path.read_bytes())
  assert len(contents) == 1
  with safetensors.safe_open(path, "numpy") as file:
    assert file.metadata() == metadata
    for name, value in tensors.items():
      found = file.get_tensor(name)
      assert found.dtype == value.dtype
      np.testing.assert_array_equal(found, value)


def check_error(path, *words):
  with pytest.raises(UserError) as caught:
    fit(path)
  for word in (os.path.basename(path), *words):
    assert word in str(caught.value), str(caught.value)
  assert "\n" not in str(caught.value)


# --- Whole files --------------------------------------------------------------

@pytest.mark.parametrize("fields", [
    {}, {"pool": "gap"}, {"layer_scale": True}, {"final_norm": False}])
def test_timm(tmp_path, fields):
  flat = flat_params(**fields)
  file = as_timm(flat) | {"head.weight": np.zeros((3, D), np.float32),
                          "head.bias": np.zeros(3, np.float32),
                          "mask_token": np.zeros((1, D), np.float32)}
  path = save(tmp_path / "timm.safetensors", file)
  read = weights.read(path)
  assert read.format.name == "timm"
  assert read.fields == {
      "gelu": "exact", "epsilon": 1e-6, "pool": "cls", "final_norm": True,
      "layer_scale": False, "registers": 0, "rope": 0.0, "pre_norm": False,
      "pool_norm": False} | fields
  check_equal(fit(path), flat)


def test_timm_without_a_position_of_the_class_token(tmp_path):
  flat = flat_params()
  file = as_timm(flat)
  file["pos_embed"] = file["pos_embed"][:, 1:].copy()
  path = save(tmp_path / "t.safetensors", file)
  check_error(path, "pos_embed", "no square grid", "config.json")
  put_config(tmp_path, architecture="deit3_small_patch16_224",
             pretrained_cfg={"input_size": [3, S, S]})
  check_equal(fit(path), flat)


# As 16 = 4 x 4 positions: 3 x 5 patches and a class token.
@pytest.mark.parametrize("sides", [(3, 5), (2, 5), (14, 16)])
def test_a_grid_that_is_not_square(tmp_path, sides):
  rows, columns = sides
  shape = (1, 1 + rows * columns, D)
  file = as_timm(flat_params()) | {"pos_embed": np.ones(shape, np.float32)}
  path = save(tmp_path / "t.safetensors", file)
  check_error(path, "pos_embed", str(shape))
  put_config(tmp_path, architecture="vit_x", pretrained_cfg={
      "input_size": [3, P * rows, P * columns]})
  check_error(path, f"a grid of {rows} x {columns} patches")
  put_config(tmp_path, architecture="vit_x", pretrained_cfg={
      "input_size": [3, S, S]})
  if rows * columns != 15:
    check_error(path, "states images of 16 x 16 px, which are 4 x 4 patches")


def put_config(folder, name="config.json", **config):
  (folder / name).write_text(json.dumps(config))


@pytest.mark.parametrize("dtype, atol", [
    ("float16", 3e-3), ("bfloat16", 3e-2), ("float64", 1e-6)])
def test_timm_in_other_precisions(tmp_path, dtype, atol):
  flat = flat_params()
  file = {n: v.astype(dtype) for n, v in as_timm(flat).items()}
  check_equal(fit(save(tmp_path / "t.safetensors", file)), flat, atol)


@pytest.mark.parametrize("root", [
    "", "params/", "opt/target/", "target/", "img/", "params/img/"])
def test_vision_transformer_old_naming(tmp_path, root):
  flat = flat_params()
  file = {root + n: v for n, v in as_vision_transformer(flat).items()}
  if root:  # What stands beside the tree is not ours.
    file |= {"opt/state/step": np.int64(3), "txt/Encoder_0/kernel": np.ones(3),
             "extra/note": np.array("text")}
  path = save(tmp_path / "ViT.npz", file)
  read = weights.read(path)
  assert (read.format.name, read.fields["gelu"]) == ("bigvision", "tanh")
  check_equal(fit(path), flat)


@pytest.mark.parametrize("place", ["", "Transformer/"])
@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_big_vision_new_naming(tmp_path, place, pool):
  flat = flat_params(pool=pool)
  file = dict(flat)
  file[place + "pos_embedding"] = file.pop("pos_embedding")
  check_equal(fit(save(tmp_path / "bv.npz", file)), flat)


def test_big_vision_bfloat16_is_stored_as_void(tmp_path):
  flat = flat_params()
  path = save(tmp_path / "bv.npz", {
      n: v.astype(ml_dtypes.bfloat16).view("V2") for n, v in flat.items()})
  check_equal(fit(path), flat, atol=3e-2)


def test_compressed_npz(tmp_path):
  np.savez_compressed(tmp_path / "bv.npz", **flat_params())
  check_equal(fit(str(tmp_path / "bv.npz")), flat_params())


@pytest.mark.parametrize("dtype, atol", [
    ("float32", 0), ("float16", 3e-3), ("bfloat16", 3e-2)])
def test_our_own_round_trip(tmp_path, dtype, atol):
  fields = {"gelu": "exact", "epsilon": 1e-5, "pool": "gap",
            "layer_scale": True, "final_norm": False}
  flat = flat_params(pool="gap", layer_scale=True, final_norm=False)
  path = str(tmp_path / "own.safetensors")
  weights.write(path, trees.unflatten(flat), fields, dtype)
  assert weights.read(path).fields == fields
  check_equal(fit(path), flat, atol)
  assert os.listdir(tmp_path) == ["own.safetensors"]


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
  path = str(tmp_path / "own.safetensors")
  fields = {"gelu": "exact", "epsilon": 1e-6}
  weights.write(path, trees.unflatten(flat_params()), fields)
  before = weights.sha256(path)

  def full_disk(flat, metadata):
    raise OSError("No space left on device")
  monkeypatch.setattr(safetensors.numpy, "save", full_disk)
  with pytest.raises(OSError, match="space"):
    weights.write(path, trees.unflatten(flat_params()), fields)
  assert weights.sha256(path) == before
  assert os.listdir(tmp_path) == ["own.safetensors"]


def test_write_refuses_what_does_not_fit(tmp_path):
  flat = flat_params() | {"cls": np.full((1, 1, D), 1e5, np.float32)}
  path = str(tmp_path / "own.safetensors")
  fields = {"gelu": "exact", "epsilon": 1e-6}
  with pytest.raises(UserError, match="'cls' is not finite as float16"):
    weights.write(path, trees.unflatten(flat), fields, "float16")
  with pytest.raises(UserError, match="unknown field 'windows'"):
    weights.write(path, trees.unflatten(flat), fields | {"windows": 7})


def test_load_takes_the_variant_from_the_file(tmp_path, monkeypatch):
  monkeypatch.setitem(vit.SIZES, "ti", (D, L, H, F))
  flat = flat_params(layer_scale=True)
  path = save(tmp_path / "t.safetensors", as_timm(flat))
  module, params = backbones.load("vit_ti4", path, 16)
  assert module == tiny(gelu="exact", layer_scale=True)
  check_equal(trees.flatten(params), flat)
  module, params = backbones.load("vit_ti4", path, 24, gelu="tanh")
  assert (module.gelu, module.image_size) == ("tanh", 24)
  assert params["pos_embedding"].shape == (1, 36, D)


def test_sha256(tmp_path):
  path = tmp_path / "file"
  path.write_bytes(b"abc" * 10**6)
  expected = hashlib.sha256(b"abc" * 10**6).hexdigest()
  assert weights.sha256(str(path)) == expected


# --- Position embeddings ------------------------------------------------------

def test_positions_stay_on_their_grid_and_keep_constants():
  position = np.random.default_rng(0).normal(size=(1, 16, 3)).astype("f4")
  assert resampling.resize_positions(position, 16) is position
  constant = np.full((1, 16, 3), 2.5, np.float32)
  for tokens in (1, 4, 25, 81):
    resized = resampling.resize_positions(constant, tokens)
    assert resized.shape == (1, tokens, 3)
    np.testing.assert_allclose(resized, 2.5, rtol=1e-6)


def test_positions_keep_their_axes():
  rows, columns = np.mgrid[:4, :4]
  position = np.stack([rows, columns], -1).reshape(1, 16, 2).astype("f4")
  resized = resampling.resize_positions(position, 64).reshape(8, 8, 2)
  assert (np.diff(resized[..., 0], axis=0)[1:-1] > 0.2).all()
  np.testing.assert_allclose(np.diff(resized[..., 0], axis=1), 0, atol=1e-5)
  np.testing.assert_allclose(resized[..., 1], resized[..., 0].T, atol=1e-5)


# --- The wrong file -----------------------------------------------------------

def test_a_missing_file(tmp_path):
  check_error(str(tmp_path / "none.npz"), "does not exist")
  with pytest.raises(UserError, match="does not exist"):
    backbones.load("vit_s16", str(tmp_path / "none.npz"), 32)


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_an_unknown_format(tmp_path, name):
  check_error(save(tmp_path / name, {"layer1.conv": np.zeros(2, "f4")}),
              "no known format", "layer1.conv")
  (tmp_path / "config.json").write_text('{"model_type": "hiera"}')
  check_error(str(tmp_path / name), "config.json beside it is of a 'hiera'")


@pytest.mark.parametrize("missing", [
    "blocks.1.attn.qkv.weight", "blocks.0.norm2.bias", "pos_embed",
    "patch_embed.proj.bias", "norm.bias"])
def test_a_missing_timm_tensor_is_named(tmp_path, missing):
  file = as_timm(flat_params())
  del file[missing]
  check_error(save(tmp_path / "t.safetensors", file), "lacks", missing)


@pytest.mark.parametrize("missing", [
    "Transformer/encoder_norm/scale", "embedding/kernel",
    "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel", "pos_embedding"])
def test_a_missing_big_vision_tensor_is_named(tmp_path, missing):
  file = flat_params()
  del file[missing]
  check_error(save(tmp_path / "bv.npz", file), "lacks", missing)


@pytest.mark.parametrize("name, what", [
    ("blocks.0.gamma_1", "EVA"),
    ("blocks.0.attn.q_norm.weight", "norms of queries"),
    ("blocks.0.attn.rel_pos.mlp.fc1.bias", "relative positions"),
    ("shared_rel_pos.mlp.fc1.bias", "relative positions"),
    ("blocks.1.mlp.w12.weight", "gated"),
    ("blocks.0.something.weight", "no place")])
def test_other_timm_architectures_are_refused(tmp_path, name, what):
  file = as_timm(flat_params()) | {name: np.zeros(D, np.float32)}
  check_error(save(tmp_path / "t.safetensors", file), name, what)


def test_registers_that_pooling_may_read_are_in_doubt(tmp_path):
  """timm's pool_include_prefix shows in no tensor."""
  file = {n: x for n, x in as_timm(flat_params()).items() if n != "cls_token"}
  file |= {"reg_token": np.zeros((1, 1, D), np.float32),
           "attn_pool.latent": np.zeros((1, 1, D), np.float32)}
  path = save(tmp_path / "model.safetensors", file)
  assert weights.read(path).fields["pool"] is None
  config = tmp_path / "config.json"
  config.write_text('{"architecture": "vit_base", "global_pool": "map"}')
  assert weights.read(path).fields["pool"] == "map"
  config.write_text('{"architecture": "test_vit3", "global_pool": "map"}')
  with pytest.raises(UserError, match="pooling reads its registers"):
    weights.read(path)


@pytest.mark.parametrize("name, what", [
    ("conv_root/kernel", "ResNet"),
    ("Transformer/encoderblock_0/something/bias", "no place")])
def test_other_big_vision_architectures_are_refused(tmp_path, name, what):
  check_error(save(tmp_path / "bv.npz", flat_params() | {name: np.zeros(D)}),
              name, what)


BLOCK = "Transformer/encoderblock_0"


@pytest.mark.parametrize("name", [
    f"{BLOCK}/MultiHeadDotProductAttention_0/query/kernel",  # (8, 2, 4)
    f"{BLOCK}/MultiHeadDotProductAttention_0/value/bias",    # (2, 4)
    f"{BLOCK}/MultiHeadDotProductAttention_0/out/kernel",    # (2, 4, 8)
    f"{BLOCK}/MlpBlock_0/Dense_1/kernel", "embedding/kernel"])
def test_the_same_number_of_values_is_not_the_same_shape(tmp_path, name):
  file = flat_params()
  file[name] = file[name].T.copy()
  check_error(save(tmp_path / "bv.npz", file), name.split("/")[-2])


@pytest.mark.parametrize("name", [
    "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight",
    "patch_embed.proj.weight", "blocks.0.attn.qkv.bias"])
def test_a_wrong_timm_shape_is_an_error(tmp_path, name):
  for change in (lambda x: x.T.copy() if x.ndim > 1 else x[:-1].copy(),
                 lambda x: x.reshape(-1), lambda x: x[None].copy(),
                 lambda x: np.ones((), np.float32), lambda x: x[:0].copy()):
    file = as_timm(flat_params())
    file[name] = change(file[name])
    if file[name].shape != as_timm(flat_params())[name].shape:
      check_error(save(tmp_path / "t.safetensors", file), name)


def test_shapes_beyond_numpy():
  tensors = {"cls": weights.Tensor((2 ** 40, 2 ** 40), "<f4", None)} | {
      n: weights.Tensor(v.shape, "<f4", lambda v=v: v)
      for n, v in flat_params().items() if n != "cls"}
  file = weights.Weights("x.npz", formats.BIGVISION, {}, tensors)
  with pytest.raises(UserError, match="x.npz"):
    weights.fit(file, backbones.shapes(tiny()), "vit_x4")


def test_heads_are_compared(tmp_path):
  file = flat_params()
  for name, value in file.items():
    if "Attention_0" in name:
      shape = [{2: 4, 4: 2}.get(n, n) for n in value.shape]
      file[name] = value.reshape(shape)
  check_error(save(tmp_path / "bv.npz", file), "heads 4", "heads 2")


@pytest.mark.parametrize("shape", [(1, 15, D), (1, 18, D), (16, D), (2, 16, D),
                                   (1, 16, D + 1), (1, 0, D), (1,)])
def test_positions_on_no_square_grid(tmp_path, shape):
  file = flat_params() | {"pos_embedding": np.zeros(shape, np.float32)}
  check_error(save(tmp_path / "bv.npz", file), "pos_embedding", str(shape))


def test_a_class_position_without_a_class_token(tmp_path):
  file = as_timm(flat_params())
  del file["cls_token"]
  check_error(save(tmp_path / "t.safetensors", file), "pos_embed")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(tmp_path, value):
  for container, file in (("t.safetensors", as_timm(flat_params())),
                          ("bv.npz", flat_params())):
    name = sorted(file)[3]
    file[name].flat[-1] = value
    check_error(save(tmp_path / container, file), name, "not finite")


def test_a_float64_too_large_for_float32(tmp_path):
  file = flat_params() | {"cls": np.full((1, 1, D), 1e300)}
  check_error(save(tmp_path / "bv.npz", file), "cls", "not finite")


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "int16"])
def test_integers_are_no_weights(tmp_path, dtype):
  file = as_timm(flat_params())
  file["norm.bias"] = file["norm.bias"].astype(dtype)
  check_error(save(tmp_path / "t.safetensors", file), "norm.bias", "type")
  file = flat_params()
  file["cls"] = file["cls"].astype(dtype)
  check_error(save(tmp_path / "bv.npz", file), "cls", "type")


@pytest.mark.parametrize("name, own, advice", [
    ("vit_s14", (768, 12, 12, 3072, 16), "use backbone=vit_b16"),
    ("vit_s16", (384, 12, 6, 1536, 14), "use backbone=vit_s14"),
    ("vit_l16", (384, 12, 6, 1536, 16), "use backbone=vit_s16"),
    ("vit_s16", (384, 11, 6, 1536, 16), "no backbone here"),
    ("vit_s16", (240, 12, 4, 960, 16), "no backbone here has that size (width "
     "240 is none of 192, 384, 768, 1024, 1152, 1280, 1408)")])
def test_a_wrong_variant_names_both(tmp_path, name, own, advice):
  width, depth, heads, hidden, patch = own
  module = vit.ViT(width, depth, heads, hidden, patch, patch)
  # Only the header matters: nothing is read before the variant is known.
  tensors = {n: weights.Tensor(s.shape, "<f4", None)
             for n, s in trees.flatten(backbones.shapes(module)).items()}
  file = weights.Weights("x.npz", formats.BIGVISION, {}, tensors)
  other = backbones.make(name, 224)
  with pytest.raises(UserError) as caught:
    weights.fit(file, backbones.shapes(other), name)
  assert str(caught.value).startswith(
      f"weights file 'x.npz' is a ViT of width {width}, patch {patch}, "
      f"depth {depth}; {name} has width {other.width}, patch {other.patch}, "
      f"depth {other.depth}: {advice}")


def test_a_field_that_the_backbone_lacks(tmp_path):
  path = save(tmp_path / "t.safetensors", as_timm(flat_params()))
  other = types.SimpleNamespace(gelu="exact", epsilon=1e-6)
  with pytest.raises(UserError, match="another architecture.*'pool'.*swin_t"):
    weights.check_fields(weights.read(path), other, "swin_t")


GOOD = {"gelu": "exact", "epsilon": 1e-6}


@pytest.mark.parametrize("text, words", [
    ("{", "no JSON"), ("[1]", "no JSON object"), ("{}", "gelu"),
    (json.dumps({"gelu": "exact"}), "epsilon"),
    (json.dumps(GOOD | {"stride": 7}), "'stride'"),
    (json.dumps(GOOD | {"window": 0}), "1 to 64"),
    (json.dumps(GOOD | {"gelu": "relu"}), "'relu'"),
    (json.dumps(GOOD | {"gelu": ["exact"]}), "gelu"),
    (json.dumps(GOOD | {"epsilon": "1e-6"}), "epsilon"),
    (json.dumps(GOOD | {"epsilon": True}), "epsilon"),
    (json.dumps(GOOD | {"epsilon": float("nan")}), "epsilon"),
    (json.dumps(GOOD | {"epsilon": -1e-6}), "epsilon"),
    (json.dumps(GOOD | {"pool": "max"}), "pool"),
    (json.dumps(GOOD | {"pool": None}), "pool"),
    (json.dumps(GOOD | {"layer_scale": 1}), "layer_scale"),
    (json.dumps(GOOD | {"final_norm": "yes"}), "final_norm")])
def test_bad_metadata(tmp_path, text, words):
  check_error(save(tmp_path / "own.safetensors", flat_params(),
                   {"ttc_jax": text}), words)


def test_a_swin_s_field_is_refused_by_a_vit(tmp_path):
  path = save(tmp_path / "own.safetensors", flat_params(),
              {"ttc_jax": json.dumps(GOOD | {"window": 7})})
  with pytest.raises(UserError, match="settles the field 'window', which vit_"):
    backbones.load("vit_ti16", path, 32)


# --- Broken files -------------------------------------------------------------

def whole_files(tmp_path):
  flat = flat_params()
  own = str(tmp_path / "own.safetensors")
  weights.write(own, trees.unflatten(flat), GOOD)
  zipped = str(tmp_path / "zipped.npz")
  np.savez_compressed(zipped, **flat)
  return [own, save(tmp_path / "timm.safetensors", as_timm(flat)),
          save(tmp_path / "bv.npz", flat), zipped]


def survives(path):
  """Whether a damaged file loads; anything but UserError is a failure."""
  try:
    found = fit(path)
  except UserError as e:
    assert len(str(e)) < 1000
    return False
  assert {n: v.shape for n, v in found.items()} == {
      n: v.shape for n, v in flat_params().items()}
  return True


def test_truncated_files(tmp_path):
  for path in whole_files(tmp_path):
    with open(path, "rb") as f:
      whole = f.read()
    for length in (0, 1, 2, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
      with open(path, "wb") as f:
        f.write(whole[:length])
      assert not survives(path), (path, length)


def test_flipped_bytes(tmp_path):
  """A zip sums its members; a safetensors file guards only its header."""
  rng = np.random.default_rng(0)
  for path in whole_files(tmp_path):
    with open(path, "rb") as f:
      whole = f.read()
    header = (8 + struct.unpack("<Q", whole[:8])[0]
              if path.endswith(".safetensors") else len(whole))
    loaded = 0
    for at in (*range(8), *rng.integers(8, header, 40)):
      broken = bytearray(whole)
      broken[at] ^= 1 << rng.integers(8)
      with open(path, "wb") as f:
        f.write(broken)
      loaded += survives(path)
    assert loaded < 12, path  # Time stamps and the like of a zip.


def check_bounded(path):
  """The file is refused without the memory that it asks for."""
  tracemalloc.start()
  try:
    assert not survives(path)
    assert tracemalloc.get_traced_memory()[1] < 2 ** 25
  finally:
    tracemalloc.stop()


def safetensors_bytes(header):
  text = json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("shape, end", [
    ([2 ** 40, 2 ** 20], 2 ** 62), ([2 ** 63], 4), ([2 ** 33, 2 ** 33], 64),
    ([1, 10 ** 9, D], 4 * D * 10 ** 9), ([-1], 4), (["8"], 32)])
def test_huge_shapes_in_a_safetensors_header(tmp_path, shape, end):
  path = tmp_path / "huge.safetensors"
  path.write_bytes(safetensors_bytes({"pos_embed": {
      "dtype": "F32", "shape": shape, "data_offsets": [0, end]}}) + b"\0" * 64)
  check_bounded(str(path))


def test_a_huge_safetensors_header(tmp_path):
  path = tmp_path / "huge.safetensors"
  path.write_bytes(struct.pack("<Q", 2 ** 60) + b"{}")
  check_bounded(str(path))


def replace_member(path, name, content):
  """Puts raw bytes in the place of one array of an npz."""
  flat = flat_params()
  del flat[name]
  np.savez(path, **flat)
  with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
    with archive.open(f"{name}.npy", "w") as f:
      for block in content:
        f.write(block)
  return str(path)


def npy_header(shape, descr="<f4"):
  text = repr({"descr": descr, "fortran_order": False, "shape": shape})
  text = text.ljust(117) + "\n"
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize("name", ["cls", "pos_embedding", "embedding/kernel"])
def test_a_zip_bomb(tmp_path, name):
  zeros, blocks = b"\0" * 2 ** 20, 64
  shape = (1, blocks * 2 ** 20 // 4 // D, D)
  path = replace_member(tmp_path / "bomb.npz", name,
                        [npy_header(shape), *[zeros] * blocks])
  assert os.path.getsize(path) < 2 ** 20
  check_bounded(path)


@pytest.mark.parametrize("header", [
    npy_header((1, 2 ** 40, D)), npy_header((2 ** 70,)), npy_header((-8,)),
    npy_header((1, 1, D), "<U99999999"), npy_header((1, 1, D), "|V99999999"),
    npy_header((1, 1, D), "no type"), npy_header("shape"), b"\x93NUMPY\x09\x09",
    b"", b"\x93NUMPY\x01\x00\xff\xff{"])
def test_lying_npy_headers(tmp_path, header):
  check_bounded(
      replace_member(tmp_path / "lie.npz", "cls", [header, b"\0" * 32]))


def test_objects_are_not_unpickled(tmp_path):
  class Trap:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / "sprung"),)

  for name in ("cls", "unused"):
    path = str(tmp_path / "evil.npz")
    np.savez(path, **(flat_params() | {name: np.array([Trap()], object)}))
    assert not survives(path)
    assert not (tmp_path / "sprung").exists()


def test_a_folder_and_a_pickle(tmp_path):
  check_error(str(tmp_path), "cannot be read")
  with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02.")
  pytest.importorskip("torch")
  check_error(str(tmp_path / "model.pth"), "cannot be read")


# --- Sources ------------------------------------------------------------------

CONTENT = np.random.default_rng(0).bytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def holds(path, content=CONTENT):
  with open(path, "rb") as f:
    return f.read() == content


def check_source(source, cache, *words):
  with pytest.raises(UserError) as caught:
    weights.locate(source, str(cache))
  for word in words:
    assert word in str(caught.value), str(caught.value)


def test_a_local_path_is_returned_as_it_is(tmp_path):
  path = tmp_path / "a#b.npz"
  path.write_bytes(CONTENT)
  assert weights.locate(str(path)) == str(path)
  assert weights.locate(f"{path}#sha256={DIGEST}") == str(path)
  check_source(f"{path}#sha256={'0' * 64}", tmp_path, DIGEST, "0" * 64)
  check_source(f"{path}#sha256=123", tmp_path, "64")
  check_source(str(tmp_path / "none"), tmp_path, "does not exist")
  check_source(str(tmp_path), tmp_path, "folder without model.safetensors")


def test_a_source_is_located_and_hashed_once(tmp_path, monkeypatch):
  monkeypatch.setitem(vit.SIZES, "ti", (D, L, H, F))
  monkeypatch.setenv("HOME", str(tmp_path))
  path = save(tmp_path / "t.safetensors", as_timm(flat_params()))
  found = weights.open_source("~/t.safetensors")
  assert found == ("~/t.safetensors", path, weights.sha256(path))
  assert (found.name, found.address) == ("t.safetensors", path)
  monkeypatch.setattr(sources, "locate", None)  # not again
  check_equal(trees.flatten(weights.load("vit_ti4", found, 16)[1]),
              flat_params())


def test_random_is_a_source(monkeypatch):
  monkeypatch.setitem(vit.SIZES, "ti", (D, L, H, F))
  found = weights.open_source("random")
  assert found == ("random", None, "random")
  assert (found.name, found.address) == ("random", "random")
  for source in ("random", found):
    made, params = weights.load("vit_ti4", source, 16, gelu="exact")
    assert made.gelu == "exact"
    assert params["cls"].shape == (1, 1, D)
  with pytest.raises(UserError, match="need the name"):
    weights.load("", "random", 16)


def test_the_default_cache(monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "/x")
  assert sources.default_cache() == "/x/ttc_jax/weights"
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert sources.default_cache().endswith("/.cache/ttc_jax/weights")


class Server:
  """A web server whose connections may be cut short."""

  def __init__(self):
    self.content, self.etag, self.ranges = CONTENT, '"1"', True
    self.cut = None  # bytes after which every connection breaks
    self.asked = []  # the Range header of every GET
    self.http = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), self.handler())
    self.http.handle_error = lambda *args: None  # cut connections are meant
    self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
    self.thread.start()
    self.url = f"http://127.0.0.1:{self.http.server_port}/model.npz"

  def stop(self):
    self.http.shutdown()
    self.thread.join()
    self.http.server_close()

  def handler(server):
    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def log_message(self, *args):
        pass

      def do_HEAD(self):
        self.answer()

      def do_GET(self):
        server.asked.append(self.headers.get("Range"))
        body = self.answer()
        sent = body[:server.cut]
        self.wfile.write(sent)
        self.close_connection = len(sent) < len(body)

      def answer(self):
        body, status = server.content, 200
        if not self.path.startswith("/model.npz"):
          body, status = b"no", 404
        whole, asked = len(body), self.headers.get("Range")
        if asked and server.ranges and status == 200:
          start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
          body = body[int(start):int(end) + 1 if end else None]
          status = 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", server.etag)
        if status == 206:
          self.send_header("Content-Range", f"bytes {start}-"
                           f"{int(start) + len(body) - 1}/{whole}")
        self.end_headers()
        return body
    return Handler


@pytest.fixture
def server():
  pytest.importorskip("fsspec")
  pytest.importorskip("aiohttp")
  server = Server()
  yield server
  server.stop()


def cached(cache):
  """The names in the cache, less the hash in front and the locks."""
  return sorted(n.partition("-")[2] for n in os.listdir(cache)
                if not n.endswith(".lock"))


def test_https_is_cached_and_verified(server, tmp_path):
  path = weights.locate(server.url, str(tmp_path))
  assert holds(path) and path.endswith("model.npz")
  assert cached(tmp_path) == ["model.npz", "model.npz.json"]
  asked = len(server.asked)
  server.content = b""  # the cache asks nobody
  assert weights.locate(server.url, str(tmp_path)) == path
  assert weights.locate(f"{server.url}#sha256={DIGEST}", str(tmp_path)) == path
  assert len(server.asked) == asked


def test_a_fresh_copy_follows_the_server_while_it_answers(
    server, tmp_path, caplog, monkeypatch):
  import fsspec
  path = weights.locate(server.url, str(tmp_path), fresh=True)
  before = len([r for r in server.asked if r])
  assert weights.locate(server.url, str(tmp_path), fresh=True) == path
  assert len([r for r in server.asked if r]) == before  # asked, not fetched
  server.content, server.etag = CONTENT[::-1], '"2"'
  assert holds(weights.locate(server.url, str(tmp_path)))
  assert holds(weights.locate(server.url, str(tmp_path), fresh=True),
               CONTENT[::-1])

  def no_network(url):
    raise OSError("no network")
  monkeypatch.setattr(fsspec.core, "url_to_fs", no_network)
  assert holds(weights.locate(server.url, str(tmp_path), fresh=True),
               CONTENT[::-1])
  assert "cannot be asked" in caplog.text


def test_a_damaged_cache_is_fetched_again(server, tmp_path):
  path = weights.locate(server.url, str(tmp_path))
  with open(path, "r+b") as f:
    f.write(b"damage")
  assert weights.locate(server.url, str(tmp_path)) == path
  assert holds(path)


def test_a_cut_connection_is_resumed(server, tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "_BLOCK", 50_000)
  server.cut = 120_000
  assert holds(weights.locate(server.url, str(tmp_path)))
  assert any(asked and not asked.startswith("bytes=0-")
             for asked in server.asked)


def test_a_later_call_resumes(server, tmp_path):
  server.cut = 120_000
  server.ranges = False  # so that the first call gets no further
  check_source(server.url, tmp_path, "resumes", server.url)
  assert cached(tmp_path) == ["model.npz.part", "model.npz.part.json"]
  server.cut, server.ranges, server.asked = None, True, []
  assert holds(weights.locate(server.url, str(tmp_path)))
  assert all(asked and asked.startswith("bytes=120000-")
             for asked in server.asked)


def test_a_changed_file_starts_again(server, tmp_path):
  server.cut, server.ranges = 120_000, False
  check_source(server.url, tmp_path, "resumes")
  server.cut, server.ranges, server.etag = None, True, '"2"'
  server.content = CONTENT[::-1]
  assert holds(weights.locate(server.url, str(tmp_path)), CONTENT[::-1])


def test_a_server_without_ranges(server, tmp_path):
  server.cut, server.ranges = 120_000, False
  check_source(server.url, tmp_path, "resumes")
  server.cut = None
  assert holds(weights.locate(server.url, str(tmp_path)))


def test_secrets_of_an_address_stay_secret(server, tmp_path):
  """Of a whole, a missing and a broken file, in messages and in the cache."""
  secret = server.url.replace("//", "//me:PASSWORD@") + "?X-Sig=SIGNATURE&a=b"
  assert weights.public(secret) == server.url
  found = weights.open_source(secret, str(tmp_path))
  assert holds(found.path) and found.name == "model.npz"
  assert found.address == server.url
  messages = []
  for broken in (secret.replace("model", "other"), f"{secret}#sha256=0",
                 f"{secret}#sha256={'0' * 64}", secret.replace("http", "ftp"),
                 f"simplecache::{secret}"):
    with pytest.raises(UserError) as caught:
      weights.locate(broken, str(tmp_path))
    messages.append(str(caught.value))
  server.cut, server.etag, server.ranges = 10, '"2"', False
  (tmp_path / os.path.basename(found.path)).unlink()
  with pytest.raises(UserError) as caught:
    weights.locate(secret, str(tmp_path))
  notes = [p.read_bytes().decode(errors="replace") + p.name
           for p in tmp_path.iterdir()]
  for text in (*messages, str(caught.value), *notes, repr(found.address)):
    assert not re.search("PASSWORD|SIGNATURE|me:", text), text


@pytest.mark.parametrize("source, shown", [
    ("a/b?c#d", "a/b?c#d"), ("https://h/a?s=1", "https://h/a"),
    ("https://u:p@h:1/a@b#sha256=0", "https://h:1/a@b"),
    ("https://u:p@h?s", "https://h"), ("gs://b/c.npz", "gs://b/c.npz"),
    ("hf://owner/name@v1/f.npz", "hf://owner/name@v1/f.npz"),
    ("hf://me:TOKEN@owner/name", "hf://owner/name"), ("random", "random")])
def test_what_a_message_shows_of_a_source(source, shown):
  assert weights.public(source) == shown


@pytest.mark.parametrize("source", [
    "file:///etc/passwd", "reference://x", "ftp://h/x.npz", "memory://b/x.npz",
    "http://host/x.npz", "http://169.254.169.254/x", "http://127.0.0.1.evil/x",
    "http://127.0.0.1@evil/x", "simplecache::https://h/x.npz",
    "zip://x.npz::https://h/x.zip", "https://h/x.zip::file:///etc/passwd"])
def test_other_protocols_and_chains_are_refused(tmp_path, source, monkeypatch):
  monkeypatch.setitem(sys.modules, "fsspec", None)  # nothing is asked
  check_source(source, tmp_path, "https://")


def test_a_git_lfs_pointer(tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_text("version https://git-lfs.github.com/spec/v1\n"
                  "oid sha256:0\nsize 9\n")
  check_error(str(path), "Git LFS pointer", "git lfs pull")


def test_a_wrong_hash_keeps_nothing(server, tmp_path):
  check_source(f"{server.url}#sha256={'0' * 64}", tmp_path, DIGEST, "0" * 64)
  assert cached(tmp_path) == []
  assert holds(weights.locate(f"{server.url}#sha256={DIGEST}", str(tmp_path)))


def test_404_and_a_server_that_is_gone(server, tmp_path):
  check_source(server.url.replace("model", "other"), tmp_path,
               "404", "other.npz")
  server.http.server_close()
  check_source(server.url, tmp_path, "cannot be fetched")


def test_load_through_a_url(server, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setitem(vit.SIZES, "ti", (D, L, H, F))
  with open(save(tmp_path / "bv.npz", flat_params()), "rb") as f:
    server.content = f.read()
  _, params = backbones.load("vit_ti4", server.url, 16)
  check_equal(trees.flatten(params), flat_params())


@pytest.fixture
def memory():
  fs = pytest.importorskip("fsspec").filesystem("memory")
  fs.pipe("/bucket/model.npz", CONTENT)
  yield fs
  fs.rm("/bucket", recursive=True)


def test_any_file_system_resumes(memory, tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "_SCHEMES", ("memory",))
  source = "memory://bucket/model.npz"
  append = sources._append

  def cut(fs, path, part, start):
    with open(part, "ab") as f:
      f.write(CONTENT[start:start + 100_000])
    monkeypatch.setattr(sources, "_append", append)
    raise ConnectionError("cut")
  monkeypatch.setattr(sources, "_append", cut)
  assert holds(weights.locate(source, str(tmp_path)))
  check_source("memory://bucket/none.npz", tmp_path, "FileNotFound")


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "fsspec", None)
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  for source in ("gs://bucket/x.npz", "https://host/x.npz", "hf://owner/name"):
    check_source(source, tmp_path, source, "pip install -e '.[hub]'")


def test_an_unknown_protocol(tmp_path):
  pytest.importorskip("fsspec")
  check_source("nonsense://x/y.npz", tmp_path, "is not fetched", "nonsense")


def test_two_processes_fetch_once(server, tmp_path):
  paths = []
  threads = [threading.Thread(
      target=lambda: paths.append(weights.locate(server.url, str(tmp_path))))
             for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(set(paths)) == 1 and len(paths) == 4 and holds(paths[0])
  assert len(server.asked) == 1


# --- The Hub ------------------------------------------------------------------

class FakeHub(types.ModuleType):
  """Stands for huggingface_hub at the two calls we make."""

  class errors:
    EntryNotFoundError = FileNotFoundError

    class LocalEntryNotFoundError(FileNotFoundError):
      pass

  def __init__(self, folder, files):
    super().__init__("huggingface_hub")
    self.files, self.calls = files, []
    self.away, self.known_missing = False, []

    class HfApi:
      def list_repo_files(api, repo, revision=None):
        return self.files

    def hf_hub_download(repo, file, revision=None, cache_dir=None):
      self.calls.append((repo, file, revision))
      if file not in self.files:
        if self.away:
          raise self.errors.LocalEntryNotFoundError("no connection")
        self.known_missing.append(file)
        raise FileNotFoundError("404 Client Error")
      path = folder / "copy"
      path.write_bytes(CONTENT)
      return str(path)
    self.HfApi, self.hf_hub_download = HfApi, hf_hub_download
    self.try_to_load_from_cache = lambda repo, file, cache_dir, revision: (
        object() if file in self.known_missing else None)


def test_a_file_that_was_not_fetched_is_no_missing_one(tmp_path, monkeypatch):
  """Where config.json is not known, neither are its GELU and epsilon."""
  hub = FakeHub(tmp_path, ["x.npz"])
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  hub.away = True
  check_source("hf://owner/name/x.npz", tmp_path, "no connection")
  hub.away = False
  assert holds(weights.locate("hf://owner/name/x.npz"))
  hub.away = True  # it is known that there is none
  assert holds(weights.locate("hf://owner/name/x.npz"))


@pytest.mark.parametrize("files, chosen", [
    (["README.md", "vit.npz"], "vit.npz"),
    (["a.npz", "model.safetensors", "b.safetensors"], "model.safetensors"),
    (["a.npz", "b.safetensors"], None), (["README.md"], None)])
def test_the_hub_chooses_a_file(tmp_path, monkeypatch, files, chosen):
  hub = FakeHub(tmp_path, files)
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  if chosen:
    assert holds(weights.locate("hf://owner/name"))
    assert hub.calls[0] == ("owner/name", chosen, None)
  else:
    check_source("hf://owner/name", tmp_path, "name one",
                 "hf://owner/name/a.npz" if len(files) > 1 else "none")


def test_the_hub_with_file_revision_and_hash(tmp_path, monkeypatch):
  hub = FakeHub(tmp_path, ["sub/x.npz"])
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  source = "hf://owner/na.me@v1/sub/x.npz"
  assert holds(weights.locate(f"{source}#sha256={DIGEST}"))
  assert hub.calls == [("owner/na.me", "sub/x.npz", "v1"),
                       ("owner/na.me", "sub/config.json", "v1"),
                       ("owner/na.me", "sub/preprocessor_config.json", "v1")]
  check_source(f"{source}#sha256={'0' * 64}", tmp_path, DIGEST)
  check_source("hf://owner/name/none.npz", tmp_path, "404")
  check_source("hf://owner", tmp_path, "hf://owner/name")


# --- Parts of a file and short names ------------------------------------------

def two_towers(path, tree=""):
  """A file with an image tower, another image model and a text tower."""
  flat, other = flat_params(), flat_params(pool="gap")
  return save(path, {
      **{f"{tree}img/{n}": x for n, x in flat.items()},
      **{f"{tree}teacher/{n}": x for n, x in other.items()},
      f"{tree}txt/head/kernel": np.zeros((2, 2), np.float32)}), flat, other


@pytest.mark.parametrize("tree", ["", "params/", "opt/target/"])
def test_a_part_is_the_tree_below_its_name(tmp_path, monkeypatch, tree):
  monkeypatch.setitem(vit.SIZES, "ti", (D, L, H, F))
  path, flat, other = two_towers(tmp_path / "two.npz", tree)
  for part, want in (("img", flat), ("teacher", other)):
    check_equal(fit(f"{path}:{part}"), want)
    source = weights.open_source(f"{path}:{part}")
    assert source == (f"{path}:{part}", f"{path}:{part}", weights.sha256(path))
    assert (source.name, source.address) == (f"two.npz:{part}", source.path)
    check_equal(trees.flatten(weights.load("vit_ti4", source, 16)[1]), want)
  assert weights.describe(f"{path}:img")["file"] == f"{path}:img"


def identity(path):
  config = default()
  config.update(backbone="vit_ti4", weights=path, image_size=16)
  return inputs.load_base(config).identity


def test_runs_are_named_by_all_that_decides_the_pretrained_model(
    tmp_path, monkeypatch):
  monkeypatch.setitem(vit.SIZES, "ti", (D, L, H, F))
  path, *_ = two_towers(tmp_path / "two.npz")
  assert identity(f"{path}:img") != identity(f"{path}:teacher")
  path = save(tmp_path / "model.safetensors", as_timm(flat_params()))
  assert identity(path) == weights.sha256(path)
  put_config(tmp_path, architecture="vit_base_patch16_224")
  exact = identity(path)
  put_config(tmp_path, architecture="vit_base_patch16_clip_quickgelu_224")
  assert len({weights.sha256(path), exact, identity(path)}) == 3


def test_the_image_tower_is_the_file_s_where_it_is_the_only_one(tmp_path):
  path = save(tmp_path / "siglip.npz", {
      **{f"img/{n}": x for n, x in flat_params().items()},
      "txt/head/kernel": np.zeros((2, 2), np.float32),
      "t": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)})
  for one, two in zip(fit(path).items(), fit(f"{path}:img").items(),
                      strict=True):
    assert one[0] == two[0]
    np.testing.assert_array_equal(one[1], two[1])


def test_a_part_that_is_not_there_is_one_sentence(tmp_path):
  path, *_ = two_towers(tmp_path / "two.npz")
  for part, words in (("image", "part 'image'; at its top are img, teach"),
                      ("txt", "of no known format")):
    with pytest.raises(UserError, match=f"two.npz' .*{words}"):
      fit(f"{path}:{part}")
  check_source(f"{tmp_path}/none.npz:img", tmp_path, "none.npz' does not exist")


def test_a_file_with_a_colon_is_a_file(tmp_path):
  path = save(tmp_path / "a.npz:img", flat_params())
  assert weights.locate(path) == path
  check_equal(fit(path), flat_params())


def test_a_part_of_a_remote_file(memory, tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "_SCHEMES", ("memory",))
  found = weights.locate("memory://bucket/model.npz:img", str(tmp_path))
  path, part = sources.split_part(found)
  assert part == "img" and holds(path)
  assert weights.locate("memory://bucket/model.npz", str(tmp_path)) == path
  assert weights.locate(
      f"memory://bucket/model.npz:img#sha256={DIGEST}", str(tmp_path)) == found


def test_short_names_stand_for_big_vision_s_addresses():
  """Some, as models/vit.py and the others of Big Vision spell them."""
  known = released.ADDRESSES
  assert known["howto-i21k-B/16"] == (
      "gs://vit_models/augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-"
      "do_0.0-sd_0.0.npz")
  assert known["howto-i21k-Ti/16"].endswith(
      "aug_none-wd_0.03-do_0.0-sd_0.0.npz")
  assert known["deit3_L_384_21k"] == (
      "gs://big_vision/zoo/deit3/bv_deit_3_large_384_21k.npz")
  assert known["SigLIP B/16 224"] == (
      "gs://big_vision/siglip/webli_en_b16_224_63724782.npz:img")
  assert known["SigLIP2 B/16 224"] == (
      "gs://big_vision/siglip2/siglip2_b16_224.npz:img")
  assert known["SigLIP2 So400m/14 384"] == (
      "gs://big_vision/siglip2/siglip2_so400m14_384.npz:img")
  assert known["SigLIP2 g-opt/16 256"] == (
      "gs://big_vision/siglip2/siglip2_g-opt16_256.npz:img")
  assert len(known) == 7 + 12 + 8 + 9 + 15
  assert len({*known.values()}) == len(known)


def test_a_short_name_is_fetched_from_its_address(
    memory, tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "_SCHEMES", ("memory",))
  monkeypatch.setitem(released.ADDRESSES, "tiny B/16",
                      "memory://bucket/model.npz:img")
  found = weights.open_source("tiny B/16", str(tmp_path))
  assert found.source == "memory://bucket/model.npz:img"
  assert found.name == "model.npz:img" and found.sha256 == DIGEST
  check_source(f"tiny B/16#sha256={'0' * 64}", tmp_path, DIGEST)
  # A path wins over a name.
  monkeypatch.chdir(tmp_path)
  (tmp_path / "tiny B").mkdir()
  (tmp_path / "tiny B" / "16").write_bytes(b"other")
  assert weights.locate("tiny B/16") == "tiny B/16"


@pytest.mark.parametrize("name,words", [
    ("howto-i21k-B/17", ("did you mean 'howto-i21k-B/16'", "does not exist")),
    ("SigLIP2 B16 224", ("'SigLIP2 B/16 224'",)),
    ("i1k-s16-300ep", ("positions are computed", "howto-i21k-B/16")),
    ("SigLIP2 B/16 NaFlex", ("not supported",)),
])
def test_an_unknown_or_unreadable_name_is_one_sentence(tmp_path, name, words):
  check_source(name, tmp_path, *words)


def test_a_missing_file_is_no_misspelt_name(tmp_path):
  with pytest.raises(UserError) as caught:
    weights.locate("ViT-B_16.npz")
  assert str(caught.value) == "weights file 'ViT-B_16.npz' does not exist"
