"""A backbone with its taps bound, the normalisation before, a head after."""
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttc_jax import taps
from ttc_jax.tasks.images import normalise

Params = dict[str, Any]


class Model(NamedTuple):
  """Hashable, so that compiled functions can be cached by it.

  Attributes:
    backbone: the Linen module; None where the inputs are its features.
    normalisation: "half", "imagenet" or "none".
    handlers: ((site, handler), ...) of the method.
    start: the block to begin with; above 0 the inputs are its tokens.
    sample: `(buffers, key) -> buffers` of a training step, the same on
      every device; None where the buffers stay.
  """
  backbone: nn.Module | None
  normalisation: str
  handlers: tuple = ()
  start: int = 0
  sample: Callable | None = None

  def features(self, params: Params, images: jax.Array, buffers: Params,
               mask: Params | None = None, key: jax.Array | None = None,
               extra_tap: taps.Tap | None = None) -> jax.Array:
    """uint8 images (B, S, S, 3) -> features (B, D).

    A `key` means training: it drops paths and feeds the handlers.
    """
    if self.backbone is None:
      return images
    tap = taps.bind(dict(self.handlers), params["adapter"], buffers, key)
    if extra_tap is not None:
      tap = taps.chain(tap, extra_tap)
    train = key is not None
    if not self.start:
      images = normalise(images, self.normalisation)
    return self.backbone.apply(
        {"params": params["backbone"]}, images, mask=mask, tap=tap,
        train=train, rngs={"drop_path": key} if train else None,
        **({"start": self.start} if self.start else {}))

  def tokens(self, params: Params, images: jax.Array, buffers: Params,
             block: int) -> jax.Array:
    """uint8 images -> the residual stream that enters a block, (B, N, D)."""
    seen = {}

    def before_handlers(site, i, y, x):
      if site == "input":
        seen[i] = x
      return y
    self.features(params, images, buffers, extra_tap=before_handlers)
    return seen[block]

  def logits(self, params: Params, images: jax.Array, buffers: Params,
             **kwargs: Any) -> jax.Array:
    """uint8 images (B, S, S, 3) -> logits (B, C), float32."""
    head = params["head"]
    return (self.features(params, images, buffers, **kwargs)
            @ head["kernel"] + head["bias"])


def init_head(width: int, classes: int, seed: int) -> Params:
  """A linear head: kernel of standard deviation 0.02 as in timm, zero bias."""
  kernel = 0.02 * jax.random.truncated_normal(
      jax.random.key(seed), -2, 2, (width, classes))
  return {"kernel": kernel, "bias": jnp.zeros(classes)}


PADDED = 512  # classes; VTAB has 2 to 397
_NEVER = -1e9  # a logit whose probability and gradient are 0 in float32


def pad_head(head: Params, multiple: int = PADDED) -> Params:
  """The head with classes that no image has, up to a multiple.

  Tasks of any number of classes share a compilation so. No gradient reaches
  the new columns, which are 0; losses and gradients of the others are the same
  to rounding.
  """
  more = -head["bias"].shape[-1] % multiple
  return {"kernel": jnp.pad(head["kernel"], ((0, 0), (0, more))),
          "bias": jnp.pad(head["bias"], (0, more), constant_values=_NEVER)}


def keep_padding(head: Params, classes: jax.Array) -> Params:
  """The padded head after a step: weight decay would move the padding."""
  bias = head["bias"]
  known = jnp.arange(bias.shape[-1]) < classes
  return head | {"bias": jnp.where(known, bias, _NEVER)}


def trim_head(head: Params, classes: int) -> Params:
  """The inverse of `pad_head`, also with an axis of devices."""
  return {name: x[..., :classes] for name, x in head.items()}
