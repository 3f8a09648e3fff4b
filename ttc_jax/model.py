"""A backbone with its taps bound, the normalisation before, the head after."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttc_jax import normalisation, taps

Params = dict[str, Any]


class Model(NamedTuple):
  """What computes logits. Hashable, so that compiled functions are cached.

  Attributes:
    backbone: the backbone's Linen module; None if the inputs are its features.
    normalisation: see the module `normalisation`.
    handlers: ((site, handler), ...) of the method.
    start: number of the first block that runs; above 0 the inputs are the
      tokens that enter it.
    sample: `(buffers, key) -> buffers` of a training step, the same on
      every device; None if the buffers do not change.
  """
  backbone: Any
  normalisation: str
  handlers: tuple = ()
  start: int = 0
  sample: Callable | None = None

  def features(self, params: Params, images: jax.Array, buffers: Params,
               mask: Params | None = None, key: jax.Array | None = None,
               extra_tap: taps.Tap | None = None,
               train: bool = False) -> jax.Array:
    """Returns features (B, D), float32.

    Args:
      params: {"backbone", "adapter", ...}.
      images: uint8 (B, S, S, 3); see `start` and `backbone` for other inputs.
      buffers: {site: {block: {name: array}}}, the handlers' other inputs.
      mask: {site: [(D_out,) of each block]}, factors on rows of the kernels.
      key: given in training only; it drops paths and goes to the handlers.
      extra_tap: applied after the handlers, see `taps`.
      train: as with a key, but nothing is random: a gradient computes the
        blocks again where the backbone says so.
    """
    if self.backbone is None:
      return images
    tap = taps.bind(dict(self.handlers), params["adapter"], buffers, key)
    if extra_tap is not None:
      tap = taps.chain(tap, extra_tap)
    if not self.start:
      images = normalisation.apply(images, self.normalisation)
    start = {"start": self.start} if self.start else {}
    return self.backbone.apply(
        {"params": params["backbone"]}, images, mask=mask, tap=tap,
        train=train or key is not None,
        rngs=None if key is None else {"drop_path": key}, **start)

  def tokens(self, params: Params, images: jax.Array, buffers: Params,
             block: int) -> jax.Array:
    """Returns the residual stream that enters a block, (B, N, D).

    Args:
      images: uint8 (B, S, S, 3).
    """
    seen = {}

    def before_handlers(site, i, y, x):
      if site == "input":
        seen[i] = x
      return y
    self.features(params, images, buffers, extra_tap=before_handlers)
    return seen[block]

  def logits(self, params: Params, images: jax.Array, buffers: Params,
             **kwargs: Any) -> jax.Array:
    """Returns logits (B, C), float32; arguments as of `features`."""
    head = params["head"]
    return (self.features(params, images, buffers, **kwargs)
            @ head["kernel"] + head["bias"])


def init_head(width: int, classes: int, seed: int,
              init: str = "normal") -> Params:
  """Returns a linear head: a kernel (width, classes), a bias (classes,) of 0.

  Args:
    init: of the kernel: "normal" has a standard deviation of 0.02, as timm's;
      "zeros", as Big Vision's, leaves nothing to the seed.
  """
  kernel = jnp.zeros((width, classes)) if init == "zeros" else (
      0.02 * jax.random.truncated_normal(
          jax.random.key(seed), -2, 2, (width, classes)))
  return {"kernel": kernel, "bias": jnp.zeros(classes)}


PADDED = 512  # classes; VTAB has 2 to 397
_NEVER = -1e9  # a logit whose probability and gradient are 0 in float32


def pad_head(head: Params, multiple: int = PADDED) -> Params:
  """Returns the head with further classes, up to a multiple of `multiple`.

  So tasks with different numbers of classes share a compiled program. No image
  has a label among the further classes, and no gradient reaches their columns,
  which are 0; losses and the other gradients are the same to rounding.
  """
  more = -head["bias"].shape[-1] % multiple
  return {"kernel": jnp.pad(head["kernel"], ((0, 0), (0, more))),
          "bias": jnp.pad(head["bias"], (0, more), constant_values=_NEVER)}


def keep_padding(head: Params, classes: jax.Array) -> Params:
  """Returns the padded head with its padding restored: weight decay moved it.

  Args:
    classes: of the task, (): the columns from this number on are padding.
  """
  bias = head["bias"]
  known = jnp.arange(bias.shape[-1]) < classes
  return head | {"bias": jnp.where(known, bias, _NEVER)}


def trim_head(head: Params, classes: int) -> Params:
  """Inverse of `pad_head`; a leading axis of devices is allowed."""
  return {name: x[..., :classes] for name, x in head.items()}
