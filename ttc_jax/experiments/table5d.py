"""Table 5d: how many channels are selected.

`ttc` has the paper's share, an eighth of the width D. All have its rates, one
more of the largest K, whose map wants a smaller one, searches that of stage 2.
"""
from ttc_jax.experiments import ABLATION, OWN_STAGE2, Grid, Results, accuracy
from ttc_jax.experiments import VARIANTS as KNOWN
from ttc_jax.experiments.table5a import OTHER_MEAN

K = (4, 12, 96, 192)
VARIANTS = {"layernorm_2x": KNOWN["layernorm_2x"],
            **{f"ttc_k{k}": ABLATION | dict(k=k) for k in K[:2]},
            "ttc": KNOWN["ttc"],
            **{f"ttc_k{k}": ABLATION | dict(k=k) for k in K[2:]},
            f"ttc_k{K[-1]}_rate": OWN_STAGE2 | dict(k=K[-1])}
PAPER = {"ttc": 78.4}


def draw(results: Results) -> list[Grid]:
  """Returns the table."""
  labels = {r["variant"]: f"ttc (K = {r['k']})"
            for r in results.final("ttc")}
  return [accuracy(results, PAPER, labels, notes=[OTHER_MEAN])]
