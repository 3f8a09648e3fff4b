"""RandAugment's operations against Pillow's."""
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import pytest

from ttc_jax import augment
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
  got = ra.rotate(jnp.asarray(picture, jnp.float32), 20.0, 0.0)
  np.testing.assert_allclose(inner(got), inner(want), atol=2)


# The matrices of timm's shear_x, shear_y, translate_x_rel and translate_y_rel,
# at half of the largest magnitude: of 0.3, and 0.45 of the side.
@pytest.mark.parametrize("op, matrix", [
    (11, (1, 0.15, 0, 0, 1, 0)), (12, (1, 0, 0, 0.15, 1, 0)),
    (13, (1, 0, 0.225 * 24, 0, 1, 0)), (14, (1, 0, 0, 0, 1, 0.225 * 24))])
@pytest.mark.parametrize("sign", [-1, 1])
def test_shears_and_translations_are_timm_s(picture, op, matrix, sign):
  matrix = tuple(m if m == 1 else sign * m for m in matrix)
  fill = (124, 116, 104)
  want = pillow(picture, lambda im: im.transform(
      im.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR,
      fillcolor=fill))
  got = np.asarray(ra._OPS[op](
      jnp.asarray(picture, jnp.float32), 0.5, sign, jnp.array(fill, "f")))
  # Pixels that neither side has to take from beyond the frame.
  whole = Image.new("L", (24, 24), 255).transform(
      (24, 24), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
  inside = np.asarray(whole) == 255
  inside[1:-1, 1:-1] &= inside[2:, 1:-1] & inside[:-2, 1:-1] & (
      inside[1:-1, 2:]) & inside[1:-1, :-2]
  inside[[0, -1]] = inside[:, [0, -1]] = False
  assert inside.sum() > 200
  np.testing.assert_allclose(got[inside], want[inside], atol=2)
  corners = [(y, x) for y in (0, -1) for x in (0, -1)
             if (want[y, x] == fill).all()]
  assert corners and all((got[at] == fill).all() for at in corners)


@pytest.mark.parametrize("normalised, fill", [
    ("half", (128, 128, 128)), ("imagenet", (124, 116, 104))])
def test_uncovered_pixels_have_timm_s_mean_colour(normalised, fill):
  """timm: round(255 x mean) of the normalisation."""
  black = jnp.zeros((64, 8, 8, 3))
  got = np.asarray(augment.change(
      black, jax.random.key(0), augment.Recipe(randaugment=9.0), normalised))
  flat = {tuple(x) for x in got.reshape(-1, 3).tolist()}
  assert tuple(map(float, fill)) in flat


def test_augmented_images_differ_in_range_and_are_seeded(picture):
  images = jnp.stack([picture] * 12)
  fn = jax.jit(lambda key: ra.rand_augment(images, key, 9.0, 128.0))
  one, again, other = fn(jax.random.key(0)), fn(jax.random.key(0)), fn(
      jax.random.key(1))
  np.testing.assert_array_equal(one, again)
  assert not np.array_equal(one, other)
  assert one.shape == images.shape and one.min() >= 0 and one.max() <= 255
  changed = [not np.array_equal(x, picture) for x in np.asarray(one)]
  assert 3 <= sum(changed) <= 12  # about 3/4, an operation may do nothing
  assert len({np.asarray(x).tobytes() for x in one}) > 4
