"""The claims about accuracy as one picture: printed gains and measured ones."""
from collections.abc import Sequence

from ttc_jax.evidence.claims import Finding, telling
from ttc_jax.experiments import Grid, Picture

TITLE = "Gains in test accuracy that are claimed, and what was measured"
QUESTIONS = "Questions beyond the paper, in points of test accuracy"


def draw(findings: Sequence[tuple[str, str, str, Finding]],
         names: Sequence[str], title: str = TITLE) -> Picture | None:
  """Returns the picture of all claims on enough tasks, or None without any.

  A dot and its 95 % interval for each work directory, a hollow diamond for the
  gain that the paper prints. The axis is linear to 2 points and logarithmic
  beyond, so that a gain of one point is seen beside one of forty.

  Args:
    findings: as `page.findings` returns them.
    names: of all work directories: one has the same colour in all pictures.
  """
  known = [(source, section, gain) for source, _, section, found in findings
           if (gain := telling(found))]
  if not known:
    return None
  from ttc_jax import plots  # an extra
  rows = [*dict.fromkeys((source, gain.name) for source, _, gain in known)]
  sections = {section: names.index(section) for _, section, _ in known}
  figure, axes = plots.subplots(figsize=(8, 0.32 * len(rows) + 1.1))
  for source, section, gain in known:
    place = sections[section]
    y = rows.index((source, gain.name))
    shift = 0.4 * ((place + 0.5) / len(names) - 0.5)
    axes.errorbar(gain.found.mean, y + shift, xerr=gain.found.half,
                  color=f"C{place}", marker="os^D"[place % 4], markersize=4,
                  capsize=2, linestyle="none")
    if gain.claimed:
      axes.plot(gain.claimed, y, marker="D", markersize=6, color="0.3",
                markerfacecolor="none", linestyle="none")
  for section, place in sorted(sections.items(), key=lambda one: one[1]):
    axes.plot([], [], color=f"C{place}", marker="os^D"[place % 4],
              linestyle="none", markersize=4, label=plots.label(section))
  if any(gain.claimed for *_, gain in known):
    axes.plot([], [], marker="D", color="0.3", markerfacecolor="none",
              linestyle="none", label="the paper")
  axes.axvline(0, color="0.4", linewidth=0.8)
  _spread(axes)
  axes.set_yticks(range(len(rows)), [
      plots.label(f"{name}  ({source})") for source, name in rows], fontsize=8)
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlabel("points, mean over tasks, 95 % interval")
  figure.legend(fontsize=8, frameon=False, ncols=len(sections) + 1,
                loc="outside upper center")
  return Picture(figure, Grid(
      title, ["source", "gain", "on", "points", "half interval", "paper"],
      [[source, gain.name, section, f"{gain.found.mean:.2f}",
        f"{gain.found.half:.2f}",
        f"{gain.claimed}" if gain.claimed else ""]
       for source, section, gain in known]))


def _spread(axes):
  """Makes the horizontal axis symmetrically logarithmic, with few ticks."""
  low, high = axes.get_xlim()
  axes.set_xscale("symlog", linthresh=2, linscale=1.2)
  ticks = [tick for tick in (-100, -20, -5, -3, -2, -1, 0, 1, 2, 3, 5, 20, 100)
           if low <= tick <= high and (abs(tick) != 3 or -5 < low < high < 5)]
  axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
  axes.minorticks_off()
  axes.set_xlim(low, high)
