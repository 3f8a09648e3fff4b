"""The Vision Transformer (Dosovitskiy et al., 2021), with taps and a mask.

Parameters are named as in Big Vision's ViT, so that its `.npz` files load by
name; `ttc_jax.weights` maps the names of other formats to these.

Shapes: B batch, N tokens, D width, H heads, L blocks, F hidden width.
"""
from collections.abc import Callable
import functools
import math
import re
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ttc_jax.backbones import layers
from ttc_jax.backbones.layers import Dense, Field, Identity, Site, Work
from ttc_jax.errors import UserError, check_known

# name: (width, depth, heads, hidden width)
SIZES = {
    "ti": (192, 12, 3, 768),
    "s": (384, 12, 6, 1536),
    "b": (768, 12, 12, 3072),
    "l": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "h": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
}

POOLS = ("cls", "distilled", "gap", "map")


def has_cls(pool: str) -> bool:
  """Returns whether a ViT with that pooling has a class token."""
  return pool in ("cls", "distilled")


# Names of parameters, as in Big Vision; {} is the number of the block.
BLOCK = "Transformer/encoderblock_{}"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_0"
_MLP = f"{BLOCK}/MlpBlock_0"

# For `backbones` and `weights`, see the docstring of `backbones`.
FIELDS = {
    "pool": Field(POOLS),
    "registers": Field(tuple(range(65))),
    "rope": Field((0.0, 100.0)),
    "pre_norm": Field((False, True)),
    "layer_scale": Field((False, True)),
    "final_norm": Field((False, True)),
    "pool_norm": Field((False, True)),
    "gelu": Field(tuple(layers.GELU), required=True),
    "epsilon": Field(float, required=True),
}
PARAMETERS = {"cls": "tokens", "registers": "tokens", "pos_embedding": "grid",
              "embedding/kernel": "patch"}


