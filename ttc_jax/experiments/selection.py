"""Selection: where does the choice of channels matter?

Beyond the paper: K from 2 to 96, scores against random channels, the norms
tuned as in TTC or frozen (then the map alone adapts, after the head). val200
chooses the rates with random channels, for each K: with tuned norms that of the
map, beside the norms' of `ttc`; with frozen norms the learning rate. All scores
have the rates of random channels, so one thing tells two runs apart.
"""
import numpy as np

from ttc_jax.experiments import VARIANTS as KNOWN
from ttc_jax.experiments import Grid, Picture, Results, accuracy

K = (2, 8, 24, 96)
SCORES = ("random", "taylor", "taylor_square", "block")
_NORMS = {"tuned": KNOWN["ttc"], "frozen": KNOWN["ttc_on_linear"]}
_SEARCH = {"tuned": dict(settings_of="ttc",
                         grid=dict(adapter_lr=(1.0, 10.0, 100.0))),
           "frozen": {}}


def _name(norms, score, k):
  return f"{norms}_{score}_k{k}"


VARIANTS = {
    "linear": KNOWN["linear"], "layernorm_2x": KNOWN["layernorm_2x"],
    **{_name(norms, score, k): values | dict(score=score, k=k) | (
        _SEARCH[norms] if score == "random" else
        dict(settings_of=_name(norms, "random", k)))
       for norms, values in _NORMS.items() for k in K for score in SCORES}}


def draw(results: Results) -> list[Grid | Picture]:
  """Returns the table of all, and a panel for each task: accuracy by K."""
  from ttc_jax import plots  # an extra
  names = {_name(norms, score, k): norms
           for norms in _NORMS for score in SCORES for k in K}
  rows = [norms for norms in _NORMS
          if norms in {names.get(v) for v in results.variants}]
  tasks = [task for task in results.tasks
           if any(results.final(name, task) for name in names)]
  if not rows:
    return [accuracy(results)]
  figure, axes = plots.subplots(
      len(rows), len(tasks), squeeze=False,
      figsize=(3.5 * len(tasks), 3 * len(rows)))
  numbers = []
  for j, task in enumerate(tasks):
    for i, norms in enumerate(rows):
      ax = axes[i, j]
      ax.set_title(f"{plots.label(task)}, norms {norms}", fontsize=8)
      for n, score in enumerate(SCORES):
        points = [(k, values) for k in K if (values := [
            r["test_top1"] for r in results.final(_name(norms, score, k),
                                                  task)])]
        numbers += [[task, norms, score, str(k), f"{np.mean(v):.2f}",
                     f"{np.std(v, ddof=1):.2f}" if len(v) > 1 else ""]
                    for k, v in points]
        ax.errorbar([k * 1.08 ** (n - 1.5) for k, _ in points],  # apart
                    [np.mean(v) for _, v in points],
                    [np.std(v, ddof=1) if len(v) > 1 else np.nan
                     for _, v in points],
                    color=f"C{n}", marker=".", capsize=2, label=score)
      ax.set_xscale("log")
      ax.set_xlim(K[0] / 1.5, K[-1] * 1.5)  # also without a point
      ax.set_xticks(K, map(str, K))
      ax.minorticks_off()
      ax.set_xlabel("K")
      ax.set_ylabel("test top-1 (%)")
  axes[0, 0].legend(frameon=False, fontsize=7)
  return [accuracy(results), Picture(figure, Grid(
      results.title, ["task", "norms", "score", "K", "top-1", "deviation"],
      numbers, ["Means over seeds; bars: ± one standard deviation."]))]
