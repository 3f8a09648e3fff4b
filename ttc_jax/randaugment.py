"""RandAugment on the device (Cubuk et al., 2020).

As timm's `rand-m9-mstd0.5-inc1`: two operations of fifteen, drawn for each
image with replacement; each is done with probability 1/2, at a magnitude drawn
around m of 10 with a standard deviation of 0.5. "inc1": a larger magnitude
always changes more. Images are float32 (S, S, 3), values 0 to 255. Uncovered
pixels take a given colour, and shears keep the upper left corner, as timm's;
affine maps are interpolated bilinearly (timm draws bilinear or bicubic).
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

OPERATIONS = 2
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601-2, as Pillow's "L"
Op = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def _grey(image):
  return jnp.round((image * _LUMA).sum(-1, keepdims=True))


def _blend(degenerate, image, factor):
  """Pillow's Image.blend: 0 gives `degenerate`, 1 the image."""
  return jnp.clip(degenerate + factor * (image - degenerate), 0, 255)


def auto_contrast(image: jax.Array) -> jax.Array:
  """Stretches each channel to 0 to 255."""
  low, high = image.min((0, 1)), image.max((0, 1))
  scale = 255 / jnp.maximum(high - low, 1e-6)
  return jnp.where(high > low, jnp.clip((image - low) * scale, 0, 255), image)


