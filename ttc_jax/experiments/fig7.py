"""Figure 7: how far scale and shift of each LayerNorm move, after each stage.

Mean absolute change over the channels of a norm, from input to output.
"""
import numpy as np

from ttc_jax.experiments import Grid, Picture, Results

VARIANTS = ("layernorm", "ttc")
MEASURES = {variant: ("norms",) for variant in VARIANTS}
NAMES = {"layernorm": "after stage 1", "ttc": "after stage 2"}


def draw(results: Results) -> list[Grid | Picture]:
  """Returns the picture: gamma above, beta below, a column per task."""
  from ttc_jax import plots  # an extra
  measured = {v: {t: results.by_seed("norms", v, t) for t in results.tasks}
              for v in NAMES}
  seeds = {t: results.common_seeds("norms", NAMES, t) for t in results.tasks}
  tasks = [t for t in results.tasks
           if seeds[t] and all(measured[v][t] for v in NAMES)]
  figure, axes = plots.subplots(
      2, max(1, len(tasks)), squeeze=False, sharex=True,
      figsize=(4 * max(1, len(tasks)), 5))
  numbers = []
  for j, task in enumerate(tasks):
    axes[0, j].set_title(plots.label(task))
    for i, leaf in enumerate(("gamma", "beta")):
      for variant, name in NAMES.items():
        found = [measured[variant][task][seed] for seed in seeds[task]]
        moved = np.array([x[leaf] for x in found])
        mean, deviation = moved.mean(0), moved.std(0, ddof=len(found) > 1)
        # The second line often covers the first one.
        axes[i, j].errorbar(
            range(len(mean)), mean, deviation, markersize=4, label=name,
            fmt="o-" if variant == "layernorm" else ".--", elinewidth=0.8)
        numbers += [[task, name, leaf, norm, f"{x:.4g}", f"{s:.2g}"]
                    for norm, x, s in zip(found[0]["norms"], mean, deviation,
                                          strict=True)]
      axes[i, 0].set_ylabel(f"mean |change of {leaf}|")
    axes[1, j].set_xlabel("LayerNorm, from input to output")
  if tasks:
    axes[0, 0].legend(frameon=False, fontsize=8)
  return [Picture(figure, Grid(
      results.title,
      ["task", "when", "leaf", "norm", "change", "deviation"], numbers,
      ["Means over the seeds that both stages have; bars: ± one standard "
       "deviation."]))]
