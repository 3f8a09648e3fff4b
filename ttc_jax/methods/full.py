"""Full (the usual fine-tuning): every parameter."""
import flax.linen as nn
import ml_collections

from ttc_jax.methods import Method, Stage


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Needs no options."""
  del config, backbone
  return Method((Stage("full", ((r".*", "tune"),)),))
