"""Experiments: declared as the folder says, and run end to end when tiny."""
import csv
import json
import runpy

import numpy as np
from PIL import Image
import pytest
import safetensors

from tests.command import ROOT, run_command
from ttc_jax import experiments, measures, methods
from ttc_jax.backbones import vit as vit_lib
from ttc_jax.config import check
from ttc_jax.errors import UserError
from ttc_jax.experiments import Grid, Picture, table4
from ttc_jax.runs import inputs, plan
from ttc_jax.runs.workdir import WorkDir


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setitem(vit_lib.SIZES, "ti", (32, 3, 2, 128))


def config(arg, name="paper"):
  return runpy.run_path(f"{ROOT}/configs/{name}.py")["get_config"](arg)


@pytest.mark.parametrize("name", experiments.names())
def test_an_experiment_names_methods_and_measures_that_there_are(name):
  c = config(f"{name},epochs=3")
  check(c)
  for variant in plan.variants(c).values():
    assert variant.method in methods.names()
    assert set(variant.measures) <= set(measures.names())
  assert experiments.title(name).split(":")[0]


def test_table_2_runs_on_a_swin_and_all_others_on_a_vit():
  for name in experiments.names():
    with safetensors.safe_open(config(name).weights, "numpy") as file:
      swin = any(key.startswith("stage_") for key in file.keys())  # noqa: SIM118
    assert swin == (name == "table2"), name


def test_a_name_stands_for_the_same_values_in_every_experiment():
  seen = {}
  for name in experiments.names():
    for label, values in experiments.variants(name, 5).items():
      values = {k: v for k, v in values.items() if k != "measures"}
      assert seen.setdefault(label, values) == values, (name, label)


def test_one_stage_trains_as_long_as_both():
  c = config("table1,epochs=7")
  found = plan.variants(c)
  assert (found["adapter"].epochs, found["layernorm_2x"].epochs,
          found["layernorm"].epochs, found["ttc"].epochs) == (14, 14, 7, 7)


def run(workdir, name, **changes):
  values = dict(seeds="0,1", limit=32, batch_size=16, eval_every=1, epochs=1,
                cache=workdir / "cache", keep_stages=True) | changes
  return run_command(
      "main", f"--workdir={workdir / 'work'}",
      f"--config=configs/paper.py:{name},task=digits,backbone=vit_ti16,"
      "weights=random,size=32",
      "--config.grid.lr=1e-3,1e-2", "--config.grid_steps=0",
      *(f"--config.{k}={v}" for k, v in values.items()))


def shown(workdir, name):
  folder = workdir / "work" / "paper" / name
  return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """A work directory after Table 8, then Figure 7: {name: output}."""
  folder = tmp_path_factory.mktemp("paper")
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(vit_lib.SIZES, "ti", (32, 3, 2, 128))
    return folder, {name: run(folder, name) for name in ("table8", "fig7")}


def test_a_table_is_printed_and_written_in_all_formats(done):
  folder, outputs = done
  output = outputs["table8"]
  assert output.returncode == 0, output.stderr
  assert "before stage 1" in output.stdout
  files = shown(folder, "table8")
  assert set(files) == {f"table8{n}.{suffix}" for n in ("", "-2")
                        for suffix in ("txt", "md", "tex", "csv", "json")}
  header, first, *_ = csv.reader(files["table8.csv"].read_text().splitlines())
  assert header == ["", "digits"] and first[0] == "before stage 1"


def test_experiments_share_runs_and_keep_their_plans(done):
  folder, outputs = done
  work = WorkDir(folder / "work")
  assert "layernorm_2x" in outputs["table8"].stdout
  # Figure 7 has two of Table 8's three variants: it trains nothing.
  assert "seed" not in outputs["fig7"].stdout
  assert set(work.plan()["tasks"]["digits"]) == {
      "layernorm", "layernorm_2x", "ttc"}


def test_measures_are_beside_the_rows(done):
  folder, _ = done
  work = WorkDir(folder / "work")
  final = [r for r in work.rows() if r["protocol"] == "final"]
  assert len(final) == 3 * 2
  for row in final:
    found = work.measures(row["run"])
    assert set(found) == {"neighbours"} | (
        {"norms"} if row["variant"] != "layernorm_2x" else set())
    assert 0 <= found["neighbours"]["before"]["1"] <= 100
  by_seed = [work.measure(r["run"], "neighbours")["before"] for r in final]
  assert all(x == by_seed[0] for x in by_seed)  # the same pretrained model


@pytest.mark.parametrize("name", experiments.names())
def test_settings_come_from_a_variant_that_searches(name):
  """Nothing is taken from a variant that has no search in the end."""
  found = plan.variants(config(f"{name},epochs=3"))
  for label, variant in found.items():
    assert plan.searched(found, label) >= {"lr"}, label
    if label.startswith("ttc_") and variant.settings_of == "ttc":
      assert plan.searched(found, label) >= {"lr", "stage2_lr"}


def test_variants_share_no_part_of_a_configuration():
  c = config("selection,epochs=3")
  c.variants.ttc.grid.stage2_lr = (0.5,)
  c.variants.tuned_random_k2.grid.adapter_lr = (7.0,)
  again = config("selection,epochs=3").variants
  assert again.ttc.grid.stage2_lr == (0.01, 0.1, 1.0)
  assert c.variants.tuned_random_k8.grid.adapter_lr == (1.0, 10.0, 100.0)


