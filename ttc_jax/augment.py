"""Augmentation on the device: crops, flips, colours, erasing, mixing.

Formulas and defaults are those of timm (`timm.data`), which NOAH and DeiT use.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttc_jax import normalisation, randaugment


class Recipe(NamedTuple):
  """What is done beyond crops and flips; `config.augment` explains the keys."""
  jitter: float = 0.0
  randaugment: float = 0.0
  erasing: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0


def random_crop(images: jax.Array, key: jax.Array, size: int, smallest: float,
                aspect: float = 1.0) -> jax.Array:
  """Returns crops of a random area and shape, resized by bicubic interpolation.

  As timm's RandomResizedCropAndInterpolation, but for whole pixels.

  Args:
    images: (B, S, S, 3), any dtype, values 0 to 255.
    size: pixels per side of the result.
    smallest: smallest area of a crop, as a share of the image's, above 0 to 1;
      1 with aspect 1 resizes the whole image.
    aspect: the longer side of a crop is at most so many times the other one;
      1 gives squares, timm and TensorFlow have 4/3.

  Returns:
    float32 (B, size, size, 3) in 0 to 255.
  """
  B, S = images.shape[:2]
  area, corner = jax.random.split(key)
  sides = S * _crop_sides(area, B, smallest, aspect)
  offset = jax.random.uniform(corner, (B, 2)) * (S - sides)

  def crop(image, sides, offset):
    scale = size / sides
    return jax.image.scale_and_translate(
        image, (size, size, 3), (0, 1), scale, -offset * scale, "cubic")
  crops = jax.vmap(crop)(images.astype(jnp.float32), sides, offset)
  return jnp.clip(crops, 0, 255)


def _crop_sides(key, count, smallest, aspect):
  """Height and width of crops, (count, 2), as shares of the image's side."""
  if aspect == 1:
    side = jnp.sqrt(jax.random.uniform(key, (count,), minval=smallest))
    return jnp.stack([side, side], -1)
  area_key, ratio_key = jax.random.split(key)
  # As timm: the first of ten draws that fits, or else the whole image.
  area = jax.random.uniform(area_key, (10, count), minval=smallest)
  ratio = jnp.exp(jnp.log(aspect) * jax.random.uniform(
      ratio_key, (10, count), minval=-1.0))
  sides = jnp.sqrt(jnp.stack([area / ratio, area * ratio], -1))
  fits = (sides <= 1).all(-1)
  first = sides[jnp.argmax(fits, 0), jnp.arange(count)]
  return jnp.where(fits.any(0)[:, None], first, 1.0)


def random_window(images: jax.Array, key: jax.Array, size: int) -> jax.Array:
  """Returns square crops (B, size, size, 3) at random places, every one as
  likely; their pixels are those of the images (B, S, S, 3)."""
  B, S = images.shape[:2]
  corner = jax.random.randint(key, (B, 2), 0, S - size + 1)

  def crop(image, corner):
    return jax.lax.dynamic_slice(image, (*corner, 0), (size, size, 3))
  return jax.vmap(crop)(images, corner)


def centre(images: np.ndarray, size: int) -> np.ndarray:
  """Returns the central (N, size, size, 3) of images (N, S, S, 3)."""
  first = round((images.shape[1] - size) / 2)
  return images[:, first:first + size, first:first + size]


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
  """Mirrors each image (B, S, S, 3) left to right with probability 1/2."""
  flip = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
  return jnp.where(flip, images[:, :, ::-1], images)


def change(images: jax.Array, key: jax.Array, recipe: Recipe,
           normalised: str) -> jax.Array:
  """Applies colour jitter or RandAugment, then erasing.

  Args:
    images: (B, S, S, 3), values 0 to 255.
    normalised: the model's normalisation: erased pixels are normal noise
      after it, those uncovered have its mean.

  Returns:
    The images; of another type only where something is done.
  """
  colour_key, erase_key = jax.random.split(key)
  if recipe.randaugment:
    mean, _ = normalisation.mean_and_std(normalised)
    images = randaugment.rand_augment(
        images, colour_key, recipe.randaugment,
        jnp.round(255 * jnp.asarray(mean, jnp.float32)))
  elif recipe.jitter:
    images = color_jitter(images, colour_key, recipe.jitter)
  if recipe.erasing:
    images = random_erasing(images, erase_key, recipe.erasing, normalised)
  return images


