"""Files of every format: with PyTorch's own models the same features; back
from our parameters the same bits."""
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.conftest import import_transformers
from tests.random_trees import random_params
from tests.torch_models import import_timm
from ttc_jax import backbones, trees
from ttc_jax import weights as weights_lib
from ttc_jax.backbones import swin, vit
from ttc_jax.errors import UserError
from ttc_jax.weights import formats, identity

SIZE, PATCH = 24, 8


def tiny(**fields):
  fields = {"gelu": "exact", **fields}
  return vit.ViT(32, 2, 4, 64, PATCH, SIZE, **fields)


def tiny_dinov3():
  return tiny(registers=3, rope=100.0, layer_scale=True, epsilon=1e-5)


def tiny_swin(**fields):
  return swin.Swin(16, (2, 2), 2, 32, window=4, **fields)


def images(size, count=2):
  return np.random.default_rng(0).normal(
      size=(count, size, size, 3)).astype(np.float32)


def features(module, params):
  return np.asarray(jax.jit(module.apply)(
      {"params": params}, images(module.image_size)))


def save(path, tensors):
  path = str(path)
  if path.endswith(".npz"):
    np.savez(path, **tensors)
  else:
    safetensors.numpy.save_file(tensors, path)
  return path


def check_same_bits(found, params):
  found, params = trees.flatten(found), trees.flatten(params)
  assert found.keys() == params.keys()
  for name, value in params.items():
    assert (found[name] == value).all(), name


# --- Out and in again ---------------------------------------------------------

ROUND_TRIPS = [
    ("npz", formats.BIGVISION, tiny(gelu="tanh")),
    ("npz", formats.BIGVISION, tiny(gelu="tanh", pool="gap")),
    ("safetensors", formats.TIMM, tiny()),
    ("safetensors", formats.TIMM, tiny(pool="gap", layer_scale=True)),
    ("safetensors", formats.TIMM, tiny(final_norm=False)),
    ("safetensors", formats.TIMM_DINOV3, tiny_dinov3()),
    ("safetensors", formats.HF_DINOV3, tiny_dinov3()),
    ("safetensors", formats.SWIN_TIMM, tiny_swin()),
    ("safetensors", formats.SWIN_MS, tiny_swin()),
    ("safetensors", formats.SWIN_HF, tiny_swin()),
]


@pytest.mark.parametrize("container, format_, module", ROUND_TRIPS)
def test_out_and_in_again_are_the_same_bits(
    container, format_, module, tmp_path):
  params = random_params(module)
  tensors = weights_lib.to_tensors(params, format_, module)
  read = weights_lib.read(save(tmp_path / f"file.{container}", tensors))
  assert read.format is format_
  known = {k: v for k, v in read.fields.items() if v is not None}
  assert known == {k: module.fields[k] for k in known}
  if format_ is not formats.TIMM_DINOV3:  # whose tensors do not show all
    assert read.fields == module.fields
  check_same_bits(weights_lib.fit(
      read._replace(fields=module.fields), backbones.shapes(module), "tiny"),
                  params)


@pytest.mark.parametrize("format_, module, word", [
    (formats.BIGVISION, tiny(layer_scale=True), "layer_scale=True"),
    (formats.BIGVISION, tiny(final_norm=False), "final_norm=False"),
    (formats.BIGVISION, tiny_swin(), "window=4"),
    (formats.TIMM, tiny_swin(), "Swin"),
    (formats.SWIN_HF, tiny(), "ViT"),
])
def test_what_a_format_cannot_hold_is_an_error(format_, module, word):
  with pytest.raises(UserError, match=word):
    weights_lib.to_tensors(random_params(module), format_, module)


# --- Into PyTorch's own models ------------------------------------------------

def torch_features(model, size):
  import torch
  with torch.no_grad():
    return model(torch.from_numpy(
        images(size).transpose(0, 3, 1, 2).copy())).numpy()


def load_state(model, tensors):
  """All of them, and nothing else, strictly."""
  import torch
  model.load_state_dict({n: torch.from_numpy(v) for n, v in tensors.items()})
  return model.eval()


