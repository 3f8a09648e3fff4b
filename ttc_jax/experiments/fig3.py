"""Figure 3: which channels each task selects in each block.

Rows of dots are tasks, a panel is a block. The table has the share of channels
that two tasks, or two seeds of a task, have in common, beside chance, K / D.
"""
import itertools

import numpy as np

from ttc_jax.experiments import Grid, Picture, Results

VARIANTS = ("ttc", "ttc_block")
MEASURES = {variant: ("channels",) for variant in VARIANTS}


def draw(results: Results) -> list[Grid | Picture]:
  """Returns the table of overlaps, and the picture of one seed."""
  shown: list[Grid | Picture] = [_overlaps(results)]
  if any(results.measured("channels", "ttc", t) for t in results.tasks):
    shown.append(_picture(results))
  return shown


def _sets(found):
  """{(site, block): set of channels} of a measure."""
  return {(site, int(block)): set(channels)
          for site, blocks in found["sites"].items()
          for block, channels in blocks.items()}


def overlap(one: dict, other: dict) -> list[float]:
  """Returns the share of common channels for each block, in order."""
  return [len(one[at] & other[at]) / len(one[at]) for at in sorted(one)]


def overlaps(results: Results, variant: str) -> tuple[list, list, float]:
  """Returns (overlaps by block of pairs of tasks, of pairs of seeds, chance).

  All pairs of runs: one run of each task tells too little. A list is empty
  where fewer than two tasks or seeds were measured. Chance is the mean of K / D
  over the blocks; NaN where nothing was measured.
  """
  runs = [[_sets(x) for x in results.measured("channels", variant, task)]
          for task in results.tasks]
  tasks = [overlap(a, b) for one, other in itertools.combinations(runs, 2)
           for a in one for b in other]
  seeds = [overlap(a, b) for r in runs for a, b in itertools.combinations(r, 2)]
  shares = [len(channels) / first["widths"][site][block]
            for first in results.measured("channels", variant)[:1]
            for site, blocks in first["sites"].items()
            for block, channels in blocks.items()]
  return tasks, seeds, float(np.mean(shares)) if shares else float("nan")


def _overlaps(results):
  lines, chance = [], float("nan")
  places = {variant: sorted(_sets(found[0])) for variant in VARIANTS
            if (found := results.measured("channels", variant))}
  columns = sorted({place for of in places.values() for place in of})
  for variant in places:
    *parts, chance = overlaps(results, variant)
    for name, values in zip(("two tasks", "two seeds of a task"), parts,
                            strict=True):
      if values:
        shares = dict(zip(places[variant], np.mean(values, 0), strict=True))
        lines.append([f"{variant}: {name}", f"{np.mean(values):.2f}",
                      *(f"{shares[at]:.2f}" if at in shares else "-"
                        for at in columns)])
  sites = len({site for site, _ in columns})
  return Grid(f"{results.title}: shared channels",
              ["", "mean", *(f"{site} {block}" if sites > 1 else str(block)
                             for site, block in columns)], lines,
              [f"Share of the K channels; by chance {chance:.2f}, the mean of "
               "K / D over the blocks. Columns: blocks." if lines else
               "One run alone: there is no pair to compare.", results.setting])


def _picture(results):
  from ttc_jax import plots  # an extra
  found = {task: of for task in results.tasks
           if (of := results.by_seed("channels", "ttc", task))}
  common = set.intersection(*map(set, found.values()))
  seeds = {task: min(common or of) for task, of in found.items()}
  runs = {task: found[task][seed] for task, seed in seeds.items()}
  places = sorted({(site, int(block)) for found in runs.values()
                   for site, blocks in found["sites"].items()
                   for block in blocks})
  figure, axes = plots.subplots(
      len(places), 1, squeeze=False, sharex=True,
      figsize=(8, len(places) * (0.3 + 0.12 * len(runs))))
  numbers = []
  for (site, block), ax in zip(places, axes[:, 0], strict=True):
    for y, (task, found) in enumerate(runs.items()):
      channels = found["sites"][site][str(block)]
      ax.scatter(channels, [y] * len(channels), marker="|", s=12,
                 color=f"C{y % 10}", linewidths=0.8)
      numbers += [[task, str(seeds[task]), site, str(block), str(c)]
                  for c in channels]
    ax.set_yticks(range(len(runs)), [plots.label(t) for t in runs], fontsize=6)
    ax.set_ylim(-0.7, len(runs) - 0.3)
    ax.set_ylabel(f"block {block}", rotation=0, labelpad=30)
    ax.grid(visible=False)
  axes[-1, 0].set_xlabel("channel")
  return Picture(figure, Grid(
      results.title, ["task", "seed", "site", "block", "channel"], numbers,
      [f"The channels that `ttc` chose; seed {min(common)}." if common else
       "The channels that `ttc` chose, of each task with its lowest seed."]))
