"""The product of activations and a kernel: its value and its gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttc_jax import products

SHAPES = ((5,), (3, 5), (2, 3, 5), (2, 3, 4, 5), (0, 3, 5))


@pytest.mark.parametrize("platform", ("cpu", "tpu"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_value_and_both_gradients_are_those_of_sums(
    shape, platform, monkeypatch):
  monkeypatch.setattr(products, "default_device", lambda: platform)
  rng = np.random.default_rng(0)
  x, kernel, weight = (rng.normal(size=s).astype(np.float32)
                       for s in (shape, (5, 7), (*shape[:-1], 7)))

  value, gradients = jax.value_and_grad(
      lambda x, kernel: (products.product(x, kernel) * weight).sum(),
      (0, 1))(x, kernel)

  rows, weights = x.reshape(-1, 5), weight.reshape(-1, 7)
  y = np.einsum("ri,io->ro", rows, kernel)
  np.testing.assert_allclose(products.product(x, kernel),
                             y.reshape(weight.shape), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(value, (y * weights).sum(), rtol=1e-5)
  np.testing.assert_allclose(
      gradients[0], np.einsum("ro,io->ri", weights, kernel).reshape(shape),
      rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
      gradients[1], np.einsum("ri,ro->io", rows, weights), rtol=1e-5,
      atol=1e-5)


def test_only_on_cpu_the_shape_changes(monkeypatch):
  def shapes(platform):
    monkeypatch.setattr(products, "default_device", lambda: platform)
    text = str(jax.make_jaxpr(
        lambda x, kernel: products.product(x, kernel))(
        jnp.zeros((2, 3, 5)), jnp.zeros((5, 7))))
    return "reshape" in text
  assert shapes("cpu")
  assert not shapes("tpu")
  assert not shapes("gpu")
