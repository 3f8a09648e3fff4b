"""Names of the leaves of a pytree ("a/b/c"); splitting it by label."""
from collections.abc import Callable, Iterable, Mapping
import math
import re
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
  """Returns {"a/b/c": leaf} in the order of `jax.tree.leaves`.

  Example:
    flatten({"norm": {"scale": x}})  # {"norm/scale": x}
  """
  return dict(zip(jax.tree.leaves(names(tree)), jax.tree.leaves(tree),
                  strict=True))


def unflatten(flat: Mapping[str, Any]) -> Tree:
  """Inverts `flatten` for trees of dictionaries."""
  tree: dict[str, Any] = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def label(tree: Tree, rules: Iterable[tuple[str, str]]) -> Tree:
  """Labels every leaf by the first rule that matches its whole name.

  Args:
    tree: a pytree.
    rules: pairs (regular expression, label).

  Returns:
    The tree with every leaf replaced by its label.

  Raises:
    ValueError: no rule matches a leaf; the message names it.

  Example:
    label(params, [(r"head/.*", "tune"), (r".*", "freeze")])
  """
  compiled = [(re.compile(pattern), label) for pattern, label in rules]

  def first_match(name, _):
    for pattern, label in compiled:
      if pattern.fullmatch(name):
        return label
    raise ValueError(f"no rule matches '{name}'; add one, or end with r'.*'")
  return map_with_names(first_match, tree)


def split(tree: Tree, labels: Tree, wanted: str) -> tuple[Tree, Tree]:
  """Splits a tree into the leaves labelled `wanted` and the others.

  Args:
    tree: a pytree.
    labels: the tree that `label` returns.
    wanted: the label of the first part.

  Returns:
    Two trees of the same structure, with None in place of the leaves that
    the other one has.
  """
  def keep(condition):
    return jax.tree.map(
        lambda x, label: x if (label == wanted) == condition else None,
        tree, labels)
  return keep(True), keep(False)


def join(tree: Tree, other: Tree) -> Tree:
  """Inverts `split`: takes each leaf from the tree that has it."""
  return jax.tree.map(lambda a, b: b if a is None else a, tree, other,
                      is_leaf=lambda x: x is None)


def count(tree: Tree) -> int:
  """Counts the scalars in a tree of arrays or shapes."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
