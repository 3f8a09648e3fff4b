"""Augmentation on the device: random resized crop and horizontal flip."""
import jax
import jax.numpy as jnp


def random_crop(images: jax.Array, key: jax.Array, size: int,
                smallest: float) -> jax.Array:
  """Returns square crops of a random area, resized by bicubic interpolation.

  Args:
    images: (B, S, S, 3), any dtype, values 0 to 255.
    size: pixels per side of the result.
    smallest: smallest area of a crop, as a share of the image's, above 0 to 1;
      1 resizes the whole image.

  Returns:
    float32 (B, size, size, 3) in 0 to 255.
  """
  B, S = images.shape[:2]
  area, corner = jax.random.split(key)
  side = S * jnp.sqrt(jax.random.uniform(area, (B,), minval=smallest))
  offset = jax.random.uniform(corner, (B, 2)) * (S - side)[:, None]

  def crop(image, side, offset):
    scale = jnp.full(2, size / side)
    return jax.image.scale_and_translate(
        image, (size, size, 3), (0, 1), scale, -offset * scale, "cubic")
  crops = jax.vmap(crop)(images.astype(jnp.float32), side, offset)
  return jnp.clip(crops, 0, 255)


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
  """Mirrors each image (B, S, S, 3) left to right with probability 1/2."""
  flip = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
  return jnp.where(flip, images[:, :, ::-1], images)
