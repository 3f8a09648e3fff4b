"""Files of every format: with PyTorch's own models the same features; back
from our parameters the same bits."""
import numpy as np
import pytest
import safetensors.numpy

from tests.torch_models import import_timm
from ttc_jax import backbones, trees
from ttc_jax.backbones import formats, swin, vit, weights as weights_lib
from ttc_jax.errors import UserError

SIZE, PATCH = 24, 8


def tiny(**fields):
  fields = {"gelu": "exact", **fields}
  return vit.ViT(32, 2, 4, 64, PATCH, SIZE, **fields)


def tiny_swin(**fields):
  return swin.Swin(16, (2, 2), 2, 32, window=4, **fields)


def random_params(module, seed=1):
  """No parameter at a special value."""
  rng = np.random.default_rng(seed)

  def draw(name, leaf):
    spread = 0.1 if len(leaf.shape) == 1 else (
        max(1, leaf.size // leaf.shape[-1]) ** -0.5)
    mean = 1.0 if name.endswith("scale") else 0.0
    return rng.normal(mean, spread, leaf.shape).astype(np.float32)
  return trees.map_with_names(draw, backbones.shapes(module))


def images(size, count=2):
  return np.random.default_rng(0).normal(
      size=(count, size, size, 3)).astype(np.float32)


def features(module, params):
  return np.asarray(module.apply(
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
  assert read.fields == module.fields
  check_same_bits(weights_lib.fit(
      read, backbones.shapes(module), "tiny"), params)


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
