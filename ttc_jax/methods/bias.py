"""Bias (BitFit, Ben Zaken et al., 2022): every bias, and the head.

The biases of the norms are included.
"""
import flax.linen as nn
import ml_collections

from ttc_jax.methods import Method, Stage
from ttc_jax.optim import FREEZE, HEAD

BIAS = (r"backbone/.*/bias", "tune")


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Needs no options."""
  del config, backbone
  return Method((Stage("bias", (BIAS, HEAD, FREEZE)),))
