"""The neighbours' published settings, and that they run."""
import importlib
import importlib.util
import json
import pathlib
import re

from absl import logging
import pytest

from ttc_jax import backbones, methods, optim, presets
from ttc_jax import config as config_lib
from ttc_jax.backbones import vit as vit_lib
from ttc_jax.errors import UserError
from ttc_jax.runs import plan as jobs
from ttc_jax.runs.job import make_job
from ttc_jax.runs.session import Session
from ttc_jax.vtab import rows as vtab


def vtab_config(arg):
  spec = importlib.util.spec_from_file_location("vtab", "configs/vtab.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)


@pytest.fixture
def small(monkeypatch):
  """A vit_ti16 of another size, for speed."""
  monkeypatch.setitem(vit_lib.SIZES, "ti", (32, 2, 2, 64))


def on(preset, task, method=""):
  """The settings of a preset's one variant on a task."""
  c = vtab_config(f"task=vtab,protocol={preset},method={method}")
  got, = jobs.variants(c, task).values()
  return got


@pytest.mark.parametrize("name", ["sct", "ssf", "vpt", "noah"])
def test_a_preset_has_valid_settings_for_all_19_tasks(name):
  c = vtab_config(f"task=vtab,protocol={name}")
  c.lock()
  jobs.check_config(c)
  assert jobs.task_names(c) == tuple(vtab.ROWS)
  assert set(c.per_task) in (set(), set(vtab.ROWS))
  for task in vtab.ROWS:
    assert on(name, task).epochs == 100


def test_there_are_four_presets():
  assert set(presets.names()) == {"sct", "ssf", "vpt", "noah"}


# --- Against ../shared/paper/hyperparameters.json -----------------------------

FACTS = pathlib.Path(__file__).parents[2] / "shared/paper/hyperparameters.json"
# Of the facts: the task of the package.
SSF_NAMES = {"cifar_100": "cifar100", "flowers102": "oxford_flowers102",
             "pets": "oxford_iiit_pet"}


@pytest.fixture(scope="module")
def facts():
  if not FACTS.exists():
    pytest.skip("../shared/paper/hyperparameters.json is not there")
  return json.loads(FACTS.read_text())


def numbers(text):
  return [float(x) for x in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", text)]


def documentation(preset):
  module = importlib.import_module(f"ttc_jax.presets.{preset}")
  return " ".join(module.__doc__.split())


def check_schedule(got, optimizer):
  """`optimizer` ends in warm-up epochs, their first rate, the last rate."""
  assert [got.warmup_epochs, got.warmup_lr, got.min_lr] == numbers(
      optimizer)[-3:]
  assert (got.optimiser == "adamw") == ("AdamW" in optimizer)


@pytest.mark.parametrize("name", ["sct", "ssf", "vpt", "noah"])
def test_every_preset_runs_the_exact_gelu_of_pytorch(name):
  for method in ("", "ttc", "lora"):
    assert on(name, "dtd", method).gelu == "exact"


@pytest.mark.parametrize("task", vtab.ROWS)
def test_sct_s_values_of_a_task(facts, task):
  fact, got = facts["SCT"]["per_task"][task], on("sct", task)
  yaml = fact["yaml"]
  assert (got.lr, got.weight_decay) == (fact["lr"], fact["wd"])
  assert (got.scale, got.label_smoothing) == (
      float(yaml["scale"]), float(yaml["labelsmoothing"]))
  assert str(got.sct.scale_on_x) == yaml["scaleonx"]
  assert [got.batch_size, got.epochs, got.warmup_epochs] == [
      float(yaml[key]) for key in ("batch_size", "epochs", "warmup_epochs")]
  # What is not reproduced is said.
  classes = int(yaml["class_num"])
  assert (vtab.ROWS[task].classes == classes) != (
      f"{task} has a head of {classes} classes" in documentation("sct"))
  family = task.split("_")[0] + "_*"
  exempt = documentation("sct").partition("on all tasks but ")[2]
  exempt = exempt.partition(";")[0]
  assert (yaml.get("train_aug") != "True") == (
      task in exempt or family in exempt)


def test_sct_s_values_of_all_tasks(facts):
  fact, got = facts["SCT"], on("sct", "dtd")
  check_schedule(got, fact["optimizer"])
  assert (got.batch_size, got.epochs, got.drop_path, got.seeds) == (
      fact["batch"], fact["epochs"], fact["drop_path"], (fact["seed"],))
  options = methods.load("sct", got, backbones.make("vit_b16", 224)).options
  assert (options["k"], options["sct"]["position"]) == (
      fact["K"], fact["tuning_mode"].replace("sct_attn", "attention"))
  assert options["blocks"] == 12
  assert got.resample in fact["resize"] and "ImageNet" in fact["norm"]
  assert got.normalisation == "imagenet"
  assert "ignores `scale` and `scaleonx`" in documentation("sct")


def test_ssf_s_values(facts):
  fact = facts["SSF"]
  assert {SSF_NAMES.get(t, t) for t in fact["per_task"]} == set(vtab.ROWS)
  for name, row in fact["per_task"].items():
    got = on("ssf", SSF_NAMES.get(name, name))
    assert (got.lr, got.weight_decay, got.drop_path) == (
        row["lr"], row["wd"], row["drop_path"])
    check_schedule(got, fact["optimizer"])
    images, gpus = numbers(fact["batch"])
    assert (got.batch_size, got.epochs) == (images * gpus, fact["epochs"])
    assert got.label_smoothing == fact["smoothing"]
    assert got.normalisation == "half" and "0.5/0.5" in fact["norm"]
  assert "Two GPUs with 32 images" in documentation("ssf")


def test_vpt_s_values(facts):
  fact, got = facts["VPT"], on("vpt", "dtd")
  check = [("", "lr_grid_prompt"), ("linear", "lr_grid_linear"),
           ("full", "lr_grid_full")]
  assert fact["lr_scaling"] == "lr/256*batch"
  for method, key in check:
    c = on("vpt", "dtd", method)
    assert sorted(c.grid.lr) == pytest.approx(
        sorted(lr / 256 * c.batch_size for lr in fact[key]))
  assert sorted(got.grid.weight_decay) == sorted(fact["wd_grid"])
  assert [got.warmup_epochs, got.epochs] == numbers(fact["optimizer"])[1:]
  assert optim.MOMENTUM == numbers(fact["optimizer"])[0]
  assert got.optimiser == "sgd" and got.batch_size == numbers(fact["batch"])[0]
  assert got.seeds == tuple(numbers(fact["select"])[-5:])
  assert got.protocol == "select" and got.resample in fact["resize"]
  assert "1024 for linear" in documentation("vpt")
  assert "AdamW decays by 0.01" in documentation("vpt")


@pytest.mark.parametrize("method", ["noah", "lora", "adapter", "vpt_deep"])
def test_noah_s_values(facts, method):
  fact, got = facts["NOAH"]["vtab"], on("noah", "dtd", method)
  for key, name in (("lr", "lr"), ("wd", "weight_decay"),
                    ("batch", "batch_size"), ("epochs", "epochs"),
                    ("warmup", "warmup_epochs"), ("warmup_lr", "warmup_lr"),
                    ("min_lr", "min_lr"), ("drop_path", "drop_path"),
                    ("smoothing", "label_smoothing")):
    assert got[name] == fact[key], key
  assert got.resample in fact["direct_resize"] and got.optimiser == "adamw"
  assert got.normalisation == ("half" if method == "vpt_deep" else "imagenet")
  assert not got.flip and got.smallest_crop == 1
  supernet = facts["NOAH"]["noah_supernet"]
  assert f"{supernet['epochs']} epochs at 5e-4" in documentation("noah")
  assert float(numbers(supernet["lr"])[0]) == 5e-4


def test_noah_s_modules_are_those_of_its_code():
  """Its adapter and LoRA of 8, dropout of 0.1, sizes of its supernet."""
  def load(method):
    return methods.load(method, on("noah", "dtd", method),
                        backbones.make("vit_b16", 224))
  adapter = load("adapter")
  assert adapter.options["adapter"] == dict(
      width=8, placement="noah", activation="quick", scale=1.0, dropout=0.1)
  lora = load("lora")
  assert lora.options["lora"] == dict(
      rank=8, alpha=8.0, sites=["q", "k", "v"], shared=True, dropout=0.1)
  assert load("vpt_deep").options["vpt"]["dropout"] == 0.1
  noah = load("noah")
  assert [site for site, _ in noah.handlers] == [
      "norm", "tokens", "input", "scores", "q", "k", "v", "block"]
  options = noah.options["noah"]
  for module in ("prompts", "rank", "width"):
    assert options[module] == [0, 5, 10, 50, 100]
  assert (options["dropout"], options["released"]) == (0.1, True)


# Copied by hand from the repositories' scripts.
@pytest.mark.parametrize("preset,task,want", [
    ("sct", "cifar100", dict(lr=0.013, weight_decay=1.0, scale=0.4,
                             label_smoothing=0.1)),
    ("sct", "oxford_flowers102", dict(lr=0.05, weight_decay=0.11, scale=0.15)),
    ("sct", "diabetic_retinopathy", dict(lr=0.004, weight_decay=3e-4,
                                         scale=0.75)),
    ("sct", "clevr_count", dict(lr=0.0033, scale=0.52, label_smoothing=0.0)),
    ("sct", "dmlab", dict(lr=0.009, scale=0.3, label_smoothing=0.0)),
    ("sct", "smallnorb_ele", dict(lr=0.0011, weight_decay=5e-4, scale=0.65)),
    ("sct", "kitti", dict(
        batch_size=64, drop_path=0.1, warmup_lr=1e-6, min_lr=1e-5,
        warmup_epochs=10, optimiser="adamw", resample="bicubic",
        normalisation="imagenet", seeds=(42,), protocol="final")),
    ("ssf", "cifar100", dict(lr=0.005, weight_decay=5e-5, drop_path=0.0)),
    ("ssf", "oxford_flowers102", dict(lr=0.005, drop_path=0.0)),
    ("ssf", "oxford_iiit_pet", dict(lr=0.005, weight_decay=5e-5)),
    ("ssf", "clevr_dist", dict(lr=0.05, weight_decay=0.05, drop_path=0.1)),
    ("ssf", "eurosat", dict(lr=0.003, weight_decay=0.05, drop_path=0.2)),
    ("ssf", "smallnorb_azi", dict(lr=0.02, weight_decay=5e-5, drop_path=0.1)),
    ("ssf", "dtd", dict(batch_size=64, warmup_lr=1e-7, min_lr=1e-8,
                        label_smoothing=0.0, normalisation="half")),
    ("noah", "dtd", dict(
        lr=1e-3, weight_decay=1e-4, batch_size=64, warmup_lr=1e-6, min_lr=1e-5,
        drop_path=0.1, label_smoothing=0.0, normalisation="imagenet")),
    ("vpt", "dtd", dict(
        optimiser="sgd", batch_size=128, warmup_epochs=10, resample="bilinear",
        normalisation="imagenet", seeds=(42, 44, 82, 100, 800),
        protocol="select")),
])
def test_a_preset_has_the_published_numbers(preset, task, want):
  got = on(preset, task)
  assert {k: got[k] for k in want} == want


def test_sct_scales_the_channels_of_six_tasks():
  scaled = [t for t in vtab.ROWS if on("sct", t).sct.scale_on_x]
  assert scaled == ["clevr_count", "clevr_dist", "dsprites_loc",
                    "dsprites_ori", "smallnorb_azi", "smallnorb_ele"]


def test_vpt_tries_40_settings_scaled_to_the_batch_and_full_tuning_others():
  got = on("vpt", "dtd")
  settings = jobs.settings(got)
  assert len(settings) == 40
  # 0.05 / 256 x 128 and 50 / 256 x 128
  assert settings[0] == dict(lr=0.025, weight_decay=0.0)
  assert settings[-1] == dict(lr=25.0, weight_decay=0.01)
  full = on("vpt", "dtd", "full")
  assert full.optimiser == "adamw" and full.batch_size == 384
  # 0.001 / 256 x 384
  assert 0.0015 in [s["lr"] for s in jobs.settings(full)]


def test_noah_s_vpt_alone_has_other_pixels():
  assert on("noah", "dtd", "vpt_deep").normalisation == "half"
  assert on("noah", "dtd", "lora").normalisation == "imagenet"


def test_a_preset_trains_its_own_method_or_another():
  trained = {p: on(p, "dtd").method for p in presets.names()}
  assert trained == dict(sct="sct", ssf="ssf", vpt="vpt_deep", noah="noah")
  ttc = on("sct", "cifar100", "ttc")
  assert (ttc.method, ttc.lr, ttc.scale) == ("ttc", 0.013, 0.4)


def test_protocol_names_a_preset_or_what_is_trained_on():
  plain = vtab_config("task=dtd")
  assert (plain.protocol, plain.method) == ("final", "ttc")
  assert not plain.per_task and plain.optimiser == "adamw"
  assert vtab_config("task=dtd,protocol=val").protocol == "val"
  with pytest.raises(UserError, match="unknown protocol 'stc'.*sct"):
    vtab_config("task=dtd,protocol=stc")


@pytest.mark.parametrize("name", ["sct", "ssf", "vpt", "noah"])
@pytest.mark.slow
def test_a_preset_runs_on_digits_by_its_general_settings(
    name, small, tmp_path, monkeypatch):
  c = vtab_config(f"task=digits,protocol={name},runlocal")
  c.epochs, c.limit, c.cache = 1, 32, str(tmp_path / "cache")
  c.warmup_epochs = 0.5
  c.noah.update(population=2, generations=1, parents=1, mutations=1,
                crossovers=0, prompts=(0, 5), rank=(0, 5), width=(0, 5))
  c.lock()
  warned = []
  monkeypatch.setattr(logging, "warning",
                      lambda text, *args: warned.append(text % args))
  session = Session(c, str(tmp_path / "work"))
  session.run_all()
  assert not session.failed
  rows = session.workdir.rows()
  protocols = ["val", "final"] if name == "vpt" else ["final"]
  assert [r["protocol"] for r in rows] == protocols
  row = rows[-1]
  assert (row["method"], row["optimiser"]) == (
      c.method, "sgd" if name == "vpt" else "adamw")
  assert (row["lr"], row["min_lr"]) == (c.lr, c.min_lr)
  alone = [w for w in warned if "nothing for digits" in w]
  assert len(alone) == bool(c.per_task)


@pytest.mark.slow
def test_a_row_has_the_values_of_its_task(small, tmp_path):
  c = config_lib.default()
  config_lib.run_locally(c)
  c.update(dict(tasks=("digits",), epochs=1, warmup_epochs=0.0, limit=32,
                cache=str(tmp_path / "cache")))
  c.variants = config_lib.variants(
      sct=dict(method="sct", protocol="select", grid=dict(scale=(0.5, 0.25))),
      linear=dict(method="linear"))
  c.per_task = {"digits": dict(lr=2e-2, drop_path=0.2, label_smoothing=0.1)}
  c.lock()
  session = Session(c, str(tmp_path / "work"))
  session.run_all()
  assert not session.failed
  settled = jobs.variants(c, "digits")["linear"]
  job = make_job(
      session.make_run("digits", "linear", settled, "final", 0), session.base,
      session.tasks["digits"], print)
  assert job.model.backbone.drop_path == 0.2
  rows = session.workdir.rows()
  assert [(r["variant"], r["scale"]) for r in rows[:2]] == [
      ("sct", 0.25), ("sct", 0.5)]
  assert rows[2]["scale"] in (0.25, 0.5) and rows[2]["protocol"] == "final"
  assert rows[3]["scale"] is None
  for row in rows:
    assert (row["lr"], row["drop_path"], row["label_smoothing"]) == (
        2e-2, 0.2, 0.1)
