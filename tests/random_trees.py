"""Random parameters, for tests and tools.

They are not in conftest.py because that one sets up fake devices.
"""
import numpy as np

from ttc_jax import backbones, trees


def random_tree(shapes, rng):
  """Returns random arrays of the shapes of a tree.

  They are of the size that training gives; no value is special (0 or 1).
  """
  def draw(name, leaf):
    fan_in = max(1, leaf.size // leaf.shape[-1])
    spread = (0.1 if len(leaf.shape) == 1 else
              0.5 if name.endswith("relative_position_bias") else
              fan_in ** -0.5)
    mean = 1.0 if name.endswith("scale") else 0.0
    return rng.normal(mean, spread, leaf.shape).astype(np.float32)
  return trees.map_with_names(draw, shapes)


def random_params(module, seed=1):
  """Returns random parameters of a backbone.

  Biases that DINOv3 and CLIP lack are 0.
  """
  lacking = tuple(name for field, name in (
      ("rope", "/key/bias"), ("pre_norm", "embedding/bias"))
                  if module.fields.get(field))
  return trees.map_with_names(
      lambda n, x: np.zeros_like(x) if n.endswith(lacking) else x,
      random_tree(backbones.shapes(module), np.random.default_rng(seed)))
