"""The Swin Transformer (Liu et al., 2021), with taps and a mask.

Four stages of blocks on grids of n x n tokens; between stages 2 x 2 tokens are
merged into one of twice the width. Attention acts within windows of w x w
tokens, in every second block shifted by w / 2.

Any image size fits: a grid that windows do not divide is padded with zeros,
which attention sees, as in the authors' code; on a grid smaller than a window
the window is the grid, and its biases are the centre of the table.

Blocks are numbered through all stages. Shapes: B batch, N = n^2 tokens, D
width of the stage, H heads, w window.
"""
from collections.abc import Callable
import functools
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ttc_jax.backbones import layers
from ttc_jax.backbones.layers import Dense, Field, Identity, Site, Work
from ttc_jax.errors import UserError, check_known

# name: (width of stage 1, depths, heads of stage 1)
SIZES = {
    "mu": (32, (2, 2, 6, 2), 1),  # ours: small enough to be trained on a CPU
    "ti": (96, (2, 2, 6, 2), 3),
    "s": (96, (2, 2, 18, 2), 3),
    "b": (128, (2, 2, 18, 2), 4),
    "l": (192, (2, 2, 18, 2), 6),
}

# For `backbones` and `weights`, see the docstring of `backbones`.
FIELDS = {
    "window": Field(tuple(range(1, 65))),
    "gelu": Field(tuple(layers.GELU), required=True),
    "epsilon": Field(float, required=True),
}
_TABLE = "attention/relative_position_bias"
PARAMETERS = {f"stage_.*/{_TABLE}": "window", "embedding/kernel": "patch"}

_OUTSIDE = -100.0  # added to scores across the edge of a shifted image


def places(depths: tuple[int, ...]) -> list[tuple[int, int]]:
  """Returns (stage, number within the stage) of each block."""
  return [(s, i) for s, depth in enumerate(depths) for i in range(depth)]


def position_index(window: int, table_window: int) -> np.ndarray:
  """(w^2, w^2) -> row of the bias table: the offset from key to query.

  The table has (2 W - 1)^2 rows for W = `table_window`; its centre serves
  smaller windows.
  """
  at = np.stack(np.meshgrid(*[np.arange(window)] * 2, indexing="ij"))
  at = at.reshape(2, -1)
  dy, dx = at[:, :, None] - at[:, None, :] + table_window - 1
  return dy * (2 * table_window - 1) + dx


def shift_mask(side: int, window: int, shift: int) -> np.ndarray:
  """(windows, w^2, w^2), 0 or `_OUTSIDE`: rolling the grid by `shift` puts
  tokens into one window that are not neighbours in the image."""
  region = np.zeros(side, np.int64)
  region[side - window:side - shift] = 1
  region[side - shift:] = 2
  regions = windows(3 * region[None, :, None, None] + region[None, None, :,
                                                             None], window)
  regions = regions.reshape(-1, window ** 2)
  return np.where(regions[:, :, None] == regions[:, None, :], 0,
                  _OUTSIDE).astype(np.float32)


def windows(x, window: int):
  """(B, n, n, D) -> (B n^2 / w^2, w^2, D)."""
  B, n, _, D = x.shape
  m = n // window
  x = x.reshape(B, m, window, m, window, D).swapaxes(2, 3)
  return x.reshape(-1, window ** 2, D)


def grid(x, side: int):
  """The inverse of `windows`."""
  window = round(x.shape[1] ** 0.5)
  m, D = side // window, x.shape[-1]
  x = x.reshape(-1, m, m, window, window, D).swapaxes(2, 3)
  return x.reshape(-1, side, side, D)


class Common(NamedTuple):
  """Attributes that all blocks share, see `Swin`."""
  window: int
  gelu: str
  epsilon: float
  dtype: Any


