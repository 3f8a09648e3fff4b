"""Bias (BitFit, Ben Zaken et al., 2022): every bias, and the head.

Those of the norms included.
"""
from ttc_jax.methods import Method, Stage
from ttc_jax.optim import FREEZE, HEAD

BIAS = (r"backbone/.*/bias", "tune")


def make(config, backbone) -> Method:
  del config, backbone
  return Method((Stage("bias", (BIAS, HEAD, FREEZE)),))
