import numpy as np
import pytest

from ttc_jax import trees

TREE = {"a": {"kernel": np.ones((2, 3)), "bias": np.ones(3)},
        "norm": {"scale": np.ones(5)}}


def test_names_are_paths():
  assert list(trees.flatten(TREE)) == ["a/bias", "a/kernel", "norm/scale"]


def test_unflatten_inverts_flatten():
  back = trees.unflatten(trees.flatten(TREE))
  assert back["a"]["kernel"] is TREE["a"]["kernel"]
  assert back.keys() == TREE.keys()


def test_first_rule_wins_and_must_match_the_whole_name():
  labels = trees.label(TREE, [("a/b", "no"), ("a/bias", "x"), ("a/.*", "y"),
                              (".*", "z")])
  assert trees.flatten(labels) == {
      "a/bias": "x", "a/kernel": "y", "norm/scale": "z"}


def test_a_leaf_without_a_rule_is_named():
  with pytest.raises(ValueError, match="no rule matches 'norm/scale'"):
    trees.label(TREE, [("a/.*", "tune")])


def test_join_inverts_split():
  labels = trees.label(TREE, [("a/.*", "tune"), (".*", "freeze")])
  tuned, frozen = trees.split(TREE, labels, "tune")
  assert list(trees.flatten(tuned)) == ["a/bias", "a/kernel"]
  assert list(trees.flatten(frozen)) == ["norm/scale"]
  joined = trees.flatten(trees.join(tuned, frozen))
  assert all(joined[k] is v for k, v in trees.flatten(TREE).items())


def test_count():
  assert trees.count(TREE) == 6 + 3 + 5
