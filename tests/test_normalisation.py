"""Pixels as backbones were trained with them, by hand and in JAX."""
import jax.numpy as jnp
import numpy as np
import pytest

from ttc_jax import normalisation
from ttc_jax.errors import UserError

CUSTOM = "0.25,0.5,0.75/0.5,0.25,0.2"


@pytest.mark.parametrize("how, want", [
    ("half", [-1.0, 0.6, 1.0]), ("none", [0.0, 0.8, 1.0]),
    ("imagenet", [-2.117904, 1.535714, 2.64]),
    ("clip", [-1.792263, 1.309488, 2.145897]), (CUSTOM, [-0.5, 1.2, 1.25])])
def test_normalise_by_hand(how, want):
  pixels = np.array([[0, 204, 255]], np.uint8)
  got = normalisation.apply(pixels, how)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, [want], atol=2e-6)


@pytest.mark.parametrize("how", [*normalisation.NAMES, CUSTOM])
def test_normalise_is_the_same_in_jax(how):
  pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 11
  got = normalisation.apply(jnp.asarray(pixels), how)
  assert got.dtype == np.float32 and not isinstance(got, np.ndarray)
  np.testing.assert_allclose(got, normalisation.apply(pixels, how), rtol=1e-5,
                             atol=1e-6)


@pytest.mark.parametrize("how", [*normalisation.NAMES, CUSTOM])
def test_a_name_stands_for_its_numbers(how):
  assert normalisation.name(*normalisation.mean_and_std(how)) == how


@pytest.mark.parametrize("how, message", [
    ("imagenett", "did you mean imagenet"), ("", "unknown normalisation"),
    ("0.5,0.5,0.5/0.5,0.5,0", "six numbers"), ("0.5/0.5", "six numbers"),
    ("0.5,0.5,0.5/0.5,0.5,0.5,0.5", "six numbers"),
    ("nan,0,0/1,1,1", "six numbers")])
def test_an_unknown_normalisation_is_refused(how, message):
  with pytest.raises(UserError, match=message):
    normalisation.apply(np.zeros(3, np.uint8), how)
