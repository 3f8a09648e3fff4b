"""The wheel works outside the repository; one entry starts every command."""
import importlib
import os
import subprocess
import sys
import zipfile

import pytest

from tests.command import ROOT
from ttc_jax import __main__ as entry
from ttc_jax import __version__


def run(*arguments, cwd, path, **env):
  return subprocess.run(
      [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True,
      env=os.environ | {"PYTHONPATH": str(path)} | env, timeout=600)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """The files of the wheel, unpacked as pip does."""
  folder = tmp_path_factory.mktemp("wheel")
  done = subprocess.run(
      [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
       "--no-build-isolation", "--no-index", f"--wheel-dir={folder}", ROOT],
      capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  wheel, = folder.glob("*.whl")
  assert __version__ in wheel.name
  with zipfile.ZipFile(wheel) as file:
    file.extractall(folder / "site")
  return folder / "site"


@pytest.mark.slow
def test_the_demo_runs_from_a_wheel_in_an_empty_folder(installed, tmp_path):
  done = run("-m", "ttc_jax", "train", "--config=demo:task=digits",
             "--config.limit=64", "--config.epochs=1",
             "--config.warmup_epochs=0.5",
             cwd=tmp_path, path=installed)
  assert done.returncode == 0, done.stderr
  assert "digits  ttc  seed 0" in done.stdout
  assert os.listdir(tmp_path) == ["checkpoints"]  # the work directory
  assert str(ROOT) not in done.stdout
  done = run("-m", "ttc_jax", "train", "--config=vtab.py", cwd=tmp_path,
             path=installed)
  assert done.returncode == 2 and "compare, controls, demo" in done.stderr


@pytest.mark.slow
def test_a_wheel_has_what_a_user_needs_and_no_more(installed):
  names = {os.path.relpath(os.path.join(where, file), installed)
           for where, _, files in os.walk(installed) for file in files}
  assert {"ttc_jax/configs/vtab.py", "ttc_jax/py.typed",
          "ttc_jax/checkpoints/vit_ti16_64.safetensors"} <= names
  top = {name.partition("/")[0] for name in names}
  assert {t.partition("-")[0] for t in top} == {"ttc_jax"}
  assert not [n for n in names if "runs/" in n and "checkpoints" in n]


def test_every_command_is_a_module_with_a_command_line():
  for module, _ in entry.COMMANDS.values():
    spec = importlib.util.find_spec(f"ttc_jax.{module}")
    if spec.submodule_search_locations:
      spec = importlib.util.find_spec(f"ttc_jax.{module}.__main__")
    with open(spec.origin) as file:
      assert 'if __name__ == "__main__":' in file.read(), module


def entered(monkeypatch, capsys, *arguments):
  monkeypatch.setattr(sys, "argv", ["ttc-jax", *arguments])
  try:
    entry.main()
    code = 0
  except SystemExit as end:
    code = end.code
  return code, *capsys.readouterr()


def test_help_lists_the_commands(monkeypatch, capsys):
  for flag in ((), ("--help",)):
    code, out, _ = entered(monkeypatch, capsys, *flag)
    assert code == 0
    for name in entry.COMMANDS:
      assert f"  {name} " in out


def test_an_unknown_command_is_refused(monkeypatch, capsys):
  code, out, err = entered(monkeypatch, capsys, "trian")
  assert code == 2 and not out and "unknown command 'trian'" in err


def test_version(monkeypatch, capsys):
  assert entered(monkeypatch, capsys, "--version") == (
      0, f"ttc_jax {__version__}\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_that_completes(shell):
  script = entry.completion(shell)
  if shell == "zsh":
    assert "bashcompinit" in script
    return
  done = subprocess.run(["bash", "-c", script + """
COMP_WORDS=(ttc-jax rep); COMP_CWORD=1; _ttc_jax; echo "${COMPREPLY[@]}"
"""], capture_output=True, text=True, check=True)
  assert done.stdout.split() == ["report"]


def test_a_command_runs_through_the_entry(tmp_path):
  done = run("-m", "ttc_jax", "methods", cwd=tmp_path, path=ROOT)
  assert done.returncode == 0, done.stderr
  assert "ttc" in done.stdout and "layernorm" in done.stdout
