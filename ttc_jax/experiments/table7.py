"""Table 7: a map on the selected channels, or their rows of the kernel tuned.

`ttc_rows` tunes the K selected rows w_i of the layer after MHSA, K x D
parameters a block as the paper counts them (0.88M); `ttc_mhsa` has a map there.
"""
from ttc_jax.experiments import Grid, Results, accuracy

VARIANTS = ("ttc", "ttc_mhsa", "ttc_rows")
PAPER = {"ttc": 74.8, "ttc_rows": 67.0}


def draw(results: Results) -> list[Grid]:
  """Returns the table."""
  return [accuracy(results, PAPER)]
