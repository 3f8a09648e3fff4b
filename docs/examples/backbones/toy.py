"""Toy: a family of backbones, token-wise MLPs on patches with positions.

Copied to `ttc_jax/backbones/toy.py` this file adds toy_8_p4, toy_16_p4, ...:
width, then patch.
"""
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttc_jax.backbones import layers
from ttc_jax.backbones.layers import Dense, Field, Identity, Site, Work

# Fields that belong to the weights, with the values that they may have.
FIELDS = {"slope": Field((0.1, 0.2), required=True)}
# Parameters that are fitted to another image size or patch.
PARAMETERS = {"places": "grid", "stem/kernel": "patch"}


class Toy(nn.Module):
  """B images -> B features: patches, two residual blocks, the mean of tokens.

  Attributes:
    width: D, 8 or 16.
    slope: of the activation below 0.
    patch, image_size, gelu, epsilon, drop_path, every_token, dtype: as in
      `vit.ViT`; what a family has no use for, it only keeps.
  """
  width: int
  patch: int
  image_size: int
  slope: float = 0.1
  gelu: str = "exact"
  epsilon: float = 1e-6
  drop_path: float = 0.0
  every_token: bool = True
  dtype: Any = jnp.float32

  # Two blocks, no tokens beside the patches; TTC adapts both blocks.
  depth, prefix, pool, default_blocks = 2, 0, "gap", 2
  takes_prompts = pads = False

  @property
  def default_k(self) -> int:
    """TTC's K."""
    return self.width // 4

  @property
  def fields(self) -> dict[str, Any]:
    """The values of `FIELDS`, which bundles keep."""
    return {"slope": self.slope}

  @property
  def sites(self) -> dict[str, tuple[Site, ...]]:
    """The linear layers, block by block: inputs, width and path of each."""
    D = self.width
    return {"embedding": (Site(3 * self.patch ** 2, D, "stem"),),
            "fc2": tuple(Site(D, D, f"mix_{i}") for i in range(self.depth))}

  @property
  def norms(self) -> dict[str, tuple[str, ...]]:
    """Paths of the norms, block by block."""
    return {"norm1": tuple(f"norm_{i}" for i in range(self.depth))}

  @property
  def work(self) -> Work:
    """Multiplications for one image, for the counted cost."""
    N, D = (self.image_size // self.patch) ** 2, self.width
    return Work(3 * self.image_size ** 2 * D, 2 * N * D * D, 0, (N, N))

  def block_of(self, name: str) -> int:
    """The block of a parameter; -1 for what comes before the blocks."""
    match = re.search(r"(?:mix|norm)_(\d)/", name)
    return int(match[1]) if match else -1

  @nn.compact
  def __call__(self, images: jax.Array, mask=None, tap=None,
               train: bool = False, start: int = 0) -> jax.Array:
    """Returns features (B, D) of images (B, S, S, 3), normalised.

    With `start`, the first block to compute, `images` are the tokens (B, N, D)
    that enter it.
    """
    mask, tap = mask or {}, tap or layers.no_tap
    D = self.width
    x = images if start else self._tokens(images)
    for i in range(start, self.depth):
      here = layers.at_block(tap, i)
      x = here("input", x, x)
      z = here("norm1", layers.LayerNorm(self.epsilon, name=f"norm_{i}")(x), x)
      z = jnp.where(z > 0, z, self.slope * z)
      rows = mask["fc2"][i] if "fc2" in mask else None
      x = x + here("fc2", Dense((D, D), name=f"mix_{i}")(z, rows), z)
    return x.mean(1)

  def _tokens(self, images):
    """Patch and position embeddings, (B, N, D)."""
    p, D = self.patch, self.width
    x = layers.patches(images, p, self.image_size)
    x = Dense((p, p, 3, D), contract=3, name="stem")(x)
    return x + self.param("places", nn.initializers.normal(),
                          (1, x.shape[1], D))


def make(name: str, image_size: int, **fields: Any) -> Toy | None:
  """Returns the module of a name, or None if the name is of another family."""
  match = re.fullmatch(r"toy_(8|16)_p(\d+)", name)
  return (Toy(int(match[1]), int(match[2]), image_size, **fields)
          if match else None)


def canonical(name: str) -> str | None:
  """Returns our name for another library's; no other library has toys."""
  del name
  return None


def examples() -> tuple[str, ...]:
  """Names for messages."""
  return ("toy_8_p4", "toy_16_p4")


def identify(shape) -> Identity | None:
  """Recognises a file of weights by the shapes of our parameters in it."""
  stem = shape("stem/kernel")
  if stem is None:
    return None
  p, _, _, D = stem
  places = shape("places")
  return Identity("a toy", {"width": D, "patch": p},
                  f"toy_{D}_p{p}" if D in (8, 16) else None,
                  image_size=places and p * round(places[1] ** 0.5))
