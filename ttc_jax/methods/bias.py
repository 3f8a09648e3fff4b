"""Bias tuning: every bias, those of the norms included, and the head.

BitFit (Ben Zaken et al., 2022, arXiv 2106.10199).
"""
from ttc_jax.methods import Method, Stage
from ttc_jax.optim import FREEZE, HEAD

BIAS = (r"backbone/.*/bias", "tune")


def make(config, backbone) -> Method:
  del config, backbone
  return Method((Stage("bias", (BIAS, HEAD, FREEZE)),))