def equalize(image: jax.Array) -> jax.Array:
  """Equalises the histogram of each channel, as Pillow's ImageOps.equalize."""
  def channel(x):
    x = jnp.clip(jnp.round(x), 0, 255).astype(jnp.int32)
    counts = jnp.zeros(256, jnp.int32).at[x.ravel()].add(1)
    last = counts[jnp.max(jnp.where(counts > 0, jnp.arange(256), 0))]
    step = (counts.sum() - last) // 255
    table = (step // 2 + jnp.cumsum(counts) - counts) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.clip(table, 0, 255)[x], x)
  return jax.vmap(channel, -1, -1)(image).astype(jnp.float32)


def invert(image: jax.Array) -> jax.Array:
  """Returns the negative."""
  return 255 - image


def posterize(image: jax.Array, bits: jax.Array) -> jax.Array:
  """Keeps the highest `bits` bits of every value."""
  step = 2.0 ** (8 - bits)
  return jnp.floor(image / step) * step


def solarize(image: jax.Array, threshold: jax.Array) -> jax.Array:
  """Inverts the values from `threshold` on."""
  return jnp.where(image < threshold, image, 255 - image)


def solarize_add(image: jax.Array, more: jax.Array) -> jax.Array:
  """Adds `more` to the values below 128."""
  return jnp.where(image < 128, jnp.clip(image + more, 0, 255), image)


def color(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Changes the saturation; 0 gives grey, 1 the image."""
  return _blend(_grey(image), image, factor)


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Changes the contrast around the mean grey value."""
  return _blend(jnp.round(_grey(image).mean()), image, factor)


def brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Changes the brightness; 0 gives black, 1 the image."""
  return _blend(0.0, image, factor)


def sharpness(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Changes the sharpness; 0 gives Pillow's SMOOTH filter, 1 the image."""
  kernel = jnp.array([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
  smooth = jax.lax.conv_general_dilated(
      jnp.moveaxis(image, -1, 0)[:, None], kernel[None, None], (1, 1), "VALID",
      precision="highest")
  smooth = jnp.round(jnp.moveaxis(smooth[:, 0], 0, -1))
  whole = image.at[1:-1, 1:-1].set(smooth)  # the border stays
  return _blend(whole, image, factor)


def affine(image: jax.Array, matrix: jax.Array, fill: jax.Array) -> jax.Array:
  """Returns the image whose pixel (x, y) is the input's at matrix (x, y, 1).

  Args:
    matrix: (2, 3), in pixels from the centre of the image.
    fill: (3,), of pixels beyond its frame.
  """
  S = image.shape[0]
  axis = jnp.arange(S) - (S - 1) / 2
  y, x = jnp.meshgrid(axis, axis, indexing="ij")
  at = jnp.einsum("ij,jhw->ihw", matrix, jnp.stack([x, y, jnp.ones_like(x)]),
                  precision="highest")
  where = at[::-1] + (S - 1) / 2  # rows first
  return fill + jax.vmap(lambda channel: jax.scipy.ndimage.map_coordinates(
      channel, list(where), order=1, mode="constant"), -1, -1)(image - fill)


def rotate(image: jax.Array, degrees: jax.Array, fill: jax.Array) -> jax.Array:
  """Rotates counter-clockwise, as Pillow does."""
  angle = jnp.deg2rad(degrees)
  c, s = jnp.cos(angle), jnp.sin(angle)
  return affine(image, jnp.array([[c, -s, 0], [s, c, 0]]), fill)


def _shear(image, along, factor, fill):
  """Shears along x (0) or y (1); the upper left corner stays in its place."""
  matrix = jnp.eye(2, 3).at[along, 1 - along].set(factor)
  return affine(image, matrix.at[along, 2].set(factor * len(image) / 2), fill)


def _translate(image, along, share, fill):
  return affine(image, jnp.eye(2, 3).at[along, 2].set(share * len(image)), fill)


# (image, share of 10, sign, fill) -> image, at timm's "increasing" magnitudes.
_SHEAR, _TRANSLATE, _ANGLE = 0.3, 0.45, 30.0
_OPS: tuple[Op, ...] = (
    lambda x, m, s, fill: auto_contrast(x),
    lambda x, m, s, fill: equalize(x),
    lambda x, m, s, fill: invert(x),
    lambda x, m, s, fill: rotate(x, s * _ANGLE * m, fill),
    lambda x, m, s, fill: posterize(x, 4 - jnp.floor(4 * m)),
    lambda x, m, s, fill: solarize(x, 256 - jnp.floor(256 * m)),
    lambda x, m, s, fill: solarize_add(x, jnp.floor(110 * m)),
    lambda x, m, s, fill: color(x, 1 + s * 0.9 * m),
    lambda x, m, s, fill: contrast(x, 1 + s * 0.9 * m),
    lambda x, m, s, fill: brightness(x, 1 + s * 0.9 * m),
    lambda x, m, s, fill: sharpness(x, 1 + s * 0.9 * m),
    lambda x, m, s, fill: _shear(x, 0, s * _SHEAR * m, fill),
    lambda x, m, s, fill: _shear(x, 1, s * _SHEAR * m, fill),
    lambda x, m, s, fill: _translate(x, 0, s * _TRANSLATE * m, fill),
    lambda x, m, s, fill: _translate(x, 1, s * _TRANSLATE * m, fill),
)


def rand_augment(images: jax.Array, key: jax.Array, magnitude: float,
                 fill: jax.Array) -> jax.Array:
  """Returns augmented images, float32 (B, S, S, 3) in 0 to 255.

  Args:
    images: any dtype, values 0 to 255.
    magnitude: m, 0 to 10; timm's and DeiT's is 9.
    fill: (3,), of uncovered pixels; timm's is the mean of the normalisation.
  """
  def one(image, key):
    for k in jax.random.split(key, OPERATIONS):
      which, apply, level, sign = jax.random.split(k, 4)
      m = jnp.clip(magnitude + 0.5 * jax.random.normal(level), 0, 10) / 10
      s = jax.random.rademacher(sign, dtype=jnp.float32)
      op = jax.random.randint(which, (), 0, len(_OPS))
      done = jax.lax.switch(op, _OPS, image, m, s, fill)
      image = jnp.where(jax.random.bernoulli(apply), done, image)
    return image
  # One image after the other: a vectorised switch would do all operations.
  return jax.lax.map(lambda args: one(*args), (
      images.astype(jnp.float32), jax.random.split(key, len(images))))
