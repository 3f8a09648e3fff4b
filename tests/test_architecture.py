"""The README's picture of the structure, held against the imports."""
import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "ttc_jax"

# Lower imports higher never; a module may import those of smaller level.
LEVELS = {
    "errors": 0, "hardware": 1, "normalisation": 1, "files": 1,
    "interrupt": 1, "trees": 1,
    "parallel": 1, "products": 1, "randaugment": 1, "augment": 2, "config": 1,
    "vtab/rows": 1, "vtab/facts": 1,
    "config_file": 2, "cli": 3,
    "compilation": 2, "tasks": 2, "backbones": 2, "optim": 2, "presets": 2,
    "stores": 2, "hosts": 3, "claims": 3, "runs/workdir": 4,
    "weights": 3, "taps": 3, "quantisation": 3, "vtab": 3,
    "model": 4, "checkpoint": 4,
    "step": 5, "feed": 5, "cost": 5, "evaluate": 5, "importance": 5,
    "bundles": 6, "methods": 6,
    "train": 7, "report": 7, "predict/loaded": 7, "measures": 8, "runs": 9,
    "plots": 10, "predict": 10, "bench": 10, "serve": 11, "export": 11,
    "experiments": 11, "fitting": 12, "hub": 12, "evidence": 12,
    "launch": 12,
    "bench/pytorch": 3, "main": 13,
}


def files():
  return sorted(p for p in ROOT.rglob("*.py") if p.name != "__init__.py"
                or p.parent != ROOT)


def unit(path):
  if path.stem == "__main__":  # a command, wherever it lies
    return "main"
  parts = path.relative_to(ROOT).with_suffix("").parts
  return level_of(".".join(parts))


def level_of(module):
  """The unit with a level that a module "a.b.c" belongs to."""
  parts = module.split(".")
  inner = "/".join(parts[:2])
  return inner if inner in LEVELS else parts[0]


def imports(path):
  """(module, name) pairs that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from ((a.name, None) for a in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from ((node.module, a.name) for a in node.names)


def own_imports(path):
  """Names of the units of this package that a file imports."""
  for module, name in imports(path):
    parts = module.split(".")
    if parts[0] == "ttc_jax" and (parts[1:] or name):  # not the public API
      yield level_of(".".join([*parts[1:], name or ""]))


@pytest.mark.parametrize("path", files(), ids=lambda p: p.stem)
def test_imports_go_down_only(path):
  here = unit(path)
  if here not in LEVELS:
    pytest.fail(f"give {here} a level")
  for other in own_imports(path):
    assert other == here or LEVELS[other] < LEVELS[here], (
        f"{path.name} imports {other}")


def test_methods_and_backbones_ignore_each_other():
  for path in (ROOT / "backbones").glob("*.py"):
    assert "methods" not in set(own_imports(path)), path
  for path in (ROOT / "methods").glob("[!_]*.py"):
    assert "backbones" not in set(own_imports(path)), path


def test_tasks_do_not_import_jax():
  for path in (ROOT / "tasks").glob("*.py"):
    names = {module.split(".")[0] for module, _ in imports(path)}
    assert not names & {"jax", "flax"}, path


def test_only_parallel_calls_jax_pmap():
  for path in files():
    if path.name != "parallel.py":
      assert "jax.pmap" not in path.read_text(), path


# Their JSON is this package's own: of a configuration, of other hosts.
OWN_JSON = {"bundles.py", "containers.py", "launch.py", "session.py",
            "stores.py", "files.py"}


@pytest.mark.parametrize("path", files(), ids=lambda p: p.stem)
def test_json_of_files_is_read_by_one_function(path):
  """`files.from_json`, whose errors are ValueErrors, also of deep nesting."""
  text = path.read_text()
  assert "json.load(" not in text and "RecursionError" not in (
      text if path.name != "files.py" else "")
  assert "json.loads(" not in text or path.name in OWN_JSON