class Attention(nn.Module):
  """Multi-head attention of `queries` (B, M, D) to x (B, N, D).

  Attributes:
    angles: (P, D/H/2), by which keys of the last P of the N tokens, the
      patches, are rotated. The M queries are the first M tokens and are
      rotated alike. None rotates nothing.
  """
  heads: int
  dtype: Any
  angles: Any = None

  @nn.compact
  def __call__(self, queries, x, mask, tap):
    D, H = x.shape[-1], self.heads
    query, key, value = (
        Dense((D, H, D // H), dtype=self.dtype, name=name)
        for name in ("query", "key", "value"))

    def project(x, **dense):
      ys = layers.together(
          [*dense.values()], x, [mask.get(site) for site in dense])
      return [tap(site, y, x) for site, y in zip(dense, ys, strict=True)]

    if queries is x:
      q, k, v = project(x, q=query, k=key, v=value)
    else:
      q, = project(queries, q=query)
      k, v = project(x, k=key, v=value)
    angles = self.angles
    if angles is not None:  # [CLS], registers and prompts are not rotated
      angles = np.pad(angles, ((x.shape[1] - len(angles), 0), (0, 0)))
    y = layers.attention(q, k, v, H, tap, angles)
    out = Dense((H, D // H, D), contract=2, dtype=self.dtype, name="out")
    return tap("proj", out(y, mask.get("proj")), y)


class Block(nn.Module):
  """Pre-LN: x + attention(norm(x)), then x + mlp(norm(x)).

  Attributes:
    queries: how many of the first tokens the block returns; None for all.
  """
  vit: "ViT"
  drop_path: float
  queries: int | None

  @nn.compact
  def __call__(self, x, mask, tap, train):
    vit, dtype = self.vit, self.vit.dtype
    norm = functools.partial(
        layers.LayerNorm, epsilon=vit.epsilon, dtype=dtype)

    def add(x, branch, name):
      if vit.layer_scale:
        scale = self.param(name, nn.initializers.constant(1e-5), x.shape[-1:])
        branch = branch * scale.astype(dtype)
      return x + layers.drop_path(self, branch, self.drop_path, train)

    x = tap("input", x, x)
    z = tap("norm1", norm(name="LayerNorm_0")(x), x)
    x = x[:, :self.queries]
    y = Attention(vit.heads, dtype, vit.angles,
                  name="MultiHeadDotProductAttention_0")(
                      z[:, :self.queries] if self.queries else z, z, mask, tap)
    x = tap("attention", add(x, y, "layer_scale_0"), x)
    z = tap("norm2", norm(name="LayerNorm_1")(x), x)
    y = layers.Mlp(vit.hidden, vit.gelu, dtype, name="MlpBlock_0")(
        z, mask, tap)
    y = tap("mlp", y, z)
    return tap("block", add(x, y, "layer_scale_1"), x)


class Encoder(nn.Module):
  vit: "ViT"

  @nn.compact
  def __call__(self, x, mask, tap, train, start):
    vit = self.vit
    block = layers.rematerialised(Block) if vit.remat and train else Block
    for i in range(start, vit.depth):
      rate = vit.drop_path * i / max(vit.depth - 1, 1)
      rows = {site: rows[i] for site, rows in mask.items()
              if site != "embedding"}
      last = i == vit.depth - 1
      x = block(vit, rate, vit.tokens_read if last else None,
                name=f"encoderblock_{i}")(
                    x, rows, layers.at_block(tap, i), train)
    if vit.final_norm:
      norm = layers.LayerNorm(
          epsilon=vit.epsilon, dtype=vit.dtype, name="encoder_norm")
      x = layers.at_block(tap, 0)("norm", norm(x), x)
    return x


class MAPHead(nn.Module):
  """Pooling by attention (Zhai et al., 2022): (B, N, D) -> (B, D).

  A learnt probe attends to the tokens; a residual MLP follows.
  """
  vit: "ViT"

  @nn.compact
  def __call__(self, x, tap):
    vit, shape = self.vit, (1, 1, x.shape[-1])
    # Its layers belong to no block, so methods do not act on them.
    alone = layers.at_block(layers.no_tap, 0)
    probe = self.param("probe", nn.initializers.xavier_uniform(), shape)
    probe = jnp.broadcast_to(probe.astype(vit.dtype), (len(x), *shape[1:]))
    x = Attention(vit.heads, vit.dtype, name="MultiHeadDotProductAttention_0")(
        probe, x, {}, alone)
    norm = layers.LayerNorm(vit.epsilon, vit.dtype, name="LayerNorm_0")
    z = tap("map_norm", norm(x), x)
    mlp = layers.Mlp(vit.hidden, vit.gelu, vit.dtype, name="MlpBlock_0")
    return (x + mlp(z, {}, alone))[:, 0]


class ViT(nn.Module):
  """`apply({"params": p}, images) -> features`.

  Attributes:
    pool: "cls" (a learnt token), "distilled" (the mean of it and the first
      register, the distillation token of DeiT: Touvron et al., 2021), "gap"
      (the mean of the patch tokens) or "map" (attention to them: SigLIP).
    registers: number of learnt tokens before the patches that the pooling
      does not read.
    rope: base of the periods of rotary position embeddings (DINOv3: 100); 0
      for learnt position embeddings.
    pre_norm: a LayerNorm before the blocks (CLIP).
    final_norm: a LayerNorm of all tokens after the blocks.
    pool_norm: a LayerNorm of the pooled features (timm's fc_norm).
    gelu: "exact" (timm, DINO), "tanh" (Big Vision, vision_transformer) or
      "quick" (CLIP).
    epsilon: of every LayerNorm.
    drop_path: rate of the last block; it rises linearly from 0.
    every_token: the last block computes all tokens, also those that the
      pooling does not read.
    remat: a training step keeps the input of each block only, and computes the
      block again for its gradient.
    dtype: of the computation; parameters, LayerNorm statistics and softmax
      stay float32.
  """
  width: int
  depth: int
  heads: int
  hidden: int
  patch: int
  image_size: int
  pool: str = "cls"
  registers: int = 0
  rope: float = 0.0
  pre_norm: bool = False
  layer_scale: bool = False
  final_norm: bool = True
  pool_norm: bool = False
  gelu: str = "tanh"
  epsilon: float = 1e-6
  drop_path: float = 0.0
  every_token: bool = False
  remat: bool = False
  dtype: Any = jnp.float32

  @property
  def tokens_read(self) -> int | None:
    """How many of the first tokens the last block returns; None for all.

    With pool="cls" the features are one token: leaving out the queries, MLP
    and gradients of the others saves 1/14 of the work of 12 blocks.
    """
    return None if self.every_token else {"cls": 1, "distilled": 2}.get(
        self.pool)

  @property
  def prefix(self) -> int:
    """Number of tokens before the patches."""
    return has_cls(self.pool) + self.registers

  @property
  def default_k(self) -> int:
    """K where the user does not set it: the paper's 96 of ViT-B."""
    return self.width // 8

  @property
  def default_blocks(self) -> int:
    """Number of tuned blocks where the user does not set it: all, as in the
    paper."""
    return self.depth

  @property
  def takes_prompts(self) -> bool:
    """Whether prompts may be inserted between the tokens."""
    return True

  @property
  def pads(self) -> bool:
    """Whether attention reads padding, which is added after the norm."""
    return False

  @property
  def fields(self) -> dict[str, Any]:
    """The fields that belong to the weights; files and bundles keep them."""
    return {name: getattr(self, name) for name in FIELDS}

  @property
  def angles(self) -> np.ndarray | None:
    """(P, D/H/2) rotation of the patches' queries and keys, in radians; None
    for learnt positions."""
    if not self.rope:
      return None
    return layers.grid_angles(
        self.image_size // self.patch, self.width // self.heads, self.rope)

  @property
  def sites(self) -> dict[str, tuple[Site, ...]]:
    """{name: a `Site` for each block} of the linear layers, which a mask can
    scale and a merge can change. The embedding has one `Site` only."""
    D, F, M = self.width, self.hidden, 3 * self.patch ** 2
    layer = {
        "q": (D, D, f"{ATTENTION}/query"),
        "k": (D, D, f"{ATTENTION}/key"),
        "v": (D, D, f"{ATTENTION}/value"),
        "proj": (D, D, f"{ATTENTION}/out"),
        "fc1": (D, F, f"{_MLP}/Dense_0"),
        "fc2": (F, D, f"{_MLP}/Dense_1"),
    }
    sites = {name: tuple(Site(inputs, width, path.format(i))
                         for i in range(self.depth))
             for name, (inputs, width, path) in layer.items()}
    return {"embedding": (Site(M, D, "embedding"),), **sites}

  @property
  def work(self) -> Work:
    """Multiply-adds of an image, without a pooling by attention. With P patches
    of M = 3 p^2 numbers, N tokens, of which the last of L blocks computes R,
    and T = (L - 1) N + R:

      patches    P M D
      linear     L N 2 D^2 + T (2 D^2 + 2 D F)    k, v; q, proj and the MLP
      attention  T 2 N D
    """
    D, F, L = self.width, self.hidden, self.depth
    P = (self.image_size // self.patch) ** 2
    N = P + self.prefix
    outputs = (N,) * (L - 1) + (self.tokens_read or N,)
    T = sum(outputs)
    return Work(P * 3 * self.patch ** 2 * D,
                L * N * 2 * D * D + T * (2 * D * D + 2 * D * F),
                T * 2 * N * D, outputs)

  @property
  def norms(self) -> dict[str, tuple[str, ...]]:
    """{name: the path of the LayerNorm in each block}; norms outside the
    blocks have one path, or none."""
    names = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_1"}
    norms = {name: tuple(f"{BLOCK.format(i)}/{path}"
                         for i in range(self.depth))
             for name, path in names.items()}
    outside = {"pre_norm": (self.pre_norm, "pre_norm"),
               "norm": (self.final_norm, "Transformer/encoder_norm"),
               "map_norm": (self.pool == "map", "MAPHead_0/LayerNorm_0"),
               "pool_norm": (self.pool_norm, "pool_norm")}
    return norms | {name: (path,) if there else ()
                    for name, (there, path) in outside.items()}

  def block_of(self, name: str) -> int:
    """Returns the number of the block of a parameter: -1 for parameters before
    the blocks, L for those after."""
    match = re.search(r"encoderblock_(\d+)/", name)
    if match:
      return int(match[1])
    after = name.startswith(
        ("Transformer/encoder_norm", "MAPHead_0/", "pool_norm/"))
    return self.depth if after else -1

  @nn.compact
  def __call__(self, images, mask=None, tap=None, train=False, start=0):
    """Computes the features of images.

    Args:
      images: (B, S, S, 3), normalised; with `start`, the tokens (B, N, D).
      mask: {site: (L, D_out)}, the factor on each row of the site's kernel.
      tap: `tap(site, block, y, x) -> y`, see `ttc_jax.taps`.
      train: drops paths, with the random stream "drop_path".
      start: number of the first block to compute.

    Returns:
      features (B, D), float32.
    """
    mask, tap = mask or {}, tap or layers.no_tap
    first = layers.at_block(tap, 0)
    # Unbound copy: Linen would register a bound module as a child.
    vit = self.clone(parent=None)
    x = images if start else self._tokens(images, mask, first)
    x = Encoder(vit, name="Transformer")(x, mask, tap, train, start)
    if self.pool == "cls":
      x = x[:, 0]
    elif self.pool == "distilled":
      x = x[:, :2].mean(axis=1)
    elif self.pool == "gap":
      x = x[:, self.registers:].mean(axis=1)
    else:
      x = MAPHead(vit, name="MAPHead_0")(x[:, self.registers:], first)
    if self.pool_norm:
      x = first("pool_norm", self._norm("pool_norm")(x), x)
    return x.astype(jnp.float32)

  def _norm(self, name):
    return layers.LayerNorm(self.epsilon, self.dtype, name=name)

  def _tokens(self, images, mask, tap):
    """Patch and position embeddings, behind [CLS] and registers: (B, N, D)."""
    B, S, p = len(images), self.image_size, self.patch
    x = layers.patches(images.astype(self.dtype), p, S)
    embed = Dense((p, p, 3, self.width), contract=3, dtype=self.dtype,
                  name="embedding")
    x = tap("embedding", embed(x, mask.get("embedding", (None,))[0]), x)
    if not self.rope:
      position = self.param("pos_embedding", nn.initializers.normal(0.02),
                            (1, (S // p) ** 2, self.width))
      x = x + position.astype(self.dtype)
    for name, count in (("registers", self.registers),
                        ("cls", has_cls(self.pool))):
      if count:
        token = self.param(
            name, nn.initializers.zeros, (1, int(count), self.width))
        token = jnp.broadcast_to(
            token.astype(self.dtype), (B, *token.shape[1:]))
        x = jnp.concatenate([token, x], axis=1)
    if self.pre_norm:
      x = tap("pre_norm", self._norm("pre_norm")(x), x)
    return tap("tokens", x, images)


def make(name: str, image_size: int, **fields) -> ViT | None:
  """Returns the ViT of a name such as "vit_b16", None for other names."""
  match = re.fullmatch(rf"vit_({'|'.join(SIZES)})([1-9]\d*)", name)
  if not match:
    return None
  width, depth, heads, hidden = SIZES[match[1]]
  vit = ViT(width, depth, heads, hidden, int(match[2]), image_size, **fields)
  check_known("pool", vit.pool, POOLS)
  if vit.pool == "distilled" and not vit.registers:
    raise UserError("pool=distilled needs a distillation token: registers is 0")
  check_known("gelu", vit.gelu, layers.GELU)
  return vit


_WORDS = {"tiny": "ti", "small": "s", "base": "b", "large": "l", "huge": "h",
          "giant": "g", "so400m": "so400m"}
_WORD = f"({'|'.join(_WORDS)})"
_REST = r"[\w.-]*"  # of a name
_LETTER = "([Tt]i|[Ss]|[Bb]|[Ll]|[Hh]|g|[Ss]o400m)"
# timm, Hugging Face (two), Big Vision; the groups are the size and the patch.
_NAMES = (
    rf"(?:vit|deit3?|flexivit)_{_WORD}(?:_distilled)?_patch(\d+)"
    rf"(?:[_.]{_REST})?",
    rf"(?:.*/)?(?:vit|deit|clip-vit|siglip2?)-{_WORD}-patch(\d+)"
    rf"(?:-{_REST})?",
    rf"(?:.*/)?dino(?:v3)?-vit([sbl])(\d+)(?:-{_REST})?",  # Hugging Face
    rf"(?:[Vv]i[Tt][-_])?{_LETTER}[-_/](\d+)",  # Big Vision: B/16, ViT-B_16
)


def canonical(name: str) -> str | None:
  """Returns e.g. "vit_b16" for timm's, Hugging Face's and Big Vision's names of
  a ViT, None for other names."""
  for pattern in _NAMES:
    if match := re.fullmatch(pattern, name):
      return f"vit_{_WORDS.get(match[1], match[1].lower())}{match[2]}"
  if match := re.fullmatch(
      rf"(?:facebook/)?dinov2(?:-with-registers)?-{_WORD}", name):
    return f"vit_{_WORDS[match[1]]}14"
  return None


def examples() -> tuple[str, ...]:
  """Names to show a user: any size works with any patch."""
  return ("vit_ti16", "vit_s14", "vit_s16", "vit_b8", "vit_b16", "vit_b32",
          "vit_l14", "vit_l16", "vit_so400m14", "vit_h14", "vit_g14")


def identify(shape: Callable[[str], tuple[int, ...] | None]
             ) -> Identity | None:
  """Reads a ViT's sizes off its parameters' shapes; None if these are no ViT's.

  Args:
    shape: `shape(name)` of a parameter, None if it is missing.
  """
  embedding = shape("embedding/kernel") or ()
  out = shape(f"{ATTENTION.format(0)}/out/kernel") or ()
  fc1 = shape(f"{_MLP.format(0)}/Dense_0/kernel") or ()
  if (len(embedding), len(fc1)) != (4, 2) or len(out) not in (2, 3):
    return None
  patch, rows, channels, width = embedding
  if (rows, channels, math.prod(out[:-1]), out[-1], fc1[0]) != (
      patch, 3, width, width, width):
    return None
  sizes = {"width": width, "patch": patch, "depth": _depth(shape),
           "heads": out[0] if len(out) == 3 else None, "hidden": fc1[1]}
  size, reason = _size(sizes)
  positions = shape("pos_embedding")
  return Identity(
      "a ViT", sizes, size and f"vit_{size}{patch}", reason,
      patch * math.isqrt(positions[1]) if positions else None)


def _depth(shape):
  """Number of blocks that have a tensor."""
  depth = 0
  while any(shape(f"{BLOCK.format(depth)}/{name}") for name in (
      "LayerNorm_0/scale", "LayerNorm_1/scale", "MlpBlock_0/Dense_0/kernel")):
    depth += 1
  return depth


def _size(sizes):
  """-> (key of SIZES, ""), or (None, why there is none)."""
  fitting = dict(SIZES)
  for i, name in enumerate(("width", "depth", "heads", "hidden")):
    known = sorted({parts[i] for parts in fitting.values()})
    if sizes[name] is not None:
      fitting = {k: v for k, v in fitting.items() if v[i] == sizes[name]}
    if not fitting:
      shown = "" if name == "width" else f" at width {sizes['width']}"
      return None, (f"{name} {sizes[name]} is none of "
                    f"{', '.join(map(str, known))}{shown}")
  return next(iter(fitting)), ""
