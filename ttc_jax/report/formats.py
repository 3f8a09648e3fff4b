"""A table as text, Markdown, LaTeX, CSV or JSON."""
from collections.abc import Callable, Sequence
import csv as csv_lib
import io
import json as json_lib
from typing import Any, NamedTuple

from ttc_jax.report import rows as rows_lib
from ttc_jax.report.tables import PARTS, Line, Score, Table, extent

_LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}",
          "^": r"\textasciicircum{}", "<": r"\textless{}",
          ">": r"\textgreater{}",
          # After a line's end these two would be its arguments.
          "[": "{[}", "*": "{*}", **{c: f"\\{c}" for c in "_%&#${}"}}


class Format(NamedTuple):
  """How a table is written.

  Attributes:
    suffix: of a file's name, without the dot.
    write: (table, interval) -> str; of `interval` see `number`.
  """
  suffix: str
  write: Callable[[Table, bool], str]


# --- Cells --------------------------------------------------------------------

def number(score: Score | None, interval: bool = False,
           signed: bool = False) -> str:
  """"52.0 ± 2.8", or "-".

  Args:
    interval: what follows ± is half of the 95 % interval of the mean, else
      the sample standard deviation over seeds.
  """
  if score is None:
    return "-"
  spread = score.interval if interval else score.deviation
  mean = round(score.mean, 1) + 0.0  # no "-0.0"
  return f"{mean:{'+' if signed else ''}.1f}" + (
      "" if spread is None else f" ± {spread:.1f}")


def count(numbers: tuple[int, int] | str | None) -> str:
  """"1,930 to 8,299", "0" or, as published, "0.11M"; empty for None."""
  if numbers is None or isinstance(numbers, str):
    return numbers or ""
  low, high = numbers
  return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def counts(rows: Sequence[rows_lib.Row]) -> list[str]:
  """The cells module, norm and head of some rows."""
  return [count(extent(r[f"{part}_params"] for r in rows)) for part in PARTS]


def header(table: Table) -> list[str]:
  """The titles of the columns."""
  return ["", *(c.title for c in table.columns), *PARTS, "seeds"]


def cells(line: Line, interval: bool = False) -> list[str]:
  """What stands under the header; of `interval` see `number`."""
  return [line.name, *(number(s, interval, line.kind == "difference")
                       for s in line.scores),
          *(count(line.params.get(part)) for part in PARTS),
          count(line.seeds)]


def notes(table: Table, interval: bool = False) -> list[str]:
  """What one needs to know under a table, a sentence each."""
  ours = [s for line in table.lines if line.kind == "run" for s in line.scores]
  found = []
  if any(s and s.deviation is not None for s in ours):
    found.append("±: half of the 95 % interval of the mean over seeds "
                 "(Student t)." if interval else
                 "±: the sample standard deviation over seeds.")
  if None in ours:
    found.append("-: a run is missing, so the means over it are too.")
  return [*found, *table.sources]