def test_variants_whose_settings_are_taken_are_run_too():
  found = config("method=ttc_random", "domain").variants
  assert [*found] == ["layernorm", "ttc", "ttc_random"]
  assert [*config("method=lora", "domain").variants] == ["lora"]
  assert [*config("table3,method=ttc_random,linear").variants] == [
      "layernorm", "ttc", "ttc_random", "linear"]


def test_flips_and_crops_change_no_place_angle_or_count():
  assert config("task=pacs/from_photo", "domain").flip
  assert config("task=ours_shifted", "domain").flip
  for arg in ("", "task=pacs/from_photo,augment=false",
              "task=sprites_location_shifted,augment=false"):
    assert not config(arg, "domain").flip
  with pytest.raises(UserError, match="add augment=false"):
    config("task=sprites_location_shifted", "domain")


def test_table_6_is_the_configuration_of_domains():
  arg = "task=pacs/from_photo,epochs=7"
  assert config(f"table6,{arg}") == config(arg, "domain")


def test_a_long_measure_is_taken_of_the_first_seed():
  assert measures.seeds("norms", (4, 5)) == (4, 5)
  assert measures.seeds("removal", (4, 5)) == (4,)


def test_norms_moved_are_those_of_the_bundle(done):
  from ttc_jax import bundles
  folder, _ = done
  work = WorkDir(folder / "work")
  row = next(r for r in work.rows()
             if (r["variant"], r["protocol"]) == ("ttc", "final"))
  moved = work.measure(row["run"], "norms")
  tuned = bundles.load(work.bundle(row["run"])).tuned
  # Random weights start with scales of 1 and shifts of 0.
  for norm, gamma, beta in zip(moved["norms"], moved["gamma"], moved["beta"],
                               strict=True):
    assert gamma == pytest.approx(
        np.abs(tuned[f"backbone/{norm}/scale"] - 1).mean(), rel=1e-4)
    assert beta == pytest.approx(
        np.abs(tuned[f"backbone/{norm}/bias"]).mean(), rel=1e-4)
  assert len(moved["norms"]) == 2 * 3 + 1


def test_a_picture_has_its_numbers_beside_it(done):
  folder, _ = done
  files = shown(folder, "fig7")
  assert set(files) == {"fig7.png", "fig7.svg", "fig7.csv"}
  with Image.open(files["fig7.png"]) as picture:
    assert picture.size[0] > 300
  assert len(files["fig7.csv"].read_text().splitlines()) == 1 + 2 * 2 * 7


def test_a_missing_measure_is_taken_again_from_the_bundle(done, monkeypatch):
  folder, _ = done
  work = WorkDir(folder / "work")
  row = next(r for r in work.rows()
             if (r["variant"], r["protocol"]) == ("ttc", "final"))
  path = folder / "work" / "runs" / row["run"] / "measures" / "norms.json"
  before = json.loads(path.read_text())
  path.unlink()
  output = run(folder, "fig7")
  assert output.returncode == 0 and "seed" not in output.stdout
  assert json.loads(path.read_text()) == before


def test_an_unknown_experiment_is_one_sentence():
  output = run_command("main", "--config=configs/paper.py:table9")
  assert output.returncode == 2
  assert "unknown experiment 'table9'" in output.stderr


def test_no_experiment_lists_them():
  output = run_command("main", "--config=configs/paper.py")
  assert output.returncode == 2 and "fig2" in output.stderr


def test_table_4_agrees_with_its_formulas(tmp_path):
  output = run_command(
      "main", f"--workdir={tmp_path / 'work'}", "--config=configs/paper.py:"
      "table4,backbone=vit_ti16,weights=random,size=32")
  assert output.returncode == 0, output.stderr
  assert " !" not in output.stdout
  text = (tmp_path / "work/paper/table4/table4.csv").read_text()
  rows = {line[0]: line for line in csv.reader(text.splitlines())}
  # L K^2 + 2 D (2 L + 1), with L = 3, D = 32, K = 4.
  assert rows["ttc"][3] == str(3 * 16 + 2 * 32 * 7)


@pytest.mark.parametrize("name, most", [
    ("adapter", 1.25), ("lora", 1.15), ("vpt_deep", 1.1), ("ssf", 1.05),
    ("ttc", 1.2), ("ttc_rows", 1.1)])
def test_the_flops_of_a_formula_are_those_of_the_program(
    name, most, monkeypatch):
  """Which counts sums, scales and gathers too; the hidden width is not 4 D."""
  monkeypatch.setitem(vit_lib.SIZES, "ti", (64, 3, 2, 160))
  c = config("table4,weights=random,backbone=vit_ti16,normalisation=half")
  values = plan.variants(c)[name]
  values.k = 32
  base = inputs.load_base(values)
  method = inputs.load_method(inputs.resolved(values, base), base)
  work = table4.FORMULAS[name].work(base.backbone, method.options)
  assert 1 <= table4.program(method, base)[1] / work < most


def test_every_format_of_a_grid_has_every_cell():
  from ttc_jax.report import grid
  table = Grid("What", ["", "a_b", "c|d"], [["x", "1.0 ± 0.1", "=1"]],
               ["Note."])
  for suffix, write in grid.WRITERS.items():
    text = write(table)
    assert "1.0" in text and "0.1" in text, suffix
  assert r"c\|d" in grid.markdown(table)
  assert r"a\_b" in grid.latex(table)
  assert "'=1" in grid.comma_separated(table)
  assert Picture(None, table).numbers == table