class WindowAttention(nn.Module):
  """Self-attention within (shifted) windows, with a learnt bias per offset."""
  common: Common
  heads: int
  shifted: bool

  @nn.compact
  def __call__(self, x, mask, tap):
    B, N, D = x.shape
    H, dtype, table_window = self.heads, self.common.dtype, self.common.window
    side = round(N ** 0.5)
    window = min(table_window, side)
    shift = window // 2 if self.shifted and side > table_window else 0
    padded = -(-side // window) * window
    x = x.reshape(B, side, side, D)
    x = jnp.pad(x, ((0, 0), *[(0, padded - side)] * 2, (0, 0)))
    x = jnp.roll(x, (-shift, -shift), (1, 2)).reshape(B, -1, D)

    dense = [Dense((D, H, D // H), dtype=dtype, name=name)
             for name in ("query", "key", "value")]
    ys = layers.together(dense, x, [mask.get(site) for site in "qkv"])
    q, k, v = (
        windows(tap(site, y, x).reshape(B, padded, padded, D), window)
        for site, y in zip("qkv", ys, strict=True))

    table = self.param("relative_position_bias", nn.initializers.normal(0.02),
                       ((2 * table_window - 1) ** 2, H))
    bias = table[position_index(window, table_window)].transpose(2, 0, 1)
    if shift:  # (windows, H, w^2, w^2)
      bias = bias + shift_mask(padded, window, shift)[:, None]

    def biased(site, scores, q):
      del site, q
      by_image = scores.reshape(B, -1, *scores.shape[1:])
      return (by_image + bias.astype(scores.dtype)).reshape(scores.shape)
    y = grid(layers.attention(q, k, v, H, biased), padded)
    y = jnp.roll(y, (shift, shift), (1, 2))[:, :side, :side].reshape(B, N, D)
    out = Dense((H, D // H, D), contract=2, dtype=dtype, name="out")
    return tap("proj", out(y, mask.get("proj")), y)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""
  common: Common
  heads: int
  shifted: bool
  drop_path: float

  @nn.compact
  def __call__(self, x, mask, tap, train):
    c = self.common
    norm = functools.partial(
        layers.LayerNorm, epsilon=c.epsilon, dtype=c.dtype)

    def add(x, branch):
      return x + layers.drop_path(self, branch, self.drop_path, train)

    x = tap("input", x, x)
    z = tap("norm1", norm(name="LayerNorm_0")(x), x)
    y = WindowAttention(c, self.heads, self.shifted, name="attention")(
        z, mask, tap)
    x = tap("attention", add(x, y), x)
    z = tap("norm2", norm(name="LayerNorm_1")(x), x)
    y = layers.Mlp(4 * x.shape[-1], c.gelu, c.dtype, name="mlp")(
        z, mask, tap)
    y = tap("mlp", y, z)
    return tap("block", add(x, y), x)


class Merge(nn.Module):
  """Concatenates 2 x 2 tokens, normalises, projects to twice the width."""
  common: Common

  @nn.compact
  def __call__(self, x, tap):
    B, N, D = x.shape
    side = round(N ** 0.5)
    odd = side % 2
    x = jnp.pad(x.reshape(B, side, side, D),
                ((0, 0), (0, odd), (0, odd), (0, 0)))
    half = (side + odd) // 2
    # The authors' order of the four: down first, then right.
    x = x.reshape(B, half, 2, half, 2, D).transpose(0, 1, 3, 4, 2, 5)
    x = x.reshape(B, half ** 2, 4 * D)
    norm = layers.LayerNorm(
        epsilon=self.common.epsilon, dtype=self.common.dtype, name="norm")
    x = tap("merge_norm", norm(x), x)
    return Dense((4 * D, 2 * D), dtype=self.common.dtype, use_bias=False,
                 name="reduction")(x)


class Swin(nn.Module):
  """`apply({"params": p}, images) -> features`.

  Attributes:
    embed: width of stage 1; of the last stage it is `width`.
    depths: blocks of each stage.
    heads: of stage 1; they double with the width.
    window: w, tokens a side, that the bias tables are made for.
    gelu, epsilon, drop_path, remat, dtype: as in `vit.ViT`.
    every_token: without effect, because the pooling reads all tokens.
  """
  embed: int
  depths: tuple[int, ...]
  heads: int
  image_size: int
  patch: int = 4
  window: int = 7
  gelu: str = "exact"
  epsilon: float = 1e-5
  drop_path: float = 0.0
  every_token: bool = True
  remat: bool = False
  dtype: Any = jnp.float32

  pool = "gap"
  prefix = 0  # no token stands before the patches

  @property
  def width(self) -> int:
    """D, the width of the features."""
    return self.embed * 2 ** (len(self.depths) - 1)

  @property
  def depth(self) -> int:
    """L, the number of blocks of all stages."""
    return sum(self.depths)

  @property
  def default_k(self) -> int:
    """K where the user does not set it: the paper's 96 of Swin-B."""
    return 3 * self.embed // 4

  @property
  def default_blocks(self) -> int:
    """Number of tuned blocks where the user does not set it: the last half of
    stage 3, and stage 4, as in the paper."""
    *_, third, last = self.depths
    return third // 2 + last

  @property
  def sides(self) -> tuple[int, ...]:
    """Tokens a side in each stage."""
    sides = [self.image_size // self.patch]
    for _ in self.depths[1:]:
      sides.append(-(-sides[-1] // 2))
    return tuple(sides)

  @property
  def takes_prompts(self) -> bool:
    """Whether prompts may be inserted between the tokens."""
    return False

  @property
  def pads(self) -> bool:
    """Whether attention reads padding, which is added after the norm."""
    return any(side > self.window and side % self.window
               for side in self.sides)

  @property
  def fields(self) -> dict[str, Any]:
    """The fields that belong to the weights; files and bundles keep them."""
    return {name: getattr(self, name) for name in FIELDS}

  @property
  def sites(self) -> dict[str, tuple[Site, ...]]:
    """{name: a `Site` for each block} of the linear layers with a bias."""
    layer = {
        "q": (1, 1, "attention/query"), "k": (1, 1, "attention/key"),
        "v": (1, 1, "attention/value"), "proj": (1, 1, "attention/out"),
        "fc1": (1, 4, "mlp/Dense_0"), "fc2": (4, 1, "mlp/Dense_1"),
    }
    def site(inputs, width, path, stage, i):
      D = self.embed * 2 ** stage
      return Site(inputs * D, width * D, f"{_block(stage, i)}/{path}")
    sites = {name: tuple(site(*parts, *place) for place in places(self.depths))
             for name, parts in layer.items()}
    embedding = Site(3 * self.patch ** 2, self.embed, "embedding")
    return {"embedding": (embedding,), **sites}

  @property
  def work(self) -> Work:
    """Multiply-adds of an image. In a stage of width D with N tokens, padded
    to Z for windows of w x w:

      linear     (3 Z + N) D^2 + 8 N D^2 a block    q, k, v; proj and the MLP;
                 8 M D^2 for the merging into M tokens
      attention  Z 2 w^2 D a block
    """
    linear = attention = 0
    outputs = []
    for stage, (depth, side) in enumerate(
        zip(self.depths, self.sides, strict=True)):
      D, N, w = self.embed * 2 ** stage, side ** 2, min(self.window, side)
      Z = (-(-side // w) * w) ** 2
      linear += depth * (3 * Z + 9 * N) * D * D
      attention += depth * Z * 2 * w * w * D
      outputs += [N] * depth
      if stage + 1 < len(self.depths):
        linear += 8 * self.sides[stage + 1] ** 2 * D * D
    patches = 3 * (self.image_size // self.patch * self.patch) ** 2
    return Work(patches * self.embed, linear, attention, tuple(outputs))

  @property
  def norms(self) -> dict[str, tuple[str, ...]]:
    """{name: paths of the LayerNorms}."""
    names = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_1"}
    norms = {name: tuple(f"{_block(*place)}/{path}"
                         for place in places(self.depths))
             for name, path in names.items()}
    merges = tuple(f"merge_{s}/norm" for s in range(len(self.depths) - 1))
    return {"embedding_norm": ("embedding_norm",), **norms,
            "merge_norm": merges, "norm": ("norm",)}

  def block_of(self, name: str) -> int:
    """Returns the number of the block of a parameter: -1 for parameters before
    the blocks, L for those after."""
    if match := re.match(r"stage_(\d+)_block_(\d+)/", name):
      return places(self.depths).index((int(match[1]), int(match[2])))
    if match := re.match(r"merge_(\d+)/", name):  # with the stage's last block
      return sum(self.depths[:int(match[1]) + 1]) - 1
    return self.depth if name.startswith("norm/") else -1

  @nn.compact
  def __call__(self, images, mask=None, tap=None, train=False, start=0):
    """Computes the features of images, see `vit.ViT`."""
    mask, tap = mask or {}, tap or layers.no_tap
    first = layers.at_block(tap, 0)
    x = images if start else self._tokens(images, mask, first)
    common = Common(self.window, self.gelu, self.epsilon, self.dtype)
    block = layers.rematerialised(Block) if self.remat and train else Block
    for number, (stage, i) in enumerate(places(self.depths)):
      if number < start:
        continue
      rate = self.drop_path * number / max(self.depth - 1, 1)
      rows = {site: rows[number] for site, rows in mask.items()
              if site != "embedding"}
      x = block(common, self.heads * 2 ** stage, i % 2 == 1, rate,
                name=_block(stage, i))(
                    x, rows, layers.at_block(tap, number), train)
      if i == self.depths[stage] - 1 and stage < len(self.depths) - 1:
        x = Merge(common, name=f"merge_{stage}")(
            x, layers.at_block(tap, stage))
    norm = layers.LayerNorm(
        epsilon=self.epsilon, dtype=self.dtype, name="norm")
    x = first("norm", norm(x), x)
    return x.mean(axis=1).astype(jnp.float32)

  def _tokens(self, images, mask, tap):
    """Normalised patch embeddings (B, N, D)."""
    p = self.patch
    x = layers.patches(images.astype(self.dtype), p, self.image_size)
    embed = Dense((p, p, 3, self.embed), contract=3, dtype=self.dtype,
                  name="embedding")
    x = tap("embedding", embed(x, mask.get("embedding", (None,))[0]), x)
    norm = layers.LayerNorm(
        epsilon=self.epsilon, dtype=self.dtype, name="embedding_norm")
    return tap("tokens", tap("embedding_norm", norm(x), x), images)


def _block(stage, i):
  return f"stage_{stage}_block_{i}"


def make(name: str, image_size: int, **fields) -> Swin | None:
  """Returns the Swin of a name such as "swin_b", None for other names."""
  size = name.removeprefix("swin_")
  if size == name or size not in SIZES:
    return None
  check_known("gelu", fields.get("gelu", "exact"), layers.GELU)
  window = fields.get("window", 7)
  if type(window) is not int or window < 1:
    raise UserError(f"window is {window!r}; expected a number of tokens a side")
  return Swin(*SIZES[size], image_size, **fields)


def canonical(name: str) -> str | None:
  """Returns e.g. "swin_b" for timm's and Hugging Face's names of a Swin, None
  for other names."""
  match = re.fullmatch(r"(?:.*/)?swin[-_](tiny|small|base|large)"
                       r"[-_]patch4[-_]window\d+[-_][\w.-]*", name)
  return match and f"swin_{'ti' if match[1] == 'tiny' else match[1][0]}"


def examples() -> tuple[str, ...]:
  """Names to show a user."""
  return tuple(f"swin_{size}" for size in SIZES)


def identify(shape: Callable[[str], tuple[int, ...] | None]
             ) -> Identity | None:
  """Reads a Swin's sizes off its parameters' shapes; None if these are no
  Swin's.

  Args:
    shape: `shape(name)` of a parameter, None if it is missing.
  """
  embedding = shape("embedding/kernel") or ()
  table = shape(f"{_block(0, 0)}/{_TABLE}") or ()
  if (len(embedding), len(table)) != (4, 2):
    return None
  depths: list[int] = []
  while blocks := _count(shape, len(depths)):
    depths.append(blocks)
  parts = (embedding[-1], tuple(depths), table[-1])
  sizes = dict(zip(("width", "depths", "heads"), parts, strict=True),
               patch=embedding[0])
  size = next((k for k, v in SIZES.items() if v == parts), None)
  if size and embedding[:3] == (4, 4, 3):
    return Identity("a Swin", sizes, f"swin_{size}")
  known = "; ".join(f"{k}: {', '.join(map(str, v))}" for k, v in SIZES.items())
  return Identity("a Swin", sizes, None,
                  f"known (width, depths, heads) with patch 4 are {known}")


def _count(shape, stage):
  """Number of blocks of a stage."""
  count = 0
  while shape(f"{_block(stage, count)}/LayerNorm_0/scale"):
    count += 1
  return count
