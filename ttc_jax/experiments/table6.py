"""Table 6: domain generalisation, test sets that differ from the training set.

The first test set of a task is of its own domain; the others are shifted. With
the task imagenet (test sets test, v2, sketch, a, r) the published numbers stand
below.
"""
import numpy as np

from ttc_jax.experiments import Grid, Results, cell
from ttc_jax.report import rows as rows_lib

VARIANTS = ("full", "linear", "bias", "adapter", "lora", "vpt_deep", "ssf",
            "noah", "layernorm", "layernorm_2x", "ttc", "ttc_random")
_SETS = ("test", "sketch", "v2", "a", "r")
_SOURCE = ("published: ViT-B/16 of ImageNet-21K, 16 images a class; TTC as in "
           "the paper's text, the others as in PACE's Table 4.")
PAPER = {
    "full": (63.9, 18.5, 52.5, 3.2, 21.2),
    "linear": (67.9, 14.4, 60.8, 9.4, 25.6),
    "adapter": (70.5, 16.4, 59.1, 5.5, 22.1),
    "vpt": (70.5, 18.3, 58.0, 4.6, 23.2),
    "lora": (70.8, 20.0, 59.3, 6.9, 23.3),
    "noah": (71.5, 24.8, 66.1, 11.9, 28.5),
    "ttc": (75.5, None, None, None, 29.4),
}


def draw(results: Results) -> list[Grid]:
  """Returns the table: a column for each test set, the mean of shifted ones."""
  columns = [*dict.fromkeys(
      (r["task"], name) for r in results.rows if r["protocol"] == "final"
      for name in rows_lib.test_sets(r))]
  first = {task: [n for t, n in columns if t == task][0]
           for task, _ in columns}
  shifted = [(t, n) for t, n in columns if n != first[t]]
  lines = []
  for variant in results.variants:
    lines.append([variant,
                  *(cell(_values(results, variant, *at)) for at in columns),
                  cell(_means(results, variant, shifted))])
  notes = [results.setting]
  if "imagenet" in first:
    lines += [[f"{name} (published)",
               *(_printed(name, *at) for at in columns), "-"] for name in PAPER]
    notes.append(_SOURCE)
  return [Grid(
      results.title,
      ["", *(f"{t}: {n}" for t, n in columns), "mean of shifted"], lines,
      ["Top-1 (%) at the last epoch; the learning rate was chosen on "
       "validation images of the training domain. ±: standard deviation over "
       "seeds. mean of shifted: of each task's further test sets, then of "
       "the tasks.", *notes])]


def _printed(method, task, name):
  known = dict(zip(_SETS, PAPER[method], strict=True))
  value = known.get(name) if task == "imagenet" else None
  return "-" if value is None else f"{value}"


def _values(results, variant, task, name):
  """Top-1 for each seed on one test set."""
  return [found for r in results.final(variant, task)
          if (found := rows_lib.test_sets(r).get(name)) is not None]


def _means(results, variant, places):
  """The mean over tasks, of each the mean over its test sets, for each seed
  that has all."""
  by_seed: dict[int, dict[str, list[float]]] = {}
  for task, name in places:
    for r in results.final(variant, task):
      if name in (found := rows_lib.test_sets(r)):
        by_seed.setdefault(r["seed"], {}).setdefault(task, []).append(
            found[name])
  return [float(np.mean([*map(np.mean, of.values())]))
          for of in by_seed.values()
          if sum(map(len, of.values())) == len(places)]
