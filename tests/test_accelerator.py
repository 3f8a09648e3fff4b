"""The script for a lent accelerator, on the CPU and small."""
import json
import runpy

from absl import flags
import jax
import numpy as np
import pytest

from tests.command import ROOT, fresh_flags
from ttc_jax.backbones import layers
from ttc_jax.backbones import vit as vit_lib
from ttc_jax.bench import programs, timing

SCRIPT = str(ROOT / "tools" / "accelerator.py")


def run(arguments):
  """-> what main returns, with the script's own flags."""
  with fresh_flags():
    script = runpy.run_path(SCRIPT)
    flags.FLAGS(["accelerator", *arguments])
    return script["main"]([])


@pytest.mark.slow
def test_it_checks_and_measures(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(vit_lib.SIZES, "ti", (32, 2, 2, 64))
  monkeypatch.setattr(programs, "_PRODUCTS", {"cpu": (32, 64)})
  monkeypatch.setattr(timing, "TURNS", 2)
  file = tmp_path / "accelerator.json"
  assert run(["--backbone=vit_ti16", "--size=32", "--batch=4", "--steps=2",
              "--seconds=0.01", "--dtype=float32", f"--json={file}"]) == 0
  found = json.loads(file.read_text())
  assert [c["equal"] for c in found["checks"].values()] == [True, True, None]
  names = [row["name"] for row in found["measured"]["rows"]]
  assert names == ["forward", "stage 1", "stage 2"]
  assert "images/s" in capsys.readouterr().out


def test_a_gradient_that_is_noise_is_not_compared_with_itself():
  with fresh_flags():
    difference = runpy.run_path(SCRIPT)["difference"]
  large, noise = np.array([3.0, -1.0]), np.array([1e-9, -2e-9])
  assert difference([large, noise], [large, -noise]) < 1e-6
  assert difference([large, noise], [1.1 * large, noise]) > 0.05
  assert difference([large, 0.1 * large], [large, 0.11 * large]) > 0.05


def test_what_is_compared_with_the_cpu_is_not_rounding():
  with fresh_flags():
    script = runpy.run_path(SCRIPT)
  device = jax.devices("cpu")[0]
  for module in script["_SMALL"].values():
    pairs = zip(script["gradients"](module, device, noise=1e-5),
                script["gradients"](module, device), strict=True)
    assert 0 < max(script["difference"](a, b) for a, b in pairs) < 1e-4


def test_fused_attention_that_differs_is_seen(monkeypatch):
  with fresh_flags():
    script = runpy.run_path(SCRIPT)
  assert script["beside_formula"]("float32") is None
  monkeypatch.setattr(layers, "fused", lambda dtype, width: "xla")
  assert script["beside_formula"]("float32") < 1e-5
  formula = layers.attention

  def wrong(*args):
    y = formula(*args)
    return 1.1 * y if layers.fused(y.dtype, 64) else y
  monkeypatch.setattr(layers, "attention", wrong)
  assert script["beside_formula"]("float32") > 0.05
