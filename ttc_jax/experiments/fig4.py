"""Figure 4: how far [CLS] moves away from the original model, LN against SSF.

Jensen-Shannon divergence (Eq. 5) between the softmax over the channels of an
image's [CLS] in the original and in the tuned model.
"""
import numpy as np

from ttc_jax.experiments import Grid, Picture, Results, cell

VARIANTS = ("layernorm", "layernorm_2x", "ssf", "ttc")
MEASURES = {variant: ("divergence",) for variant in VARIANTS}


def draw(results: Results) -> list[Grid | Picture]:
  """Returns the table and the picture."""
  from ttc_jax import plots  # an extra
  seeds = {task: results.common_seeds("divergence", VARIANTS, task)
           for task in results.tasks}
  found = {v: [[100 * x["js"] for seed, x in results.by_seed(
      "divergence", v, task).items() if seed in seeds[task]]
               for task in results.tasks] for v in VARIANTS}
  table = Grid(
      f"{results.title}: divergence x 100 (nats)", ["", *results.tasks],
      [[v, *map(cell, values)] for v, values in found.items()],
      ["Mean over at most 500 test images; ±: standard deviation over the "
       "seeds that all lines have. layernorm has half of the epochs of the "
       "others.", results.setting])
  figure, axes = plots.subplots(figsize=(7, 3.5))
  wide = 0.8 / len(VARIANTS)
  for i, (variant, values) in enumerate(found.items()):
    axes.bar(np.arange(len(values)) + i * wide,
             [np.mean(v) if v else np.nan for v in values], wide, label=variant,
             yerr=[np.std(v, ddof=1) if len(v) > 1 else np.nan for v in values],
             capsize=2)
  axes.set_xticks(np.arange(len(results.tasks)) + 0.4 - wide / 2,
                  [plots.label(t) for t in results.tasks])
  axes.set_ylabel("JS divergence x 100 (nats)")
  figure.legend(frameon=False, ncols=len(VARIANTS), loc="outside upper center")
  return [table, Picture(figure, table._replace(notes=[
      "Means over seeds; lines on bars: ± one standard deviation."]))]
