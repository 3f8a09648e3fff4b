"""The Taylor score has three forms; all are the same number (method.md)."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import DEPTH, WIDTH
from ttc_jax import importance, normalisation, parallel, taps, trees
from ttc_jax.backbones.layers import Site
from ttc_jax.errors import RunError, UserError
from ttc_jax.model import Model

SITES = ("q", "k", "v", "proj", "fc1", "fc2")


def loss(model, params, split, mask=None, tap=None):
  """On one device, all images at once."""
  logits = model.logits(params, split.images, {}, mask=mask, extra_tap=tap)
  return optax.softmax_cross_entropy_with_integer_labels(
      logits, split.labels).sum()


def score(name, model, params, split, sites=SITES, **kwargs):
  on_devices = parallel.replicate(params)
  return importance.score(name, model, on_devices, {}, split.images,
                          split.labels, sites, batch_size=10, **kwargs)


def weight_products(model, params, split):
  """{site: [w * dL/dw of each block as (D_in, D_out)]} by plain jax.grad."""
  grads = trees.flatten(jax.jit(jax.grad(
      lambda p: loss(model, p, split)))(params)["backbone"])
  weights = trees.flatten(params["backbone"])
  return {s: [np.asarray(grads[p] * weights[p]).reshape(
      -1, layer.width) for p, layer in zip(
          importance.kernel_paths(model, s), model.backbone.sites[s],
          strict=True)]
      for s in SITES}


def every_token(model):
  return model._replace(backbone=model.backbone.clone(every_token=True))


def test_there_are_two_devices():
  assert len(parallel.devices()) == 2


def test_gate_gradient_is_the_sum_of_weight_times_gradient(
    model, params, split):
  """Fact (a), over two devices and padded batches, against one device."""
  got = score("taylor", model, params, split)
  for site, products in weight_products(model, params, split).items():
    want = np.stack([p.sum(0) for p in products])
    np.testing.assert_allclose(got[site], want, rtol=1e-3, atol=1e-4)
    assert np.abs(want).max() > 1e-2


def test_gate_gradient_is_the_activation_form(model, params, split):
  """Fact (b): sum over examples and tokens of dL/dy_i (y_i - b_i)."""
  got = score("taylor", model, params, split, ("fc2",))["fc2"]
  model = every_token(model)

  def through(added):
    seen = {}

    def tap(site, block, y, x):
      if site == "fc2":
        y = y + added[block]
        seen[block] = y
      return y
    return loss(model, params, split, tap=tap), seen
  tokens = (8 // 4) ** 2 + 1
  zeros = [jnp.zeros((len(split.labels), tokens, WIDTH))] * DEPTH
  grads, y = jax.jit(jax.grad(through, has_aux=True))(zeros)
  flat = trees.flatten(params["backbone"])
  for block, path in enumerate(importance.kernel_paths(model, "fc2")):
    bias = flat[path.replace("kernel", "bias")]
    want = (grads[block] * (y[block] - bias)).sum((0, 1))
    np.testing.assert_allclose(got[block], want, rtol=1e-3, atol=1e-4)


def test_bfloat16_models_are_scored_in_float32(model, params, split):
  half = model._replace(backbone=model.backbone.clone(dtype=jnp.bfloat16))
  np.testing.assert_array_equal(score("taylor", half, params, split)["fc2"],
                                score("taylor", model, params, split)["fc2"])


@pytest.mark.parametrize("name,power", [
    ("taylor_abs", np.abs), ("taylor_square", np.square)])
def test_unsigned_scores_sum_over_weights(model, params, split, name, power):
  got = score(name, model, params, split)
  for site, products in weight_products(model, params, split).items():
    want = np.stack([power(p).sum(0) for p in products])
    np.testing.assert_allclose(got[site], want, rtol=1e-3, atol=1e-6)


def test_l2_is_the_norm_of_the_features(model, params, split):
  got = score("l2", model, params, split, ("fc2",))["fc2"]
  model, seen = every_token(model), {}
  model.features(params, split.images, {},
                 extra_tap=taps.record(("fc2",), seen))
  want = np.stack([np.sqrt((np.asarray(seen["fc2", i]) ** 2).sum((0, 1)))
                   for i in range(DEPTH)])
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_class_l2_is_the_mean_over_classes_of_norms_of_patch_tokens(
    model, params, split):
  got = score("class_l2", model, params, split, ("attention",))["attention"]
  seen = {}
  every_token(model).features(params, split.images, {},
                              extra_tap=taps.record(("attention",), seen))
  for i in range(DEPTH):
    patches = np.asarray(seen["attention", i])[:, 1:]
    norms = [np.linalg.norm(patches[split.labels == c].reshape(-1, WIDTH),
                            axis=0) for c in np.unique(split.labels)]
    np.testing.assert_allclose(got[i], np.mean(norms, 0), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(
    importance.SCORES.keys() - {"random"}))
def test_sums_of_parts_of_a_set_make_the_score_of_the_set(
    model, params, split, name):
  on_devices = parallel.replicate(params)
  parts = [importance.total(
      name, model, on_devices, {}, split.images[rows], split.labels[rows],
      ("fc2",), batch_size=4) for rows in (slice(3), slice(3, None))]
  got = importance.of_total(
      name, jax.tree.map(np.add, *parts), model, on_devices, ("fc2",))
  want = score(name, model, params, split, ("fc2",))
  np.testing.assert_allclose(got["fc2"], want["fc2"], rtol=1e-3, atol=1e-5)


def test_random_depends_on_the_seed_alone(model, params, split):
  one, again, other = (
      np.stack(score("random", model, params, split, seed=s)["fc2"])
      for s in (0, 0, 1))
  assert (one == again).all() and (one != other).any()


def test_unknown_score_names_the_nearest(model, params, split):
  with pytest.raises(UserError, match="did you mean taylor"):
    score("tayler", model, params, split)


def test_a_score_that_is_not_finite_stops_the_run(model, params, split):
  params["head"]["kernel"] = params["head"]["kernel"] * jnp.nan
  with pytest.raises(RunError, match="not finite"):
    score("taylor", model, params, split)


def test_top_k_keeps_the_largest_in_order_and_the_lower_index_of_equals():
  scores, equal = np.array([0., 3., -5., 3., 1.]), np.full(5, 2.)
  assert importance.top_k(scores, 2).tolist() == [1, 3]
  assert importance.top_k(equal, 2).tolist() == [0, 1]
  assert not importance.tied(scores, 2)
  assert importance.tied(scores, 1) and importance.tied(equal, 2)
  assert not importance.tied(equal, 5)


def numpy_map_gradient(params, images, labels):
  """G = dL/dM at M = 0, in numpy: features = mean over tokens of (y + y M),
  logits = features H + b, L summed over images. {block: (D, D)} of a backbone
  of one linear layer a block, `y_1 = y_0 W_1` and so on (no nonlinearity)."""
  x = images.astype(np.float64)
  kernels, head = params["kernels"], params["head"]
  ys, y = [], x
  for w in kernels:
    y = y @ w
    ys.append(y)
  logits = y.mean(1) @ head["kernel"] + head["bias"]
  p = np.exp(logits - logits.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  p[np.arange(len(labels)), labels] -= 1
  g = np.repeat((p @ head["kernel"].T)[:, None] / x.shape[1], x.shape[1], 1)
  found = {}
  for block in reversed(range(len(kernels))):
    found[block] = np.einsum("bni,bnj->ij", ys[block], g)
    g = g @ kernels[block].T
  return found


class Layers(nn.Module):
  """A backbone of linear layers alone, whose gradients numpy can write down."""
  width: int = 6
  depth: int = 2
  dtype: type = jnp.float32
  drop_path: float = 0.0

  @property
  def sites(self):
    return {"fc2": tuple(Site(self.width, self.width, f"fc{i}")
                         for i in range(self.depth))}

  @nn.compact
  def __call__(self, x, mask=None, tap=None, train=False):
    for i in range(self.depth):
      y = nn.Dense(self.width, use_bias=False, name=f"fc{i}")(x)
      x = tap("fc2", i, y, x)
    return x.mean(1)


@pytest.fixture
def layers():
  """(model, params, images as tokens (N, T, D), labels, numpy's G)."""
  width, classes = 6, 3
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)
  kernels = [draw(width, width) for _ in range(2)]
  head = {"kernel": draw(width, classes), "bias": draw(classes)}
  params = {"backbone": {f"fc{i}": {"kernel": k}
                         for i, k in enumerate(kernels)},
            "adapter": {}, "head": head}
  images, labels = draw(10, 4, width), rng.integers(0, classes, 10)
  want = numpy_map_gradient({"kernels": kernels, "head": head}, images, labels)
  return Model(Layers(), "none"), params, images, labels, want


