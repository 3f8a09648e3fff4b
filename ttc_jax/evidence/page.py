"""The evidence as one page: claims with verdicts, then tables and figures."""
from collections.abc import Mapping, Sequence
import html
import io
import os
import re
from typing import NamedTuple
import urllib.parse
import zlib

from ttc_jax import experiments, files
from ttc_jax.errors import UserError, printable
from ttc_jax.evidence import forest
from ttc_jax.evidence.claims import (
    CLAIMS,
    IDLE,
    OPEN,
    Finding,
    interval,
    telling,
)
from ttc_jax.experiments import Grid, Picture, Results
from ttc_jax.report import formats, grid
from ttc_jax.report import rows as rows_lib
from ttc_jax.runs.workdir import WorkDir


class Section(NamedTuple):
  """A work directory's part of the page.

  Attributes:
    name: of the directory.
    results: all its runs, for the claims.
    shown: {experiment: (title, tables and pictures)}.
  """
  name: str
  results: Results
  shown: dict[str, tuple[str, Sequence[Grid | Picture]]]


def gather(workdir: str) -> Section:
  """Reads a work directory of experiments and draws what is finished.

  Raises:
    UserError: it has no finished run of an experiment, or cannot be read.
  """
  place = WorkDir(workdir)
  rows = rows_lib.of(workdir)
  finals = rows_lib.latest(rows_lib.of_one_setting(
      [r for r in rows if r["protocol"] == "final"]))
  rows = [*finals, *rows_lib.of_one_setting(
      [r for r in rows if r["protocol"] != "final"], searched=True)]
  failed = experiments.failures(place)
  plans = place.experiments()
  shown = {}
  for name, planned in plans.items():
    if drawn := _drawn(name, planned, rows, place, failed):
      shown[name] = experiments.title(name), drawn
  if not plans or not rows and not shown:
    raise UserError(f"'{workdir}' has no finished run of an experiment: start "
                    "configs/paper.py with that --workdir first")
  tasks = dict.fromkeys([*(
      task for planned in plans.values() for task in planned),
      *(r["task"] for r in rows)])
  results = Results(place.name, rows, [*tasks], place, failed)
  with experiments.reading(workdir, "setting"):
    str(results.setting)  # the page will show it
  return Section(place.name, results, shown)


def _drawn(name, planned, rows, place, failed):
  """What an experiment shows by now; the setting is its section's."""
  if not experiments.trains(name):
    return experiments.read(name, place)
  # A name stands for the same values in every experiment, so what another one
  # has run is shown too.
  variants = [*dict.fromkeys([*experiments.variants(name, 1), *(
      v for of_task in planned.values() for v in of_task)])]
  mine = sorted((r for r in rows if r["variant"] in variants),
                key=lambda r: variants.index(r["variant"]))
  if not any(r["protocol"] == "final" for r in mine):
    return []
  # Also those of an earlier plan.
  tasks = dict.fromkeys([*planned, *(r["task"] for r in mine)])
  results = Results(experiments.title(name), mine, [*tasks], place,
                    [f for f in failed if f.variant in variants])
  return [_without(x, results.setting)
          for x in experiments.show(name, results)
          if (x.numbers if isinstance(x, Picture) else x).lines]


def _without(one, note):
  """A table or picture without one of its notes."""
  if isinstance(one, Picture):
    return one._replace(numbers=_without(one.numbers, note))
  return one._replace(notes=[x for x in one.notes if x != note])


Told = tuple[str, str, str, Finding]  # source, claim, section, finding


def findings(sections: Sequence[Section]) -> list[Told]:
  """Returns (source, claim, section, finding) of all that can be judged."""
  told = []
  for claim in CLAIMS:
    for section in sections:
      with experiments.reading(section.results.workdir, claim.text):
        if (claim.domains == (set(section.shown) == {"table6"})
            and (found := claim.judge(section.results))):
          told.append((claim.source, claim.text, section.name, found))
  return told


