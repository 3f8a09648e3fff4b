"""Measures against their formulas, written here with numpy and SciPy."""
import itertools
import math
import types

import numpy as np
import pytest
from scipy import stats

from ttc_jax import backbones, importance, measures, parallel, tasks
from ttc_jax.errors import RunError, UserError
from ttc_jax.experiments import Results, fig3
from ttc_jax.measures import (
  divergence,
  neighbours,
  norms,
  scores,
  separation,
)
from ttc_jax.runs.workdir import WorkDir


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def clouds(rng, count=40, far=8.0):
  """Two clouds of features (N, 5), and their labels."""
  labels = np.arange(count) % 2
  x = rng.normal(size=(count, 5))
  x[:, 0] += far * labels
  return x.astype(np.float32), labels


def test_an_unknown_measure_is_refused():
  with pytest.raises(UserError, match="unknown measure 'norm': did you mean"):
    measures.take("norm", "", None, None, 0, 0)


def test_nearest_neighbour_is_the_one_with_the_largest_cosine(rng):
  train, labels = rng.normal(size=(30, 4)), rng.integers(0, 5, 30)
  test, truth = rng.normal(size=(20, 4)), rng.integers(0, 5, 20)
  cosine = (test / np.linalg.norm(test, axis=1, keepdims=True)) @ (
      train / np.linalg.norm(train, axis=1, keepdims=True)).T
  want = 100 * (labels[cosine.argmax(1)] == truth).mean()
  assert neighbours.accuracy(train, labels, test, truth, 1) == (
      pytest.approx(want))


def test_nearest_class_mean(rng):
  x, y = clouds(rng)
  test, truth = rng.normal(size=(30, 5)) * 4, np.arange(30) % 2
  means = [x[y == c].mean(0) for c in (0, 1)]
  nearest = [min((0, 1), key=lambda c: np.linalg.norm(t - means[c]))
             for t in test]
  assert separation.centroid_accuracy(x, y, test, truth) == pytest.approx(
      100 * (np.array(nearest) == truth).mean())


def test_silhouette_is_its_definition(rng):
  x, y = clouds(rng, 12, 2.0)
  found = []
  for i in range(len(x)):
    far = np.linalg.norm(x - x[i], axis=1)
    own = far[(y == y[i]) & (np.arange(len(x)) != i)].mean()
    other = far[y != y[i]].mean()
    found.append((other - own) / max(own, other))
  assert separation.silhouette(x, y) == pytest.approx(np.mean(found), rel=1e-5)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_a_silhouette_that_is_not_defined_is_one_sentence(labels):
  with pytest.raises(RunError, match=f"3 images of {len(set(labels))} classes"):
    separation.silhouette(np.eye(3), np.array(labels))


@pytest.mark.parametrize("labels, rows", [
    ([0, 1] * 10, range(5)),  # the first ones have all classes
    ([0] * 11 + [1] * 10, [0, 1, 2, 11, 12]), ([0, 1, 2], range(3)),
    ([0, 1] * 9 + [2], [0, 1, 2, 3, 18]), ([0] * 9 + [1] + [2] * 9,
                                           [0, 1, 9, 10, 11])])
def test_some_test_images_are_of_all_classes(labels, rows):
  labels = np.array(labels)
  split = tasks.Split(np.arange(len(labels)), labels)
  task = types.SimpleNamespace(tests=("test",), split={"test": split}.get)
  trained = measures.Trained(None, None, None, None, None, task, 0, 0)
  found = trained.test(5)
  assert found.images.tolist() == list(rows)
  assert (found.labels == labels[list(rows)]).all()


def test_embedding_keeps_far_clouds_apart(rng):
  x, y = clouds(rng, 60, 50.0)
  points = separation.embedded(x, 0)
  assert points.shape == (60, 2)
  assert separation.centroid_accuracy(points, y, points, y) == 100


def test_divergence_is_equation_5(rng):
  p, q = rng.normal(size=(2, 3, 6))
  found = divergence.jensen_shannon(p, q)
  for a, b, js in zip(p, q, found, strict=True):
    a, b = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
    m = (a + b) / 2
    want = (sum(x * math.log(x / y) for x, y in zip(a, m, strict=True)) +
            sum(x * math.log(x / y) for x, y in zip(b, m, strict=True))) / 2
    assert js == pytest.approx(want)
  np.testing.assert_array_equal(divergence.jensen_shannon(p, p), 0)
  apart = divergence.jensen_shannon(np.array([[90.0, 0]]),
                                    np.array([[0, 90.0]]))
  np.testing.assert_allclose(apart, math.log(2))