def color_jitter(images: jax.Array, key: jax.Array,
                 strength: float) -> jax.Array:
  """Changes brightness, contrast and saturation, in an order of its own each.

  Every factor is uniform in [1 - strength, 1 + strength], as torchvision's
  ColorJitter. Images (B, S, S, 3), values 0 to 255; returns float32.
  """
  ops = (randaugment.brightness, randaugment.contrast, randaugment.color)

  def one(args):
    image, key = args
    order_key, factor_key = jax.random.split(key)
    factors = jax.random.uniform(factor_key, (3,), minval=1 - strength,
                                 maxval=1 + strength)
    for i in jax.random.permutation(order_key, 3):
      image = jax.lax.switch(i, ops, image, factors[i])
    return image
  return jax.lax.map(one, (images.astype(jnp.float32),
                           jax.random.split(key, len(images))))


def random_erasing(images: jax.Array, key: jax.Array, probability: float,
                   normalised: str) -> jax.Array:
  """Fills a random rectangle of some images with noise (Zhong et al., 2020).

  Its area is uniform in 0.02 to 1/3 of the image, the logarithm of its aspect
  ratio uniform in that of 0.3 to 1/0.3; a side is cut to the image's. The
  noise is standard normal for every pixel and channel after normalisation.
  """
  B, S = images.shape[:2]
  keys = jax.random.split(key, 5)
  area = jax.random.uniform(keys[0], (B,), minval=0.02, maxval=1 / 3)
  aspect = jnp.exp(jax.random.uniform(
      keys[1], (B,), minval=jnp.log(0.3), maxval=-jnp.log(0.3)))
  sides = jnp.minimum(jnp.round(S * jnp.sqrt(
      area * jnp.stack([aspect, 1 / aspect]))), S)
  inside = _boxes(keys[2], sides, S)
  inside &= jax.random.bernoulli(keys[3], probability, (B,))[:, None, None]
  mean, deviation = map(jnp.asarray, normalisation.mean_and_std(normalised))
  noise = 255 * (mean + deviation * jax.random.normal(keys[4], images.shape))
  return jnp.where(inside[..., None], noise, images.astype(jnp.float32))


def _boxes(key, sides, S):
  """Boxes at random places: True inside, (B, S, S), for sides (2, B)."""
  corner = jnp.floor(jax.random.uniform(key, sides.shape) * (S - sides + 1))
  at = jnp.arange(S)
  rows, columns = ((at >= corner[i][:, None])
                   & (at < (corner + sides)[i][:, None]) for i in (0, 1))
  return rows[:, :, None] & columns[:, None, :]


def mix(images: jax.Array, targets: jax.Array, key: jax.Array,
        recipe: Recipe) -> tuple[jax.Array, jax.Array]:
  """Mixes every image with that at the mirrored place of the batch.

  Mixup (Zhang et al., 2018): weights l and 1 - l, l of Beta(alpha, alpha).
  CutMix (Yun et al., 2019): a box of a share 1 - l of the area comes from the
  other, at a centre anywhere, cut at the frame; l is then the share that
  stayed. With both, one of them for the whole batch, with equal odds. The
  targets are mixed with the same l.

  Args:
    images: (B, S, S, 3); targets: (B, C).
  """
  if not recipe.mixup and not recipe.cutmix:
    return images, targets
  which, up_key, cut_key, box_key = jax.random.split(key, 4)
  images, S = images.astype(jnp.float32), images.shape[1]
  cut = (jax.random.bernoulli(which) if recipe.mixup and recipe.cutmix
         else jnp.asarray(bool(recipe.cutmix)))
  up = jax.random.beta(up_key, recipe.mixup or 1.0, recipe.mixup or 1.0)
  inside = _cut_box(box_key, jax.random.beta(
      cut_key, recipe.cutmix or 1.0, recipe.cutmix or 1.0), S)
  share = jnp.where(cut, 1 - inside.mean(), up)
  keep = jnp.where(cut, 1.0 - inside, up)[None, :, :, None]
  return (keep * images + (1 - keep) * images[::-1],
          share * targets + (1 - share) * targets[::-1])


def _cut_box(key, share, S):
  """CutMix's box, (S, S) of bool."""
  side = jnp.floor(S * jnp.sqrt(1 - share))
  middle = jax.random.randint(key, (2,), 0, S)
  at = jnp.arange(S)
  low, high = middle - side // 2, middle + side // 2
  rows, columns = ((at >= low[i]) & (at < high[i]) for i in (0, 1))
  return rows[:, None] & columns[None]