def timm_vit(module, **more):
  timm = import_timm()
  return timm.models.vision_transformer.VisionTransformer(**{
      "img_size": module.image_size, "patch_size": module.patch,
      "embed_dim": module.width, "depth": module.depth,
      "num_heads": module.heads, "mlp_ratio": module.hidden / module.width,
      "num_classes": 0, "init_values": 1e-5 if module.layer_scale else None,
      **more})


TIMM = [
    (tiny(), {}),
    (tiny(layer_scale=True), {}),
    (tiny(pool="gap"), {"global_pool": "avg", "class_token": False,
                        "fc_norm": False}),
]


@pytest.mark.parametrize("module, options", TIMM)
def test_ours_in_timm_s_model(module, options):
  params = random_params(module)
  model = load_state(timm_vit(module, **options), weights_lib.to_tensors(
      params, formats.TIMM, module))
  assert np.abs(torch_features(model, module.image_size)
                - features(module, params)).max() < 1e-5


def load(read, size, **fields):
  """The module that a file is of, whatever its size, and its parameters."""
  sizes = vit.identify(identity.shapes_of(read)).sizes
  module = vit.ViT(sizes["width"], sizes["depth"], 4, sizes["hidden"],
                   sizes["patch"], size, **weights_lib.settled(read, fields))
  read = read._replace(fields=module.fields)
  return module, weights_lib.fit(read, backbones.shapes(module), "tiny")


def check_features(path, expected, size, format_, **fields):
  """The file gives the features, and its parameters go out and in again."""
  read = weights_lib.read(path)
  assert read.format is format_
  module, params = load(read, size, **fields)
  difference = np.abs(features(module, params) - expected).max()
  print(f"{format_.name} {module.fields}: {difference:.1e}")
  assert difference < 1e-4
  assert np.abs(expected).max() > 0.1
  return module, params


def shake(model):
  """No parameter at a special value."""
  import torch
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      spread = 0.1 if p.ndim < 2 else max(1, p.numel() / len(p)) ** -0.5
      norm = p.ndim == 1 and name.endswith("weight")
      p.copy_(float(norm) + spread * torch.randn(p.shape, generator=generator))
  return model.eval()


# --- timm's models ------------------------------------------------------------

TIMM_MODELS = {
    "plain": {},
    "dinov2 reg4": dict(reg_tokens=4, no_embed_class=True, init_values=1.0),
    "registers with positions": dict(reg_tokens=2),
    "siglip": dict(class_token=False, global_pool="map",
                   act_layer="gelu_tanh"),
    "clip": dict(pre_norm=True, act_layer="quick_gelu", norm_layer="clip"),
    "fc_norm": dict(class_token=False, global_pool="avg", fc_norm=True),
    "fc_norm and a token": dict(global_pool="avg"),
    "no norm": dict(final_norm=False),
}
GELU_OF = {"gelu_tanh": "tanh", "quick_gelu": "quick"}


@pytest.mark.sweep(keep=2)
@pytest.mark.parametrize("case", TIMM_MODELS)
def test_timm_s_vit(case, tmp_path):
  timm = import_timm()
  from functools import partial

  import torch
  options = dict(TIMM_MODELS[case])
  if options.get("norm_layer"):
    options["norm_layer"] = partial(torch.nn.LayerNorm, eps=1e-5)
  torch.manual_seed(0)
  model = shake(timm.models.vision_transformer.VisionTransformer(
      img_size=SIZE, patch_size=PATCH, embed_dim=32, depth=2, num_heads=4,
      mlp_ratio=4, num_classes=0, **options))
  path = save(tmp_path / "model.safetensors", {
      n: t.numpy() for n, t in model.state_dict().items()})
  gelu = GELU_OF.get(options.get("act_layer"))
  if gelu:
    with pytest.raises(UserError, match="does not say the field 'gelu'"):
      load(weights_lib.read(path), SIZE)
  module, params = check_features(
      path, torch_features(model, SIZE), SIZE, formats.TIMM,
      **({"gelu": gelu} if gelu else {}))
  ours = weights_lib.to_tensors(params, formats.TIMM, module)
  check_same_bits(load(weights_lib.read(save(
      tmp_path / "ours.safetensors", ours)), SIZE, gelu="exact")[1], params)


@pytest.mark.sweep
@pytest.mark.parametrize("options", [
    dict(qkv_bias=False), dict(qkv_bias=True),
    dict(qkv_bias=True, class_token=False)], ids=str)
