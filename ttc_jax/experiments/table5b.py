"""Table 5b: how many of the last blocks are adapted.

0 blocks are stage 1 alone; `layernorm_2x` is that with equal compute.
"""
from ttc_jax.experiments import ABLATION, Grid, Results, accuracy
from ttc_jax.experiments import VARIANTS as KNOWN
from ttc_jax.experiments.table5a import OTHER_MEAN

VARIANTS = {"layernorm": KNOWN["layernorm"],
            "layernorm_2x": KNOWN["layernorm_2x"],
            **{f"ttc_last{n}": ABLATION | dict(blocks=n)
               for n in (2, 4, 8)}, "ttc": KNOWN["ttc"]}
PAPER = {"layernorm": 74.9, "ttc_last2": 77.8, "ttc_last8": 77.9, "ttc": 78.4}


def draw(results: Results) -> list[Grid]:
  """Returns the table."""
  return [accuracy(results, PAPER, notes=[OTHER_MEAN])]
