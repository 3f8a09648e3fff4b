"""Writes notebooks/*.ipynb from the Python files in notebooks/src.

  python tools/notebooks.py            # writes those that differ
  python tools/notebooks.py --check    # exit code 1 if one differs
  python tools/notebooks.py --run=NAME --out=DIR   # executes it, for a look

A source is Python in the percent format: `# %%` begins a cell of code and
`# %% [markdown]` one of text, whose lines are comments. The first cell is the
title. A Colab badge is added to it, and a cell that installs the package
follows it. `--run` writes DIR/NAME.ipynb with all outputs, and every picture
as DIR/NAME-N.png. TTC_JAX_SHORT=1 makes a notebook shorter.
"""
import argparse
import base64
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import nbformat

REPOSITORY = "ttc-jax/ttc_jax"  # owner and name on GitHub
BRANCH = "main"
FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"

_BADGE = ("[![Open in Colab](https://colab.research.google.com/assets/"
          "colab-badge.svg)](https://colab.research.google.com/github/"
          "{repository}/blob/{branch}/notebooks/{name}.ipynb)")
# Colab has a JAX of its own. An update of it needs the same version's plugin
# for the accelerator, or JAX falls back to the CPU.
_INSTALL = '''\
# Installs ttc_jax where it is missing, as on Colab.
import glob
import importlib.util
import shutil
import subprocess
import sys

if importlib.util.find_spec("ttc_jax") is None:
  packages = ["ttc_jax[plots] @ git+https://github.com/{repository}"]
  if shutil.which("nvidia-smi"):
    packages.append("jax[cuda12]<0.13")
  elif glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
    packages.append("jax[tpu]<0.13")
  subprocess.run(
      [sys.executable, "-m", "pip", "install", "--quiet", *packages],
      check=True)'''


def names() -> list[str]:
  """Returns the names of all sources, sorted."""
  return sorted(path.stem for path in (FOLDER / "src").glob("*.py"))


def cells(source: str) -> list[tuple[str, str]]:
  """Splits a source into cells.

  Returns:
    [("code" or "markdown", text), ...].

  Raises:
    ValueError: text before the first marker, or a line of a text cell that is
      no comment.
  """
  found: list[tuple[str, list[str]]] = []
  for number, line in enumerate(source.splitlines(), start=1):
    if line == "# %%" or line == "# %% [markdown]":
      found.append(("markdown" if line.endswith("]") else "code", []))
    elif not found:
      raise ValueError(f"line {number}: begin with '# %% [markdown]'")
    else:
      kind, lines = found[-1]
      lines.append(_uncommented(number, line) if kind == "markdown" else line)
  return [(kind, "\n".join(lines).strip("\n")) for kind, lines in found]


def _uncommented(number, line):
  """A line of a text cell, without the '# ' of the source."""
  if line and line != "#" and not line.startswith("# "):
    raise ValueError(f"line {number}: a text cell's lines begin with '# '")
  return line[2:]


def generate(name: str) -> str:
  """Returns the text of NAME.ipynb: no outputs, the same bytes every time."""
  (kind, title), *others = cells(
      (FOLDER / "src" / f"{name}.py").read_text(encoding="utf-8"))
  if kind != "markdown":
    raise ValueError(f"{name}: the first cell is the title, in Markdown")
  badge = _BADGE.format(repository=REPOSITORY, branch=BRANCH, name=name)
  heading, _, text = title.partition("\n")
  install = _INSTALL.format(repository=REPOSITORY)
  all_cells = [("markdown", f"{heading}\n\n{badge}\n{text}".rstrip()),
               ("code", install), *others]
  notebook = nbformat.v4.new_notebook(
      cells=[_cell(i, *cell) for i, cell in enumerate(all_cells)],
      metadata={
          "accelerator": "GPU", "colab": {"provenance": []},
          "kernelspec": {"display_name": "Python 3", "language": "python",
                         "name": "python3"},
          "language_info": {"name": "python"}})
  nbformat.validate(notebook)
  return nbformat.writes(notebook) + "\n"


def _cell(i, kind, text):
  new = {"code": nbformat.v4.new_code_cell,
         "markdown": nbformat.v4.new_markdown_cell}[kind]
  return new(text, id=f"cell-{i}")  # else nbformat draws one at random


def execute(name: str, folder: str | os.PathLike, timeout: float = 1800,
            **environment: str) -> Any:
  """Runs NAME.ipynb with this Python; returns it with its outputs.

  Args:
    folder: working directory of the notebook. What IPython and Jupyter
      themselves write goes to a temporary folder, not to the user's home.
    timeout: seconds for a cell.
    **environment: more variables of the kernel's environment.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell failed.
  """
  from jupyter_client import AsyncKernelManager
  from jupyter_client.kernelspec import KernelSpec
  from nbclient import NotebookClient

  with tempfile.TemporaryDirectory() as scratch:
    manager = AsyncKernelManager(
        connection_file=os.path.join(scratch, "connection.json"),
        **({} if os.name == "nt" else
           dict(transport="ipc", ip=os.path.join(scratch, "kernel"))))
    # No installed kernel is looked up: it may be another Python.
    manager._kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f",
              "{connection_file}"], display_name="here", language="python")
    path = os.pathsep.join(filter(None, (
        str(FOLDER.parent), os.environ.get("PYTHONPATH", ""))))
    client = NotebookClient(
        nbformat.reads(generate(name), as_version=4), km=manager,
        timeout=timeout, resources={"metadata": {"path": str(folder)}})
    # A kernel of a manager that is given is not stopped unless one asks for it.
    return client.execute(cleanup_kc=True, env={
        **os.environ, "PYTHONPATH": path, "IPYTHONDIR": scratch,
        "JUPYTER_RUNTIME_DIR": scratch, "JUPYTER_CONFIG_DIR": scratch,
        "JUPYTER_DATA_DIR": scratch, **environment})


def pictures(notebook: Any) -> list[bytes]:
  """Returns the PNGs among the outputs, in order."""
  return [base64.b64decode(output["data"]["image/png"])
          for cell in notebook.cells
          for output in cell.get("outputs", ())
          if "image/png" in output.get("data", {})]


def _run(name, out):
  """Executes one and writes it and its pictures."""
  out.mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    notebook = execute(name, folder)
  nbformat.write(notebook, out / f"{name}.ipynb")
  for i, picture in enumerate(pictures(notebook)):
    (out / f"{name}-{i}.png").write_bytes(picture)
  print(f"{name}: {time.monotonic() - start:.0f} s")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--check", action="store_true")
  parser.add_argument("--run", choices=names(), action="append", default=[])
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."))
  args = parser.parse_args()
  for name in args.run:
    _run(name, args.out)
  stale = [] if args.run else [
      name for name in names()
      if not (path := FOLDER / f"{name}.ipynb").exists()
      or path.read_text(encoding="utf-8") != generate(name)]
  for name in stale:
    if args.check:
      print(f"notebooks/{name}.ipynb differs from its source: "
            "python tools/notebooks.py")
    else:
      (FOLDER / f"{name}.ipynb").write_text(generate(name), encoding="utf-8")
      print(f"written: notebooks/{name}.ipynb")
  return int(args.check and bool(stale))


if __name__ == "__main__":
  sys.exit(main())
