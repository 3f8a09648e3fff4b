import jax
import numpy as np

from ttc_jax import augment


def images(n=6, size=8):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (n, size, size, 3)).astype(np.float32)


def test_a_crop_of_the_whole_area_at_the_same_size_is_the_image():
  x = images()
  got = augment.random_crop(x, jax.random.key(0), 8, smallest=1.0)
  np.testing.assert_allclose(got, x, atol=1e-2)


def test_a_crop_comes_from_inside_the_image():
  """On a ramp along x, a crop's values grow and stay within the ramp."""
  ramp = np.broadcast_to(
      np.arange(8, dtype=np.float32)[None, None, :, None] * 10, (20, 8, 8, 3))
  got = np.asarray(
      augment.random_crop(ramp, jax.random.key(0), 8, smallest=0.1))
  assert (np.diff(got, axis=2) > -1e-3).all()
  assert got.min() >= 0 and got.max() <= 72
  spans = got[:, 0, -1, 0] - got[:, 0, 0, 0]
  assert spans.min() < 40 < spans.max()  # small areas and large ones


def test_a_flip_mirrors_some_and_leaves_the_others():
  x = images(40)
  got = np.asarray(augment.random_flip(x, jax.random.key(0)))
  same = (got == x).all((1, 2, 3))
  mirrored = (got == x[:, :, ::-1]).all((1, 2, 3))
  assert (same ^ mirrored).all() and 8 < same.sum() < 32