def align(lines: Sequence[Sequence[str]]) -> list[list[str]]:
  """Pads every column to its width: the first to the left, the others to the
  right."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  return [[c.rjust(w) if i else c.ljust(w)
           for i, (c, w) in enumerate(zip(line, widths))] for line in lines]


# --- Formats ------------------------------------------------------------------

def text(table: Table, interval: bool = False) -> str:
  """Columns apart by two blanks."""
  lines = align([header(table), *(cells(x, interval) for x in table.lines)])
  return _paragraphs(
      table.what + ".", "\n".join("  ".join(x).rstrip() for x in lines),
      "\n".join(notes(table, interval)))


def markdown(table: Table, interval: bool = False) -> str:
  """With pipes, aligned in the source too."""
  return _paragraphs(
      table.what + ".",
      pipes([header(table), *(cells(x, interval) for x in table.lines)]),
      "\n".join(notes(table, interval)))


def pipes(lines: Sequence[Sequence[str]]) -> str:
  """A Markdown table, its first line the header."""
  first, *rest = ("| " + " | ".join(x) + " |" for x in align(lines))
  dashes = [len(c) for c in align(lines)[0]]
  rule = "|" + "|".join("-" * (n + 1) + ":" if i else "-" * (n + 2)
                        for i, n in enumerate(dashes)) + "|"
  return "\n".join([first, rule, *rest])


def latex(table: Table, interval: bool = False) -> str:
  """To \\input: needs booktabs and graphicx, as its first line says."""
  blocks = [[x for x in table.lines if x.kind == kind]
            for kind in ("run", "published", "difference")]
  rules = ["\\midrule\n" + "".join(
      _latex_line(cells(x, interval)) for x in block)
           for block in blocks if block]
  return (
      "% \\usepackage{booktabs,graphicx}\n"
      "\\noindent\\resizebox{\\linewidth}{!}{%\n"
      f"\\begin{{tabular}}{{l{'r' * (len(header(table)) - 1)}}}\n\\toprule\n"
      f"{_headings(table)}{_latex_line(header(table))}{''.join(rules)}"
      "\\bottomrule\n\\end{tabular}}\n\n{\\footnotesize\\noindent\n"
      + "\\\\\n".join(_escape(note) for note in (
          table.what + ".", *notes(table, interval))) + "\\par}\n")


def _headings(table):
  """The groups above their tasks, where there are several."""
  of_groups = [c.heading for c in table.columns if c.heading]
  if len(set(of_groups)) < 2:
    return ""
  line, rules = [""], []
  for group in dict.fromkeys(of_groups):
    first = of_groups.index(group) + 2
    wide = of_groups.count(group)
    line.append(f"\\multicolumn{{{wide}}}{{c}}{{{group}}}")
    rules.append(f"\\cmidrule(lr){{{first}-{first + wide - 1}}}")
  rest = len(header(table)) - 1 - len(of_groups)
  return " & ".join([*line, *[""] * rest]) + " \\\\\n" + "".join(rules) + "\n"


def _latex_line(line):
  """A lone minus or a sign becomes a dash or a sign of mathematics."""
  out = []
  for i, cell in enumerate(line):
    if i and cell == "-":
      out.append("--")
    elif i and cell[:1] in ("+", "-"):
      out.append(f"${cell}$")
    else:
      out.append(_escape(cell))
  return " & ".join(out) + " \\\\\n"


def _escape(text_: str) -> str:
  return "".join(_LATEX.get(c, c) for c in text_)


def csv(table: Table, interval: bool = False) -> str:
  """Tidy: a line per variant, task and seed, full precision; a published
  number has no seed."""
  del interval  # of means, which are not here
  out = io.StringIO()
  writer = csv_lib.writer(out, lineterminator="\n")
  writer.writerow(["kind", "variant", "method", "protocol", "task", "group",
                   "seed", "top1", "lr", "weight_decay",
                   *(f"{part}_params" for part in PARTS), "backbone", "run"])
  for line in table.lines:
    for r in line.rows:
      writer.writerow([
          "run", r["variant"], r["method"], r["protocol"], r["task"],
          r["group"], r["seed"], r[rows_lib.SCORE[r["protocol"]]], r["lr"],
          r["weight_decay"], *(r[f"{part}_params"] for part in PARTS),
          r["backbone"], r["run"]])
    if line.kind == "published":
      for column, score in zip(table.columns, line.scores):
        if column.heading and score:
          writer.writerow(["published", line.name, "", table.protocol,
                           column.title, column.heading, "",
                           round(score.mean, 2), *[""] * 7])
  return out.getvalue()


def json(table: Table, interval: bool = False) -> str:
  """A list of objects, one a line of the table; both kinds of spread."""
  del interval
  return json_lib.dumps([_object(table, x) for x in table.lines],
                        indent=2) + "\n"


def _object(table: Table, line: Line) -> dict[str, Any]:
  scores = {
      c.title: s and {"mean": s.mean, "deviation": s.deviation,
                      "interval": s.interval, "seeds": list(s.seeds)}
      for c, s in zip(table.columns, line.scores)}
  return {"name": line.name, "kind": line.kind, "protocol": table.protocol,
          "top1": scores,
          **{f"{part}_params": line.params.get(part) for part in PARTS},
          "runs": [r["run"] for r in line.rows]}


def _paragraphs(*parts):
  return "\n\n".join(filter(None, parts)) + "\n"


FORMATS = {"text": Format("txt", text), "markdown": Format("md", markdown),
           "latex": Format("tex", latex), "csv": Format("csv", csv),
           "json": Format("json", json)}