def lines_of(sections: Sequence[Section]) -> list[list[str]]:
  """Returns the lines of the table of claims, also of those not measured."""
  told = findings(sections)
  measured = {text for _, text, *_ in told}
  return [[source, text, name, found.measured, found.verdict]
          for source, text, name, found in told] + [
              [claim.source, claim.text, "-", claim.lacking, OPEN]
              for claim in CLAIMS
              if claim.text not in measured and not claim.ours]


def apart(told: Sequence[Told]) -> tuple[list[Told], list[Told]]:
  """Returns the paper's claims with their controls, and our own questions."""
  ours = {claim.text for claim in CLAIMS if claim.ours}
  return ([one for one in told if one[1] not in ours],
          [one for one in told if one[1] in ours])


def summary(sections: Sequence[Section]) -> Grid:
  """Returns the paper's claims about accuracy and the controls that they need.

  A column for each work directory; only lines and columns that say something,
  as `telling` has it.
  """
  judged = [(text, name, gain, found.verdict)
            for _, text, name, found in apart(findings(sections))[0]
            if (gain := telling(found))]
  names = [*dict.fromkeys(name for _, name, *_ in judged)]
  lines: dict[str, list[str]] = {}
  for text, name, gain, verdict in judged:
    line = lines.setdefault(text, [
        text, f"{gain.claimed:+.1f}" if gain.claimed else "-",
        *["-"] * len(names)])
    said = "open" if verdict == OPEN else verdict
    line[2 + names.index(name)] = f"{interval(gain.found, '')}, {said}"
  return Grid("Claims", ["", "the paper", *names], [*lines.values()], [_RULE])


_RULE = ("A claim that one variant is above another is supported if the whole "
         "95 % interval is above 0, whatever gain the paper prints (of the "
         "mean over these tasks, for other seeds: runs are paired by task and "
         "seed, Student t with the degrees of freedom of Welch and "
         "Satterthwaite); not supported if it is below 0, or holds 0 and is "
         "below the gain that the paper prints; else, of one seed, and on "
         "fewer than three tasks, it is not decidable here. Left out of a "
         "difference are tasks with one finished seed beside others with more, "
         "and tasks where val200 left both variants without a stage 2, at "
         f"{IDLE} times the rate of stage 1 or less; where it left one of them "
         "without, the task counts and is named. Of so many intervals of "
         "95 % some miss by chance.")


def write(sections: Sequence[Section], folder: str) -> list[str]:
  """Writes evidence.html, evidence.md and its pictures; returns the paths."""
  from ttc_jax import plots  # an extra
  names = [section.name for section in sections]
  if twice := [name for name in names if names.count(name) > 1]:
    raise UserError(f"two work directories are called '{twice[0]}', which the "
                    "page cannot tell apart: rename one")
  os.makedirs(folder, exist_ok=True)
  drawn = _forests(sections) | {
      f"{section.name}/{name}-{i}": one for section in sections
      for name, (_, shown) in section.shown.items()
      for i, one in enumerate(shown) if isinstance(one, Picture)}
  written, pictures = [], {}
  for key, one in drawn.items():
    if one:
      stem = f"evidence-{key.removesuffix('-0').replace('/', '-')}"
      png, svg = plots.save(one.figure, os.path.join(folder, stem))
      os.remove(svg)
      written.append(png)
      pictures[key] = os.path.basename(png)
  for name, text in (("evidence.html", page(sections)),
                     ("evidence.md", markdown(sections, pictures))):
    written.append(os.path.join(folder, name))
    files.write_text(written[-1], text)
  return written


def _forests(sections):
  """{name: the picture of the paper's claims or of our questions, or None}."""
  claims, questions = apart(findings(sections))
  names = [section.name for section in sections]
  return {"claims": forest.draw(claims, names),
          "questions": forest.draw(questions, names, forest.QUESTIONS)}


def _setting(section):
  """What the runs have in common; nothing where there are none."""
  return [section.results.setting] if section.results.rows else []


# --- Markdown -----------------------------------------------------------------

