"""Scores: does the choice of channels depend on the images?

Beyond the paper. For the model before and after stage 1: agreement of a score
between two halves of the training images, and how much of the gradient that
stage 2 can use (on images that the score has not seen) its channels hold.
"""
import numpy as np

from ttc_jax.experiments import Grid, Picture, Results

VARIANTS = ("linear", "layernorm")
MEASURES = {variant: ("scores", "removal") for variant in VARIANTS}
_WHEN = {"linear": "before stage 1", "layernorm": "after stage 1"}


def draw(results: Results) -> list[Grid | Picture]:
  """Returns the table of agreement, that of removal, and the scatter."""
  return [_agreement(results), _removal(results), *_scatter(results)]


def _agreement(results):
  lines = []
  for variant, when in _WHEN.items():
    for task in results.tasks:
      found = results.measured("scores", variant, task)
      for score in found[0] if found else ():
        mine = [x[score] for x in found]
        k = str(mine[0]["k"])
        lines.append([
            f"{score}, {when}", task,
            *(f"{np.mean([x[key] for x in mine]):.2f}"
              for key in ("correlation", "overlap", "negative")),
            f"{np.mean([x['energy'][k] for x in mine]):.3f}",
            *(f"{np.mean([x['sizes'][n] for x in mine]):.2f}"
              if n in mine[0]["sizes"] else "-" for n in ("100", "500"))])
  return Grid(
      f"{results.title} Two halves of the training images", [
          "", "task", "rank correlation", "shared top K", "negative", "energy",
          "100 images", "500 images"], lines,
      ["K = D / 8 at fc2, mean over blocks and seeds. energy: share of the "
       "squared gradient of the full map on the other half that lies in the "
       "selected block. 100, 500 images: share of the top K that they have in "
       "common with the top K of all.", results.setting])


def _removal(results):
  lines, counts = [], set()
  for variant, when in _WHEN.items():
    for task in results.tasks:
      for x in results.measured("removal", variant, task)[:1]:
        counts.add(x.get("images", 500))  # that of earlier versions
        lines.append([when, task, f"{np.mean(x['spearman']):.2f}",
                      f"{np.mean(x['squared']):.2f}",
                      *(f"{x['spearman'][i]:.2f}" for i in (0, -1))])
  return Grid(
      "Removing a channel: rank correlation of the true change of the loss "
      "with the first order's", ["", "task", "signed", "squared", "first block",
                            "last block"], lines,
      [f"16 channels of every block, {', '.join(map(str, sorted(counts)))} "
       "training images, the lowest seed; mean over blocks. squared: both "
       "squared, as in Eq. 6.", results.setting])


def _scatter(results):
  from ttc_jax import plots  # an extra
  drawn = [(variant, task, found[0]) for variant in _WHEN
           for task in results.tasks
           if (found := results.measured("removal", variant, task))]
  if not drawn:
    return []
  tasks = [*dict.fromkeys(task for _, task, _ in drawn)]
  figure, axes = plots.subplots(
      2, len(tasks), squeeze=False, figsize=(3.2 * len(tasks), 6))
  numbers = []
  for variant, task, found in drawn:
    ax = axes[[*_WHEN].index(variant), tasks.index(task)]
    depth = len(found["true"])
    for block, (p, t) in enumerate(zip(found["predicted"], found["true"],
                                       strict=True)):
      ax.scatter(p, t, s=5, color=plots.colour(block / depth))
      numbers += [[variant, task, str(block), f"{a:.5g}", f"{b:.5g}"]
                  for a, b in zip(p, t, strict=True)]
    ax.set_title(f"{plots.label(task)}, {_WHEN[variant]}", fontsize=8)
    ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8)
    ax.set_xlabel("first order")
    ax.set_ylabel("true change of the loss")
  return [Picture(figure, Grid(
      "Removing a channel", ["variant", "task", "block", "predicted", "true"],
      numbers, ["A point is a channel, its colour the block; one seed."]))]
