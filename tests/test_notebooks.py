"""Notebooks: generated from their sources, and run from start to end."""
import io
import json
import os
import runpy

import numpy as np
from PIL import Image
import pytest

pytest.importorskip("nbformat")
from tests.command import ROOT

TOOL = runpy.run_path(str(ROOT / "tools" / "notebooks.py"))
NAMES = TOOL["names"]()


def test_they_are_those_of_the_sources():
  assert NAMES == sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))
  assert len(NAMES) == 5


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_source_generates(name):
  text = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
  assert text == TOOL["generate"](name), "run tools/notebooks.py"
  title, install, *others = json.loads(text)["cells"]
  link = f"{TOOL['REPOSITORY']}/blob/main/notebooks/{name}.ipynb"
  assert link in "".join(title["source"])
  assert "git+https://github.com/" + TOOL["REPOSITORY"] in "".join(
      install["source"])
  for cell in (install, *others):
    assert not cell.get("outputs") and cell.get("execution_count") is None


def test_cells_are_split_at_the_markers():
  assert TOOL["cells"]("# %% [markdown]\n# # A\n#\n# b\n\n# %%\nx = 1\n\n"
                       "# a comment\ny = 2\n") == [
      ("markdown", "# A\n\nb"), ("code", "x = 1\n\n# a comment\ny = 2")]
  with pytest.raises(ValueError, match="line 1"):
    TOOL["cells"]("x = 1")
  with pytest.raises(ValueError, match="line 2"):
    TOOL["cells"]("# %% [markdown]\nx = 1")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_start_to_end(name, tmp_path):
  """Shortened, in an empty folder, without network."""
  pytest.importorskip("nbclient")
  pytest.importorskip("ipykernel")
  # One device, as a notebook has; programs run once or twice.
  notebook = TOOL["execute"](
      name, tmp_path, timeout=300, TTC_JAX_SHORT="1",
      XLA_FLAGS="--xla_backend_optimization_level=0",
      JAX_COMPILATION_CACHE_DIR=os.path.join(
          os.environ["XDG_CACHE_HOME"], "notebooks"))
  texts = [output["text"] for cell in notebook.cells
           for output in cell.get("outputs", ()) if "text" in output]
  assert "Traceback" not in "".join(texts)
  drawn = TOOL["pictures"](notebook)
  assert drawn
  for png in drawn:
    with Image.open(io.BytesIO(png)) as picture:
      assert min(picture.size) > 60
      assert np.asarray(picture.convert("L")).std() > 2  # not one colour
