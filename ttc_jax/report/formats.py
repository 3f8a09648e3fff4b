"""Writes a table as text, Markdown, LaTeX, CSV or JSON."""
from collections.abc import Callable, Sequence
import csv as csv_lib
import io
import json as json_lib
import re
from typing import Any, NamedTuple

from ttc_jax.errors import printable
from ttc_jax.report import rows as rows_lib
from ttc_jax.report.tables import PARTS, Line, Score, Table, extent

_LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}",
          "^": r"\textasciicircum{}", "<": r"\textless{}",
          ">": r"\textgreater{}",
          # After "\\\\" LaTeX would read these two as its arguments.
          "[": "{[}", "*": "{*}", **{c: f"\\{c}" for c in "_%&#${}"}}


class Format(NamedTuple):
  """A format of tables.

  Attributes:
    suffix: file name suffix, without the dot.
    write: `(table, interval) -> str`; `number` explains `interval`.
  """
  suffix: str
  write: Callable[[Table, bool], str]


# --- Cells --------------------------------------------------------------------

def number(score: Score | None, interval: bool = False,
           signed: bool = False) -> str:
  """Formats a score as "52.0 ± 2.8"; "-" for None.

  Args:
    interval: ± is half of the 95 % interval of the mean; otherwise it is the
      sample standard deviation over seeds.
    signed: writes "+" before positive numbers, for differences.
  """
  if score is None:
    return "-"
  spread = score.interval if interval else score.deviation
  mean = round(score.mean, 1) + 0.0  # no "-0.0"
  return f"{mean:{'+' if signed else ''}.1f}" + (
      "" if spread is None else f" ± {spread:.1f}")


def count(numbers: tuple[int, int] | str | None) -> str:
  """Formats counts as "1,930 to 8,299", "0" or, as published, "0.11M"."""
  if numbers is None or isinstance(numbers, str):
    return numbers or ""
  low, high = numbers
  return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def counts(rows: Sequence[rows_lib.Row]) -> list[str]:
  """Returns the cells of module, norm and head for some rows."""
  return [count(extent(r[f"{part}_params"] for r in rows)) for part in PARTS]


def header(table: Table) -> list[str]:
  """Returns the cells of the header."""
  return ["", *(c.title for c in table.columns), *PARTS, "seeds"]


def cells(line: Line, interval: bool = False) -> list[str]:
  """Returns the cells of a line; `number` explains `interval`."""
  return [line.name, *(number(s, interval, line.kind == "difference")
                       for s in line.scores),
          *(count(line.params.get(part)) for part in PARTS),
          count(line.seeds)]


def notes(table: Table, interval: bool = False) -> list[str]:
  """Returns the notes under a table, one sentence each."""
  ours = [s for line in table.lines if line.kind == "run" for s in line.scores]
  found = []
  if any(s and s.deviation is not None for s in ours):
    found.append("±: half of the 95 % interval of the mean over seeds "
                 "(Student t)." if interval else
                 "±: the sample standard deviation over seeds.")
  if None in ours:
    found.append("-: a run is missing, so the means over it are too.")
  return [printable(note) for note in (*found, *table.sources)]


def align(lines: Sequence[Sequence[str]]) -> list[list[str]]:
  """Pads cells to the width of their column; escapes control characters.

  The first column is aligned left, the others right.
  """
  lines = [[*map(printable, line)] for line in lines]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return [[c.rjust(w) if i else c.ljust(w)
           for i, (c, w) in enumerate(zip(line, widths, strict=True))]
          for line in lines]


# --- Formats ------------------------------------------------------------------

def text(table: Table, interval: bool = False) -> str:
  """Writes plain text; two blanks separate columns."""
  lines = align([header(table), *(cells(x, interval) for x in table.lines)])
  return paragraphs(
      printable(table.what + "."),
      "\n".join("  ".join(x).rstrip() for x in lines),
      "\n".join(notes(table, interval)))


def markdown(table: Table, interval: bool = False) -> str:
  """Writes Markdown, aligned in the source too."""
  return paragraphs(
      in_markdown(table.what + "."),
      pipes([header(table), *(cells(x, interval) for x in table.lines)]),
      "\n".join(map(in_markdown, notes(table, interval))))


def in_markdown(text_: str) -> str:
  r"""Returns text for Markdown: "<" is "\<", so that a name is no HTML, and
  what `printable` escapes is escaped."""
  return printable(text_).replace("<", r"\<")


def pipes(lines: Sequence[Sequence[str]], aligned: bool = True) -> str:
  r"""Writes a Markdown table; the first line is the header. "|" is "\|".

  Args:
    aligned: in the source too; of long sentences better not.
  """
  lines = [[in_markdown(cell).replace("|", r"\|") for cell in x] for x in lines]
  lines = align(lines) if aligned else lines
  first, *rest = ("| " + " | ".join(x) + " |" for x in lines)
  dashes = [len(c) if aligned else 1 for c in lines[0]]
  rule = "|" + "|".join("-" * (n + 1) + (":" if i and aligned else "-")
                        for i, n in enumerate(dashes)) + "|"
  return "\n".join([first, rule, *rest])


