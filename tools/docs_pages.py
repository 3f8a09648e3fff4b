"""Pages of the documentation that are read off the code, as Markdown.

`docs/conf.py` puts them where a page has a line `<!-- generated: NAME -->`:

  config      every configuration key, its default and what it means
  commands    every command, its documentation and its flags
  methods, measures, experiments, presets, tasks    the files of that folder,
              each with the first paragraph of its documentation

So no page can be older than the code.
"""
import ast
from collections.abc import Callable, Iterator
import importlib
import io
import pathlib
import re
import textwrap
import tokenize
from typing import Any, NamedTuple

from ttc_jax import __main__ as entry
from ttc_jax import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "ttc_jax"


# --- Configuration keys -------------------------------------------------------

class Key(NamedTuple):
  """A configuration key.

  Attributes:
    name: e.g. "lora.rank".
    default: its value, or None for a section and for no value.
    meaning: the comments above and beside it.
    section: True where it holds keys.
  """
  name: str
  default: Any
  meaning: str
  section: bool = False


def config_groups() -> list[tuple[str, list[Key]]]:
  """Returns [(title, keys)] in the order of `ttc_jax/config.py`.

  A comment that stands alone between blank lines is the title of what follows.
  """
  source = (PACKAGE / "config.py").read_text(encoding="utf-8")
  comments = _comments(source)
  values = config_lib.default().to_dict()
  body = next(node.body for node in ast.parse(source).body
              if getattr(node, "name", "") == "default")
  lines = source.splitlines()
  groups: list[tuple[str, list[Key]]] = []
  for node in body:
    if not (isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Attribute)):
      continue
    name = node.targets[0].attr
    if title := _title(lines, node.lineno, comments):
      groups.append((title, []))
    groups[-1][1].extend(_keys(name, node, values[name], lines, comments))
  return groups


def _comments(source: str) -> dict[int, str]:
  """{line: its comment}."""
  return {token.start[0]: token.string.removeprefix("#").strip()
          for token in tokenize.generate_tokens(io.StringIO(source).readline)
          if token.type == tokenize.COMMENT}


def _above(lines, number, comments) -> list[str]:
  """The comments on the lines of their own that end above line `number`."""
  found: list[str] = []
  while lines[number - 2].strip().startswith("#"):
    number -= 1
    found.insert(0, comments[number])
  return found


def _title(lines, number, comments) -> str:
  """The comment that stands alone above the statement on line `number`."""
  number -= len(_above(lines, number, comments))
  if lines[number - 2].strip():
    return ""
  return " ".join(_above(lines, number - 1, comments)).rstrip(".")


def _keys(name, node, value, lines, comments) -> Iterator[Key]:
  """A key and, if it is a section, the keys in it."""
  inner = [keyword for call in ast.walk(node.value)
           if isinstance(call, ast.Call)
           and isinstance(call.func, ast.Name) and call.func.id == "dict"
           for keyword in call.keywords]
  above = _above(lines, node.lineno, comments)
  if not isinstance(value, dict):
    beside = comments.get(node.end_lineno, "")
    yield Key(name, value, " ".join(filter(None, [*above, beside])))
    return
  yield Key(name, None, " ".join(above), section=True)
  for keyword in inner:
    said = [*_above(lines, keyword.lineno, comments),
            comments.get(keyword.value.end_lineno, "")]
    yield Key(f"{name}.{keyword.arg}", value[keyword.arg],
              " ".join(filter(None, said)))


def config() -> str:
  """The tables of keys."""
  text = []
  for title, keys in config_groups():
    text += [f"## {title}", "", "| key | default | meaning |", "|---|---|---|"]
    text += [_row(f"`{key.name}`", "" if key.section else f"`{key.default!r}`",
                  key.meaning) for key in keys] + [""]
  return "\n".join(text)


def _row(*cells: str) -> str:
  return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


# --- Commands -----------------------------------------------------------------

class Command(NamedTuple):
  """A command.

  Attributes:
    name: of `ttc-jax NAME`.
    module: of `python -m ttc_jax.MODULE`.
    about: its documentation.
    flags: {flag: (default, what it means)}.
  """
  name: str
  module: str
  about: str
  flags: dict[str, tuple[str, str]]


def commands() -> list[Command]:
  """Returns the commands of `ttc-jax`, in its order."""
  found = []
  for name, (module, _) in entry.COMMANDS.items():
    path = PACKAGE / f"{module}.py"
    if not path.exists():
      path = PACKAGE / module / "__main__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    about = ast.get_docstring(tree) or ""
    where = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    found.append(Command(name, module, about, dict(_flags(tree, where))))
  return found


def _flags(tree, module) -> Iterator[tuple[str, tuple[str, str]]]:
  """The calls of `flags.DEFINE_...` in a module."""
  for node in ast.walk(tree):
    name = getattr(getattr(node, "func", None), "attr", "")
    if name == "define_config":
      yield "config", ("", "configuration, FILE[:key=value,...]; "
                       "--config.KEY=VALUE sets a key")
    if name.startswith("DEFINE_"):
      flag, default, *rest = (_value(arg, module) for arg in node.args)
      values = f"one of {', '.join(rest[0])}; " if rest[1:] else ""
      yield flag, ("" if default in (None, "") else str(default),
                   values + rest[-1])


def _value(node, module: str) -> Any:
  """An argument; what is computed is computed in the module."""
  if isinstance(node, ast.Constant):
    return node.value
  names = vars(importlib.import_module(module))
  return eval(compile(ast.Expression(node), module, "eval"), names)


def command_line() -> str:
  """The commands with their documentation and flags."""
  text = []
  for command in commands():
    text += [f"## `ttc-jax {command.name}`", "",
             f"`python -m ttc_jax.{command.module}`", "",
             *_markdown(command.about), "", "| flag | default | meaning |",
             "|---|---|---|"]
    for flag, (default, meaning) in command.flags.items():
      text.append(_row(f"`--{flag}`", f"`{default}`" if default else "",
                       meaning))
    text.append("")
  return "\n".join(text)


def _markdown(docstring: str) -> Iterator[str]:
  """A docstring, in which an indented paragraph is code."""
  for paragraph in re.split(r"\n\s*\n", docstring):
    if paragraph.startswith(("  ", "python ")):
      yield from ("```text", *textwrap.dedent(paragraph).splitlines(), "```")
    else:
      yield paragraph
    yield ""


# --- Folders ------------------------------------------------------------------

def folder(name: str) -> Callable[[], str]:
  """Returns a page that lists the files of a folder by what they say first."""
  def page() -> str:
    lines = ["| name | what |", "|---|---|"]
    for path in sorted((PACKAGE / name).glob("[!_]*.py")):
      source = path.read_text(encoding="utf-8")
      if name == "tasks" and "\ndef load(name" not in source:
        continue  # it serves the families
      about = ast.get_docstring(ast.parse(source))
      first = " ".join((about or "").split("\n\n")[0].split())
      lines.append(_row(f"`{path.stem}`", first))
    return "\n".join(lines)
  return page


PAGES: dict[str, Callable[[], str]] = {
    "config": config, "commands": command_line,
    **{name: folder(name) for name in (
        "methods", "measures", "experiments", "presets", "tasks")}}


def fill(text: str) -> str:
  """Puts the pages in place of the lines `<!-- generated: NAME -->`."""
  return re.sub(r"<!-- generated: (\w+) -->", lambda m: PAGES[m[1]](), text)
