"""FLOPs of use, and the list of methods."""
import json
import types

import jax
import jax.numpy as jnp
import pytest

from tests.command import run_command
from ttc_jax import backbones, cost, methods
from ttc_jax.backbones import layers
from ttc_jax.bench import programs
from ttc_jax.errors import UserError
from ttc_jax.methods import __main__ as listing
from ttc_jax.model import Model, init_head


def test_flops_are_those_of_the_products_and_little_more():
  vit = backbones.make("vit_b16", 224)
  params = {"backbone": backbones.shapes(vit), "adapter": {},
            "head": init_head(768, 100, 0)}
  got = cost.flops(Model(vit, "half"), params, {})
  needed = programs.flops_needed(vit, 96, 100)["forward"]
  assert 1 <= got / needed < 1.03


def test_flops_are_the_same_where_a_gpu_trains(monkeypatch):
  """Whose programs JAX does not count, and whose attention is one call."""
  vit = backbones.make("vit_ti16", 32).clone(dtype=jnp.bfloat16)
  params = {"backbone": backbones.shapes(vit), "adapter": {},
            "head": init_head(192, 10, 0)}
  here, real = cost.flops(Model(vit, "half"), params, {}), jax.local_devices
  gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
  monkeypatch.setattr(jax, "local_devices", lambda backend=None: (
      real(backend=backend) if backend else [gpu]))
  monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
  assert layers.fused(jnp.bfloat16, 64) == "cudnn"
  assert cost.flops(Model(vit, "half"), params, {}) == here


def test_without_a_cpu_nothing_is_trained(monkeypatch):
  def none(backend):
    raise RuntimeError(f"Unknown backend {backend}")
  monkeypatch.setattr(jax, "local_devices", none)
  with pytest.raises(UserError, match="add it to JAX_PLATFORMS"):
    cost.counter()


def list_methods(*arguments):
  return run_command("methods", *arguments)


@pytest.fixture(scope="module")
def rows():
  done = list_methods(
      "--backbone=vit_ti16", "--size=32", "--classes=10", "--json")
  assert done.returncode == 0, done.stderr
  return {r["method"]: r for r in json.loads(done.stdout)}


@pytest.mark.slow
def test_the_list_has_every_method_with_its_cost(rows):
  assert set(rows) == set(methods.names())
  assert rows["ttc"]["module_params"] == 12 * 24 * 24
  assert rows["ttc"]["norm_params"] == 25 * 2 * 192
  assert rows["ttc"]["head_params"] == 193 * 10
  # The map, its gather and its sum, on 5 tokens in 11 blocks and on 1.
  extra = 2 * 24 * 24 * (11 * 5 + 1)
  assert extra <= rows["ttc"]["extra_flops"] < 1.2 * extra
  assert rows["ttc"]["mergeable"] and rows["ttc"]["extra_flops_merged"] == 0
  for name in ("adapter", "vpt_deep", "noah", "sct"):
    assert not rows[name]["mergeable"] and rows[name]["cannot_merge"]
    assert rows[name]["extra_flops_merged"] == rows[name]["extra_flops"] > 0
  for row in rows.values():
    assert row["source"] and row["what"].endswith(".")


@pytest.mark.slow
def test_the_table_is_aligned(rows):
  header, *lines = listing.table(list(rows.values())).splitlines()
  column = header.index("source")
  assert len(lines) == len(rows)
  assert all(line[column - 1] == " " != line[column] for line in lines)


def test_an_unknown_backbone_is_one_sentence():
  done = list_methods("--backbone=vit_b")
  assert done.returncode == 2
  assert "unknown backbone 'vit_b'" in done.stderr
  assert "Traceback" not in done.stderr
