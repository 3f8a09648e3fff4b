"""The paper's claims, one by one, each judged from rows of finished runs.

A claim says that variant A has a higher accuracy than B, by so many points.
The runs of the same task and seed are paired, and the difference is the mean
over tasks of the mean over seeds. Its 95 % interval is for these tasks and
other seeds: every task has a variance over seeds of its own, and Student's t
has the degrees of freedom of Welch and Satterthwaite.

  supported           the whole interval is above 0, whatever gain is printed
  not supported       the whole interval is below 0, or it holds 0 and is wholly
                      below the gain that the paper prints
  not decidable here  otherwise: the interval holds both 0 and that gain, or
                      there is one seed only, or fewer than three tasks: what
                      is true of one need not be of the next; or a run has
                      failed: what is left are the survivors

Two things say nothing of a difference and are left out of it: a task with a
single finished seed beside others with more, and a task where val200 left both
variants without a stage 2, at `IDLE` times the rate of stage 1 or less. Where
it left one without, as TTC beside LayerNorm, that is the choice of the recipe:
the task counts and is named.

Claims about other numbers say their thresholds.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from ttc_jax import experiments
from ttc_jax.experiments import Results, selection
from ttc_jax.report import rows as rows_lib
from ttc_jax.runs.workdir import Row
from ttc_jax.vtab import rows as vtab

SUPPORTED, NOT_SUPPORTED, OPEN = (
    "supported", "not supported", "not decidable here")
TASKS = 3  # that a verdict needs
WIDE = 25.0  # points: a half interval that no summary shows
IDLE = 0.001  # a factor on stage 2's rate that leaves stage 1's model
_OURS = "beyond the paper"


class Difference(NamedTuple):
  """A mean over tasks, in points.

  Attributes:
    half: of the 95 % interval; None where a task has fewer than two seeds.
    tasks: number of them.
    seeds: the fewest that a task has.
  """
  mean: float
  half: float | None
  tasks: int
  seeds: int


class Gain(NamedTuple):
  """A difference in accuracy that a claim is about.

  Attributes:
    name: "A - B".
    claimed: the paper's, in points; 0 where it prints none.
  """
  name: str
  found: Difference
  claimed: float


class Finding(NamedTuple):
  """What was measured for a claim in one work directory.

  Attributes:
    measured: a sentence with numbers.
    verdict: one of the three above.
    gain: the difference, where the claim is about one.
  """
  measured: str
  verdict: str
  gain: Gain | None = None


def telling(finding: Finding) -> Gain | None:
  """Returns the gain of a finding on enough tasks, known to `WIDE`, or None."""
  if (gain := finding.gain) is None:
    return None
  _, half, tasks, _ = gain.found
  return gain if tasks >= TASKS and half is not None and half < WIDE else None


class Claim(NamedTuple):
  """A claim and how it is judged.

  Attributes:
    source: where the paper makes it; "beyond the paper" for our questions.
    text: the claim, a sentence.
    judge: `(results) -> Finding`, or None where the runs are missing.
    domains: it is about runs of domain generalisation; all others are not.
    control: beyond the paper, but needed to read a claim of its own.
    lacking: why nothing was measured, where `judge` finds nothing anywhere.
  """
  source: str
  text: str
  judge: Callable[[Results], Finding | None]
  domains: bool = False
  control: bool = False
  lacking: str = "no finished run tells it"

  @property
  def ours(self) -> bool:
    """Whether it is a question of this project alone."""
    return self.source == _OURS and not self.control


def _own(row: Row) -> float | None:
  """Accuracy on the first test set, in percent."""
  return row["test_top1"]


def _others(row: Row) -> float | None:
  """Mean accuracy on the test sets of other domains; None without one."""
  others = [*rows_lib.test_sets(row).values()][1:]
  return float(np.mean(others)) if others else None


def _any(row: Row) -> bool:
  return True


def _of_group(name: str) -> Callable[[Row], bool]:
  return lambda row: row["group"] == name


def _on_swin(row: Row) -> bool:
  return row["backbone"].startswith("swin")


def differences(results: Results, one: str, other: str,
                accuracy: Callable[[Row], float | None] = _own,
                where: Callable[[Row], bool] = _any
                ) -> dict[str, dict[int, float]]:
  """Returns {task: {seed: A - B in points}} of the runs that both have.

  Without the tasks that say nothing of it, as the module tells, and the rows
  for which `where` is false.
  """
  found: dict[str, dict[int, float]] = {}
  for task in results.tasks:
    rows = [[*filter(where, results.final(v, task))] for v in (one, other)]
    a, b = ({r["seed"]: x for r in mine if (x := accuracy(r)) is not None}
            for mine in rows)
    common = a.keys() & b.keys()
    if common and not all(_idle(r) for mine in rows for r in mine):
      found[task] = {seed: a[seed] - b[seed] for seed in sorted(common)}
  return finished(found)


def _idle(row):
  """Whether nothing of stage 2 has a rate to speak of, the map neither."""
  factor = row.get("stage2_lr")
  return factor is not None and max(
      factor, factor * (row.get("adapter_lr") or 1)) <= IDLE


def _device(row):
  """The kind of device; None where an older row tells no kind of CPU."""
  device = row.get("device")
  return None if str(device).endswith(" x cpu") else device


def finished(by_task: dict[str, dict[int, float]]
             ) -> dict[str, dict[int, float]]:
  """Returns {task: {seed: value}} without tasks of one seed, if others have
  more."""
  most = max(map(len, by_task.values()), default=0)
  return {task: values for task, values in by_task.items()
          if len(values) > 1 or most == 1}


def over_tasks(by_task: dict[str, dict[int, float]]) -> Difference | None:
  """Returns the mean over tasks of {task: {seed: value}}, None of nothing."""
  if not by_task:
    return None
  values = [np.array([*x.values()]) for x in by_task.values()]
  mean = float(np.mean([v.mean() for v in values]))
  fewest = min(map(len, values))
  if fewest < 2:
    return Difference(mean, None, len(values), fewest)
  # Of each task's share in the mean.
  variances = [v.var(ddof=1) / len(v) / len(values) ** 2 for v in values]
  total, degrees = sum(variances), 1.0
  if total:
    degrees = total ** 2 / sum(s ** 2 / (len(v) - 1) for s, v in zip(
        variances, values, strict=True))
  half = float(stats.t.ppf(0.975, degrees) * total ** 0.5)
  return Difference(mean, half, len(values), fewest)


def verdict(found: Difference, claimed: float) -> str:
  """Judges a difference; `claimed` is the printed gain in points, or 0."""
  if found.half is None or found.tasks < TASKS:
    return OPEN
  low, high = found.mean - found.half, found.mean + found.half
  if low > 0:
    return SUPPORTED
  return NOT_SUPPORTED if high < max(claimed, 0) else OPEN


def graded(value: float, low: float, high: float, tasks: int) -> str:
  """Judges a number: supported above `high`, not below `low`."""
  if tasks < TASKS:
    return OPEN
  return SUPPORTED if value > high else NOT_SUPPORTED if value < low else OPEN


def interval(found: Difference, unit: str = " points") -> str:
  """Formats a difference with its 95 % interval."""
  if found.half is None:
    return f"{found.mean:+.1f}{unit}"
  # Enough digits to see on which side of 0 an end of the interval is.
  digits = next((n for n in range(1, 4) if
                 f"{abs(found.mean):.{n}f}" != f"{found.half:.{n}f}"), 4)
  return f"{found.mean:+.{digits}f} ± {found.half:.{digits}f}{unit}"


def _plural(count, word):
  return f"{count} {word}" + "s" * (count != 1)


def better(one: str, other: str, claimed: float = 0.0,
           accuracy: Callable[[Row], float | None] = _own,
           where: Callable[[Row], bool] = _any
           ) -> Callable[[Results], Finding | None]:
  """Judges whether variant `one` is above `other`.

  Args:
    claimed: gain in points that the paper prints; 0 where it prints none.
    accuracy: of a row, in percent.
    where: which rows the claim is about.
  """
  name = f"{one} - {other}" + ", other domains" * (accuracy is _others)

  def judge(results):
    by_task = differences(results, one, other, accuracy, where)
    score = over_tasks(by_task)
    if score is None:
      return None
    each = ", ".join(f"{task} {np.mean([*x.values()]):+.1f}"
                     for task, x in by_task.items())
    said = f"; the paper has {claimed:+.1f}" if claimed else ""
    rows = {task: [r for variant in (one, other)
                   for r in results.final(variant, task) if where(r)]
            for task in by_task}
    if without := [task for task in by_task if any(map(_idle, rows[task]))]:
      said += f"; val200 chose no stage 2 on {', '.join(without)}"
    if mixed := [task for task in by_task if len({*map(
        _device, rows[task])} - {None}) > 1]:
      said += f"; on several kinds of device: {', '.join(mixed)}"
    if failed := experiments.lost([
        f for f in results.failed if f.variant in (one, other)]):
      said += f"; failed: {failed}"
    return Finding(
        f"{name}: {interval(score)} over "
        f"{_plural(score.tasks, 'task')} ({each}), "
        f"{_plural(score.seeds, 'seed')}{said}",
        OPEN if failed else verdict(score, claimed),
        Gain(name, score, claimed))
  return judge


def wins(one: str, other: str, printed: int
         ) -> Callable[[Results], Finding | None]:
  """Judges on how many of VTAB-1K's 19 tasks `one` is above `other`.

  Args:
    printed: the paper's number, of 19.
  """
  def judge(results):
    means = {vtab.canonical(task): np.mean([*x.values()])
             for task, x in differences(results, one, other).items()}
    if not means.keys() & vtab.ROWS.keys():
      return None
    above = sum(mean > 0 for mean in means.values())
    whole = means.keys() == vtab.ROWS.keys()
    return Finding(
        f"{one} is above {other} on {above} of {_plural(len(means), 'task')}; "
        f"the paper has {printed} of {len(vtab.ROWS)}",
        OPEN if not whole else SUPPORTED if above >= printed
        else NOT_SUPPORTED)
  return judge


def measure_rises(measure: str, variant: str,
                  value: Callable[[dict], tuple[float, float]], what: str,
                  factor: float = 1.0) -> Callable[[Results], Finding | None]:
  """Judges whether a measure rises from before training to after it.

  Args:
    value: `(measure) -> (before, after)`.
    what: name of the number.
  """
  def judge(results):
    by_task = {}
    for task in results.tasks:
      pairs = {seed: value(x) for seed, x in results.by_seed(
          measure, variant, task).items()}
      if pairs:
        by_task[task] = {seed: factor * (after - before)
                         for seed, (before, after) in pairs.items()}
    by_task = finished(by_task)
    score = over_tasks(by_task)
    if score is None:
      return None
    each = ", ".join(f"{task} {np.mean([*x.values()]):+.1f}"
                     for task, x in by_task.items())
    return Finding(f"{what}: {interval(score, '')} ({each})",
                   verdict(score, 0))
  return judge


def moves_less(one: str, other: str) -> Callable[[Results], Finding | None]:
  """Judges whether `one` has a smaller divergence (Eq. 5) than `other`."""
  def judge(results):
    by_task = {}
    for task in results.tasks:
      js = [{seed: x["js"] for seed, x in results.by_seed(
          "divergence", v, task).items()} for v in (other, one)]
      if common := js[0].keys() & js[1].keys():
        by_task[task] = {s: 100 * (js[0][s] - js[1][s]) for s in common}
    score = over_tasks(finished(by_task))
    return score and Finding(
        f"JS divergence x 100 of {other} minus that of {one}: "
        f"{interval(score, '')} nats", verdict(score, 0))
  return judge


def _costs(results):
  """Judges TTC's line of Table 4: formulas against what the program has."""
  tables = experiments.read("table4", results.workdir)
  lines = [line for table in tables for line in table.lines
           if line[:1] == ["ttc"]]
  try:
    (_, _, formula, counted, _, work, added, merged), = lines
    ratio = float(added.replace(",", "")) / float(work.replace(",", ""))
  except (ValueError, ZeroDivisionError):
    return None  # not drawn, or changed by hand
  agree = counted == formula and merged == "0" and 1 <= ratio < 1.1
  return Finding(
      f"{counted} parameters with the norms ({formula} by the formula), "
      f"{added} million FLOPs added ({work}; XLA counts sums and gathers too, "
      f"at most a tenth), {merged} after merging",
      SUPPORTED if agree else NOT_SUPPORTED)


