"""The Taylor score has three forms; all are the same number (method.md)."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import DEPTH, WIDTH
from ttc_jax import importance, parallel, taps, trees
from ttc_jax.errors import RunError, UserError

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