def markdown(sections: Sequence[Section], pictures: Mapping[str, str]) -> str:
  """Writes the page as Markdown.

  Args:
    pictures: {"SECTION/EXPERIMENT-NUMBER": path of the drawn picture}, and
      "claims" and "questions" for those of `forest`.
  """
  lines = [["", "claim", "on", "measured", "verdict"], *lines_of(sections)]
  out = ["# Evidence", _RULE, *(
      f"![{title}]({pictures[name]})" for name, title in (
          ("claims", forest.TITLE), ("questions", forest.QUESTIONS))
      if name in pictures), formats.pipes(lines, aligned=False)]
  for section in sections:
    out += map(formats.in_markdown,
               (f"## {section.name}", *_setting(section)))
    for name, (title, shown) in section.shown.items():
      out.append(f"### {title}")
      for i, one in enumerate(shown):
        if isinstance(one, Grid):
          out.append(grid.markdown(_under(title, one)).strip())
        else:
          path = pictures[f"{section.name}/{name}-{i}"]
          out.append(f"![{title}]({urllib.parse.quote(path)})")
          out += map(formats.in_markdown, one.numbers.notes)
  return "\n\n".join(out) + "\n"


def _under(title, table):
  """A table under its experiment's title, which it does not repeat."""
  rest = table.title.removeprefix(title).lstrip(" :.")
  return table._replace(title=rest[:1].upper() + rest[1:])


# --- HTML ---------------------------------------------------------------------

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1300px;
       margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px;
        display: block; overflow-x: auto }
th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: right;
         vertical-align: top; white-space: nowrap }
.claims td { white-space: normal }
.claims td:last-child { white-space: nowrap }
th:first-child, td:first-child, .claims td, .claims th { text-align: left }
th { border-bottom: 2px solid #999 }
svg { max-width: 100%; height: auto }
.note { color: #666; font-size: 13px }
.supported { color: #176f2c; font-weight: 600 }
.not-supported { color: #b3261e; font-weight: 600 }
.not-decidable-here { color: #7a5c00; font-weight: 600 }
"""


def page(sections: Sequence[Section]) -> str:
  """Writes the page as one HTML file that needs no other."""
  body = ["<h1>Evidence</h1>", f"<p>{html.escape(_RULE)}</p>",
          *(_svg(one) for one in _forests(sections).values() if one),
          _claims(sections)]
  for section in sections:
    body.append(f"<h2>{_text(section.name)}</h2>")
    body += [f"<p class=note>{_text(x)}</p>" for x in _setting(section)]
    for title, shown in section.shown.values():
      body.append(f"<h3>{_text(title)}</h3>")
      body += [_table(_under(title, one)) if isinstance(one, Grid)
               else _svg(one) + _notes(one.numbers) for one in shown]
  return ("<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
          "<meta name=viewport content='width=device-width'>"
          f"<title>ttc_jax: evidence</title><style>{_STYLE}</style></head>"
          f"<body>\n" + "\n".join(body) + "\n</body></html>\n")


def _text(value):
  return html.escape(printable(value))


def _claims(sections):
  lines = ["<table class=claims><tr><th>paper<th>claim<th>on<th>measured"
           "<th>verdict</tr>"]
  for *start, verdict in lines_of(sections):
    cells = "".join(f"<td>{_text(x)}" for x in start)
    lines.append(f"<tr>{cells}<td class={verdict.replace(' ', '-')}>"
                 f"{_text(verdict)}</tr>")
  return "\n".join([*lines, "</table>"])


def _table(one):
  head = "".join(f"<th>{_text(x)}" for x in one.header)
  body = "\n".join("<tr>" + "".join(f"<td>{_text(x)}" for x in line) + "</tr>"
                   for line in one.lines)
  title = f"<p>{_text(one.sentence)}</p>" if one.title else ""
  return f"{title}<table><tr>{head}</tr>\n{body}</table>{_notes(one)}"


def _notes(one):
  return f"<p class=note>{'<br>'.join(map(_text, one.notes))}</p>"


def _svg(picture):
  """The picture as inline SVG; names within are made unique by its title."""
  out = io.StringIO()
  picture.figure.savefig(out, format="svg", bbox_inches="tight",
                         metadata={"Date": None})
  svg = out.getvalue()
  svg = svg[svg.index("<svg"):]
  prefix = f"p{zlib.crc32(svg.encode())}-"
  svg = re.sub(r'id="', f'id="{prefix}', svg)
  return re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)
