"""`python -m ttc_jax.weights`, and files that are several or PyTorch's."""
import json
import os
import shutil
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from tests.command import run_command
from tests.random_trees import random_params
from tests.test_weights import as_timm, check_equal, fit, flat_params, save
from ttc_jax import backbones, trees, weights
from ttc_jax.backbones import swin, vit
from ttc_jax.errors import UserError
from ttc_jax.weights import convert as cli
from ttc_jax.weights import formats, resampling, sources

D, L, H, F = 8, 2, 2, 16  # of `flat_params`, patch 4 and 16 px
FIELDS = {"gelu": "exact", "epsilon": 1e-6}


@pytest.fixture
def sizes(monkeypatch):
  """Tiny backbones have the names of large ones."""
  monkeypatch.setitem(vit.SIZES, "ti", (D, L, H, F))
  monkeypatch.setitem(swin.SIZES, "ti", (16, (2, 2), 2))


# --- The command --------------------------------------------------------------

def test_inspect_says_what_a_file_is(sizes, tmp_path):
  path = save(tmp_path / "t.safetensors", as_timm(flat_params()) | {
      "head.weight": np.zeros((3, D), np.float32)})
  found = cli.describe(path)
  assert found == {
      "file": path, "format": "timm", "backbone": "vit_ti4", "image_size": 16,
      "fields": vit.ViT(D, L, H, F, 4, 16, gelu="exact").fields,
      "parameters": sum(v.size for v in as_timm(flat_params()).values()),
      "normalisation": None, "dtypes": ["F32"], "sha256": weights.sha256(path),
      "ignored": ["head.weight"]}
  json.dumps(found)


def test_inspect_escapes_what_a_file_says(sizes, tmp_path):
  path = save(tmp_path / "t\n.safetensors", as_timm(flat_params()) | {
      "\x1b[2Jhead.weight": np.zeros((3, D), np.float32)})
  done = run_command("weights", "inspect", path)
  assert done.returncode == 0
  assert "\x1b" not in done.stdout + done.stderr
  assert r"t\n.safetensors" in done.stdout


def test_what_is_outside_the_backbone_is_listed(sizes, tmp_path):
  """And a size that no backbone has is no error."""
  flat = flat_params()
  stacked = {f"params/img/{n}": v for n, v in flat.items()
             if "encoderblock" not in n}
  for name, value in flat.items():
    if "encoderblock_0/" in name:
      both = [value, flat[name.replace("block_0/", "block_1/")]]
      name = name.replace("encoderblock_0", "encoderblock")
      stacked[f"params/img/{name}"] = np.stack(both)
  file = stacked | {"params/txt/head/bias": np.zeros(3, np.float32)}
  path = save(tmp_path / "bv.npz", file)
  assert cli.describe(path)["backbone"] == "vit_ti4"
  assert cli.describe(path)["ignored"] == ["params/txt/head/bias"]
  check_equal(fit(path), flat)
  file["params/img/embedding/kernel"] = np.zeros((8, 8, 3, D), np.float32)
  assert cli.describe(save(path, file))["backbone"] == "vit_ti8"
  vit.SIZES.pop("ti")  # `sizes` puts it back
  assert cli.describe(path)["backbone"] is None


