"""The layers whose formulas were rearranged for speed, against plain ones."""
import types

import flax.linen as nn
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
  for a, b in zip(*map(jax.tree.leaves, (
      (y, pull(g)), (expected, expected_pull(g)))), strict=True):
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


class Projections(nn.Module):
  """Three layers of one x; masks on the first."""
  dtype: jnp.dtype
  apart: bool

  @nn.compact
  def __call__(self, x, mask):
    dense = [layers.Dense((24, 2, 4), dtype=self.dtype, name=name)
             for name in "abc"]
    masks = [mask, None, None]
    if self.apart:
      return [d(x, m) for d, m in zip(dense, masks, strict=True)]
    return layers.together(dense, x, masks)


@pytest.mark.parametrize("dtype, products", [
    (jnp.float32, 3), (jnp.bfloat16, 1)])
def test_layers_together_equal_layers_apart(dtype, products):
  x, mask = normal(2, 5, 24, dtype=dtype), normal(8, seed=1)
  apart, together = (Projections(dtype, a) for a in (True, False))
  params = apart.init(jax.random.key(0), x, mask)
  assert jax.tree.all(jax.tree.map(
      lambda a, b: (a == b).all(), params,
      together.init(jax.random.key(0), x, mask)))

  def result(module):
    return lambda *a: jnp.stack(module.apply(*a))
  assert_same(result(together), result(apart), (params, x, mask),
              1e-6 if dtype == jnp.float32 else 1e-2)
  text = jax.jit(result(together)).lower(params, x, mask).as_text()
  assert text.count("stablehlo.dot_general") == products


def plain_attention(q, k, v):
  B, N, D = q.shape
  q, k, v = (x.reshape(B, -1, 3, D // 3) for x in (q, k, v))
  weights = jax.nn.softmax(
      jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(D / 3.0))
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(B, N, D)


def test_attention_and_its_gradients():
  args = [normal(2, 5, 24, seed=i) for i in range(3)]
  assert_same(lambda *a: layers.attention(*a, 3), plain_attention, args)


@pytest.fixture
def fused(monkeypatch):
  """XLA's `dot_product_attention` in the place of cuDNN's; the calls of it.

  As with cuDNN's, JAX refuses odd numbers of tokens where it differentiates.
  """
  calls, real = [], jax.nn.dot_product_attention

  def noted(*args, **kwargs):
    assert not any(x.shape[1] % 2 for x in args)
    calls.append(kwargs)
    return real(*args, **kwargs)
  monkeypatch.setattr(jax.nn, "dot_product_attention", noted)
  monkeypatch.setattr(layers, "fused", lambda dtype, width: "xla")
  return calls


@pytest.mark.parametrize("tokens", [5, 4])
@pytest.mark.parametrize("queries", [5, 4, 1])
def test_fused_attention_equals_the_formula(fused, queries, tokens):
  args = [normal(2, n, 24, seed=i)
          for i, n in enumerate((queries, tokens, tokens))]
  assert_same(lambda *a: layers.attention(*a, 3), plain_attention, args)
  assert [c["implementation"] for c in fused] == ["xla"]


def test_a_tap_that_changes_the_scores_is_heard(fused, monkeypatch):
  """And one that records them hears them beside the fused attention."""
  args, seen = [normal(2, 5, 24, seed=i) for i in range(3)], []

  def doubled(site, y, x):
    return 2 * y

  def note(site, y, x):
    seen.append(y)
    return y
  found = [layers.attention(*args, 3, tap) for tap in (doubled, note)]
  assert len(fused) == 1
  monkeypatch.undo()
  for tap, y in zip((doubled, note), found, strict=True):
    np.testing.assert_allclose(layers.attention(*args, 3, tap), y, atol=1e-6)
  np.testing.assert_array_equal(*seen)


@pytest.mark.parametrize("backend, capability, dtype, width, version, found", [
    ("gpu", "9.0", jnp.bfloat16, 64, (0, 11, 0), "cudnn"),
    ("gpu", "12.0", jnp.bfloat16, 80, (0, 12, 0), "cudnn"),
    ("gpu", "7.5", jnp.bfloat16, 64, (0, 11, 0), None),
    ("gpu", "gfx90a", jnp.bfloat16, 64, (0, 11, 0), None),
    ("gpu", "9.0", jnp.float32, 64, (0, 11, 0), None),
    ("gpu", "9.0", jnp.bfloat16, 12, (0, 11, 0), None),
    ("gpu", "9.0", jnp.bfloat16, 64, (0, 10, 2), None),
    ("tpu", "9.0", jnp.bfloat16, 64, (0, 11, 0), None)])
def test_where_attention_is_fused(
    monkeypatch, backend, capability, dtype, width, version, found):
  monkeypatch.setattr(jax, "__version_info__", version)
  device = types.SimpleNamespace(platform=backend,
                                 compute_capability=capability)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  assert layers.fused(dtype, width) == found
  with jax.default_device(jax.devices("cpu")[0]):
    assert layers.fused(dtype, width) is None


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