@pytest.fixture
def as_they_are(monkeypatch):
  """Images that are tokens already."""
  monkeypatch.setattr(normalisation, "apply", lambda images, name: images)


def test_gradient_of_the_full_map_is_numpy_s(layers, as_they_are):
  model, params, images, labels, want = layers
  got = importance.map_gradient(
      model, parallel.replicate(params), {}, images, labels, ("fc2",), 4)
  for block, g in want.items():
    np.testing.assert_allclose(got["fc2"][block], g, rtol=1e-4, atol=1e-4)


def test_block_scores_keep_what_peeling_numpy_s_gradient_keeps(
    layers, as_they_are):
  model, params, images, labels, want = layers
  scores = importance.score(
      "block", model, parallel.replicate(params), {}, images, labels, ("fc2",),
      batch_size=4)["fc2"]
  for block, g in want.items():
    left = list(range(len(g)))
    while left:  # by definition: without which channel does most remain?
      np.testing.assert_array_equal(
          importance.top_k(scores[block], len(left)), left)
      left = max(([x for x in left if x != i] for i in left), key=lambda s:
                 np.square(g[np.ix_(s, s)]).sum())


def test_diagonal_of_the_full_map_s_gradient_is_the_taylor_score(
    model, params, split):
  """Up to the bias, which Eq. 10 leaves out: S_i = G_ii - b_i sum dL/dy_i."""
  flat = dict(trees.flatten(params["backbone"]))
  for layer in model.backbone.sites["fc2"]:
    flat[f"{layer.path}/bias"] = np.zeros(layer.width, np.float32)
  params = params | {"backbone": trees.unflatten(flat)}
  on_devices = parallel.replicate(params)
  g = importance.map_gradient(model, on_devices, {}, split.images,
                              split.labels, ("fc2",), 10)["fc2"]
  taylor = score("taylor", model, params, split, ("fc2",))["fc2"]
  for block in range(DEPTH):
    np.testing.assert_allclose(np.diagonal(g[block]), taylor[block],
                               rtol=1e-3, atol=1e-4)


def test_peeling_drops_the_higher_of_equal_channels_first():
  np.testing.assert_array_equal(
      importance.peel(np.ones((4, 4))), [3, 2, 1, 0])
