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
  names = sorted({name.rpartition("/")[0] for name in before},
                 key=order(trained.model.backbone))
  moved = {leaf: [float(np.abs(after[f"{n}/{leaf}"] - before[f"{n}/{leaf}"])
                        .mean()) for n in names] for leaf in ("scale", "bias")}
  return {"norms": [n.removeprefix("backbone/") for n in names],
          "gamma": moved["scale"], "beta": moved["bias"]}


def order(backbone):
  """Returns a sort key of norms' names: the order in which they are applied."""
  kinds = {path: kind for kind, paths in enumerate(backbone.norms.values())
           for path in paths}

  def key(name):
    path = name.removeprefix("backbone/")
    return backbone.block_of(f"{path}/"), kinds.get(path, -1), path
  return key
