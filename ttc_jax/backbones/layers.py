"""What families share: dense layers with a mask, norms, attention, GELU; and
the records by which a family describes itself."""
from collections.abc import Callable
import functools
import math
import re
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ttc_jax.products import default_device, product

Tap = Callable[[str, int, jax.Array, jax.Array], jax.Array]
SCALE = "kernel_scale"  # beside an int8 kernel, see `ttc_jax.quantisation`


class Site(NamedTuple):
  """One linear layer of a backbone.

  Attributes:
    inputs: D_in.
    width: D_out, the number of output channels (rows, in the paper's words).
    path: of its parameters below the backbone.
  """
  inputs: int
  width: int
  path: str


class Work(NamedTuple):
  """Multiply-adds of an image's matrix products, without the head.

  Attributes:
    patches: of the patch embedding, which comes before all tuned layers.
    linear: of products with kernels.
    attention: of products of activations, q k^T and weights v.
    outputs: for each block, the number of tokens that its MLP computes.
  """
  patches: int
  linear: int
  attention: int
  outputs: tuple[int, ...]


class Field(NamedTuple):
  """A field of a module that belongs to the weights: its possible values.

  Attributes:
    values: the allowed values, all of one type; `float` for any number
      between 0 and 1.
    required: whether a file must state it, because no shape shows it.
  """
  values: tuple[Any, ...] | type[float]
  required: bool = False

  def allows(self, value: Any) -> bool:
    """Returns whether the field may have the value; True is not 1 here."""
    if isinstance(self.values, tuple):
      return type(value) is type(self.values[0]) and value in self.values
    return type(value) is float and 0 < value < 1

  def __str__(self) -> str:
    if not isinstance(self.values, tuple):
      return "a float between 0 and 1"
    if len(self.values) < 5:
      return " or ".join(map(repr, self.values))
    return f"{self.values[0]} to {self.values[-1]}"


class Identity(NamedTuple):
  """The architecture that the shapes in a file show.

  Attributes:
    kind: for messages, e.g. "a ViT".
    sizes: e.g. {"width": 384, "patch": 14, ...}, most telling first; None for
      one that the file does not show.
    name: of the backbone with these sizes, None if no backbone has them.
    reason: why there is none, e.g. "width 240 is none of 192, 384".
    image_size: pixels a side that the positions are made for, None if any.
  """
  kind: str
  sizes: dict[str, Any]
  name: str | None
  reason: str = ""
  image_size: int | None = None


def rematerialised(block: Any) -> Any:
  """Returns a block of `(x, mask, tap, train)` that keeps its input only.

  Its gradient computes the block again (`jax.checkpoint`).
  """
  return nn.remat(block, static_argnums=(3, 4))


def no_tap(site: str, block: int, y: jax.Array, x: jax.Array) -> jax.Array:
  """The default tap: y flows on."""
  del site, block, x
  return y


def at_block(tap: Tap, block: int) -> Callable[..., jax.Array]:
  """The tap inside block number `block`: `(site, y, x) -> y`."""
  return lambda site, y, x: tap(site, block, y, x)


def _product(x, kernel, dtype):
  """x @ kernel, of a kernel that may be kept in fewer bits than the dtype."""
  narrow = kernel.dtype in (jnp.int8, jnp.bfloat16) and kernel.dtype != dtype
  return (_widened if narrow else _cast)(x, kernel, dtype)


def _cast(x, kernel, dtype):
  return product(x, kernel.astype(dtype))


# XLA would widen all kernels at the start of a program and so need the memory
# of float32 beside that of the kernels: the barrier makes it wait for x. And
# the backward pass widens a kernel again, instead of keeping the wide one.
@functools.partial(jax.checkpoint, static_argnums=2)
def _widened(x, kernel, dtype):
  x, kernel = jax.lax.optimization_barrier((x, kernel))
  return _cast(x, kernel, dtype)


