"""Table 5c: where the map is inserted.

After MHSA, after the MLP or both, on the branch's output before the residual
addition; and after that addition, where the map cannot be merged.
"""
from ttc_jax.experiments import ABLATION, Grid, Results, accuracy
from ttc_jax.experiments import VARIANTS as KNOWN
from ttc_jax.experiments.table5a import OTHER_MEAN

VARIANTS = {"ttc": KNOWN["ttc"], "ttc_mhsa": KNOWN["ttc_mhsa"],
            "ttc_both": KNOWN["ttc_both"],
            "ttc_stream": ABLATION | dict(position="stream_mlp")}
PAPER = {"ttc": 78.4, "ttc_both": 77.1}


def draw(results: Results) -> list[Grid]:
  """Returns the table."""
  return [accuracy(results, PAPER, {"ttc": "ttc (after the MLP)"},
                   notes=[OTHER_MEAN])]
