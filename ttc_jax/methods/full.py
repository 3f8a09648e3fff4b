"""Full (the usual fine-tuning): every parameter."""
from ttc_jax.methods import Method, Stage


def make(config, backbone) -> Method:
  del config, backbone
  return Method((Stage("full", ((r".*", "tune"),)),))