class Dense(nn.Module):
  """y = (x @ kernel) * mask + bias.

  Attributes:
    shape: of the kernel; its first `contract` axes are inputs, the others
      outputs, so that attention keeps the (D, H, D/H) layout of Big Vision's
      files while one matrix product does the work.
  """
  shape: tuple[int, ...]
  contract: int = 1
  dtype: Any = jnp.float32
  use_bias: bool = True

  def setup(self):
    outputs = self.shape[self.contract:]
    init = nn.initializers.xavier_uniform(
        in_axis=range(self.contract),
        out_axis=range(self.contract, len(self.shape)))
    self.kernel = self.param("kernel", init, self.shape)
    if self.use_bias:
      self.bias = self.param("bias", nn.initializers.zeros, outputs)

  def __call__(self, x, mask=None):
    return self.finish(_product(x, self.matrix(), self.dtype), mask)

  def matrix(self) -> jax.Array:
    """Returns the kernel as (inputs, outputs)."""
    return self.kernel.reshape(math.prod(self.shape[:self.contract]), -1)

  def finish(self, y, mask):
    """Returns the layer's result, from the product y."""
    if self.kernel.dtype == jnp.int8:
      scale: jax.Array = self.get_variable("params", SCALE)
      y = (y * scale.reshape(-1)).astype(self.dtype)
    if mask is not None:
      # The mask scales row i of the kernel, not the bias (Eq. 10).
      y = y * mask.astype(self.dtype)
    if self.use_bias:
      y = y + self.bias.reshape(-1).astype(self.dtype)
    return y


def together(dense: list[Dense], x: jax.Array, masks: list) -> list[jax.Array]:
  """Returns [layer(x, mask) for each], by one product where it costs no copy.

  One wide product is faster than narrow ones. The wide kernel is a copy, which
  XLA makes once an epoch, before the loop over its steps. Where the dtype is
  narrower than the kernels such a copy is made in any case.
  """
  kernels, dtype = [layer.matrix() for layer in dense], dense[0].dtype
  if any(kernel.dtype.itemsize <= jnp.dtype(dtype).itemsize
         for kernel in kernels):
    return [layer(x, mask) for layer, mask in zip(dense, masks, strict=True)]
  wide = jnp.concatenate([kernel.astype(dtype) for kernel in kernels], axis=1)
  ends = np.cumsum([kernel.shape[1] for kernel in kernels])[:-1]
  return [layer.finish(y, mask) for layer, y, mask in zip(
      dense, jnp.split(product(x, wide), ends, axis=-1), masks, strict=True)]


class Mlp(nn.Module):
  """Two dense layers with a GELU between."""
  hidden: int
  gelu: str
  dtype: Any

  @nn.compact
  def __call__(self, x, mask, tap):
    D = x.shape[-1]
    dense = functools.partial(Dense, dtype=self.dtype)
    h = dense((D, self.hidden), name="Dense_0")(x, mask.get("fc1"))
    h = GELU[self.gelu](tap("fc1", h, x))
    y = dense((self.hidden, D), name="Dense_1")(h, mask.get("fc2"))
    return tap("fc2", y, h)


# jax.checkpoint: the backward pass starts from the inputs. To compute norms
# and GELUs again is less work than to write and read what XLA would keep of
# them, and a step needs a quarter to a third less memory.
@functools.partial(jax.checkpoint, static_argnums=3)
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array,
               epsilon: float) -> jax.Array:
  """(x - mean) / sqrt(variance + epsilon) * scale + bias, in float32.

  Over the last axis of x (..., D), of any dtype; scale and bias (D,).
  """
  x = x.astype(jnp.float32)
  centred = x - x.mean(-1, keepdims=True)
  variance = jnp.square(centred).mean(-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + epsilon) * scale + bias


