"""A backbone with its taps bound, the normalisation before, a head after."""
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
  """
  backbone: nn.Module | None
  normalisation: str
  handlers: tuple = ()

  def features(self, params: Params, images: jax.Array, selection: Params,
               mask: Params | None = None, key: jax.Array | None = None,
               extra_tap: taps.Tap | None = None) -> jax.Array:
    """uint8 images (B, S, S, 3) -> features (B, D); a `key` drops paths."""
    if self.backbone is None:
      return images
    tap = taps.bind(dict(self.handlers), params["adapter"], selection,
                    self.backbone.depth)
    if extra_tap is not None:
      tap = taps.chain(tap, extra_tap)
    train = key is not None
    return self.backbone.apply(
        {"params": params["backbone"]}, normalise(images, self.normalisation),
        mask=mask, tap=tap, train=train,
        rngs={"drop_path": key} if train else None)

  def logits(self, params: Params, images: jax.Array, selection: Params,
             **kwargs: Any) -> jax.Array:
    """uint8 images (B, S, S, 3) -> logits (B, C), float32."""
    head = params["head"]
    return (self.features(params, images, selection, **kwargs)
            @ head["kernel"] + head["bias"])


def init_head(width: int, classes: int, seed: int) -> Params:
  """A linear head: kernel of standard deviation 0.02 as in timm, zero bias."""
  kernel = 0.02 * jax.random.truncated_normal(
      jax.random.key(seed), -2, 2, (width, classes))
  return {"kernel": kernel, "bias": jnp.zeros(classes)}
