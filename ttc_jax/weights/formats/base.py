"""What a format of weights is, and how a table gives its names."""
from collections.abc import Callable, Mapping
import re
from typing import Any, NamedTuple

from ttc_jax.errors import UserError

Fields = dict[str, Any]
# (format, fields, tensors below the format's root)
Found = tuple["Format", Fields, Mapping[str, Any]]


class Format(NamedTuple):
  """How a family of files keeps our parameters.

  Attributes:
    names: our name -> the names it may have there, the likeliest first; none
      where the format has no place for it.
    torch: whether kernels are (out, in) and (out, in, p, p), heads are merged,
      and what shares a name is joined along the first axis. Else all is laid
      out as ours.
    tokens: the names of what stands before the patches, in that order.
    positions: (whether there is a [CLS], registers) -> how many of those
      tokens have a position of their own when we write a file.
    squeezed: {their name: how many leading axes of 1 it lacks}.
    zero: {pattern of our names: the field}: what has no place in files of the
      variants that have that field, being 0 there.
    optional: pattern of our names: what a file may lack, being 0.
    ignored: pattern of tensors without a part in the features.
    refused: {pattern: what of the architecture we lack}.
  """
  name: str
  names: Callable[[str], tuple[str, ...]]
  torch: bool = False
  tokens: tuple[str, ...] = ("cls", "registers")
  positions: Callable[[bool, int], int] = lambda cls, registers: 0
  squeezed: Mapping[str, int] = {}
  zero: Mapping[str, str] = {}
  optional: str = r"(?!)"
  ignored: str = r"(?!)"
  refused: Mapping[str, str] = {}


def is_zero(format_: Format, name: str, fields: Mapping[str, Any]) -> bool:
  """Whether our parameter is 0 in files of a variant, and not in them."""
  return any(re.fullmatch(pattern, name) and fields.get(field)
             for pattern, field in format_.zero.items())


_NUMBER = re.compile(r"(?<=block_)\d+|(?<=stage_)\d+|(?<=merge_)\d+")
_LEAF = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}


def by_table(table: Mapping[str, str]) -> Callable[[str], tuple[str, ...]]:
  """`Format.names` of a table {our name or its stem: theirs}.

  "{}" is a number of a block or stage, in both; "{next}" the first number plus
  one. A stem's leaves are named as PyTorch's modules name them.
  """
  def names(name):
    numbers = [int(n) for n in _NUMBER.findall(name)]
    name = _NUMBER.sub("{}", name)
    stem, _, leaf = name.rpartition("/")
    if name in table:
      theirs = table[name]
    elif stem in table and leaf in _LEAF:
      theirs = table[stem] + _LEAF[leaf]
    else:
      return ()
    return (theirs.format(*numbers, next=numbers[0] + 1 if numbers else None),)
  return names


def below(tensors: Mapping[str, Any], mark: str) -> Mapping[str, Any] | None:
  """The tensors of the one module that has a tensor called `mark`, by their
  names below it; None if none has."""
  roots = sorted(n.removesuffix(mark) for n in tensors
                 if n == mark or n.endswith("." + mark))
  if len(roots) > 1:
    raise UserError(f"the weights hold {len(roots)} vision models, below "
                    f"{' and '.join(map(repr, roots))}: save one alone")
  return {n.removeprefix(root): t for root in roots
          for n, t in tensors.items() if n.startswith(root)} or None


def count_tokens(tensors: Mapping[str, Any], names: tuple[str, ...]) -> int:
  """How many tokens stand before the patches."""
  shapes = [tensors[n].shape for n in names if n in tensors]
  return sum(shape[-2] if len(shape) > 1 else 1 for shape in shapes)


def vit_fields(pool: str, tokens: int, **fields: Any) -> Fields:
  """All fields of a `vit.ViT` that belong to its weights.

  Args:
    tokens: before the patches; those that are no [CLS] are registers.
  """
  return {"pool": pool, "registers": max(tokens - (pool == "cls"), 0),
          "rope": 0.0, "pre_norm": False, "layer_scale": False,
          "final_norm": True, "pool_norm": False, **fields}
