"""How far each LayerNorm moved (Fig. 7).

{"norms": names from input to output, "gamma": [...], "beta": [...]}: the mean
absolute change of scale and shift over the channels of each norm.
"""
import re

import numpy as np

from ttc_jax import parallel, trees
from ttc_jax.optim import NORM


def measure(trained):
  """Returns {"norms": [...], "gamma": [...], "beta": [...]}."""
  before, after = (
      {name: np.asarray(x) for name, x in trees.flatten(
          parallel.unreplicate({"backbone": tree["backbone"]})).items()
       if re.fullmatch(NORM[0], name)}
      for tree in (trained.base, trained.params))
  names = sorted({name.rpartition("/")[0] for name in before}, key=_natural)
  moved = {leaf: [float(np.abs(after[f"{n}/{leaf}"] - before[f"{n}/{leaf}"])
                        .mean()) for n in names] for leaf in ("scale", "bias")}
  return {"norms": [n.removeprefix("backbone/") for n in names],
          "gamma": moved["scale"], "beta": moved["bias"]}


def _natural(name):
  """Sort key: block_2 before block_10, the final norm last."""
  numbers = [int(n) for n in re.findall(r"\d+", name)]
  return not numbers, numbers, name
