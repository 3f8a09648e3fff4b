"""Linear (the usual probe): the head alone, on frozen features."""
import flax.linen as nn
import ml_collections

from ttc_jax.methods import TUNE_HEAD, Method


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Needs no options."""
  del config, backbone
  return Method((TUNE_HEAD,))
