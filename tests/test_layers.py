"""The layers whose formulas were rearranged for speed, against plain ones."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttc_jax.backbones import layers


def normal(*shape, seed=0, dtype=jnp.float32):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, dtype)


def assert_same(fn, plain, args, tolerance=1e-5):
  """Equal values and equal gradients by every argument."""
  y, pull = jax.vjp(fn, *args)
  expected, expected_pull = jax.vjp(plain, *args)
  assert y.dtype == expected.dtype
  g = normal(*y.shape, seed=9, dtype=y.dtype)
  for a, b in zip((y, *pull(g)), (expected, *expected_pull(g)), strict=False):
    assert a.dtype == b.dtype
    a, b = (np.asarray(t, np.float32) for t in (a, b))
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def plain_layer_norm(x, scale, bias):
  x = x.astype(jnp.float32)
  y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(
      x.var(-1, keepdims=True) + 1e-6)
  return y * scale + bias


@pytest.mark.parametrize("shape", [(2, 5, 24), (2, 3, 4, 24), (7, 24)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_and_its_gradients(shape, dtype):
  args = (3 + 2 * normal(*shape, dtype=dtype), normal(24, seed=1),
          normal(24, seed=2))
  assert_same(lambda *a: layers.layer_norm(*a, 1e-6), plain_layer_norm, args,
              1e-5 if dtype == jnp.float32 else 1e-2)


def test_layer_norm_of_a_constant_row_is_finite():
  x = jnp.full((1, 8), 5.0)
  y, pull = jax.vjp(lambda x: layers.layer_norm(
      x, jnp.ones(8), jnp.zeros(8), 1e-6), x)
  np.testing.assert_array_equal(y, 0)
  assert np.isfinite(pull(jnp.ones((1, 8)))[0]).all()


def plain_attention(q, k, v):
  B, N, D = q.shape
  q, k, v = (x.reshape(B, N, 3, D // 3) for x in (q, k, v))
  weights = jax.nn.softmax(
      jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(D / 3.0))
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(B, N, D)


def test_attention_and_its_gradients():
  args = [normal(2, 5, 24, seed=i) for i in range(3)]
  assert_same(lambda *a: layers.attention(*a, 3), plain_attention, args)


def test_attention_in_bfloat16_has_its_softmax_in_float32():
  x = [normal(2, 5, 24, seed=i, dtype=jnp.bfloat16) for i in range(3)]
  y = layers.attention(*x, 3)
  assert y.dtype == jnp.bfloat16
  text = jax.jit(lambda *a: layers.attention(*a, 3)).lower(*x).as_text()
  assert "exponential" in text
  assert all("bf16" not in line for line in text.splitlines()
             if "stablehlo.exponential" in line)


@pytest.mark.parametrize("name", ["exact", "tanh"])
@pytest.mark.parametrize("dtype, tolerance",
                         [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_gelu_and_its_gradient(name, dtype, tolerance):
  x = jnp.linspace(-12, 12, 4001).astype(dtype)
  assert_same(layers.GELU[name],
              lambda x: jax.nn.gelu(x, approximate=name == "tanh"), (x,),
              tolerance)
