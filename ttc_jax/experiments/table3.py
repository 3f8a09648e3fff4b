"""Table 3: which component brings what.

The paper's five rows, with three controls: LayerNorm for as many epochs as both
stages, TTC with random channels, and TTC whose second stage leaves the norms as
the first one tuned them (`ttc_map`).
"""
from ttc_jax.experiments import Grid, Results, accuracy

VARIANTS = ("linear", "layernorm", "layernorm_2x", "ttc", "ttc_random",
            "ttc_map", "ttc_on_linear", "ttc_joint")
PAPER = {"linear": 52.9, "layernorm": 73.6, "ttc": 74.8,
         "ttc_on_linear": 70.0, "ttc_joint": 74.1}


def draw(results: Results) -> list[Grid]:
  """Returns the table."""
  notes = []
  if "ttc_joint" in results.variants:
    notes.append("ttc_joint chooses its channels before any training, by a "
                 "gradient through a head at its initial values.")
  if own := [v for v in ("ttc_joint", "ttc_on_linear")
             if v in results.variants]:
    notes.append(f"One rate for all that is trained, from a search of its own: "
                 f"{', '.join(own)}.")
  return [accuracy(results, PAPER, notes=notes)]
