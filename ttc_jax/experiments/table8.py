"""Table 8: nearest neighbours of [CLS] before stage 1, after it, after stage 2.

No head is involved: it tells whether the backbone itself is aligned. The paper
says only that stage 1 improves it.
"""
from ttc_jax.experiments import Grid, Results, cell

VARIANTS = ("layernorm", "layernorm_2x", "ttc")
MEASURES = {variant: ("neighbours",) for variant in VARIANTS}
LINES = (("before stage 1", "layernorm", "before"),
         ("after stage 1", "layernorm", "after"),
         ("stage 1 for as long as both", "layernorm_2x", "after"),
         ("after stage 2", "ttc", "after"))


def draw(results: Results) -> list[Grid]:
  """Returns a table for each number of neighbours."""
  def line(name, variant, when, k):
    return [name, *(cell([x[when][k] for x in results.measured(
        "neighbours", variant, task)]) for task in results.tasks)]
  return [Grid(
      f"{results.title}: top-1 (%) of {k} nearest training images",
      ["", *results.tasks], [line(*x, k) for x in LINES],
      ["Cosine similarity, the first test set, neighbours among the "
       "training images; ±: standard deviation over seeds.", results.setting])
          for k in ("1", "20")]
