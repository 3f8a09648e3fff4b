"""RandAugment's operations against Pillow's."""
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import pytest

from ttc_jax import randaugment as ra


@pytest.fixture
def picture():
  """Smooth colours, so that interpolation matters little; (24, 24, 3)."""
  y, x = np.mgrid[:24, :24] / 23
  return np.stack([200 * x, 255 * y, 120 + 60 * x * y], -1).astype(np.uint8)


def pillow(picture, fn):
  return np.asarray(fn(Image.fromarray(picture))).astype(np.float32)


ENHANCED = [("color", ImageEnhance.Color), ("contrast", ImageEnhance.Contrast),
            ("brightness", ImageEnhance.Brightness),
            ("sharpness", ImageEnhance.Sharpness)]


@pytest.mark.parametrize("factor", [0.1, 0.6, 1.9])
@pytest.mark.parametrize("name,theirs", ENHANCED)
def test_enhancements(picture, name, theirs, factor):
  want = pillow(picture, lambda im: theirs(im).enhance(factor))
  got = getattr(ra, name)(jnp.asarray(picture, jnp.float32), factor)
  np.testing.assert_allclose(got, want, atol=2)  # Pillow truncates


@pytest.mark.parametrize("name,theirs,argument", [
    ("auto_contrast", ImageOps.autocontrast, ()),
    ("equalize", ImageOps.equalize, ()), ("invert", ImageOps.invert, ()),
    ("posterize", ImageOps.posterize, (3,)),
    ("solarize", ImageOps.solarize, (100,))])
def test_tables(picture, name, theirs, argument):
  want = pillow(picture, lambda im: theirs(im, *argument))
  got = getattr(ra, name)(jnp.asarray(picture, jnp.float32), *argument)
  np.testing.assert_allclose(got, want, atol=1)


def test_equalize_of_one_value_changes_nothing():
  flat = jnp.full((4, 4, 3), 7.0)
  np.testing.assert_array_equal(ra.equalize(flat), flat)


def test_solarize_add_is_timm_s_table(picture):
  got = np.asarray(ra.solarize_add(jnp.asarray(picture, jnp.float32), 60.0))
  want = [[min(255, v + 60) if v < 128 else v for v in row]
          for row in picture[..., 0].tolist()]
  np.testing.assert_array_equal(got[..., 0], want)


def inner(x):
  """Pixels that no corner of the frame reaches."""
  return np.asarray(x)[9:15, 9:15]


def test_rotation_turns_as_pillow_s(picture):
  want = pillow(picture, lambda im: im.rotate(20, Image.Resampling.BILINEAR))
  got = ra.rotate(jnp.asarray(picture, jnp.float32), 20.0)
  np.testing.assert_allclose(inner(got), inner(want), atol=2)


@pytest.mark.parametrize("matrix", [
    (1, 0.2, 0, 0, 1, 0), (1, 0, 0, 0.2, 1, 0), (1, 0, 3, 0, 1, 0),
    (1, 0, 0, 0, 1, 3)])
def test_shears_and_translations_are_pillow_s(picture, matrix):
  a, b, c, d, e, f = matrix
  # Pillow counts from the corner of the first pixel.
  mid = 12
  corner = (a, b, c + mid - a * mid - b * mid, d, e, f + mid - d * mid
            - e * mid)
  want = pillow(picture, lambda im: im.transform(
      im.size, Image.Transform.AFFINE, corner, Image.Resampling.BILINEAR))
  got = ra.affine(jnp.asarray(picture, jnp.float32),
                  jnp.array([[a, b, c], [d, e, f]], jnp.float32))
  np.testing.assert_allclose(inner(got), inner(want), atol=2)


def test_uncovered_pixels_are_grey(picture):
  got = ra.affine(jnp.asarray(picture, jnp.float32),
                  jnp.array([[1.0, 0, 100], [0, 1, 0]]))
  np.testing.assert_array_equal(got, 128)


def test_augmented_images_differ_in_range_and_are_seeded(picture):
  images = jnp.stack([picture] * 12)
  fn = jax.jit(lambda key: ra.rand_augment(images, key, 9.0))
  one, again, other = fn(jax.random.key(0)), fn(jax.random.key(0)), fn(
      jax.random.key(1))
  np.testing.assert_array_equal(one, again)
  assert not np.array_equal(one, other)
  assert one.shape == images.shape and one.min() >= 0 and one.max() <= 255
  changed = [not np.array_equal(x, picture) for x in np.asarray(one)]
  assert 3 <= sum(changed) <= 12  # about 3/4, an operation may do nothing
  assert len({np.asarray(x).tobytes() for x in one}) > 4
