"""TTC against its equations in numpy."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import DEPTH, WIDTH, features, numpy_tree, random_adapter
from ttc_jax import backbones, methods, optim, parallel, trees
from ttc_jax.errors import UserError
from ttc_jax.methods import ttc, tuned_rules

K = 4


def prepared(config, model, params, split):
  """(method, params with adapter, buffers) as stage 2 starts."""
  method = methods.load("ttc", config, model.backbone)
  on_devices = parallel.replicate(params)
  adapter, buffers = method.stages[-1].prepare(methods.Context(
      model, on_devices, {}, split.images, split.labels, 0))
  model = model._replace(handlers=method.handlers)
  return method, model, {**params, "adapter": adapter}, buffers


def eq_11(y, channels, kernel, scale, bias):
  out = np.array(y)
  picked = out[..., channels]
  out[..., channels] = picked + scale * (picked @ kernel + bias)
  return out


def handler_inputs():
  rng = np.random.default_rng(0)
  return (rng.normal(size=(2, 5, WIDTH)).astype(np.float32),
          {"channels": np.array([1, 4, 5, 11]), "scale": np.float32(0.5),
           "kernel": rng.normal(size=(K, K)).astype(np.float32),
           "bias": rng.normal(size=K).astype(np.float32)})


def test_handler_is_equation_11():
  y, p = handler_inputs()
  want = eq_11(y, p["channels"], p["kernel"], 0.5, p["bias"])
  got = ttc.adapt({k: jnp.asarray(v) for k, v in p.items()}, jnp.asarray(y), y)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_handler():
  """d/dA sum(g * out) = s x'^T g', and d/dy = g + s P^T A g'."""
  y, p = handler_inputs()
  g = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)

  def objective(kernel, y):
    return (g * ttc.adapt({**p, "kernel": kernel}, y, y)).sum()
  p = {k: jnp.asarray(v) for k, v in p.items()}
  of_kernel, of_y = jax.grad(objective, (0, 1))(p["kernel"], jnp.asarray(y))
  c = np.asarray(p["channels"])
  picked, g_picked = y[..., c].reshape(-1, K), g[..., c].reshape(-1, K)
  np.testing.assert_allclose(
      of_kernel, 0.5 * picked.T @ g_picked, rtol=1e-4, atol=1e-5)
  want = g.copy()
  want[..., c] += 0.5 * g[..., c] @ np.asarray(p["kernel"]).T
  np.testing.assert_allclose(of_y, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", ttc.POSITIONS)
@pytest.mark.sweep(keep=2)
def test_starts_as_the_identity(config, model, params, split, position):
  config.position = position
  _, with_adapter, new, buffers = prepared(config, model, params, split)
  before = features(model, params, split.images, {})
  after = features(with_adapter, new, split.images, buffers)
  np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("position", ["mlp", "mhsa", "both"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.sweep(keep=4)
def test_merged_equals_unmerged(config, model, params, split, position, bias,
                                blocks):
  config.position, config.bias, config.blocks = position, bias, blocks
  config.scale = 0.7
  method, tapped, new, buffers = prepared(config, model, params, split)
  new["adapter"] = random_adapter(new["adapter"])
  unmerged = features(tapped, new, split.images, buffers)
  merged = method.merge(numpy_tree(new), buffers, model.backbone)
  plain = features(model, {"backbone": merged, "adapter": {}}, split.images, {})
  np.testing.assert_allclose(plain, unmerged, atol=2e-5)
  assert np.abs(unmerged - features(model, params, split.images, {})).max() > .1


@pytest.mark.parametrize("position", ["stream_mlp", "stream_mhsa"])
def test_the_residual_stream_cannot_be_merged(config, vit, position):
  config.position = position
  method = methods.load("ttc", config, vit)
  assert method.merge is None and "residual stream" in method.cannot_merge


def test_only_the_last_blocks_are_adapted(config, model, params, split):
  config.blocks = 1
  _, tapped, new, buffers = prepared(config, model, params, split)
  assert {k: v["kernel"].shape for k, v in new["adapter"]["fc2"].items()} == {
      str(DEPTH - 1): (K, K)}
  new["adapter"] = random_adapter(new["adapter"])
  from ttc_jax import taps
  seen, plain = {}, {}
  tapped.features(new, split.images, buffers,
                  extra_tap=taps.record(("block",), seen))
  model.features(params, split.images, {},
                 extra_tap=taps.record(("block",), plain))
  same = [bool((seen["block", i] == plain["block", i]).all())
          for i in range(DEPTH)]
  assert same == [True] * (DEPTH - 1) + [False]


def counts(config, name, classes=100):
  """Tuned parameters on ViT-B/16 at 224 px, from shapes alone."""
  vit_b = backbones.make("vit_b16", 224)
  config.k = 96
  method = methods.load(name, config, vit_b)
  adapter = {}
  if method.handlers:
    adapter = jax.eval_shape(lambda: {
        site: {str(i): {"kernel": jnp.zeros((96, 96))} for i in range(12)}
        for site, _ in method.handlers})
  head = jax.eval_shape(lambda: {"kernel": jnp.zeros((768, classes)),
                                 "bias": jnp.zeros(classes)})
  params = {"backbone": backbones.shapes(vit_b), "adapter": adapter,
            "head": head}
  labels = trees.label(params, tuned_rules(method))
  return optim.counts(trees.split(params, labels, "tune")[0])


def test_published_counts_on_vit_b16(config):
  head = 768 * 100 + 100
  assert counts(config, "ttc") == {
      "module": 110_592, "norm": 38_400, "head": head}
  assert counts(config, "layernorm") == {
      "module": 0, "norm": 38_400, "head": head}
  assert counts(config, "linear") == {"module": 0, "norm": 0, "head": head}


def test_channels_are_the_top_k_of_the_score(config, model, params, split):
  from ttc_jax import importance
  config.position = "both"
  _, _, _, buffers = prepared(config, model, params, split)
  scores = importance.score(
      "taylor", model, parallel.replicate(params), {}, split.images,
      split.labels, ("proj", "fc2"))
  for site in ("proj", "fc2"):
    for i, row in enumerate(scores[site]):
      chosen = buffers[site][str(i)]["channels"]
      left_out = np.delete(row, chosen)
      assert row[chosen].min() >= left_out.max()


@pytest.mark.parametrize("key,value,message", [
    ("k", 17, "config.k is 17; it selects among the 16 channels"),
    ("blocks", 4, "config.blocks is 4; this backbone has 3 blocks"),
    ("position", "mpl", "did you mean mlp"),
    ("score", "taylr", "did you mean taylor"),
    ("stage1", "norms", "did you mean norm"),
])
def test_bad_options_name_the_fix(config, vit, key, value, message):
  config[key] = value
  with pytest.raises(UserError, match=message):
    methods.load("ttc", config, vit)


def test_stages_of_the_variants(config, vit):
  def stages(**options):
    config.update(options)
    return [s.name for s in methods.load("ttc", config, vit).stages]
  assert stages(stage1="norm") == ["align", "adapt"]
  assert stages(stage1="linear") == ["head", "adapt"]
  assert stages(stage1="none") == ["adapt"]