def latex(table: Table, interval: bool = False) -> str:
  r"""Writes LaTeX for \input; its first line names the packages it needs."""
  blocks = [[latex_line(cells(x, interval)) for x in table.lines
             if x.kind == kind]
            for kind in ("run", "theirs", "published", "difference")]
  return latex_table(
      _headings(table) + latex_line(header(table)), blocks,
      [table.what + ".", *notes(table, interval)], len(header(table)))


def latex_table(head: str, blocks: Sequence[Sequence[str]],
                sentences: Sequence[str], columns: int) -> str:
  """Writes a table of lines that `latex_line` wrote, a rule above each block.

  Args:
    head: the lines of the header.
    sentences: what is set below the table.
    columns: number of cells in a line.
  """
  body = "".join("\\midrule\n" + "".join(block) for block in blocks if block)
  return (
      "% \\usepackage{booktabs,graphicx}\n"
      "\\noindent\\resizebox{\\linewidth}{!}{%\n"
      f"\\begin{{tabular}}{{l{'r' * (columns - 1)}}}\n\\toprule\n"
      f"{head}{body}\\bottomrule\n\\end{{tabular}}}}\n\n"
      "{\\footnotesize\\noindent\n"
      + "\\\\\n".join(map(_escape, sentences)) + "\\par}\n")


def _headings(table):
  """Returns the line of group names above the tasks, if there are several."""
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


def latex_line(line: Sequence[str]) -> str:
  """Writes a line; "-" becomes a dash, "+1.0" and "-1.0" mathematics."""
  out = []
  for i, cell in enumerate(line):
    if i and cell == "-":
      out.append("--")
    elif i and re.fullmatch(r"[+-][\d.]+", cell):
      out.append(f"${cell}$")
    else:
      out.append(_escape(cell))
  return " & ".join(out) + " \\\\\n"


def _escape(text_: str) -> str:
  return "".join(_LATEX.get(c, c) for c in printable(text_))


def csv(table: Table, interval: bool = False) -> str:
  """Writes tidy CSV, in full precision.

  One line per variant, task, test set and seed; published numbers and those
  of other trainers have no seed. A spreadsheet takes text that begins with one
  of = + - @ for a formula: it gets an apostrophe in front. `interval` is
  unused: there are no means.
  """
  del interval
  out = io.StringIO()
  writer = csv_lib.writer(out, lineterminator="\n")

  def write(*values):
    writer.writerow([csv_cell(x) for x in values])
  write("kind", "variant", "method", "protocol", "task", "test", "group",
        "seed", "top1", "lr", "weight_decay",
        *(f"{part}_params" for part in PARTS), "backbone", "run")
  for line in table.lines:
    for r in line.rows:
      tests = ({"val": r["val_top1"]} if r["protocol"] == "val"
               else rows_lib.test_sets(r))
      for test, top1 in tests.items():
        write("run", r["variant"], r["method"], r["protocol"], r["task"], test,
              r["group"], r["seed"], top1, r["lr"], r["weight_decay"],
              *(r[f"{part}_params"] for part in PARTS), r["backbone"], r["run"])
    if line.kind in ("published", "theirs"):
      for column, score in zip(table.columns, line.scores, strict=True):
        if column.heading and score:
          write(line.kind, line.name, "", table.protocol, column.title, "",
                column.heading, "", round(score.mean, 2), *[""] * 7)
  return out.getvalue()


def csv_cell(value: Any) -> Any:
  """Returns a cell's value; text that looks like a formula is quoted."""
  if not isinstance(value, str):
    return value
  return ("'" if value.startswith(("=", "+", "-", "@")) else "") + printable(
      value)


def json(table: Table, interval: bool = False) -> str:
  """Writes a JSON list with one object per line of the table.

  `interval` is unused: every score has its deviation and its interval.
  """
  del interval
  return json_lib.dumps([_object(table, x) for x in table.lines],
                        indent=2) + "\n"


def _object(table: Table, line: Line) -> dict[str, Any]:
  scores = {
      c.title: s and {"mean": s.mean, "deviation": s.deviation,
                      "interval": s.interval, "seeds": list(s.seeds)}
      for c, s in zip(table.columns, line.scores, strict=True)}
  return {"name": line.name, "kind": line.kind, "protocol": table.protocol,
          "top1": scores,
          **{f"{part}_params": line.params.get(part) for part in PARTS},
          "runs": [r["run"] for r in line.rows]}


def paragraphs(*parts: str) -> str:
  """Joins the parts that are not empty, a blank line between two."""
  return "\n\n".join(filter(None, parts)) + "\n"


FORMATS = {"text": Format("txt", text), "markdown": Format("md", markdown),
           "latex": Format("tex", latex), "csv": Format("csv", csv),
           "json": Format("json", json)}