@pytest.mark.parametrize("size", [SIZE, 40])
def test_timm_s_dinov3(options, size, tmp_path):
  timm = import_timm()
  from functools import partial

  import torch
  model = shake(timm.models.eva.Eva(**{
      "img_size": size, "patch_size": PATCH, "embed_dim": 32, "depth": 2,
      "num_heads": 4, "num_classes": 0, "init_values": 1e-5,
      "global_pool": "token" if options.get("class_token", True) else "avg",
      "use_rot_pos_emb": True, "use_abs_pos_emb": False, "use_fc_norm": False,
      "rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True,
      "num_reg_tokens": 3, "norm_layer": partial(torch.nn.LayerNorm, eps=1e-5),
      **options}))
  path = save(tmp_path / "model.safetensors", {
      n: t.numpy() for n, t in model.state_dict().items()})
  pool = "cls" if options.get("class_token", True) else "gap"
  with pytest.raises(UserError, match="'rope', which no tensor shows"):
    load(weights_lib.read(path), size)  # nor the pooling
  (tmp_path / "config.json").write_text(json.dumps({
      "architecture": "vit_small_patch16_dinov3",
      "global_pool": "token" if pool == "cls" else "avg"}))
  module, params = check_features(
      path, torch_features(model, size), size, formats.TIMM_DINOV3)
  assert module.pool == pool
  assert weights_lib.native_size(weights_lib.read(path)) is None
  if options["qkv_bias"]:
    load_state(model, weights_lib.to_tensors(
        params, formats.TIMM_DINOV3, module))
    assert np.abs(torch_features(model, size)
                  - features(module, params)).max() < 1e-5


def test_dinov3_by_its_authors_is_refused_by_name(tmp_path):
  path = save(tmp_path / "model.safetensors", {
      n: np.zeros((1, 1, 1, 1), np.float32) for n in (
          "patch_embed.proj.weight", "storage_tokens", "blocks.0.ls1.gamma")})
  with pytest.raises(UserError, match="timm's and Hugging Face's files"):
    weights_lib.read(path)


def test_timm_s_distilled_deit(tmp_path):
  timm = import_timm()
  model = shake(timm.models.deit.VisionTransformerDistilled(
      img_size=SIZE, patch_size=PATCH, embed_dim=32, depth=2, num_heads=4,
      num_classes=3))
  path = save(tmp_path / "model.safetensors", {
      n: t.numpy() for n, t in model.state_dict().items()})
  model.reset_classifier(0)  # the mean of both tokens
  module, _ = check_features(
      path, torch_features(model, SIZE), SIZE, formats.TIMM)
  assert (module.pool, module.registers, module.prefix) == ("distilled", 1, 2)


@pytest.mark.parametrize("architecture, name", [
    ("vit_pe_core_tiny_patch16_384", "a Perception Encoder"),
    ("vit_base_patch16_rope_reg1_gap_256", "rotary positions that are not"),
    ("eva02_tiny_patch14_224", "an EVA-02")])
def test_timm_s_other_architectures_are_refused_by_name(
    tmp_path, architecture, name):
  path = save(tmp_path / "model.safetensors", weights_lib.to_tensors(
      random_params(tiny()), formats.TIMM, tiny()))
  (tmp_path / "config.json").write_text(
      json.dumps({"architecture": architecture}))
  with pytest.raises(UserError, match=name):
    weights_lib.read(path)


@pytest.mark.parametrize("options, words", [
    # As the Perception Encoder, whose rotary positions are in no tensor.
    (dict(pre_norm=True, global_pool="map", class_token=False), "'rope'"),
    (dict(pre_norm=True, final_norm=False), "'rope'")])
def test_what_may_have_rotary_positions_is_in_doubt(options, words, tmp_path):
  timm = import_timm()
  model = timm.models.vision_transformer.VisionTransformer(
      img_size=SIZE, patch_size=PATCH, embed_dim=32, depth=2, num_heads=4,
      num_classes=0, **options)
  path = save(tmp_path / "model.safetensors", {
      n: t.numpy() for n, t in model.state_dict().items()})
  with pytest.raises(UserError, match=words):
    load(weights_lib.read(path), SIZE, gelu="exact")
  load(weights_lib.read(path), SIZE, gelu="exact", rope=0.0)
  (tmp_path / "config.json").write_text(
      json.dumps({"architecture": "vit_base_patch16_clip_224"}))
  load(weights_lib.read(path), SIZE, gelu="exact")


