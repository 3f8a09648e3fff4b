"""Sphinx: `make docs` builds the pages of this folder into build/docs."""
import ast
import functools
import inspect
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import docs_pages

import ttc_jax

project, author = "ttc_jax", "The ttc_jax authors"
version = release = ttc_jax.__version__
copyright = "The ttc_jax authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["examples", "evidence"]
html_theme, html_title = "furo", f"ttc_jax {version}"
html_show_sphinx = False
smartquotes = False  # --flags keep their dashes

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True  # no second entry beside the attribute's own
napoleon_numpy_docstring = False


def fill_pages(app, docname, source):
  """Puts what is read off the code in its place."""
  source[0] = docs_pages.fill(source[0])
  if docname == "index" and not (ROOT / "docs" / "evidence.md").exists():
    source[0] = source[0].replace("\nevidence\n", "\n")  # a tool writes it


def to_rst(app, what, name, obj, options, lines):
  """Turns our docstrings into reStructuredText, before napoleon.

  `x` is code. Outside of Args and its like, "name: text" is an item of a list,
  and what is indented otherwise is a code block, and so is an Example.
  """
  out, inside = [], ""  # "section", "item", "code" or prose
  for line in _written(what, name, obj) or lines:
    if line.strip() and not line[0].isspace():
      heading = re.fullmatch(r"(\w+):", line)
      item = re.match(r"([a-z]\w*): ", line)
      before, inside = inside, (
          "code" if heading and heading[1] == "Example" else
          "section" if heading else "item" if item else "")
      if inside == "code":
        out += ["**Example**", "", "::", ""]
      elif inside == "item":
        out += ([] if before == "item" else [""]) + [
            f"- **{item[1]}**: {_inline(line[item.end():])}"]
      else:
        out += ([""] if before in ("item", "code") else []) + [_inline(line)]
    elif line.strip() and not inside:
      out += ["", "::", "", line]
      inside = "code"
    else:
      out += [line] if inside == "code" else _inline(_each(line)).split("\n")
  # A property whose first line has a colon would be read as "type: meaning".
  lines[:] = [*([""] if what == "property" else []), *out, ""]


def _written(what, name, obj):
  """The lines of a docstring as they are indented in the source.

  Python and Sphinx take away what all lines but the first share, and with it
  the difference between a text and an example.
  """
  obj = getattr(obj, "fget", None) or obj
  module = name if what == "module" else getattr(obj, "__module__", "")
  found = _docstrings(module) if module.startswith("ttc_jax") else {}
  return found.get("" if what == "module" else
                   getattr(obj, "__qualname__", "?"))


@functools.cache
def _docstrings(module):
  """{qualified name: lines} of a module, "" for its own."""
  source = pathlib.Path(inspect.getsourcefile(sys.modules[module])).read_text(
      encoding="utf-8")
  found = {}

  def visit(node, path):
    text = ast.get_docstring(node, clean=False)
    if text is not None:
      margin = " " * node.body[0].col_offset
      found[".".join(path)] = [
          line.removeprefix(margin).rstrip() for line in text.split("\n")]
    for child in node.body:
      if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
        visit(child, (*path, child.name))
  visit(ast.parse(source), ())
  return found


def _each(line):
  """Gives each of "a, b: text" a line of its own, which napoleon wants."""
  match = re.fullmatch(r"( +)((?:\w+, )+)(\w+): (.*)", line)
  if not match:
    return line
  indent, others, last, text = match.groups()
  return "\n".join([*(f"{indent}{name}: as `{last}`."
                      for name in others.split(", ")[:-1]),
                    f"{indent}{last}: {text}"])


def _inline(text):
  """Code in double backticks; what else acts in reStructuredText is escaped."""
  parts = re.split(r"(`[^`]+`\w*)", text)
  return "".join(re.sub(r"(`[^`]+`)(\w*)", r"`\1`\\ \2", p)
                 if p.startswith("`") and len(p) > 1 else
                 re.sub(r"([*|])", r"\\\1", re.sub(r"(\w)_(?!\w)", r"\1\\_", p))
                 for p in parts)


def skip(app, what, name, obj, skipped, options):
  """Leaves out the fields of named tuples, which their docstring explains, and
  Linen's `setup`, whose docstring is Flax's."""
  return True if name == "setup" or type(obj).__name__ == "_tuplegetter" else (
      None)


def setup(app):
  app.connect("source-read", fill_pages)
  app.connect("autodoc-process-docstring", to_rst, priority=400)
  app.connect("autodoc-skip-member", skip)
