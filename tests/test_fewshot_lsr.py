"""The closed-form probe: against scikit-learn, and as a run like any other."""
import jax
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from tests.conftest import CLASSES, WIDTH
from tests.test_train import make_job, run
from ttc_jax import evaluate, methods, parallel, trees
from ttc_jax import model as model_lib
from ttc_jax.errors import UserError
from ttc_jax.methods import fewshot_lsr
from ttc_jax.runs import inputs
from ttc_jax.runs import plan as jobs


def problem(count, width, classes=5, seed=0):
  """Features of very different scales, and labels that they tell a bit of."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, count)
  x = rng.normal(size=(count, width)) + rng.normal(size=(classes, width))[
      labels]
  return (x * 10 ** rng.uniform(-2, 2, width)
          + rng.normal(size=width)).astype(np.float32), labels


def sklearn_outputs(x, labels, test, classes, l2):
  """Big Vision's recipe by another hand and another solver."""
  x, test = x.astype(np.float64), test.astype(np.float64)
  mean, std = x.mean(axis=0), x.std(axis=0) + 1e-5

  def standard(z):
    return np.concatenate(
        [(z - mean) / std, np.full((len(z), 1), 100.0)], axis=1)
  y = np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)
  fitted = Ridge(alpha=l2, fit_intercept=False, solver="svd").fit(
      standard(x), y)
  return fitted.predict(standard(test)), np.mean(
      (fitted.predict(standard(x)) - y) ** 2)


@pytest.mark.parametrize("l2", [2.0 ** -6, 1.0, 2.0 ** 10, 2.0 ** 20])
@pytest.mark.parametrize("count,width", [(60, 12), (20, 50)])
def test_the_head_is_scikit_learn_s_ridge(count, width, l2):
  x, labels = problem(count, width)
  test, _ = problem(30, width, seed=1)
  head, loss = fewshot_lsr.head(x, labels, 5, l2)
  want, want_loss = sklearn_outputs(x, labels, test, 5, l2)
  found = test.astype(np.float64) @ head["kernel"] + head["bias"]
  scale = np.abs(want).max()
  np.testing.assert_allclose(found, want, atol=2e-4 * scale)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
  assert {x.dtype for x in head.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("count,width", [(30, 8), (8, 30)])
def test_ridge_is_the_minimum(count, width):
  """The gradient of the loss is zero there."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(count, width)), rng.normal(size=(count, 3))
  w = fewshot_lsr.ridge(x, y, 0.7)
  np.testing.assert_allclose(x.T @ (x @ w - y) + 0.7 * w, 0, atol=1e-10)


def test_a_feature_that_never_changes_and_a_class_without_images():
  x, labels = problem(40, 6)
  x[:, 2] = 3.25
  head, _ = fewshot_lsr.head(x, np.minimum(labels, 3), 5, 1.0)
  assert all(np.isfinite(v).all() for v in head.values())
  outputs = x @ head["kernel"] + head["bias"]
  np.testing.assert_allclose(outputs[:, 4], -1, atol=1e-2)
  assert not (outputs.argmax(1) == 4).any()


def test_a_run_computes_the_head_and_touches_nothing_else(
    config, model, params, split, tmp_path):
  job = make_job(config, model, split, "fewshot_lsr")
  reports = []
  job = job._replace(report=lambda *args: reports.append(args))
  outcome, flat = run(job, params, tmp_path)
  for name, leaf in trees.flatten(params).items():
    if not name.startswith("head/"):
      np.testing.assert_array_equal(flat[name], leaf)
  replicated = parallel.replicate(params)
  features = evaluate.features(model, replicated, {}, split.images)
  head, loss = fewshot_lsr.head(features, split.labels, CLASSES, 1024.0)
  np.testing.assert_array_equal(flat["head/kernel"], head["kernel"])
  np.testing.assert_array_equal(flat["head/bias"], head["bias"])
  predicted = (features @ head["kernel"] + head["bias"]).argmax(1)
  record, = outcome.history
  assert record["stage"] == "lsr" and record["loss"] == loss
  assert record["val_top1"] == pytest.approx(
      100 * (predicted == split.labels).mean())
  assert reports == [("lsr", 1, 1, {k: v for k, v in record.items()
                                    if k != "stage"})]
  assert outcome.images_per_second > 0


def test_a_second_start_reads_the_first_one_s_state(
    config, model, params, split, tmp_path, monkeypatch):
  job = make_job(config, model, split, "fewshot_lsr")
  first, flat = run(job, params, tmp_path)
  monkeypatch.setattr(fewshot_lsr, "head", None)
  second, again = run(job, params, tmp_path)
  assert second.history == first.history
  for name, leaf in flat.items():
    np.testing.assert_array_equal(again[name], leaf)
  other = make_job(config, model, split, "fewshot_lsr", settings={"l2": 2.0})
  with pytest.raises(TypeError):  # another l2 is another state
    run(other, params, tmp_path)


def test_the_grid_has_l2_for_this_method_alone(config):
  config.grid.lr, config.grid.l2 = (), (16.0, 1.0)
  config.method = "fewshot_lsr"
  assert jobs.settings(config) == [{"l2": 1.0}, {"l2": 16.0}]
  config.method, config.grid.lr = "linear", (0.1,)
  assert jobs.settings(config) == [{"lr": 0.1}]


def test_epochs_are_settled_since_none_is_trained(config, vit):
  method = methods.load("fewshot_lsr", config, vit)
  settled = inputs.settled(config, method)
  assert (settled.epochs, settled.warmup_epochs) == (1, 0.0)
  linear = methods.load("linear", config, vit)
  assert inputs.settled(config, linear).epochs == config.epochs


def test_l2_is_above_zero(config, vit):
  config.l2 = 0.0
  with pytest.raises(UserError, match="config.l2 is 0; give more than 0"):
    methods.load("fewshot_lsr", config, vit)


def test_a_head_of_zeros_has_the_shape_of_the_other():
  zeros = model_lib.init_head(WIDTH, CLASSES, 0, "zeros")
  normal = model_lib.init_head(WIDTH, CLASSES, 0)
  assert jax.tree.map(np.shape, zeros) == jax.tree.map(np.shape, normal)
  assert not any(np.any(x) for x in zeros.values())
  assert np.any(normal["kernel"])
