"""Names for the leaves of a pytree: "a/b/c", split and join by label."""
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

Tree = Any
Rules = tuple[tuple[str, str], ...]


def names(tree: Tree) -> Tree:
  """Returns the tree with every leaf replaced by its name "a/b/c"."""
  return map_with_names(lambda name, _: name, tree)


def map_with_names(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
  """Maps `fn(name, leaf, *leaves_of_rest)` over the tree."""
  def call(path, *leaves):
    return fn("/".join(str(_key(p)) for p in path), *leaves)
  return jax.tree_util.tree_map_with_path(call, tree, *rest)


def _key(entry):
  for attribute in ("key", "idx", "name"):
    if hasattr(entry, attribute):
      return getattr(entry, attribute)
  return entry


def flatten(tree: Tree) -> dict[str, Any]:
  """Returns {"a/b/c": leaf}, in the tree's own order."""
  pairs = zip(jax.tree.leaves(names(tree)), jax.tree.leaves(tree))
  return dict(pairs)


def unflatten(flat: Mapping[str, Any]) -> Tree:
  """The inverse of `flatten`, for trees of dictionaries."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def label(tree: Tree, rules: Iterable[tuple[str, str]]) -> Tree:
  """Labels every leaf by the first rule `(pattern, label)` that matches all
  of its name.

  Raises:
    ValueError: a leaf that no rule matches, named.
  """
  rules = [(re.compile(pattern), label) for pattern, label in rules]

  def first_match(name, _):
    for pattern, label in rules:
      if pattern.fullmatch(name):
        return label
    raise ValueError(f"no rule matches '{name}'; add one, or end with r'.*'")
  return map_with_names(first_match, tree)


def split(tree: Tree, labels: Tree, wanted: str) -> tuple[Tree, Tree]:
  """Splits into (leaves with that label, the others); None fills the gaps."""
  def keep(condition):
    return jax.tree.map(
        lambda x, l: x if (l == wanted) == condition else None, tree, labels)
  return keep(True), keep(False)


def join(tree: Tree, other: Tree) -> Tree:
  """The inverse of `split`."""
  return jax.tree.map(lambda a, b: b if a is None else a, tree, other,
                      is_leaf=lambda x: x is None)


def count(tree: Tree) -> int:
  """Number of scalars in the tree."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
