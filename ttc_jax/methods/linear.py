"""Linear (the usual probe): the head alone, on frozen features."""
from ttc_jax.methods import TUNE_HEAD, Method


def make(config, backbone) -> Method:
  del config, backbone
  return Method((TUNE_HEAD,))