def _overlap(results):
  """Judges whether tasks choose other channels: overlap beside chance."""
  from ttc_jax.experiments import fig3
  pairs, repeated, chance = fig3.overlaps(results, "ttc")
  if not pairs or not repeated:
    return None
  tasks, seeds = np.mean(pairs), np.mean(repeated)
  return Finding(
      f"two tasks share {tasks:.2f} of their channels, two seeds of one task "
      f"{seeds:.2f}, chance is {chance:.2f} (supported if two seeds share 0.05 "
      "more, not if they share no more)", graded(
          seeds - tasks, 0, 0.05, _tasks(results, "channels", "ttc")))


def _tasks(results, measure, variant):
  """Number of tasks with a measure."""
  return sum(bool(results.measured(measure, variant, task))
             for task in results.tasks)


def _agreement(results):
  """Judges whether a score is a property of the task, not of the images."""
  found = [x["taylor"] for x in results.measured("scores", "layernorm")]
  if not found:
    return None
  overlap = np.mean([x["overlap"] for x in found])
  negative = np.mean([x["negative"] for x in found])
  return Finding(
      f"two halves of the training images share {overlap:.2f} of the top D/8 "
      f"channels (chance 0.12) after stage 1, and {negative:.2f} of the scores "
      "are negative (supported above 0.75, not below 0.5)",
      graded(overlap, 0.5, 0.75, _tasks(results, "scores", "layernorm")))


