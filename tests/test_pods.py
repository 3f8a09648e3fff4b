"""What a user of pods starts from: the examples name what there is."""
import importlib.util
import re
import shlex
import subprocess
import sys

import pytest

from tests.command import ROOT, run_command
from ttc_jax import config_file
from ttc_jax.config import default

PODS = ROOT / "examples" / "pods"
SCRIPTS = sorted(p for p in PODS.iterdir() if p.suffix in (".sh", ".yaml"))


def _ours(path):
  """What of a file starts ttc_jax, its lines joined."""
  text = path.read_text().replace("\\\n", "")
  if path.suffix == ".yaml":
    return text
  return " ".join(re.findall(r"ttc_jax\.main(.*(?:\n  .*)*)", text)) + " "


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_flags_and_keys_exist(path):
  text = path.read_text()
  known = run_command("main", "--help").stdout
  flags = set(re.findall(r"--(\w+)[= ]", _ours(path)))
  assert {"config", "workdir"} <= flags
  for flag in flags:
    assert f"--{flag}" in known or f"--[no]{flag}" in known, flag
  for given in re.findall(r"--config=\"?([^\s\"]+)", _ours(path)):
    given = re.sub(r"\$\{?\w+\}?", "X", given)
    assert config_file.load(*config_file.split(given)).tasks == ("vtab",)
  keys = re.findall(r"--config\.(\w+)", text)
  assert keys and all(key in default() for key in keys)


@pytest.mark.parametrize("path", sorted(PODS.glob("*.sh")),
                         ids=lambda p: p.name)
def test_shell_scripts_parse(path):
  subprocess.run(["bash", "-n", str(path)], check=True)
  assert shlex.split(path.read_text(), comments=True)


def test_the_list_of_files_is_whole():
  text = (PODS / "README.md").read_text()
  listed = set(re.findall(r"\]\((\w+\.\w+)\)", text))
  assert listed == {p.name for p in PODS.iterdir()} - {"README.md"}


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs ray")
def test_ray_workers_share_a_session(tmp_path):
  done = subprocess.run(
      [sys.executable, str(PODS / "ray_runs.py"), "--workers=2", "--",
       f"--workdir={tmp_path}", "--config=configs/demo.py",
       "--config.epochs=2", "--config.limit=64"], cwd=ROOT, text=True,
      capture_output=True, timeout=600)
  assert done.returncode == 0, done.stderr
  assert len(list(tmp_path.glob("runs/*/row.json"))) == 6
