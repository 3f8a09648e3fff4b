"""A table of text cells, in the formats of all tables.

For what is no table of accuracies by task, which `tables.py` makes.
"""
from collections.abc import Callable, Mapping, Sequence
import csv
import io
import json
from typing import Any, NamedTuple, TypeGuard

from ttc_jax.errors import printable
from ttc_jax.report import formats


class Grid(NamedTuple):
  """A header and lines of cells; the first column has names.

  Attributes:
    title: says what the numbers are, without a full stop.
    notes: sentences under the table.
  """
  title: str
  header: Sequence[str]
  lines: Sequence[Sequence[str]]
  notes: Sequence[str] = ()

  @property
  def sentence(self) -> str:
    """The title with a full stop, unless it is a question; "" without one."""
    end = "" if self.title[-1:] in ("", "?") else "."
    return self.title + end


def text(grid: Grid) -> str:
  """Writes plain text."""
  body = "\n".join("  ".join(x).rstrip()
                   for x in formats.align([grid.header, *grid.lines]))
  return formats.paragraphs(printable(grid.sentence), body,
                            "\n".join(map(printable, grid.notes)))


def markdown(grid: Grid) -> str:
  """Writes Markdown."""
  return formats.paragraphs(
      formats.in_markdown(grid.sentence),
      formats.pipes([grid.header, *grid.lines]),
      "\n".join(map(formats.in_markdown, grid.notes)))


def latex(grid: Grid) -> str:
  r"""Writes LaTeX for \input; its first line names the packages it needs."""
  return formats.latex_table(
      formats.latex_line(grid.header),
      [[formats.latex_line(x) for x in grid.lines]],
      [grid.sentence, *grid.notes], len(grid.header))


def comma_separated(grid: Grid) -> str:
  """Writes CSV with the cells as they are; the notes are left out."""
  out = io.StringIO()
  csv.writer(out, lineterminator="\n").writerows(
      [formats.csv_cell(x) for x in line]
      for line in (grid.header, *grid.lines))
  return out.getvalue()


def as_json(grid: Grid) -> str:
  """Writes all fields as JSON, which `from_fields` takes."""
  return json.dumps(grid._asdict(), ensure_ascii=False, indent=1) + "\n"


def from_fields(fields: Mapping[str, Any]) -> Grid | None:
  """Returns a table of its fields, as JSON has them; None if it is none."""
  title, header, lines, notes = map(fields.get, Grid._fields)
  if (isinstance(title, str) and _are_texts(header) and _are_texts(notes)
      and isinstance(lines, list) and all(
          _are_texts(line) and len(line) == len(header) for line in lines)):
    return Grid(title, header, lines, notes)
  return None


def _are_texts(value: Any) -> TypeGuard[list[str]]:
  return isinstance(value, list) and all(isinstance(x, str) for x in value)


WRITERS: dict[str, Callable[[Grid], str]] = {
    "txt": text, "md": markdown, "tex": latex, "csv": comma_separated,
    "json": as_json}
