"""Shifted test sets show the same scenes in another way."""
import numpy as np
import pytest

from ttc_jax import tasks
from ttc_jax.tasks import rendered, shifted


@pytest.fixture(scope="module")
def task():
  return tasks.load("sprites_location_shifted", size=64)


def test_labels_are_those_of_the_plain_test_set(task):
  plain = tasks.load("sprites_location", size=64)
  assert task.tests == ("test", "colour", "texture", "noise")
  for name in task.tests:
    np.testing.assert_array_equal(task.labels[name], plain.labels["test"])
  assert task.digest != plain.digest


@pytest.mark.parametrize("name", shifted.names(None))
def test_training_images_are_the_plain_ones(name):
  base = name.removesuffix("_shifted")
  found = tasks.find(name, None)
  for split in ("train", "val", "test"):
    image = np.asarray(found.sources[split].read(7))
    np.testing.assert_array_equal(image, rendered.render(base, split, 7))


@pytest.mark.parametrize("shift", shifted.SHIFTS)
def test_a_shift_changes_the_picture_and_repeats(shift):
  plain = rendered.render("scene_count", "test", 3)
  one = shifted.render("scene_count", shift, 3)
  np.testing.assert_array_equal(one, shifted.render("scene_count", shift, 3))
  assert one.dtype == np.uint8 and one.shape == plain.shape
  change = np.abs(one.astype(int) - plain).mean()
  assert 8 < change < 140
  other = shifted.render("scene_count", shift, 4)
  assert not np.array_equal(one, other)


def test_colour_is_the_negative_in_another_order():
  rng = np.random.default_rng(0)
  x = rng.uniform(size=(4, 4, 3))
  got = shifted.colour(x, np.random.default_rng(1))
  np.testing.assert_allclose(np.sort(1 - got, -1), np.sort(x, -1))
  assert not np.allclose(1 - got, x)


def test_noise_has_its_deviation():
  flat = np.full((64, 64, 3), 0.5)
  got = shifted.noise(flat, np.random.default_rng(0))
  assert got.std() == pytest.approx(0.12, rel=0.02)