@pytest.mark.parametrize("to, format_", [
    ("timm", "timm"), ("hf", "hf_vit"), ("bigvision", "bigvision"),
    ("ttc_jax", "ttc_jax")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back(sizes, tmp_path, to, format_, dtype):
  first, there, back = (str(tmp_path / n) for n in (
      "a.safetensors", "b", "c.safetensors"))
  weights.write(first, trees.unflatten(flat_params()), FIELDS)
  written, untold = cli.convert(first, there, to, dtype)
  assert written == cli.describe(there)["format"] == format_
  read = weights.read(there).fields
  # The file says nothing of pixels; of Big Vision's readers take "half".
  assert untold == {k: v for k, v in FIELDS.items() if read[k] != v} | (
      {"normalisation": "unknown"} if to == "bigvision" else {})
  cli.convert(there, back)
  _, differences = cli.compare(first, back)
  assert max(differences.values()) <= (0 if dtype == "float32" else 0.02)


@pytest.mark.parametrize("to, name, suffix", [
    ("timm", "b.npz", ".safetensors"), ("ttc_jax", "b.PTH", ".safetensors"),
    ("bigvision", "b.safetensors", ".npz")])
def test_a_name_of_another_kind_of_file_is_refused(
    sizes, tmp_path, to, name, suffix):
  first = str(tmp_path / "a.safetensors")
  weights.write(first, trees.unflatten(flat_params()), FIELDS)
  with pytest.raises(UserError, match=f"written as {suffix}"):
    cli.convert(first, str(tmp_path / name), to)
  assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("to, format_", [
    ("timm", "swin_timm"), ("hf", "swin_hf")])
def test_a_swin_too(sizes, tmp_path, to, format_):
  module = backbones.make("swin_ti", 32, window=4)
  path, there = str(tmp_path / "a.safetensors"), str(tmp_path / "b")
  weights.write(path, random_params(module), module.fields)
  assert cli.convert(path, there, to) == (format_, {})
  assert cli.describe(there)["backbone"] == "swin_ti"
  assert cli.compare(path, there)[1].keys() == trees.flatten(
      backbones.shapes(module)).keys()
  assert not any(cli.compare(path, there)[1].values())


@pytest.mark.parametrize("to", ["timm", "hf"])
def test_a_dinov3_too(sizes, tmp_path, to):
  """Its rotary positions fit any grid: to another patch without a size."""
  module = backbones.make("vit_ti4", 56, registers=2, rope=100.0,
                          layer_scale=True, epsilon=1e-5, gelu="exact")
  path, there = (str(tmp_path / f"{n}.safetensors") for n in ("own", "there"))
  weights.write(path, random_params(module), module.fields)
  format_, untold = cli.convert(path, there, to)
  assert format_ == f"{to}_dinov3"
  if to == "timm":  # whose tensors do not show these
    assert untold == {"pool": "cls", "registers": 2, "rope": 100.0}
    assert not any(cli.compare(path, there)[1].values())
    (tmp_path / "config.json").write_text(json.dumps({
        "architecture": "vit_small_patch16_dinov3_qkvb",
        "global_pool": "token"}))
  else:
    assert untold == {}
  found = cli.describe(there)
  assert found["backbone"] == "vit_ti4" and found["image_size"] is None
  assert found["fields"] == module.fields
  assert not any(cli.compare(path, there)[1].values())
  cli.convert(there, other := str(tmp_path / "other"), patch=8)
  assert cli.describe(other)["backbone"] == "vit_ti8"
  with pytest.raises(UserError, match="up to 64"):
    cli.convert(there, str(tmp_path / "large"), patch=1000)


def test_what_no_format_holds_names_each(sizes, tmp_path):
  path = str(tmp_path / "a.safetensors")
  flat = flat_params(layer_scale=True, pool="gap")
  weights.write(path, trees.unflatten(flat), FIELDS | {
      "layer_scale": True, "pool": "gap"})
  with pytest.raises(UserError, match="'hf_vit'.*'hf_dinov2'.*'hf_siglip'"):
    cli.convert(path, str(tmp_path / "b"), "hf")
  assert os.listdir(tmp_path) == ["a.safetensors"]


def test_convert_overwrites_nothing(sizes, tmp_path):
  path = save(tmp_path / "t.safetensors", as_timm(flat_params()))
  before = weights.sha256(path)
  for out in (path, str(tmp_path), f"{path}/x", "/proc/x/y"):
    with pytest.raises(UserError, match="another path"):
      cli.convert(path, out, dtype="bfloat16")
  assert weights.sha256(path) == before
  cli.convert(path, out := str(tmp_path / "new" / "x"))
  assert os.stat(out).st_mode == os.stat(path).st_mode | 0o044


def test_diff_finds_the_one_that_differs(sizes, tmp_path):
  flat = flat_params()
  one = save(tmp_path / "a.safetensors", as_timm(flat))
  flat["Transformer/encoder_norm/bias"][3] += 0.5
  two = save(tmp_path / "b.npz", flat)
  notes, differences = cli.compare(one, two)
  assert notes == ["gelu: exact, tanh"]
  assert {n for n, d in differences.items() if d} == {
      "Transformer/encoder_norm/bias"}
  assert abs(max(differences.values()) - 0.5) < 1e-6


def test_the_command(tmp_path):
  def run(*args):
    done = run_command("weights", *args)
    assert "Traceback" not in done.stderr, done.stderr
    return done
  path = str(tmp_path / "x.safetensors")
  module = backbones.make("vit_ti16", 32)
  weights.write(path, backbones.init(module), FIELDS)
  done = run("inspect", path, "--json")
  assert json.loads(done.stdout)[0]["backbone"] == "vit_ti16"
  assert run("diff", path, path).returncode == 0
  done = run("convert", path, "--to=tim", "--out=y")
  assert (done.returncode, done.stdout) == (2, "")
  assert "did you mean timm" in done.stderr


# --- Several files ------------------------------------------------------------

def write_shards(folder, tensors):
  """As Hugging Face writes them, in two."""
  names, map_ = sorted(tensors), {}
  for i, part in enumerate((names[::2], names[1::2])):
    shard = f"model-{i + 1:05}-of-00002.safetensors"
    safetensors.numpy.save_file({n: tensors[n] for n in part}, folder / shard)
    map_ |= dict.fromkeys(part, shard)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": map_}))
  return index, map_


def test_shards_are_one_model(tmp_path):
  flat = flat_params()
  index, _ = write_shards(tmp_path, as_timm(flat))
  check_equal(fit(str(index)), flat)
  assert sources.locate(str(tmp_path)) == str(index)


def test_the_hash_of_shards_is_of_them_all(tmp_path):
  index, _ = write_shards(tmp_path, as_timm(flat_params()))
  before = sources.sha256(str(index))
  copy = shutil.copytree(tmp_path, tmp_path / "copy")
  assert sources.sha256(str(copy / index.name)) == before
  seen = {before}
  for file in (tmp_path / "model-00002-of-00002.safetensors", index):
    file.write_bytes(file.read_bytes() + b" ")
    seen.add(sources.sha256(str(index)))
  assert len(seen) == 3


@pytest.mark.parametrize("shard", [
    "../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "", 3,
    "x.pth", "a\\x.safetensors", "x.safetensors\n"])
def test_an_index_names_plain_files_beside_it(tmp_path, shard):
  index, map_ = write_shards(tmp_path, as_timm(flat_params()))
  map_["pos_embed"] = shard
  index.write_text(json.dumps({"weight_map": map_}))
  with pytest.raises(UserError, match="expected plain names"):
    fit(str(index))


def test_a_shard_that_is_missing_or_lacks_a_tensor(tmp_path):
  index, map_ = write_shards(tmp_path, as_timm(flat_params()))
  map_["blocks.0.nothing"] = map_["pos_embed"]
  index.write_text(json.dumps({"weight_map": map_}))
  with pytest.raises(UserError, match="'blocks.0.nothing' in 'model-"):
    fit(str(index))
  os.remove(tmp_path / map_["pos_embed"])
  with pytest.raises(UserError, match="which is not beside it"):
    fit(str(index))
  for text in ("{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {}}'):
    index.write_text(text)
    with pytest.raises(UserError, match="no 'weight_map'"):
      fit(str(index))


# --- PyTorch's files ----------------------------------------------------------

@pytest.mark.parametrize("around", [
    lambda s: s, lambda s: {"model": s, "epoch": 3},
    lambda s: {"student": {}, "teacher": {f"backbone.{n}": t
                                          for n, t in s.items()}},
    lambda s: {"state_dict": {f"module.{n}": t for n, t in s.items()}},
    # DINOv2's own, in chunks of blocks.
    lambda s: {n.replace("blocks.", "blocks.0."): t for n, t in s.items()}])
def test_a_state_dict(tmp_path, around):
  torch = pytest.importorskip("torch")
  flat = flat_params(layer_scale=True)
  state = {n: torch.from_numpy(v) for n, v in as_timm(flat).items()}
  path = str(tmp_path / "model.pth")
  torch.save(around(state), path)
  check_equal(fit(path), flat)


@pytest.mark.parametrize("dtype, atol", [("bfloat16", 3e-2), ("float16", 3e-3)])
def test_a_state_dict_in_other_precisions(tmp_path, dtype, atol):
  torch = pytest.importorskip("torch")
  flat, path = flat_params(), str(tmp_path / "model.pth")
  torch.save({n: torch.from_numpy(v).to(getattr(torch, dtype))
              for n, v in as_timm(flat).items()}, path)
  check_equal(fit(path), flat, atol)


def test_a_compressed_state_dict_may_be_a_bomb(tmp_path):
  torch = pytest.importorskip("torch")
  plain, packed = tmp_path / "model.pth", tmp_path / "packed.pth"
  torch.save({n: torch.from_numpy(v)
              for n, v in as_timm(flat_params()).items()}, plain)
  with (zipfile.ZipFile(plain) as archive,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out):
    for name in archive.namelist():
      out.writestr(name, archive.read(name))
  fit(str(plain))
  with pytest.raises(UserError, match="PyTorch never compresses"):
    fit(str(packed))


def test_a_state_dict_before_zip_files(tmp_path):
  torch = pytest.importorskip("torch")
  flat, path = flat_params(), str(tmp_path / "model.pth")
  torch.save({"model_state_dict": {
      n: torch.from_numpy(v) for n, v in as_timm(flat).items()}}, path,
             _use_new_zipfile_serialization=False)
  check_equal(fit(path), flat)


def test_microsoft_s_swin(tmp_path):
  torch = pytest.importorskip("torch")
  module = swin.Swin(16, (2, 2), 2, 32, window=4)
  params, path = random_params(module), str(tmp_path / "swin.pth")
  tensors = weights.to_tensors(params, formats.SWIN_MS, module)
  state = {n: torch.from_numpy(v) for n, v in tensors.items()} | {
      "layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16),
      "head.weight": torch.zeros(3, 32)}
  torch.save({"model": state}, path)
  read = weights.read(path)
  assert (read.format, read.fields) == (formats.SWIN_MS, module.fields)
  check_equal(trees.flatten(weights.fit(read, backbones.shapes(module), "x")),
              trees.flatten(params))


@pytest.mark.parametrize("around, words", [
    (lambda s: {"state_dict": s, "state_dict_ema": s}, "state_dict_ema"),
    (lambda s: {"model": s, "model_ema": s, "epoch": 3}, "2 models, model"),
    (lambda s: {"ema": {"shadow": s}, "net": {"model": s}}, "ema.shadow"),
    (lambda s: {"model": {f"{who}.backbone.{n}": t for n, t in s.items()
                          for who in ("student", "teacher")}},
     "2 vision models, below 'student"),
    (lambda s: s | {"probe.weight": s["pos_embed"]}, None),
    (lambda s: {f"net.{n}": t for n, t in s.items()} | {
        "probe.weight": s["pos_embed"]}, "'probe.weight': save the backbone"),
])
def test_one_model_of_several_is_not_chosen(tmp_path, around, words):
  torch = pytest.importorskip("torch")
  path = str(tmp_path / "model.pth")
  torch.save(around({n: torch.from_numpy(v)
                     for n, v in as_timm(flat_params()).items()}), path)
  with pytest.raises(UserError, match=words or "no place for.*'probe.weight'"):
    fit(path)


def test_the_state_of_the_training_is_not_a_model(tmp_path):
  torch = pytest.importorskip("torch")
  path, flat = str(tmp_path / "model.pth"), flat_params()
  state = {n: torch.from_numpy(v) for n, v in as_timm(flat).items()}
  torch.save({
      "model": {f"_orig_mod.{n}": t for n, t in state.items()},
      "optimizer": {"state": {0: {"exp_avg": torch.zeros(3, 3)}}},
      "rng_state": torch.zeros(9), "lr_scheduler": {"x": torch.zeros(2, 2)},
      "epoch": 3}, path)
  check_equal(fit(path), flat)


class Evil:
  def __reduce__(self):
    return os.mkdir, ("executed",)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  monkeypatch.chdir(tmp_path)
  torch.save({"model": {}, "args": Evil()}, "model.pth")
  with pytest.raises(UserError, match="holds more than tensors"):
    fit("model.pth")
  assert os.listdir(tmp_path) == ["model.pth"]


def test_a_pth_without_pytorch(tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  torch.save({"x": torch.zeros(2)}, tmp_path / "model.pth")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(UserError, match=r"pip install -e '.\[torch\]'"):
    fit(str(tmp_path / "model.pth"))


# --- config.json --------------------------------------------------------------

@pytest.mark.parametrize("config, words", [
    ({"model_type": "vit", "hidden_act": "relu"}, "hidden_act 'relu'"),
    ({"model_type": "vit", "hidden_act": ["gelu"]}, "hidden_act"),
    ({"model_type": "vit", "layer_norm_eps": "small"}, "layer_norm_eps"),
    ({"model_type": "vit", "layer_norm_eps": 2.0}, "layer_norm_eps"),
    ({"model_type": []}, r"of a \[\]"),
    ({"model_type": "dpt"}, "of a 'dpt'.*move config.json away"),
    ({"architecture": "vit_base"}, "of a 'vit_base'.*move config.json away")])
def test_a_bad_config(tmp_path, config, words):
  module = vit.ViT(D, L, H, F, 4, 16)
  path = save(tmp_path / "m.safetensors", weights.to_tensors(
      trees.unflatten(flat_params()), formats.HF_VIT, module))
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match=words):
    weights.read(path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match="mend it or move it away"):
    weights.read(path)
  (tmp_path / "config.json").write_text("{}")  # nobody's
  assert weights.read(path).fields["epsilon"] == 1e-12


@pytest.mark.parametrize("config, gelu, pool", [
    ({"architecture": "vit_base_patch16_224"}, "exact", "cls"),
    ({"architecture": "x", "model_args": {"act_layer": "gelu_tanh"}}, "tanh",
     "cls"),
    ({"architecture": "x", "global_pool": "avg"}, "exact", "gap")])
def test_timm_s_config(tmp_path, config, gelu, pool):
  path = save(tmp_path / "m.safetensors", as_timm(flat_params()))
  (tmp_path / "config.json").write_text(json.dumps(config))
  fields = weights.read(path).fields
  assert (fields["gelu"], fields["pool"]) == (gelu, pool)
  assert fields["registers"] == int(pool == "gap")


# --- Names --------------------------------------------------------------------

@pytest.mark.parametrize("name, ours", [
    ("vit_base_patch16_224", "vit_b16"), ("ViT-B/16", "vit_b16"),
    ("B/16", "vit_b16"), ("ViT-B_16", "vit_b16"), ("Ti/16", "vit_ti16"),
    ("deit_tiny_distilled_patch16_224", "vit_ti16"), ("vit_b_32", "vit_b32"),
    ("vit_small_patch14_dinov2.lvd142m", "vit_s14"), ("S/14", "vit_s14"),
    ("vit_so400m_patch14_siglip_224", "vit_so400m14"),
    ("google/vit-base-patch16-224-in21k", "vit_b16"),
    ("facebook/dinov2-small", "vit_s14"), ("dino-vits16", "vit_s16"),
    ("openai/clip-vit-large-patch14", "vit_l14"),
    ("swin_tiny_patch4_window7_224", "swin_ti"),
    ("microsoft/swin-base-patch4-window12-384", "swin_b"),
    ("vit_b16", "vit_b16"), ("G/14", "G/14"), ("resnet50", "resnet50"),
    ("microsoft/beit-base-patch16-224", "microsoft/beit-base-patch16-224"),
    ("swinv2_tiny_window8_256", "swinv2_tiny_window8_256")])
def test_names_of_other_libraries(name, ours):
  assert backbones.canonical(name) == ours


def test_the_name_may_be_left_out(sizes, tmp_path):
  path = save(tmp_path / "t.safetensors", as_timm(flat_params()))
  module, params = backbones.load("", path, 16)
  assert module == backbones.make("vit_tiny_patch4_16", 16, gelu="exact")
  check_equal(trees.flatten(params), flat_params())


# --- Another patch ------------------------------------------------------------

def bilinear(old, new):
  """(new, old): samples at the centres of new pixels, edges repeated."""
  out = np.zeros((new, old))
  for i in range(new):
    at = np.clip((i + 0.5) * old / new - 0.5, 0, old - 1)
    low = int(at)
    out[i, low] += 1 - (at - low)
    out[i, min(low + 1, old - 1)] += at - low
  return out


@pytest.mark.parametrize("old, new", [(4, 6), (8, 5), (4, 8)])
def test_pi_resize_is_flexivit_s_formula(old, new):
  kernel = np.random.default_rng(0).normal(size=(old, old, 3, 5))
  kernel = kernel.astype(np.float32)
  one = bilinear(old, new)
  inverse = np.linalg.pinv(np.kron(one, one).T)
  expected = np.einsum("ij,jcd->icd", inverse, kernel.reshape(-1, 3, 5))
  got = resampling.resize_patch(kernel, new)
  np.testing.assert_allclose(got, expected.reshape(new, new, 3, 5), atol=1e-5)
  if new > old:  # a patch made larger looks the same: the purpose of it all
    patch = np.random.default_rng(1).normal(size=(old, old, 3))
    larger = np.einsum("ij,kl,jlc->ikc", one, one, patch)
    np.testing.assert_allclose(np.einsum("ijc,ijcd->d", larger, got),
                               np.einsum("ijc,ijcd->d", patch, kernel),
                               atol=1e-4)


def test_another_patch_is_asked_for(sizes, tmp_path):
  path = save(tmp_path / "t.safetensors", as_timm(flat_params()))
  with pytest.raises(UserError, match="use backbone=vit_ti4"):
    backbones.load("vit_ti8", path, 32)
  module, params = backbones.load("vit_ti8", path, 32, resample_patch=True)
  assert params["embedding"]["kernel"].shape == (8, 8, 3, D)
  assert (params["pos_embedding"] == flat_params()["pos_embedding"]).all()
  out = str(tmp_path / "out.safetensors")
  cli.convert(path, out, patch=8)
  assert cli.describe(out)["backbone"] == "vit_ti8"
  assert cli.describe(out)["image_size"] == 32
  check_equal(trees.flatten(backbones.load("vit_ti8", out, 32)[1]),
              trees.flatten(params), 0)
  with pytest.raises(UserError, match="depth 2; vit_s8 has width 384"):
    backbones.load("vit_s8", path, 32, resample_patch=True)


def test_a_normalisation_is_kept_by_our_own_format(tmp_path):
  """timm's numbers, through `convert`; CLIP's are a name."""
  path = str(tmp_path / "ours.safetensors")
  module = backbones.make("vit_ti16", 32)
  weights.write(path, random_params(module), module.fields,
                normalisation="clip")
  again = str(tmp_path / "again.safetensors")
  cli.convert(path, again)
  for file in (path, again):
    assert weights.read(file).normalisation.mean[0] == 0.48145466
  with pytest.raises(UserError, match="unknown normalisation"):
    weights.write(str(tmp_path / "no.safetensors"),
                  trees.unflatten(flat_params()), FIELDS, normalisation="a")
  assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize("to, told", [
    ("bigvision", {}), ("timm", {"normalisation": "half"})])
def test_readers_have_to_be_told_a_normalisation_that_they_do_not_take(
    tmp_path, to, told):
  module = backbones.make("vit_ti16", 32, gelu="tanh")
  for name in ("half", "imagenet"):
    path = str(tmp_path / f"{name}.safetensors")
    weights.write(path, random_params(module), module.fields,
                  normalisation=name)
    _, untold = cli.convert(path, f"{path}.{to}", to)
    untold = {k: v for k, v in untold.items() if k == "normalisation"}
    assert untold == (told if name == "half" else {"normalisation": name})
  notes, _ = cli.compare(path, str(tmp_path / "half.safetensors"))
  assert "normalisation: imagenet, half" in notes
