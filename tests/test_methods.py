"""Every method: its formula and gradient, where it starts, what it counts,
and that merging changes nothing."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import DEPTH, features, numpy_tree, random_adapter
from ttc_jax import (
  backbones,
  importance,
  methods,
  optim,
  parallel,
  taps,
  trees,
)
from ttc_jax.backbones import layers
from ttc_jax.errors import UserError
from ttc_jax.methods import (
  adapter,
  layernorm,
  lora,
  noah,
  sct,
  ssf,
  ttc,
  tuned_rules,
  vpt_deep,
  vpt_shallow,
)
from ttc_jax.model import Model, init_head

CHANNELS = np.array([1, 4, 5, 11])


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- Formulas -----------------------------------------------------------------

def on_channels(y, change, keep=1.0):
  out = y.copy()
  out[..., CHANNELS] = keep * out[..., CHANNELS] + change
  return out


def double(x):
  return x if np.asarray(x).dtype.kind in "iu" else np.asarray(x, np.float64)


# Buffers that have no gradient.
INTEGERS = ("channels", "size")


def quick_gelu(x):
  return x / (1 + np.exp(-1.702 * x))


def relu(x):
  return x * (x > 0)


FORMULAS = {
    "adapter, serial": (
        adapter.handler("relu", "output"),
        {"down": normal(16, 3), "down_bias": normal(3), "up": normal(3, 16),
         "up_bias": normal(16), "scale": np.float32(0.3)},
        lambda p, y, x: y + p["scale"] * (relu(
            y @ p["down"] + p["down_bias"]) @ p["up"] + p["up_bias"])),
    "adapter, parallel": (
        adapter.handler("silu", "input"),
        {"down": normal(9, 3), "down_bias": normal(3), "up": normal(3, 16),
         "up_bias": normal(16), "scale": np.float32(0.3)},
        lambda p, y, x: y + p["scale"] * (
            (h := x @ p["down"] + p["down_bias"]) / (1 + np.exp(-h)) @ p["up"]
            + p["up_bias"])),
    "adapter, noah": (
        adapter.handler("quick", "branch"),
        {"down": normal(16, 3), "down_bias": normal(3), "up": normal(3, 16),
         "up_bias": normal(16), "scale": np.float32(0.7)},
        lambda p, y, x: y + p["scale"] * (quick_gelu(
            (y - x) @ p["down"] + p["down_bias"]) @ p["up"] + p["up_bias"])),
    "noah, adapter of 2": (
        noah.bottleneck("output"),
        {"down": normal(16, 3), "down_bias": normal(3), "up": normal(3, 16),
         "up_bias": normal(16), "size": np.int32(2)},
        lambda p, y, x: y + quick_gelu(
            y @ p["down"][:, :2] + p["down_bias"][:2]) @ p["up"][:2]
        + p["up_bias"]),
    "noah, lora of 2": (
        noah.low_rank("b_v"),
        {"a": normal(9, 3), "b_v": normal(3, 16), "size": np.int32(2)},
        lambda p, y, x: y + x @ p["a"][:, :2] @ p["b_v"][:2]),
    "lora, shared": (
        lora.low_rank("b_k"),
        {"a": normal(9, 2), "b_q": normal(2, 16, seed=1), "b_k": normal(2, 16),
         "scale": np.float32(2)},
        lambda p, y, x: y + p["scale"] * x @ p["a"] @ p["b_k"]),
    "lora": (
        lora.low_rank("b"),
        {"a": normal(9, 2), "b": normal(2, 16), "scale": np.float32(2)},
        lambda p, y, x: y + p["scale"] * x @ p["a"] @ p["b"]),
    "ssf": (
        ssf.scale_and_shift, {"scale": normal(16), "shift": normal(16, seed=1)},
        lambda p, y, x: y * p["scale"] + p["shift"]),
    "sct": (
        ttc.adapt,
        {"channels": CHANNELS, "kernel": normal(4, 4), "bias": normal(4),
         "scale": np.float32(0.4)},
        lambda p, y, x: on_channels(y, p["scale"] * (
            y[..., CHANNELS] @ p["kernel"] + p["bias"]))),
    "sct, scale on x": (
        sct.adapt_scaled,
        {"channels": CHANNELS, "kernel": normal(4, 4), "bias": normal(4),
         "scale": np.float32(0.4)},
        lambda p, y, x: on_channels(
            y, y[..., CHANNELS] @ p["kernel"] + p["bias"], p["scale"])),
    "ttc, rows": (
        ttc.adapt_rows,
        {"channels": CHANNELS, "kernel": normal(9, 4), "bias": normal(4),
         "scale": np.float32(0.4)},
        lambda p, y, x: on_channels(
            y, p["scale"] * (x @ p["kernel"] + p["bias"]))),
    "vpt, shallow": (
        vpt_shallow.insert(1), {"prompts": normal(3, 16)},
        lambda p, y, x: np.concatenate([
            y[:, :1], np.repeat(p["prompts"][None], len(y), 0), y[:, 1:]], 1)),
    "vpt, deep": (
        vpt_deep.replace(1), {"prompts": normal(3, 16)},
        lambda p, y, x: np.concatenate([
            y[:, :1], np.repeat(p["prompts"][None], len(y), 0), y[:, 4:]], 1)),
}


def difference(formula, args, place, step, g):
  """Central difference of sum(g * formula) along `step` at a place."""
  i, leaf = place

  def at(sign):
    new = list(args)
    new[i] = (args[i] + sign * step if leaf is None
              else {**args[i], leaf: args[i][leaf] + sign * step})
    return (formula(*new) * g).sum()
  return (at(1) - at(-1)) / 2


@pytest.mark.parametrize("name", FORMULAS)
def test_a_handler_is_its_formula_and_so_is_its_gradient(name):
  """In float64, against numpy; the gradient against differences."""
  handler, p, formula = FORMULAS[name]
  args = [jax.tree.map(double, t) for t in (
      p, normal(2, 5, 16, seed=2),
      normal(2, 5, 16 if name == "adapter, noah" else 9, seed=3))]
  with jax.enable_x64(True):
    got, pull = jax.vjp(lambda *a: handler(*a), *jax.tree.map(
        jnp.asarray, args))
    g = normal(*got.shape, seed=4).astype(np.float64)
    grads = jax.tree.map(np.asarray, pull(jnp.asarray(g)))
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, formula(*args), rtol=1e-9, atol=1e-9)
  places = [*((0, leaf) for leaf in p if leaf not in INTEGERS),
            (1, None), (2, None)]
  for i, leaf in places:
    grad = grads[i] if leaf is None else grads[i][leaf]
    step = 1e-5 * normal(*np.shape(grad), seed=5)
    np.testing.assert_allclose(
        difference(formula, args, (i, leaf), step, g), (grad * step).sum(),
        rtol=1e-5, atol=1e-11, err_msg=leaf)


ACTIVATIONS = {
    "relu": relu, "quick": quick_gelu,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "exact": lambda x: x * (1 + np.vectorize(math.erf)(x / 2 ** 0.5)) / 2,
    "tanh": lambda x: x / 2 * (1 + np.tanh(
        (2 / np.pi) ** 0.5 * (x + 0.044715 * x ** 3))),
}


@pytest.mark.parametrize("name", adapter.ACTIVATIONS)
def test_an_activation_is_its_formula(name):
  x = normal(100).astype(np.float64)
  with jax.enable_x64(True):
    np.testing.assert_allclose(
        adapter.ACTIVATIONS[name](jnp.asarray(x)), ACTIVATIONS[name](x),
        rtol=1e-9, atol=1e-12)


def test_gelus_are_named_as_those_of_backbones():
  assert set(layers.GELU) <= set(adapter.ACTIVATIONS)
  for name, gelu in layers.GELU.items():
    np.testing.assert_allclose(
        gelu(normal(100)), adapter.ACTIVATIONS[name](normal(100)), atol=1e-6)


def ones(*shape):
  return jnp.ones(shape, jnp.float32)


DROPS = {  # the output is 1 where nothing is dropped
    "lora": (lora.low_rank("b"), {"a": jnp.eye(50), "b": jnp.eye(50),
                                  "scale": ones()}),
    "adapter": (adapter.handler("relu", "input"), {
        "down": jnp.eye(50), "down_bias": jnp.zeros(50), "up": jnp.eye(50),
        "up_bias": jnp.zeros(50), "scale": ones()}),
    "noah, lora": (noah.low_rank("b"), {"a": jnp.eye(50), "b": jnp.eye(50)}),
    "noah, adapter": (noah.bottleneck("branch"), {
        "down": 50 * jnp.eye(50), "down_bias": jnp.zeros(50),
        "up": jnp.eye(50) / 50, "up_bias": jnp.zeros(50)}),
}


@pytest.mark.parametrize("name", DROPS)
def test_dropout_zeroes_a_share_in_training_alone(name):
  handler, p = DROPS[name]
  y, x = jnp.zeros((2, 4, 50)), ones(2, 4, 50)
  if name == "noah, adapter":  # of y - x
    x = -x
  plain = handler(p, y, x)
  np.testing.assert_allclose(plain, 1, rtol=1e-6)
  key = jax.random.key(0)
  np.testing.assert_array_equal(handler({**p, "key": key}, y, x), plain)
  p = {**p, "dropout": jnp.float32(0.25)}
  np.testing.assert_array_equal(handler(p, y, x), plain)
  some = handler({**p, "key": key}, y, x)
  np.testing.assert_allclose(np.unique(np.round(some, 5)), [0, 1.33333])
  assert 0.15 < float((some == 0).mean()) < 0.35
  assert (some[0] != some[1]).any()


def test_shared_lora_has_one_dropout_and_one_a_for_q_k_and_v():
  """Three sites, one tree; each has a b of its own."""
  p = {"a": jnp.eye(50), "b_q": jnp.eye(50), "b_k": 2 * jnp.eye(50),
       "b_v": 3 * jnp.eye(50)}
  fixed = {"scale": ones(), "dropout": jnp.float32(0.5)}
  y, x = jnp.zeros((2, 4, 50)), ones(2, 4, 50)

  def outputs(key):
    tap = taps.bind(dict(lora.shared(("q", "k", "v"))), {"q": {"0": p}},
                    {"q": {"0": fixed}}, key)
    assert (tap("k", 1, y, x) == y).all()  # block 1 has none
    return [np.asarray(tap(site, 0, y, x)) for site in ("q", "k", "v")]
  for i, got in enumerate(outputs(None)):
    np.testing.assert_array_equal(got, (i + 1) * x)
  q, k, v = outputs(jax.random.key(0))
  assert set(np.unique(q)) == {0, 2}
  np.testing.assert_array_equal(k, 2 * q)
  np.testing.assert_array_equal(v, 3 * q)


def test_parameters_without_a_handler_are_an_error():
  with pytest.raises(ValueError, match="'k', which has no handler"):
    taps.bind({}, {"k": {"0": {"a": ones(1)}}}, {})("k", 0, ones(1), ones(1))


@pytest.mark.parametrize("placement, spared", [
    ("noah", True), ("pfeiffer", False)])
def test_drop_path_spares_the_adapter_of_noah(
    config, model, params, split, placement, spared):
  """x + z + adapter(z), z the branch that drop-path leaves or drops."""
  config.adapter.update(placement=placement, activation="quick", scale=1.0)
  model = model._replace(backbone=model.backbone.clone(
      drop_path=0.5, every_token=True))
  _, tuned, new, buffers = prepared(config, "adapter/as is", model, params,
                                    split)
  new["adapter"] = random_adapter(new["adapter"])
  (site,) = new["adapter"]
  p = new["adapter"][site][str(DEPTH - 1)]

  def record(key):
    seen = {}

    def tap(site, block, y, x):
      seen[site, block] = y, x
      return y
    tuned.features(new, split.images, buffers, extra_tap=tap, key=key)
    last = DEPTH - 1
    return (*seen["block", last], *seen["fc2", last][:1])
  y, x, z = map(np.asarray, jax.jit(record)(jax.random.key(0)))

  def adapted(z):
    return z + quick_gelu(z @ p["down"] + p["down_bias"]) @ p["up"] + p[
        "up_bias"]
  # Of pfeiffer the site "fc2" has the adapter already.
  kept = adapted(z / 0.5) if spared else z / 0.5
  dropped = adapted(np.zeros_like(z)) if spared else np.zeros_like(z)
  is_kept = np.abs(y - x - kept).max((1, 2)) < 1e-4
  is_dropped = np.abs(y - x - dropped).max((1, 2)) < 1e-4
  assert (is_kept ^ is_dropped).all()
  assert is_kept.any() and is_dropped.any()


def test_prompts_drop_out_in_training_alone_and_per_example():
  p = {"prompts": jnp.ones((50, 16)), "dropout": jnp.float32(0.25)}
  y = jnp.zeros((2, 2, 16))
  assert (vpt_shallow.insert(1)(p, y, y)[:, 1:51] == 1).all()
  some = vpt_shallow.insert(1)({**p, "key": jax.random.key(0)}, y, y)[:, 1:51]
  assert (some[0] != some[1]).any()
  np.testing.assert_allclose(np.unique(some), [0, 1 / 0.75], rtol=1e-6)
  assert 0.15 < float((some == 0).mean()) < 0.35


# --- Laws of every method -----------------------------------------------------

VARIANTS = {
    "bias": {}, "layernorm": {}, "linear": {}, "full": {}, "ttc": {},
    "vpt_shallow": {"vpt.dropout": 0.0}, "vpt_deep": {"vpt.dropout": 0.0},
    "adapter": {}, "ssf": {"ssf.spread": 0.0}, "lora": {}, "sct": {},
    "adapter/pfeiffer": {"adapter.placement": "pfeiffer"},
    "adapter/houlsby": {"adapter.placement": "houlsby"},
    "lora/all": {"lora.sites": lora.SITES},
    "adapter/noah": {"adapter.placement": "noah",
                     "adapter.activation": "quick", "adapter.dropout": 0.1},
    "lora/shared": {"lora.sites": ("q", "k", "v"), "lora.shared": True,
                    "lora.dropout": 0.1},
    "sct/blocks": {"sct.position": "mlp", "blocks": 2},
    "sct/mlp": {"sct.position": "mlp"}, "sct/qv": {"sct.position": "qv"},
    "sct/scaled": {"sct.position": "mlp", "sct.scale_on_x": True},
    "ttc/rows": {"tune": "rows", "position": "mhsa", "bias": True},
    "ttc/joint": {"stage1": "none"},
}
RULES_ALONE = ("bias", "layernorm", "linear", "full")


def configured(config, variant):
  for key, value in VARIANTS.get(variant, {}).items():
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
  return config


def prepared(config, variant, model, params, split):
  """(method, model with handlers, params, buffers) before its last stage."""
  method = methods.load(
      variant.split("/")[0], configured(config, variant), model.backbone)
  prepare, buffers = method.stages[-1].prepare, {}
  if prepare:
    adapter, buffers = prepare(methods.Context(
        model, parallel.replicate(params), {}, split.images, split.labels, 0))
    params = {**params, "adapter": adapter}
  return (method, model._replace(handlers=method.handlers), params, buffers)


@pytest.mark.parametrize("variant", [
    v for v in VARIANTS if v not in RULES_ALONE and "vpt" not in v])
@pytest.mark.sweep(keep=6)
def test_starts_as_the_pretrained_model(config, model, params, split, variant):
  _, tuned, new, buffers = prepared(config, variant, model, params, split)
  np.testing.assert_array_equal(
      features(tuned, new, split.images, buffers),
      features(model, params, split.images, {}))


def test_ssf_starts_near_the_pretrained_model(config, model, params, split):
  method = methods.load("ssf", config, model.backbone)
  adapter, _ = method.stages[0].prepare(methods.Context(
      model, params, {}, split.images, split.labels, 0))
  for name, leaf in trees.flatten(adapter).items():
    assert abs(leaf.mean() - name.endswith("scale")) < 0.03
    assert 0.005 < leaf.std() < 0.04


@pytest.mark.parametrize("pool", ["cls", "gap"])
@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v not in RULES_ALONE])
@pytest.mark.sweep(keep=8)
def test_what_can_be_merged_is_exact_and_the_rest_says_why_not(
    config, model, params, split, variant, pool):
  model = model._replace(backbone=model.backbone.clone(pool=pool))
  method, tuned, new, buffers = prepared(
      config, variant, model, params, split)
  new["adapter"] = random_adapter(new["adapter"])
  unmerged = features(tuned, new, split.images, buffers)
  plain = features(model, params, split.images, {})
  assert np.abs(unmerged - plain).max() > .01
  if not method.merge:
    assert method.cannot_merge
    return
  merged = method.merge(numpy_tree(new), buffers, model.backbone)
  np.testing.assert_allclose(
      features(model, {"backbone": merged, "adapter": {}}, split.images, {}),
      unmerged, rtol=1e-3, atol=1e-4)


def test_norms_fold_into_the_layers_after_them(model, params, split):
  folded = layernorm.merge(numpy_tree(params), {}, model.backbone)
  flat = trees.flatten(folded)
  for path in (*model.backbone.norms["norm1"], *model.backbone.norms["norm2"]):
    assert (flat[f"{path}/scale"] == 1).all()
    assert (flat[f"{path}/bias"] == 0).all()
  np.testing.assert_allclose(
      features(model, {"backbone": folded, "adapter": {}}, split.images, {}),
      features(model, params, split.images, {}), atol=1e-4)


def counts(config, name):
  """Tuned parameters on ViT-B/16 at 224 px."""
  vit_b = backbones.make("vit_b16", 224)
  config.k = 96
  config.score = config.sct.score = "random"
  method = methods.load(name, config, vit_b)
  params = {"backbone": backbones.shapes(vit_b), "adapter": {},
            "head": init_head(768, 100, 0)}
  if prepare := method.stages[-1].prepare:
    params["adapter"], _ = prepare(methods.Context(
        Model(vit_b, "half"), params, {}, None, None, 0))
  labels = trees.label(params, tuned_rules(method))
  got = optim.counts(trees.split(params, labels, "tune")[0])
  assert got.pop("head") == 76_900
  return got["module"], got["norm"]


@pytest.mark.parametrize("name, changes, module, norm", [
    ("linear", {}, 0, 0),
    # timm has 85,798,656: [CLS] has a position of its own there.
    ("full", {}, 85_798_656 - 768 - 38_400, 38_400),
    ("layernorm", {}, 0, 38_400),
    ("bias", {}, 102_912 - 19_200, 19_200),
    ("ttc", {}, 110_592, 38_400),
    ("ttc", {"tune": "rows", "position": "mhsa"}, 884_736, 38_400),
    ("ssf", {}, 205_824, 0),
    ("lora", {}, 294_912, 0),
    ("lora", {"lora.rank": 4, "lora.sites": ("fc1",)}, 12 * 4 * 3840, 0),
    ("lora", {"lora.sites": ("q", "k", "v"), "lora.shared": True},
     12 * 8 * 4 * 768, 0),
    ("adapter", {}, 156_768, 0),
    ("adapter", {"adapter.placement": "noah"}, 156_768, 0),
    ("sct", {"blocks": 3}, 3 * (96 * 96 + 96), 0),
    ("adapter", {"adapter.placement": "houlsby"}, 2 * 156_768, 0),
    ("vpt_deep", {"vpt.prompts": 7}, 12 * 7 * 768, 0),
    ("vpt_shallow", {"vpt.prompts": 7}, 7 * 768, 0),
    ("sct", {}, 12 * (96 * 96 + 96), 0),
])
def test_parameters_on_vit_b16(config, name, changes, module, norm):
  for key, value in changes.items():
    section, _, key = key.rpartition(".")
    (config[section] if section else config)[key] = value
  assert counts(config, name) == (module, norm)


def test_the_mean_of_patches_leaves_prompts_out(config, model, params, split):
  """Prompts that no query looks at change nothing."""
  for final_norm in (True, False):
    vit = model.backbone.clone(pool="gap", final_norm=final_norm)
    small = model._replace(backbone=vit)
    _, tuned, new, buffers = prepared(
        config, "vpt_shallow", small, params, split)
    # Keys of the prompts far away from every query: no weight in the softmax.

    def hide(site, block, y, x):
      return (y.at[..., :config.vpt.prompts].set(-1e9)
              if site == "scores" else y)
    got = features(tuned, new, split.images, buffers, extra_tap=hide)
    np.testing.assert_allclose(
        got, features(small, params, split.images, {}), atol=1e-5)


@pytest.mark.parametrize("name, key, value, message", [
    ("adapter", "adapter.placement", "serial", "unknown adapter.placement"),
    ("adapter", "adapter.activation", "rulu", "did you mean relu"),
    ("adapter", "adapter.activation", "gelu", "known: exact, quick, relu"),
    ("adapter", "adapter.width", 0, "config.adapter.width is 0"),
    ("adapter", "adapter.dropout", 1.0, "dropout is 1.0; give 0 to below 1"),
    ("lora", "lora.dropout", float("nan"), "lora.dropout is nan"),
    ("noah", "noah.dropout", -0.1, "noah.dropout is -0.1"),
    ("sct", "blocks", 4, "config.blocks is 4; this backbone has 3 blocks"),
    ("lora", "lora.sites", ("qkv",), "unknown lora.sites 'qkv'"),
    ("lora", "lora.rank", 0, "rank of 1 or more"),
    ("vpt_deep", "vpt.prompts", 0, "1 or more"),
    ("ssf", "ssf.spread", -1.0, "config.ssf.spread is -1"),
    ("sct", "sct.position", "stream", "unknown sct.position"),
    ("sct", "k", 17, "among the 16 channels"),
    ("ttc", "tune", "row", "did you mean rows"),
])
def test_a_wrong_option_is_one_sentence(config, vit, name, key, value, message):
  section, _, key = key.rpartition(".")
  (config[section] if section else config)[key] = value
  with pytest.raises(UserError, match=message):
    methods.load(name, config, vit)


@pytest.mark.parametrize("placement, scale", [
    ("parallel", 0.1), ("pfeiffer", 1.0), ("houlsby", 1.0)])
def test_adapters_have_the_scale_of_their_paper(
    config, model, placement, scale):
  config.adapter.placement = placement
  method = methods.load("adapter", config, model.backbone)
  _, buffers = method.stages[0].prepare(methods.Context(
      model, {}, {}, None, None, 0))
  assert {float(v) for v in trees.flatten(buffers).values()} == {
      float(np.float32(scale))}


@pytest.mark.parametrize("name, values, sites", [
    ("ttc", {"position": "stream_mhsa", "score": "block"}, ("attention",)),
    ("ttc", {"position": "stream_mhsa", "score": "taylor"}, ("proj",)),
    ("sct", {"sct.position": "attention", "sct.score": "block"},
     ("attention",)),
    ("sct", {"sct.position": "attention", "sct.score": "taylor"}, ("proj",))])
def test_the_block_score_is_of_what_the_map_acts_on(
    config, model, params, split, monkeypatch, name, values, sites):
  asked, score = [], importance.score
  monkeypatch.setattr(importance, "score", lambda *args: (
      asked.append(args[6]), score(*args))[1])
  for key, value in values.items():
    part, _, last = key.rpartition(".")
    (config[part] if part else config)[last] = value
  method = methods.load(name, config, model.backbone)
  method.stages[-1].prepare(methods.Context(
      model, parallel.replicate(params), {}, split.images, split.labels, 0))
  assert asked == [sites]


def test_sct_adapts_the_blocks_of_the_authors_code_on_swin(config):
  """The last 9 of stage 3's 18, and both of stage 4."""
  module = backbones.make("swin_b", 224)
  config.k, config.sct.score = 0, "random"
  method = methods.load("sct", config, module)
  adapter, buffers = method.stages[0].prepare(methods.Context(
      Model(module, "half"), {}, {}, None, None, 0))
  assert list(adapter["attention"]) == [str(i) for i in range(13, 24)]
  assert list(buffers["attention"]) == list(adapter["attention"])
  assert (method.options["k"], method.options["blocks"]) == (96, 11)


def test_shared_lora_needs_one_input(config, vit):
  config.lora.update(shared=True, sites=("q", "fc1"))
  with pytest.raises(UserError, match="needs sites with one input"):
    methods.load("lora", config, vit)


def test_rows_need_a_linear_layer(config, vit):
  config.tune, config.position = "rows", "stream_mlp"
  with pytest.raises(UserError, match="the residual stream"):
    methods.load("ttc", config, vit)
