"""Linear probing: the head alone, on frozen features."""
from ttc_jax.methods import Method, Stage
from ttc_jax.optim import FREEZE, HEAD

ALIGN_HEAD = Stage("head", (HEAD, FREEZE))


def make(config, backbone) -> Method:
  del config, backbone
  return Method((ALIGN_HEAD,))
