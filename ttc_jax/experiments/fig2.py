"""Figure 2: how well [CLS] separates the classes before and after LN tuning.

The picture is t-SNE, for the eye alone; the table has numbers: silhouette, and
top-1 of the nearest class mean.
"""
from ttc_jax.experiments import Grid, Picture, Results, cell

VARIANTS = ("layernorm", "ttc")
MEASURES = {variant: ("separation",) for variant in VARIANTS}
LINES = (("before", "layernorm", "before"),
         ("after stage 1", "layernorm", "after"), ("after stage 2", "ttc",
                                                   "after"))


def draw(results: Results) -> list[Grid | Picture]:
  """Returns the table, and the picture of the lowest seed that has all."""
  lines = []
  for name, variant, when in LINES:
    for what, unit in (("silhouette", 100.0), ("centroid", 1.0)):
      lines.append([f"{name}: {what}", *(cell([
          unit * x[what][when] for x in results.measured(
              "separation", variant, task)]) for task in results.tasks)])
  table = Grid(
      f"{results.title}", ["", *results.tasks], lines,
      ["silhouette: mean coefficient x 100, Euclidean, of at most 500 test "
       "images; centroid: top-1 (%) of the nearest class mean of the training "
       "images; ±: standard deviation over seeds.", results.setting])
  return [table, _picture(results)]


def _picture(results):
  from ttc_jax import plots  # an extra
  tasks = [t for t in results.tasks
           if results.measured("separation", "layernorm", t)]
  figure, axes = plots.subplots(
      len(LINES), max(1, len(tasks)), squeeze=False,
      figsize=(3 * max(1, len(tasks)), 3 * len(LINES)))
  numbers = []
  for j, task in enumerate(tasks):
    found = {v: results.by_seed("separation", v, task) for v in VARIANTS}
    seed = next(iter(results.common_seeds("separation", VARIANTS, task)), None)
    for i, (name, variant, when) in enumerate(LINES):
      axes[i, j].axis("off")
      axes[i, j].set_title(f"{plots.label(task)}, {name}")
      if seed not in found[variant]:
        continue
      one = found[variant][seed]
      points, labels = one["points"][when], one["labels"]
      axes[i, j].scatter(*zip(*points, strict=True), c=labels, cmap="tab20",
                         s=4)
      numbers += [[task, name, str(seed), f"{x}", f"{y}", str(label)]
                  for (x, y), label in zip(points, labels, strict=True)]
  return Picture(figure, Grid(
      results.title, ["task", "when", "seed", "x", "y", "label"], numbers,
      ["t-SNE of [CLS] of the test images, coloured by class; of each task the "
       "lowest seed that all lines have."]))
