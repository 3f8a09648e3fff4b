"""A format of weights, a table of its names, and what was recognised."""
from collections.abc import Callable, Mapping
import re
from typing import Any, NamedTuple

from ttc_jax.backbones import vit
from ttc_jax.errors import UserError

Fields = dict[str, Any]
Triple = tuple[float, float, float]


class Normalisation(NamedTuple):
  """Pixels in [0, 1] become (x - mean) / std, red, green and blue.

  Attributes:
    mean, std: three numbers each; hashable.
  """
  mean: Triple
  std: Triple


HALF = Normalisation((0.5,) * 3, (0.5,) * 3)


class Format(NamedTuple):
  """How a family of files names and lays out our parameters.

  Attributes:
    names: our name -> the names it may have there, the likeliest first; none
      if the format has no place for it.
    torch: whether kernels are (out, in) and (out, in, p, p), heads are merged,
      and parameters that share a name are joined along the first axis. If
      not, the layout is ours.
    tokens: the names of the tokens before the patches, in that order.
    positions: (whether there is a [CLS], registers) -> how many of those
      tokens have a position of their own when we write a file.
    squeezed: {their name: how many leading axes of 1 it lacks}.
    zero: {pattern of our names: the field}: parameters that are 0 and not in
      the files of variants with that field.
    optional: pattern of our names: parameters that a file may lack; they are
      0 then.
    ignored: pattern of tensors without a part in the features.
    refused: {pattern: a part of an architecture that is not supported}.
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


class Found(NamedTuple):
  """What a format recognised.

  Attributes:
    fields: of the module; None for one that neither the tensors nor the
      configuration determine.
    tensors: those below the format's root, by their names there.
    beside: pattern of the names of other tensors that may be in the file,
      because they have no part in the features; all others are refused.
    sizes: stated by the configuration: "width", "depth", "heads", "hidden",
      "patch", and "image_size" as (height, width).
    positioned: how many tokens before the patches may have a position.
    normalisation: that the weights were trained with, None if unknown.
  """
  format: Format
  fields: Fields
  tensors: Mapping[str, Any]
  beside: str = r"(?!)"
  sizes: Mapping[str, Any] = {}
  positioned: tuple[int, ...] = (0,)
  normalisation: Normalisation | None = None


def is_zero(format_: Format, name: str, fields: Mapping[str, Any]) -> bool:
  """Returns whether our parameter is 0, and so not in a variant's files."""
  return any(re.fullmatch(pattern, name) and fields.get(field)
             for pattern, field in format_.zero.items())


_NUMBER = re.compile(r"(?<=block_)\d+|(?<=stage_)\d+|(?<=merge_)\d+")
_LEAF = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}


def by_table(table: Mapping[str, str]) -> Callable[[str], tuple[str, ...]]:
  """Returns `Format.names` of a table {our name or its stem: theirs}.

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
  """Returns the tensors of the one module that has a tensor called `mark`, by
  their names below it; None if no module has.

  Raises:
    UserError: several modules have.
  """
  roots = sorted(n.removesuffix(mark) for n in tensors
                 if n == mark or n.endswith("." + mark))
  if len(roots) > 1:
    raise UserError(f"the weights hold {len(roots)} vision models, below "
                    f"{' and '.join(map(repr, roots))}: save one alone")
  return {n.removeprefix(root): t for root in roots
          for n, t in tensors.items() if n.startswith(root)} or None


def count_tokens(tensors: Mapping[str, Any], names: tuple[str, ...]) -> int:
  """Returns the number of tokens before the patches."""
  shapes = [tensors[n].shape for n in names if n in tensors]
  return sum(shape[-2] if len(shape) > 1 else 1 for shape in shapes)


def sizes(config: Mapping[str, Any],
          names: Mapping[str, str]) -> dict[str, Any]:
  """Returns the sizes that a configuration states, see `Found`.

  Args:
    names: {our name: the configuration's}.

  Raises:
    UserError: one is no positive whole number, or no (height, width).
  """
  out = {}
  for ours, theirs in names.items():
    value = config.get(theirs)
    if value is None:
      continue
    pair = value if isinstance(value, (list, tuple)) else [value]
    if not 1 <= len(pair) <= (2 if ours in ("image_size", "patch") else 1) or (
        not all(type(v) is int and v > 0 for v in pair)):
      raise UserError(f"config.json has the {theirs} {value!r}; expected a "
                      "positive whole number")
    if ours == "image_size":
      out[ours] = (pair[0], pair[-1])
    elif pair[0] != pair[-1]:
      raise UserError(f"config.json has the {theirs} {value!r}: only square "
                      "patches are supported")
    else:
      out[ours] = pair[0]
  return out


def normalisation(mean: Any, std: Any) -> Normalisation | None:
  """Returns a configuration's mean and deviation, None if it states neither.

  Raises:
    UserError: they are no three numbers each.
  """
  if mean is None and std is None:
    return None

  def triple(name, value):
    if (isinstance(value, (list, tuple)) and len(value) == 3 and all(
        type(v) in (int, float) and abs(v) < 1e3 for v in value)
        and (name == "mean" or min(value) > 0)):
      return (float(value[0]), float(value[1]), float(value[2]))
    raise UserError(f"the configuration beside it has the {name} {value!r}; "
                    f"expected three numbers{' above 0' * (name == 'std')}")
  return Normalisation(triple("mean", mean), triple("std", std))


def vit_fields(pool: str | None, tokens: int, **fields: Any) -> Fields:
  """Returns all fields of a `vit.ViT` that belong to its weights.

  Args:
    pool: None if it is not known.
    tokens: before the patches; those that are not [CLS] are registers.
  """
  registers = None if pool is None else max(tokens - vit.has_cls(pool), 0)
  return {"pool": pool, "registers": registers,
          "rope": 0.0, "pre_norm": False, "layer_scale": False,
          "final_norm": True, "pool_norm": False, **fields}