def _first_order(results):
  """Judges the rank correlation of Eq. 7 with the true change of the loss."""
  found = [x["spearman"] for x in results.measured("removal", "layernorm")]
  if not found:
    return None
  value = float(np.mean(found))
  return Finding(
      "rank correlation with the true change of the loss, 16 channels of each "
      f"block: {value:.2f} after stage 1 (supported above 0.75, not below "
      "0.5)", graded(value, 0.5, 0.75, _tasks(results, "removal", "layernorm")))


def _energy(results):
  """Judges whether energy before training predicts accuracy after it.

  Energy on the other half of the training images, of the backbone before stage
  1 with the head of `linear`; accuracy of the map with frozen norms, which has
  a head of its own and channels that the same score chose on all images (of
  random ones both are another draw). Spearman's rank correlation over the
  scores, for each task and K, without those where all are equal. Without any
  relation each of them has a mean of 0 and a variance of 1 / (scores - 1), and
  their mean is near normal.
  """
  values, tasks = [], set()
  for task in results.tasks:
    found = results.measured("scores", "linear", task)
    for k in map(str, selection.K):
      known = [(np.mean([x[score]["energy"][k] for x in found]),
                np.mean([r["test_top1"] for r in rows]))
               for score in selection.SCORES
               if found and k in found[0][score]["energy"]
               and (rows := results.final(f"frozen_{score}_k{k}", task))]
      if len(known) == len(selection.SCORES) and all(
          len(set(of)) > 1 for of in zip(*known, strict=True)):
        values.append(stats.spearmanr(*zip(*known, strict=True)).statistic)
        tasks.add(task)
  if not values:
    return None
  mean = float(np.mean(values))
  half = 1.96 / np.sqrt((len(selection.SCORES) - 1) * len(values))
  return Finding(
      "rank correlation over four scores of the energy before stage 1, of "
      "channels chosen on half of the images, and the accuracy, mean of "
      f"{_plural(len(values), 'pair')} of task and K: {mean:.2f} (within "
      f"± {half:.2f} by chance; supported above that, not if it excludes 0.5)",
      graded(mean, 0.5 - half, half, len(tasks)))