class LayerNorm(nn.Module):
  """Over the last axis; statistics in float32 whatever the dtype."""
  epsilon: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int,
              tap: Callable[..., jax.Array] | None = None,
              angles: jax.Array | None = None) -> jax.Array:
  """softmax(q k^T / sqrt(D/H)) v per head, with softmax in float32.

  q (B, M, D), k and v (B, N, D) -> (B, M, D). The tap "scores" sees what goes
  into the softmax, (B, H, M, N). Queries and keys are rotated by `angles`
  (N, D/H/2) if there are any, see `rotate`. Where no tap changes the scores,
  a device's fused kernel takes the place of the formula, see `fused`.

  The heads are moved before the tokens first: left to XLA, the products on
  CPU transpose every head's keys and values, element by element.
  """
  B, M, D = q.shape
  q = q / math.sqrt(D // heads)
  q, k, v = (x.reshape(B, -1, heads, D // heads).swapaxes(1, 2)
             for x in (q, k, v))
  if angles is not None:
    q, k = rotate(q, angles), rotate(k, angles)
  plain = scores = jnp.einsum("bhqd,bhkd->bhqk", q, k)
  if tap is not None:
    scores = tap("scores", scores, q)
  implementation = fused(q.dtype, D // heads)
  if implementation and scores is plain:  # which XLA then leaves out
    return _fused_attention(q, k, v, implementation).reshape(B, M, D)
  weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(v.dtype)
  y = jnp.einsum("bhqk,bhkd->bhqd", weights, v)
  return y.swapaxes(1, 2).reshape(B, M, D)


def _fused_attention(q, k, v, implementation):
  """(B, H, M, d), (B, H, N, d) twice -> (B, M, H, d), by JAX's own function.

  Odd numbers of tokens, as [CLS] makes them, get one more, which no query sees:
  for the sake of a bias, also where there is none, JAX 0.10 to 0.12 refuses to
  differentiate cuDNN's kernel at odd numbers (check_is_flash_attention).
  """
  B, M, N = q.shape[0], q.shape[2], k.shape[2]

  def even(x):
    return jnp.pad(x.swapaxes(1, 2), (
        (0, 0), (0, x.shape[2] % 2), (0, 0), (0, 0)))
  y = jax.nn.dot_product_attention(
      even(q), even(k), even(v), scale=1.0, implementation=implementation,
      key_value_seq_lengths=jnp.full(B, N, jnp.int32) if N % 2 else None)
  return y[:, :M]


def fused(dtype: Any, width: int) -> Literal["cudnn"] | None:
  """Returns the implementation of `jax.nn.dot_product_attention` that keeps no
  scores in memory; None where the device has none.

  cuDNN's is for 16 bits, heads of a multiple of 8 up to 128, and NVIDIA GPUs
  from Ampere (compute capability 8.0). JAX before 0.11 cannot vmap it, as
  serving several tasks does, where an operand is the same for all.
  """
  if jax.__version_info__ < (0, 11):
    return None
  if jnp.dtype(dtype).itemsize != 2 or width % 8 or width > 128:
    return None
  device = default_device()
  if getattr(device, "platform", device) != "gpu":
    return None
  capability = getattr(device, "compute_capability", "")
  number = re.fullmatch(r"(\d+)\.\d+", str(capability))  # AMD's is "gfx90a"
  return "cudnn" if number and int(number[1]) >= 8 else None


def grid_angles(side: int, width: int, base: float) -> np.ndarray:
  """DINOv3's angles of rotary position embeddings (Simeoni et al., 2025).

  The centre of a patch is at y and x in (-1, 1), and the periods are
  base^(4 i / width) for i < width / 4.

  Args:
    side: patches a side.
    width: of a head, a multiple of 4.

  Returns:
    (side^2, width / 2) in radians, those of y before those of x.
  """
  at = (2 * np.arange(side) + 1) / side - 1
  yx = np.stack(np.meshgrid(at, at, indexing="ij"), axis=-1).reshape(-1, 2, 1)
  periods = base ** (np.arange(width // 4) * 4 / width)
  return (2 * np.pi * yx / periods).reshape(side ** 2, -1).astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotates the pairs (x_i, x_{i + d/2}) of tokens, in float32.

  Args:
    x: (B, H, M, d), the first M of N tokens.
    angles: (N, d / 2), in radians.
  """
  angles = angles[:x.shape[-2]]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin,
                          second * cos + first * sin], axis=-1).astype(x.dtype)


def drop_path(module: nn.Module, branch: jax.Array, rate: float,
              train: bool) -> jax.Array:
  """Drops whole examples of a residual branch (Huang et al., 2016)."""
  if not train or not rate:
    return branch
  shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
  keep = jax.random.bernoulli(
      module.make_rng("drop_path"), 1 - rate, shape)
  return jnp.where(keep, branch / (1 - rate), 0).astype(branch.dtype)


def patches(images: jax.Array, patch: int, size: int) -> jax.Array:
  """(B, S, S, 3), S the size -> (B, N, patch * patch * 3): a convolution's
  input rows.

  The patch embedding is then a matrix product, on every device at least as
  fast as the convolution of stride `patch` that it equals.
  """
  B, S, _, C = images.shape
  if (S, *images.shape[2:]) != (size, size, 3):
    raise ValueError(f"images have shape {images.shape}, expected "
                     f"(B, {size}, {size}, 3)")
  n = S // patch
  x = images.reshape(B, n, patch, n, patch, C).swapaxes(2, 3)
  return x.reshape(B, n * n, patch * patch * C)


@jax.checkpoint
def exact_gelu(x: jax.Array) -> jax.Array:
  """x Phi(x), Phi the normal distribution function, computed in float32.

  By erf, as PyTorch. jax.nn.gelu has erfc, which keeps the relative precision
  of values near 0 that nothing here needs, at over twice the time on CPU.
  """
  z = x.astype(jnp.float32)
  return (0.5 * z * (1 + jax.lax.erf(z * math.sqrt(0.5)))).astype(x.dtype)


GELU = {
    "exact": exact_gelu,
    "tanh": jax.checkpoint(functools.partial(jax.nn.gelu, approximate=True)),
    "quick": jax.checkpoint(lambda x: x * jax.nn.sigmoid(1.702 * x)),
}