# --- Hugging Face's models ----------------------------------------------------

def hugging_face(kind, **options):
  transformers = import_transformers()
  config = getattr(transformers, f"{kind}Config")(**{
      "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
      "image_size": SIZE, "patch_size": PATCH, **options})
  return shake(getattr(transformers, f"{kind}Model")(config))


HIDDEN = dict(intermediate_size=64)
HF_MODELS = [
    ("ViT", {**HIDDEN, "layer_norm_eps": 1e-3}, formats.HF_VIT),
    ("ViT", {**HIDDEN, "hidden_act": "gelu_new"}, formats.HF_VIT),
    ("DeiT", HIDDEN, formats.HF_VIT),
    ("ViTMSN", {**HIDDEN, "layer_norm_eps": 1e-3}, formats.HF_VIT),
    ("Dinov2", {"mlp_ratio": 2}, formats.HF_DINOV2),
    ("Dinov2WithRegisters", {"mlp_ratio": 2}, formats.HF_DINOV2),
    ("DINOv3ViT", {**HIDDEN, "num_register_tokens": 3}, formats.HF_DINOV3),
    ("DINOv3ViT", {**HIDDEN, "key_bias": True}, formats.HF_DINOV3),
    ("CLIPVision", HIDDEN, formats.HF_CLIP),
    ("CLIPVision", {**HIDDEN, "hidden_act": "gelu"}, formats.HF_CLIP),
    ("SiglipVision", HIDDEN, formats.HF_SIGLIP),
]


@pytest.mark.sweep(keep=2)
@pytest.mark.parametrize("kind, options, format_", HF_MODELS)
def test_hugging_face_s_vits(kind, options, format_, tmp_path):
  model = hugging_face(kind, **options)
  model.save_pretrained(tmp_path)

  def features_of(model):
    import torch
    with torch.no_grad():
      out = model(torch.from_numpy(images(SIZE).transpose(0, 3, 1, 2).copy()))
    return (out.pooler_output if kind in ("CLIPVision", "SiglipVision")
            else out.last_hidden_state[:, 0]).numpy()
  module, params = check_features(
      str(tmp_path / "model.safetensors"), features_of(model), SIZE, format_)
  # HF_VIT has registers, but no class of theirs.
  if kind == "DeiT" or options.get("key_bias"):
    return
  ours = weights_lib.to_tensors(params, format_, module)
  save(tmp_path / "model.safetensors", ours)
  again, loading = type(model).from_pretrained(
      tmp_path, output_loading_info=True)
  assert not loading["unexpected_keys"]
  assert not [n for n in loading["missing_keys"]
              if "pooler" not in n and "mask_token" not in n]
  assert np.abs(features_of(again.eval()) - features(module, params)).max() < (
      1e-5)


def test_hugging_face_s_other_models_are_refused(tmp_path):
  hugging_face("IJepa", **HIDDEN).save_pretrained(tmp_path)
  path = str(tmp_path / "model.safetensors")
  with pytest.raises(UserError, match="of a 'ijepa'"):
    weights_lib.read(path)
  (tmp_path / "config.json").unlink()
  with pytest.raises(UserError, match="0 tokens before the patches"):
    load(weights_lib.read(path), SIZE)


def test_hugging_face_s_deit_with_a_teacher_reads_both_tokens(tmp_path):
  import torch
  transformers = import_transformers()
  model = shake(transformers.DeiTForImageClassificationWithTeacher(
      transformers.DeiTConfig(
          hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
          image_size=SIZE, patch_size=PATCH, intermediate_size=64)))
  model.save_pretrained(tmp_path)
  with torch.no_grad():
    out = model.deit(torch.from_numpy(
        images(SIZE).transpose(0, 3, 1, 2).copy())).last_hidden_state
  module, _ = check_features(
      str(tmp_path / "model.safetensors"), out[:, :2].mean(1).numpy(), SIZE,
      formats.HF_VIT)
  assert module.pool == "distilled"