def _silhouette(found):
  return found["silhouette"]["before"], found["silhouette"]["after"]


def _neighbours(found):
  return found["before"]["20"], found["after"]["20"]


CLAIMS: Sequence[Claim] = (
    Claim("Table 3", "Tuning the LayerNorms alone is above linear probing.",
          better("layernorm", "linear", 20.7)),
    # Also Table 5b's line without blocks, +3.5 in the average that it is of.
    Claim("Table 3", "Stage 2 adds to stage 1.",
          better("ttc", "layernorm", 1.2)),
    # The longer stage 1 has the rate that was chosen for the shorter one.
    Claim(_OURS, "Stage 2 is above a stage 1 that trains for as long as both.",
          better("ttc", "layernorm_2x"), control=True),
    # K = 24 is TTC's on the ViT-Ti/16, the one that was searched so.
    Claim(_OURS, "The same, with rates searched for the map and the longer "
          "stage 1.",
          better("tuned_taylor_k24", "layernorm_2x_rate"), control=True),
    Claim(_OURS, "With one learning rate for both stages, stage 2 adds to "
          "stage 1.", better("ttc_one_rate", "layernorm")),
    Claim("Table 3", "Two stages are above one joint stage.",
          better("ttc", "ttc_joint", 0.7)),
    Claim("Table 3", "TTC is above the map on a backbone that was not "
          "aligned.", better("ttc", "ttc_on_linear", 4.8)),
    Claim("Table 3", "The map on a backbone that was not aligned is above "
          "linear probing.", better("ttc_on_linear", "linear", 17.1)),
    Claim("Table 1", "TTC is above full tuning.", better("ttc", "full", 9.2)),
    *(Claim("Table 1", f"TTC is above {title} on {group} tasks.",
            better("ttc", other, gain, where=_of_group(group)),
            lacking="VTAB-1K's tasks were not run")
      for other, title, gains in (("full", "full tuning", (6.2, 3.3, 13.9)),
                                  ("vpt_deep", "VPT-Deep", (5.0, 4.3, 6.5)))
      for group, gain in zip(rows_lib.GROUPS, gains, strict=False)),
    Claim("Table 1", "TTC is above full tuning on 18 of VTAB-1K's 19 tasks.",
          wins("ttc", "full", 18), lacking="VTAB-1K's tasks were not run"),
    Claim("Table 1", "TTC is above tuning the biases.",
          better("ttc", "bias", 12.7)),
    # The paper's have one a block after the MLP, as their count tells.
    Claim("Table 1", "TTC is above adapters, here AdaptFormer's.",
          better("ttc", "adapter", 3.4)),
    Claim("Table 1", "TTC is above SSF.", better("ttc", "ssf", 1.7)),
    # The paper's number of prompts is that of VPT, another one on each task.
    Claim("Table 1", "TTC is above VPT-Deep, here of 10 prompts.",
          better("ttc", "vpt_deep", 5.4)),
    Claim("Table 2", "On a Swin TTC is above full tuning.",
          better("ttc", "full", where=_on_swin)),
    Claim("Table 2", "On a Swin TTC is above VPT, by 6.2, 2.2 and 7.6 points "
          "on Natural, Specialized and Structured tasks.", lambda results: None,
          lacking="VPT's prompts are tokens, which windows have no place for"),
    Claim("Table 4", "TTC's maps have L K^2 parameters and add N K^2 products "
          "each, which merging removes.", _costs),
    Claim("Table 5a", "The Taylor score is above random channels.",
          better("ttc", "ttc_random")),
    Claim("Table 5a", "The Taylor score is above the L2 norm.",
          better("ttc", "ttc_l2", 3.0)),
    Claim("Table 5b", "TTC's blocks, all of a ViT, are above the last two.",
          better("ttc", "ttc_last2", 0.6)),
    Claim("Table 5b", "TTC's blocks, all of a ViT, are above the last eight.",
          better("ttc", "ttc_last8", 0.5)),
    Claim("Table 5c", "After the MLP is above both places.",
          better("ttc", "ttc_both", 1.3)),
    Claim("Table 5c", "After the MLP is above after MHSA.",
          better("ttc", "ttc_mhsa")),
    Claim("Table 5d", "An eighth of the channels is above many more.",
          better("ttc", "ttc_k192")),
    Claim("Table 5d", "An eighth of the channels is above many more, each with "
          "a rate of its own.", better("ttc", "ttc_k192_rate")),
    Claim("Table 5d", "An eighth of the channels is above a few.",
          better("ttc", "ttc_k4")),
    Claim("Table 7", "A map on the channels is above tuning their weights.",
          better("ttc", "ttc_rows", 7.8)),
    Claim(_OURS, "A map after MHSA is above tuning the weights there.",
          better("ttc_mhsa", "ttc_rows")),
    Claim("Table 8", "Stage 1 improves nearest neighbours of [CLS].",
          measure_rises("neighbours", "layernorm", _neighbours,
                        "top-1 of 20 neighbours, after minus before")),
    Claim("Fig. 2", "Stage 1 separates the classes.",
          measure_rises("separation", "layernorm", _silhouette,
                        "silhouette x 100, after minus before", 100)),
    Claim("Fig. 3", "Two tasks select different channels, more than two seeds "
          "of one task do.", _overlap),
    Claim("Fig. 4", "LayerNorm tuning moves [CLS] less than SSF does.",
          moves_less("layernorm_2x", "ssf")),
    Claim(_OURS, "Our block score is above the Taylor score.",
          better("ttc_block", "ttc")),
    Claim(_OURS, "The sign in Eq. 7 matters: squared scores are better.",
          better("ttc_taylor_square", "ttc")),
    *(Claim(_OURS, f"With the norms {norms} and K = {k}, {title} is above "
            "random channels.",
            better(f"{norms}_{score}_k{k}", f"{norms}_random_k{k}"))
      for norms in ("frozen", "tuned") for k in selection.K
      for score, title in (("taylor", "Taylor"), ("block", "block"))),
    Claim(_OURS, "On random channels a map with a rate of its own is above "
          "stage 1 for as long as both.",
          better("tuned_random_k24", "layernorm_2x_rate")),
    Claim(_OURS, "The energy that a score's channels hold on the other half of "
          "the images predicts what training the map on them brings.", _energy),
    Claim("Table 6", "On the domain of its training TTC is above NOAH.",
          better("ttc", "noah", 4.0), domains=True),
    Claim("Table 6", "On other domains TTC is above NOAH.",
          better("ttc", "noah", accuracy=_others), domains=True),
    Claim("Table 6", "On other domains TTC is above LoRA.",
          better("ttc", "lora", accuracy=_others), domains=True),
    Claim("Table 6", "On other domains TTC is above linear probing.",
          better("ttc", "linear", accuracy=_others), domains=True),
    Claim(_OURS, "On other domains stage 2 adds to stage 1.",
          better("ttc", "layernorm", accuracy=_others), domains=True,
          control=True),
    Claim(_OURS, "On other domains TTC is above stage 1 for as long as both.",
          better("ttc", "layernorm_2x", accuracy=_others), domains=True,
          control=True),
    Claim("Eq. 7", "The first order tells what removing a channel does.",
          _first_order),
    Claim(_OURS, "The Taylor score is a property of the task, not of the "
          "images drawn.", _agreement),
)