@pytest.mark.parametrize("name, expected", [
    ("vit_ti16", [
        "Transformer/encoderblock_2/LayerNorm_0",
        "Transformer/encoderblock_2/LayerNorm_1",
        "Transformer/encoderblock_10/LayerNorm_0", "Transformer/encoder_norm"]),
    ("swin_mu", [
        "embedding_norm", "stage_0_block_1/LayerNorm_0",
        "stage_0_block_1/LayerNorm_1", "merge_0/norm",
        "stage_1_block_0/LayerNorm_0", "norm"])])
def test_norms_are_in_the_order_of_the_network(name, expected):
  key = norms.order(backbones.make(name, 64))
  names = [f"backbone/{path}" for path in sorted(expected)]
  assert sorted(names, key=key) == [f"backbone/{path}" for path in expected]


def test_energy_of_a_set_is_that_of_its_block(rng):
  squares = np.square(rng.normal(size=(6, 6)))
  share = sum(squares[i, j] for i in (1, 4) for j in (1, 4)) / squares.sum()
  assert scores.energy(squares, np.array([1, 4])) == pytest.approx(share)
  assert scores.energy(squares, np.arange(6)) == pytest.approx(1)


def test_overlap_of_selections():
  one = {("fc2", 0): {1, 2, 3, 4}, ("fc2", 10): {1, 2, 3, 4}}
  other = {("fc2", 0): {3, 4, 5, 6}, ("fc2", 10): {1, 2, 3, 4}}
  assert fig3.overlap(one, other) == [0.5, 1.0]


def test_the_overlap_of_tasks_is_of_all_pairs_of_runs(tmp_path):
  """Not of the first runs alone."""
  chosen = {("t", 0): [0, 1], ("t", 1): [0, 2], ("u", 0): [0, 1],
            ("u", 1): [3, 4], ("u", 2): [0, 3]}
  work = WorkDir(tmp_path)
  rows = [dict(run=f"{task}{seed}", protocol="final", variant="ttc", task=task,
               seed=seed) for task, seed in chosen]
  for r, channels in zip(rows, chosen.values(), strict=True):
    work.write_measure(r["run"], "channels", {
        "sites": {"mlp": {"0": channels}}, "widths": {"mlp": {"0": 8}}})
  tasks, seeds, chance = fig3.overlaps(
      Results("t", rows, ["t", "u"], work), "ttc")

  def shared(pairs):
    return [[len({*a} & {*b}) / 2] for a, b in pairs]
  t, u = ([c for (task, _), c in chosen.items() if task == name]
          for name in "tu")
  assert tasks == shared(itertools.product(t, u)) and chance == 0.25
  assert seeds == shared([*itertools.combinations(t, 2),
                          *itertools.combinations(u, 2)])


def test_scores_of_parts_are_those_of_the_images_in_them(
    model, params, split, monkeypatch):
  monkeypatch.setattr(scores, "SIZES", (3, len(split.labels)))
  trained = types.SimpleNamespace(
      model=model, params=parallel.replicate(params), buffers={}, train=split,
      seed=5)
  found = scores.measure(trained)
  order = np.random.default_rng(5).permutation(len(split.labels))
  halves = np.array_split(order, 2)
  for name in set(scores.SCORES) - {"random"}:
    def of(rows, name=name):
      return importance.score(
          name, model, trained.params, {}, split.images[rows],
          split.labels[rows], (scores.SITE,))[scores.SITE]
    one, two = map(of, halves)
    got = found[name]
    assert got["correlation"] == pytest.approx(
        [stats.spearmanr(a, b)[0] for a, b in zip(one, two, strict=True)],
        abs=1e-3)
    assert got["negative"] == pytest.approx(np.mean(np.array(one) < 0))
    k = got["k"]
    shared = [len({*importance.top_k(a, k)} & {*importance.top_k(b, k)}) / k
              for a, b in zip(of(order[:3]), of(order), strict=True)]
    assert got["sizes"] == {"3": pytest.approx(np.mean(shared))}
  assert {*found} == {*scores.SCORES}