@pytest.mark.parametrize("change, words", [
    ({"image_size": [16, 40]}, "16 x 40 px, which are 2 x 5 patches"),
    ({"patch_size": 4, "image_size": 12}, "patch 8, while.*states 4"),
    ({"hidden_size": 48}, "width 32, while.*states 48"),
    ({"num_hidden_layers": 3}, "depth 2, while.*states 3"),
    ({"num_attention_heads": 2}, "heads 2, .*tiny has.*heads 4"),
    ({"image_size": "24"}, "image_size '24'")])
def test_a_config_that_contradicts_the_tensors(change, words, tmp_path):
  hugging_face("ViT", **HIDDEN).save_pretrained(tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | change))
  with pytest.raises(UserError, match=words):
    load(weights_lib.read(str(tmp_path / "model.safetensors")), SIZE)


def test_normalisation_is_of_the_weights(tmp_path):
  """By Hugging Face's preprocessor, timm's config and Google's formats."""
  hugging_face("ViT", **HIDDEN).save_pretrained(tmp_path)
  path, beside = str(tmp_path / "model.safetensors"), (
      tmp_path / "preprocessor_config.json")
  assert weights_lib.normalisation(path) is None
  mean, std = [0.48, 0.45, 0.4], [0.26, 0.26, 0.27]
  beside.write_text(json.dumps({"image_mean": mean, "image_std": std}))
  assert weights_lib.normalisation(path) == (tuple(mean), tuple(std))
  for bad in ({"image_mean": [1, 2], "image_std": std},
              {"image_mean": mean, "image_std": [0, 1, 1]},
              {"image_mean": "half", "image_std": std}):
    beside.write_text(json.dumps(bad))
    with pytest.raises(UserError, match="expected three numbers"):
      weights_lib.read(path)
  timm = tmp_path / "timm"
  timm.mkdir()
  path = save(timm / "model.safetensors", weights_lib.to_tensors(
      random_params(tiny()), formats.TIMM, tiny()))
  (timm / "config.json").write_text(json.dumps({
      "architecture": "x", "pretrained_cfg": {"mean": mean, "std": std}}))
  assert weights_lib.read(path).normalisation == (tuple(mean), tuple(std))
  path = save(tmp_path / "bv.npz", weights_lib.to_tensors(
      random_params(tiny(gelu="tanh")), formats.BIGVISION, tiny(gelu="tanh")))
  assert weights_lib.normalisation(path) == formats.HALF
  assert weights_lib.normalisation("random") is None


def test_a_clip_without_its_config_is_in_doubt(tmp_path):
  hugging_face("CLIPVision", **HIDDEN).save_pretrained(tmp_path)
  (tmp_path / "config.json").unlink()
  read = weights_lib.read(str(tmp_path / "model.safetensors"))
  with pytest.raises(UserError, match="put the model's config.json beside it"):
    load(read, SIZE)
  assert load(read, SIZE, gelu="quick")[0].gelu == "quick"


# Grids that windows divide: where they do not, timm shifts before it pads, the
# authors, Hugging Face and we pad first.
@pytest.mark.sweep
@pytest.mark.parametrize("depths, window, size", [
    ((2, 2), 4, 32), ((2, 2), 4, 64), ((1, 2, 1), 3, 48), ((1, 2, 1), 3, 96)])
def test_timm_s_swin(depths, window, size, tmp_path):
  timm = import_timm()
  model = shake(timm.models.swin_transformer.SwinTransformer(
      img_size=size, patch_size=4, embed_dim=16, depths=depths,
      num_heads=[2 * 2 ** i for i in range(len(depths))], num_classes=0,
      window_size=window))
  read = weights_lib.read(save(tmp_path / "model.safetensors", {
      n: t.numpy() for n, t in model.state_dict().items()}))
  assert read.format is formats.SWIN_TIMM
  module = swin.Swin(16, depths, 2, size, **read.fields)
  params = weights_lib.fit(read, backbones.shapes(module), "tiny")
  expected = torch_features(model, size)
  difference = np.abs(features(module, params) - expected).max()
  print(f"swin_timm {depths} at {size}: {difference:.1e}")
  assert difference < 1e-4
  # timm keeps indices and masks out of what it loads.
  load_state(model, weights_lib.to_tensors(params, formats.SWIN_TIMM, module))
  assert np.abs(torch_features(model, size)
                - features(module, params)).max() < 1e-4
