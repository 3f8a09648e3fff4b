"""The command line end to end, as a user starts it."""
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from PIL import Image
import pytest

from tests.command import ROOT, run_command, start_command
from ttc_jax import (
  backbones,
  bundles,
  checkpoint,
  config_file,
  measures,
  predict,
  train,
  trees,
)
from ttc_jax import weights as weights_lib
from ttc_jax.backbones import vit as vit_lib
from ttc_jax.config import default, run_locally
from ttc_jax.config import variants as variants_of
from ttc_jax.errors import RunError, UserError
from ttc_jax.methods import Method
from ttc_jax.runs.plan import Run, common_keys, expected, variants
from ttc_jax.runs.session import Session
from ttc_jax.runs.workdir import WorkDir

# Outside checks read these.
CONTRACT = """task group method backbone weights_sha256 seed k position lr
weight_decay epochs val_top1 test_top1 test_count module_params norm_params
head_params seconds_train seconds_test images_per_second compile_seconds
device versions""".split()


# "vit_ti16" of these tests, here and in processes: it compiles fast.
WIDTH, DEPTH = SIZE = (32, 3)
SMALL = f"""
from ttc_jax.backbones import vit
vit.SIZES["ti"] = {(*SIZE, 2, 64)}
"""


@pytest.fixture(scope="module", autouse=True)
def small():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(vit_lib.SIZES, "ti", (*SIZE, 2, 64))
    yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A real folder task: red and green pictures, told apart by colour."""
  folder = tmp_path_factory.mktemp("data") / "colours"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for name, count in (("train800", 32), ("val200", 16), ("test", 24)):
    lines = []
    for i in range(count):
      pixels = rng.integers(0, 90, (20, 30, 3), dtype=np.uint8)
      pixels[..., i % 2] += 150
      Image.fromarray(pixels).save(folder / f"{name}_{i}.png")
      lines.append(f"{name}_{i}.png {i % 2}\n")
    (folder / f"{name}.txt").write_text("".join(lines))
  both = [(folder / f"{n}.txt").read_text() for n in ("train800", "val200")]
  (folder / "train800val200.txt").write_text("".join(both))
  (folder / "classes.txt").write_text("red\ngreen\n")
  return folder.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A real weights file in our own format."""
  path = tmp_path_factory.mktemp("weights") / "ti16.safetensors"
  module = backbones.make("vit_ti16", 32)
  weights_lib.write(str(path), backbones.init(module),
                    {"gelu": "tanh", "epsilon": 1e-6}, normalisation="half")
  return path


def arguments(data, weights, cache, workdir, method="ttc", **config):
  options = dict(epochs=2, batch_size=16, lr=2e-3, warmup_epochs=1.0,
                 cache=cache, eval_every=1, keep_stages=True) | config
  return (f"--config=configs/vtab.py:task=colours,method={method},"
          f"backbone=vit_ti16,data={data},weights={weights},size=32",
          f"--workdir={workdir}",
          *(f"--config.{k}={v}" for k, v in options.items()))


@pytest.fixture(scope="module")
def finished(data, weights, tmp_path_factory):
  """A work directory after one command, and what it printed."""
  folder = tmp_path_factory.mktemp("run")
  args = arguments(data, weights, folder / "cache", folder / "work")
  return folder / "work", args, run_command("main", *args)


def rows(workdir):
  """Rows as `results.jsonl` has them: those of the files row.json."""
  found = [json.loads(line)
           for line in (workdir / "results.jsonl").read_text().splitlines()]
  assert found == WorkDir(workdir).rows()
  return found


def test_a_run_writes_a_row_and_a_table(finished, weights):
  workdir, _, done = finished
  assert done.returncode == 0, done.stderr
  row, = rows(workdir)
  assert not set(CONTRACT) - row.keys()
  # All that decides a result is told, so that tables can compare it.
  deciding = common_keys(dict.fromkeys(default(), object()))
  assert not deciding.keys() - row.keys()
  assert row["weights_sha256"] == weights_lib.sha256(str(weights))
  assert (row["test_count"], row["train_count"]) == (24, 48)
  K = WIDTH // 8
  assert row["module_params"] == DEPTH * K * K
  assert row["norm_params"] == (2 * DEPTH + 1) * 2 * WIDTH
  assert row["head_params"] == WIDTH * 2 + 2
  assert row["k"] == K and row["position"] == "mlp" and row["epochs"] == 2
  assert 0 <= row["test_top1"] <= 100 and row["val_top1"] is None
  table = (workdir / "results.md").read_text()
  assert f"{row['test_top1']:.1f}" in table and table in done.stdout
  before, _ = done.stdout.split("colours  ttc  seed 0")  # the run's line
  assert "colours: 2 classes: red, green\n  train" in before
  curve = (workdir / "runs" / row["run"] / "metrics.jsonl").read_text()
  assert [(r["stage"], r["epoch"]) for r in map(
      json.loads, curve.splitlines())] == [
          ("align", 1), ("align", 2), ("adapt", 1), ("adapt", 2)]


def test_the_same_command_again_does_nothing_twice(finished):
  workdir, args, _ = finished
  before = rows(workdir)
  stages = sorted(os.listdir(workdir / "stages"))
  again = run_command("main", *args)
  assert again.returncode == 0
  assert rows(workdir) == before
  assert sorted(os.listdir(workdir / "stages")) == stages


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(data, weights, tmp_path):
  args = arguments(data, weights, tmp_path / "cache", tmp_path / "work",
                   epochs=100_000, save_seconds=1e9, method="layernorm",
                   eval_every=100_000)
  process = start_command("main", *args, before=SMALL)
  wait_for(process, tmp_path / "work", '"align"', 2)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  assert "start the same command again" in errors
  assert not WorkDir(tmp_path / "work").rows()
  stage, = (tmp_path / "work" / "stages").iterdir()
  work = WorkDir(tmp_path / "work")
  with checkpoint.Stages(work.store).open(stage.name) as store:
    assert 2 <= store.latest_epoch() < 100_000
    saved = store.load()
  curve, = (tmp_path / "work").glob("runs/*/metrics.jsonl")
  assert len(curve.read_text().splitlines()) == saved.epoch


def wait_for(process, workdir, text, count):
  """Until a run's curve has so many lines with the text, or none can come."""
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline and process.poll() is None:
    found = list(workdir.glob("runs/*/metrics.jsonl"))
    if found and found[0].read_text().count(text) >= count:
      return
    time.sleep(0.002)


@pytest.mark.slow
def test_two_processes_share_the_runs_of_a_directory(data, weights, tmp_path):
  args = [*arguments(data, weights, tmp_path / "cache", tmp_path / "work",
                     method="linear", seeds="0,1,2,3,4,5")]
  both = [start_command("main", *args, before=SMALL) for _ in range(2)]
  printed = [process.communicate(timeout=300) for process in both]
  assert [p.returncode for p in both] == [0, 0], printed
  found = rows(tmp_path / "work")
  assert sorted(r["seed"] for r in found) == [0, 1, 2, 3, 4, 5]
  tables = [out[out.index("Top-1"):out.index("Rows,")] for out, _ in printed]
  assert tables[0] == tables[1]
  done = [len(re.findall("colours  linear  seed", out)) for out, _ in printed]
  assert sum(done) == 6


def test_a_task_without_data_is_skipped_and_shows_as_a_hole(
    data, weights, tmp_path):
  args = arguments(data, weights, tmp_path / "cache", tmp_path / "work",
                   method="linear")
  config = args[0].replace("task=colours", "task=colours,dtd")
  done = run_command("main", config, *args[1:])
  assert done.returncode == 1
  assert "skipped: dtd: " in done.stderr and "tfds build dtd" in done.stderr
  row, = rows(tmp_path / "work")
  assert row["task"] == "colours"
  header, _, line = [x for x in done.stdout.splitlines()
                     if x.startswith("|")][:3]
  cells = dict(zip(*([c.strip() for c in x.split("|")]
                     for x in (header, line)), strict=True))
  assert cells["dtd"] == "-" and cells["mean of 2"] == "-"
  assert cells["colours"] == f"{row['test_top1']:.1f}"


@pytest.mark.parametrize("cache_gib", [8.0, 0.0])  # cached, streamed
def test_an_image_that_cannot_be_read_fails_its_task_alone(
    data, weights, tmp_path, cache_gib):
  shutil.copytree(data / "colours", tmp_path / "data" / "colours")
  shutil.copytree(data / "colours", tmp_path / "data" / "broken")
  (tmp_path / "data" / "broken" / "test_3.png").write_bytes(b"no image")
  s = session(tmp_path / "data", weights, tmp_path, method="linear", epochs=1,
              tasks=("broken", "colours"), cache_gib=cache_gib)
  s.run_all()
  (name, why), = s.failed.items()
  assert name.startswith("broken-") and "test_3.png" in why
  assert [r["task"] for r in rows(tmp_path / "work")] == ["colours"]
  failed, = WorkDir(tmp_path / "work").failures()
  assert failed["run"] == name and failed["error"] == why


def test_a_full_disk_is_one_sentence_and_the_next_start_goes_on(
    data, weights, tmp_path):
  """Every wait for the disk says that it is full."""
  args = arguments(data, weights, tmp_path / "cache", tmp_path / "work",
                   method="linear")

  def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results.jsonl")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, "fsync", full)
    done = run_command("main", *args)
  assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
  assert "No space left on device" in done.stderr
  assert run_command("main", *args).returncode == 0
  assert len({r["run"] for r in rows(tmp_path / "work")}) == 1


@pytest.mark.slow
def test_a_second_process_compiles_nothing_and_damaged_programs_are_made_anew(
    finished, tmp_path):
  """Also in another work directory; entries of the cache are cut short."""
  _, args, _ = finished
  cache = tmp_path / "programs"

  def start(name):
    process = start_command(
        "main", *args, f"--workdir={tmp_path / name}",
        f"--config.compilation_cache={cache}", before=SMALL)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    new, cached = map(int, re.search(
        r": (\d+) new, (\d+) from the cache", out).groups())
    return new, cached, errors
  assert start("first")[0] > 20
  new, cached, _ = start("second")
  assert (new, cached > 20) == (0, True)
  for path in cache.rglob("*-cache"):
    path.write_bytes(path.read_bytes()[:100])
  new, _, errors = start("damaged")
  assert new > 20 and "is damaged: it is made anew" in errors
  assert start("mended")[0] == 0


@pytest.mark.slow
def test_sigterm_while_images_are_decoded_ends_at_once(
    data, weights, tmp_path):
  args = arguments(data, weights, tmp_path / "cache", tmp_path / "work")
  process = start_command("main", *args, before=SMALL + """
import time
from ttc_jax.tasks import images
def slow(path, read=images.read):
  time.sleep(1)
  return read(path)
images.read, images._CHUNK = slow, 2
""")
  deadline = time.monotonic() + 120
  while (time.monotonic() < deadline and process.poll() is None
         and not list((tmp_path / "cache").glob("*.tmp"))):
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 0 and "Traceback" not in errors, errors
  assert "start the same command again" in errors
  assert not list((tmp_path / "cache").glob("*.npy"))


def test_a_damaged_state_runs_its_stage_again_to_the_same_bits(
    finished, tmp_path):
  workdir, args, _ = finished
  shutil.copytree(workdir, tmp_path / "work")
  row_file, = (tmp_path / "work" / "runs").glob("*/row.json")
  row_file.unlink()
  hit = [p for p in (tmp_path / "work" / "stages").rglob("*")
         if p.is_file() and p.stat().st_size > 1000]
  for path in hit:
    path.write_bytes(path.read_bytes()[:500])
  done = run_command("main", *args, f"--workdir={tmp_path / 'work'}")
  assert hit and done.returncode == 0, done.stderr
  assert "damaged" in done.stderr
  one, two = rows(workdir)[0], rows(tmp_path / "work")[0]
  both = [bundles.load(str(w / "runs" / one["run"] / "bundle"))
          for w in (workdir, tmp_path / "work")]
  assert one["test_top1"] == two["test_top1"]
  assert all((both[0].tuned[k] == both[1].tuned[k]).all()
             for k in both[0].tuned)


def test_the_data_folder_is_only_read(finished, data):
  before = {p: (p.stat().st_mtime_ns, p.stat().st_size)
            for p in data.rglob("*")}
  assert len(before) == 1 + 5 + 72  # what the fixture wrote, and no more
  _, args, _ = finished
  run_command("main", *args)
  assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size)
                    for p in data.rglob("*")}


def test_another_configuration_needs_another_work_directory(finished):
  workdir, args, _ = finished
  refused = run_command("main", *args, "--config.weight_decay=0.5")
  assert refused.returncode == 2
  assert "another configuration: weight_decay is 0.0001 there and 0.5" in (
      refused.stderr)
  assert "Traceback" not in refused.stderr


def test_measures_can_be_added_to_a_finished_work_directory(
    finished, tmp_path):
  """Nothing trains for them: they are taken of the bundle."""
  workdir, args, _ = finished
  copy = shutil.copytree(workdir, tmp_path / "work")
  row, = rows(copy)
  assert f"--workdir={workdir}" in args
  added = run_command("main", *args, f"--workdir={copy}",
                      "--config.measures=channels", "--config.eval_every=2")
  assert added.returncode == 0, added.stderr
  assert "colours  ttc  seed" not in added.stdout  # the line of a run
  assert rows(copy) == [row]
  blocks, = WorkDir(copy).measure(row["run"], "channels")["sites"].values()
  assert [*blocks] == [str(block) for block in range(DEPTH)]


def test_a_key_that_a_later_version_adds_is_no_other_configuration(tmp_path):
  place = WorkDir(tmp_path / "work")
  usual = {"lr": 1.0, "new": 2, "grid": {"lr": [], "new": []}}
  place.adopt({"lr": 0.5, "grid": {"lr": [1]}}, usual)
  place.adopt({"lr": 0.5, "new": 2, "grid": {"lr": [1], "new": []}}, usual)
  with pytest.raises(UserError, match="new is 2 there and 3 here"):
    place.adopt({"lr": 0.5, "new": 3, "grid": {"lr": [1], "new": []}}, usual)
  with pytest.raises(UserError, match="grid is"):
    place.adopt({"lr": 0.5, "grid": {"lr": [1], "new": [4]}}, usual)


def test_predict_agrees_with_the_test_accuracy(finished, data):
  workdir, _, _ = finished
  row, = rows(workdir)
  bundle = workdir / "runs" / row["run"] / "bundle"
  paths = [data / "colours" / f"test_{i}.png" for i in range(24)]
  done = run_command("predict", f"--bundle={bundle}", *paths)
  assert done.returncode == 0, done.stderr
  lines = [line.split("\t") for line in done.stdout.splitlines()]
  assert [line[0] for line in lines] == [str(p) for p in paths]
  right = [line[1] == ("red", "green")[i % 2] for i, line in enumerate(lines)]
  assert 100 * np.mean(right) == pytest.approx(row["test_top1"])
  assert all(0.5 <= float(line[2]) <= 1 for line in lines)


def test_a_bundle_refuses_other_base_weights(finished, tmp_path):
  workdir, _, _ = finished
  row, = rows(workdir)
  other = tmp_path / "other.safetensors"
  module = backbones.make("vit_ti16", 32)
  weights_lib.write(str(other), backbones.init(module, seed=5),
                    {"gelu": "tanh", "epsilon": 1e-6})
  bundle = str(workdir / "runs" / row["run"] / "bundle")
  with pytest.raises(UserError) as error:
    predict.load(bundle, str(other))
  assert row["weights_sha256"] in str(error.value)
  assert weights_lib.sha256(str(other)) in str(error.value)


def test_a_bundle_holds_every_tuned_leaf_and_no_other(finished):
  workdir, _, _ = finished
  row, = rows(workdir)
  bundle = bundles.load(
      str(workdir / "runs" / row["run"] / "bundle"))
  count = sum(x.size for x in bundle.tuned.values())
  assert count == sum(row[f"{p}_params"] for p in ("module", "norm", "head"))
  assert bundle.meta["classes"] == ["red", "green"]


@pytest.mark.slow
def test_a_run_killed_in_stage_2_ends_with_the_same_bits(
    data, weights, tmp_path):
  """SIGKILL, and the same command again, against an undisturbed run."""
  def start(name):
    return arguments(data, weights, tmp_path / "cache", tmp_path / name,
                     epochs=8, save_seconds=0.0)
  assert run_command("main", *start("whole")).returncode == 0
  process = start_command("main", *start("killed"), before=SMALL)
  # The first epoch of stage 2 is saved.
  wait_for(process, tmp_path / "killed", '"adapt"', 2)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
  assert not WorkDir(tmp_path / "killed").rows()
  assert len(list((tmp_path / "killed" / "stages").glob("[!.]*"))) == 2
  assert run_command("main", *start("killed")).returncode == 0

  def bundle(name):
    row, = rows(tmp_path / name)
    return row, bundles.load(
        str(tmp_path / name / "runs" / row["run"] / "bundle"))
  (want_row, want), (got_row, got) = bundle("whole"), bundle("killed")
  assert got_row["test_top1"] == want_row["test_top1"]
  assert got.tuned.keys() == want.tuned.keys()
  assert all((got.tuned[k] == want.tuned[k]).all() for k in got.tuned)
  assert all((got.buffers[k] == want.buffers[k]).all()
             for k in got.buffers)


def test_merged_predictions_equal_unmerged_ones(finished, data):
  workdir, _, _ = finished
  row, = rows(workdir)
  bundle = str(workdir / "runs" / row["run"] / "bundle")
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
  merged, unmerged = (predict.load(bundle, merge=m) for m in (True, False))
  assert not merged.params["adapter"] and unmerged.params["adapter"]
  np.testing.assert_allclose(
      merged.predict(images), unmerged.predict(images), atol=1e-5)


def test_the_readme_s_python_lines_work_elsewhere(finished, weights, tmp_path):
  workdir, _, _ = finished
  row, = rows(workdir)
  code = SMALL + f"""
import numpy as np, ttc_jax
module, params = ttc_jax.backbones.load(
    "vit_ti16", weights={str(weights)!r}, image_size=48)
print(module.apply({{"params": params}}, np.zeros((2, 48, 48, 3))).shape)
tuned = ttc_jax.predict.load({str(workdir / "runs" / row["run"] / "bundle")!r})
print(tuned.predict(np.zeros((3, 32, 32, 3), np.uint8)).shape)
"""
  done = subprocess.run(
      [sys.executable, "-c", code], cwd=tmp_path, text=True, timeout=300,
      capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
  assert done.stdout.split("\n")[:2] == [f"(2, {WIDTH})", "(3, 2)"], done.stderr


def test_a_run_that_another_process_is_at_is_left_to_it(
    data, weights, tmp_path):
  one = session(data, weights, tmp_path, method="linear", epochs=1)
  two = session(data, weights, tmp_path, method="linear", epochs=1)
  run = one.make_run("colours", "linear", one.config, "final", 0)
  with WorkDir(tmp_path / "work").claim(run.name):
    assert one.workdir.running() == [run.name]
    assert not one.settle(run) and not one.done
  assert one.settle(run) and run.name in one.done
  before = rows(tmp_path / "work")
  assert two.settle(run)  # it finds the row
  assert rows(tmp_path / "work") == before


def test_stages_go_when_no_unfinished_run_needs_them(data, weights, tmp_path):
  """The first variant's stage is the second one's too."""
  s = session(data, weights, tmp_path, epochs=1)
  s.config.variants = dict(layernorm=dict(method="layernorm"),
                           ttc=dict(method="ttc", score="random"))
  s = Session(s.config, str(tmp_path / "other"))
  stages = tmp_path / "other" / "stages"
  one, two = (s.make_run("colours", label, c, "final", 0)
              for label, c in variants(s.config, "colours").items())
  assert s.settle(one)
  s.workdir.write_stages(two.name, [p.name for p in stages.glob("[!.]*")])
  assert not s.workdir.spent_stages([one.name])
  assert len(list(stages.glob("[!.]*"))) == 1  # the other run needs it
  s.run_all()
  assert not list(stages.glob("[!.]*"))


def test_the_default_k_and_its_number_are_one_run(data, weights, tmp_path):
  s = session(data, weights, tmp_path)
  named = [s.make_run("colours", "ttc", c, "final", 0).name for c in (
      s.config, *(_with(s.config, **given) for given in (
          dict(k=4), dict(blocks=3), dict(warmup_epochs=5.0), dict(k=3))))]
  assert len(set(named[:4])) == 1 and named[4] != named[0]


def _with(config, **changes):
  changed = config.copy_and_resolve_references()
  changed.update(changes)
  return changed


def test_a_byte_that_is_not_utf8_costs_its_row(finished, tmp_path, caplog):
  workdir, _, _ = finished
  copy = WorkDir(shutil.copytree(workdir, tmp_path / "work"))
  row, = copy.rows()
  copy.write_row(row | {"run": "another"})
  assert len(copy.rows()) == 2
  file = tmp_path / "work" / "runs" / "another" / "row.json"
  file.write_bytes(file.read_bytes().replace(b"colours", b"colour\xff"))
  assert WorkDir(str(copy)).rows() == [row]
  assert str(file) in caplog.text


def test_changed_lists_make_another_run(data, weights, tmp_path):
  shutil.copytree(data, tmp_path / "data")
  s = session(tmp_path / "data", weights, tmp_path)
  before = s.make_run("colours", "ttc", s.config, "final", 0).name
  path = tmp_path / "data" / "colours" / "test.txt"
  path.write_text("\n".join(path.read_text().split("\n")[:-2]) + "\n")
  s = session(tmp_path / "data", weights, tmp_path)
  assert s.make_run("colours", "ttc", s.config, "final", 0).name != before


def session(folder, weights_file, workdir, **changes):
  c = default()
  c.tasks, c.data = changes.pop("tasks", ("colours",)), str(folder)
  c.weights = str(weights_file)
  c.backbone, c.image_size, c.batch_size = "vit_ti16", 32, 16
  c.cache = str(workdir / "cache")
  c.grid.lr = changes.pop("grid_lr", ())
  for key, value in changes.items():
    c[key] = value
  return Session(c, str(workdir / "work"))


def test_select_tests_the_setting_that_is_best_on_val200(
    data, weights, tmp_path):
  s = session(data, weights, tmp_path, method="linear", protocol="select",
              epochs=3, seeds=(0, 1), grid_lr=(1e-5, 1e-2))
  s.run_all()
  val = [r for r in rows(tmp_path / "work") if r["protocol"] == "val"]
  final = [r for r in rows(tmp_path / "work") if r["protocol"] == "final"]
  assert [r["lr"] for r in val] == [1e-5, 1e-2]
  assert all(r["test_top1"] is None and r["train_count"] == 32 for r in val)
  assert len({r["finished"] for r in val + final}) == len(val + final)
  best = max(val, key=lambda r: (r["val_top1"], -r["lr"]))
  assert [(r["seed"], r["lr"]) for r in final] == [
      (0, best["lr"]), (1, best["lr"])]


def test_variants_may_differ_in_backbone_and_size(data, weights, tmp_path):
  s = session(data, weights, tmp_path, epochs=2, lr=1e-2)
  s.config.variants = variants_of(
      small=dict(method="linear"), large=dict(method="linear", image_size=48),
      other=dict(method="linear", backbone="vit_ti16", weights="random"))
  s.run_all()
  assert not s.failed
  found = {r["variant"]: r for r in rows(tmp_path / "work")}
  assert {v: r["image_size"] for v, r in found.items()} == {
      "small": 32, "large": 48, "other": 32}
  assert found["small"]["weights_sha256"] == found["large"]["weights_sha256"]
  assert found["other"]["weights_sha256"] == "random"
  alone = session(data, weights, tmp_path / "alone", epochs=2, lr=1e-2,
                  image_size=48, method="linear")
  alone.run_all()
  row, = rows(tmp_path / "alone" / "work")
  for key in ("test_top1", "data_digest", "flops", "image_size"):
    assert row[key] == found["large"][key], key


def test_the_precision_of_products_is_that_of_the_session_alone(
    data, weights, tmp_path, monkeypatch):
  seen, real = [], train.run

  def noted(*args):
    seen.append(jax.config.jax_default_matmul_precision)
    return real(*args)
  monkeypatch.setattr(train, "run", noted)
  session(data, weights, tmp_path, method="linear", epochs=1,
          matmul_precision="highest").run_all()
  assert seen == ["highest"]
  assert jax.config.jax_default_matmul_precision is None


def test_select_goes_on_beyond_the_grid_while_the_edge_is_best(
    data, weights, tmp_path):
  s = session(data, weights, tmp_path, method="linear", protocol="select",
              epochs=3, grid_lr=(1e-6, 1e-5), grid_steps=2)
  s.run_all()
  val = {r["lr"]: r["val_top1"] for r in rows(tmp_path / "work")
         if r["protocol"] == "val"}
  final, = (r for r in rows(tmp_path / "work") if r["protocol"] == "final")
  best = max(val, key=lambda lr: (val[lr], -lr))
  assert final["lr"] == best
  # It ended within the tried rates, or after two more of them.
  assert len(val) == 4 or best not in (min(val), max(val))
  assert 3 <= len(val) <= 4


def test_a_variant_takes_the_settings_that_the_search_chose_for_another(
    data, weights, tmp_path):
  s = session(data, weights, tmp_path, protocol="select", epochs=2,
              seeds=(0, 1), grid_lr=(1e-5, 1e-2))
  # The last one comes first: order does not matter.
  s.config.variants = variants_of(
      random=dict(method="ttc", score="random", settings_of="ttc"),
      ttc=dict(method="ttc", settings_of="norm",
               grid=dict(stage2_lr=(0.1, 1.0))),
      norm=dict(method="layernorm"))
  s.run_all()
  found: dict = {}
  for r in rows(tmp_path / "work"):
    found.setdefault((r["variant"], r["protocol"]), []).append(r)
  assert found.keys() == {("norm", "val"), ("norm", "final"), ("ttc", "val"),
                          ("ttc", "final"), ("random", "final")}
  def best(rows, *keys):
    row = max(rows, key=lambda r: (r["val_top1"], *(-r[k] for k in keys)))
    return [row[k] for k in keys]
  lr, = best(found["norm", "val"], "lr")
  assert [(r["lr"], r["stage2_lr"]) for r in found["ttc", "val"]] == [
      (lr, 0.1), (lr, 1.0)]
  chosen = best(found["ttc", "val"], "lr", "stage2_lr")
  for variant in ("ttc", "random"):
    assert [[r["seed"], r["lr"], r["stage2_lr"]]
            for r in found[variant, "final"]] == [[0, *chosen], [1, *chosen]]
  # The plan knows that `random` tries nothing itself.
  assert [expected(c).runs for c in variants(s.config, "colours").values()
          ] == [2, 4, 4]


def test_stage_2_starts_from_the_stage_1_whose_settings_it_takes(
    data, weights, tmp_path):
  s = session(data, weights, tmp_path, protocol="select", epochs=2,
              grid_lr=(1e-3, 1e-2), keep_stages=True)
  s.config.variants = variants_of(
      norm=dict(method="layernorm"),
      ttc=dict(method="ttc", settings_of="norm", stage2_lr=0.1))
  s.run_all()
  # Two of the search, one of 1000 images, one of stage 2 that starts there.
  assert len(list((tmp_path / "work" / "stages").iterdir())) == 4


def test_settings_are_waited_for_while_another_process_searches(
    data, weights, tmp_path):
  s = session(data, weights, tmp_path, protocol="select", epochs=1,
              grid_lr=(1e-3, 1e-2))
  s.config.variants = variants_of(
      norm=dict(method="layernorm"),
      ttc=dict(method="ttc", settings_of="norm"))
  found = variants(s.config, "colours")
  tried = found["norm"].copy_and_resolve_references()
  tried.lr = 1e-3
  run = s.make_run("colours", "norm", tried, "val", 0)
  with s.workdir.claim(run.name):
    assert s.select("colours", "ttc", found["ttc"]) is None
  config = s.select("colours", "ttc", found["ttc"])
  assert config.lr == s.select("colours", "norm", found["norm"]).lr


def test_what_would_take_the_settings_of_failed_runs_is_not_run(
    data, weights, tmp_path):
  s = session(data, weights, tmp_path, protocol="select", epochs=1,
              grid_lr=(3e38,))
  s.config.variants = variants_of(
      broken=dict(method="linear"),
      other=dict(method="layernorm", settings_of="broken"))
  s.run_all()
  assert len(s.failed) == 1 and rows(tmp_path / "work") == []


def test_a_run_whose_measure_fails_is_done(
    data, weights, tmp_path, monkeypatch):
  def fail(*args):
    raise RunError("the test set has 1 class")
  monkeypatch.setattr(measures, "take", fail)
  s = session(data, weights, tmp_path, epochs=1, method="layernorm",
              measures=("norms",))
  s.run_all()
  row, = s.rows()
  assert s.failed == {f"{row['run']}, norms": "the test set has 1 class"}
  assert not s.workdir.failures()


def test_a_row_of_an_earlier_version_gets_its_measure(data, weights, tmp_path):
  values = dict(epochs=1, method="layernorm", measures=("norms",))
  session(data, weights, tmp_path, **values).run_all()
  run, = (tmp_path / "work" / "runs").iterdir()
  row = json.loads((run / "row.json").read_text())
  later = ("adapter_lr", "stage2_lr", "l2", "bundle_bytes", "frozen_dtype")
  (run / "row.json").write_text(json.dumps(
      {k: v for k, v in row.items() if k not in later}))
  shutil.rmtree(run / "bundle")
  shutil.rmtree(run / "measures")
  s = session(data, weights, tmp_path, **values)
  said: list = []
  s.say = said.append
  s.run_all()
  assert len(said) == 1 and s.workdir.measure(run.name, "norms")


@pytest.mark.slow
def test_a_bundle_of_any_method_gives_its_row_s_accuracy(
    data, weights, tmp_path):
  s = session(data, weights, tmp_path, epochs=2, lr=1e-2)
  small = dict(population=3, generations=2, parents=2, mutations=1,
               crossovers=1)
  s.config.variants = {name: {"method": name} for name in (
      "lora", "ssf", "sct", "vpt_deep")}
  s.config.variants.noah = dict(method="noah", noah=small)
  s.run_all()
  assert not s.failed
  test = s.tasks["colours"].split("test")
  for row in rows(tmp_path / "work"):
    bundle = str(tmp_path / "work" / "runs" / row["run"] / "bundle")
    merged, unmerged = (predict.load(bundle, merge=m) for m in (True, False))
    found = unmerged.predict(test.images)
    assert 100 * (found.argmax(1) == test.labels).mean() == pytest.approx(
        row["test_top1"]), row["variant"]
    np.testing.assert_allclose(
        merged.predict(test.images), found, atol=1e-4, err_msg=row["variant"])
    assert 0 < row["bundle_bytes"] < 4e6
    assert row["flops"] >= row["flops_merged"] > 0


def test_a_failed_run_is_reported_and_the_others_go_on(
    data, weights, tmp_path):
  s = session(data, weights, tmp_path, epochs=1)
  s.config.variants = dict(
      broken=dict(method="linear", lr=3e38), linear=dict(method="linear"))
  s.run_all()
  (name, why), = s.failed.items()
  assert "broken" in name and "training diverged" in why
  assert [r["variant"] for r in rows(tmp_path / "work")] == ["linear"]


@pytest.mark.parametrize("name", ["", "vit_tiny_patch16_224", "Ti/16"])
def test_the_backbone_may_be_left_out_or_called_otherwise(
    data, weights, tmp_path, name):
  s = session(data, weights, tmp_path, backbone=name)
  run = s.make_run("colours", "ttc", s.config, "final", 0)
  assert (s.base.name, run.config.backbone) == ("vit_ti16", "vit_ti16")


def test_pixels_are_normalised_as_the_weights_or_the_user_say(
    data, weights, tmp_path):
  s = session(data, weights, tmp_path / "a")
  assert s.make_run("colours", "ttc", s.config, "final", 0
                    ).config.normalisation == "half"
  s = session(data, weights, tmp_path / "b", normalisation="clip")
  assert s.make_run("colours", "ttc", s.config, "final", 0
                    ).config.normalisation == "clip"
  silent = tmp_path / "silent.safetensors"
  module = backbones.make("vit_ti16", 32)
  weights_lib.write(str(silent), backbones.init(module), module.fields)
  with pytest.raises(UserError, match="silent.safetensors' do not say how"):
    session(data, silent, tmp_path / "c")
  assert not (tmp_path / "c" / "work").exists()


@pytest.mark.parametrize("changes,message", [
    (dict(tasks=("colour",)), "unknown task 'colour': did you mean colours"),
    (dict(method="tcc"), "unknown method 'tcc': did you mean ttc"),
    (dict(backbone="vit_tj16"), "unknown backbone 'vit_tj16': did you mean"),
    (dict(backbone="vit_s16"), f"{WIDTH}"),
    (dict(k=33), "config.k is 33; it selects among the 32 channels"),
    (dict(image_size=40), "not divisible by the patch 16"),
    (dict(weights=""), "needs pretrained weights"),
    (dict(weights="nowhere.npz"), "nowhere.npz"),
    (dict(batch_size=64), "has 32 training images; lower it"),
    (dict(batch_size=15), "does not divide among the 2 devices"),
    (dict(accumulate=3), "give a multiple of 6"),
    (dict(normalisation="imagnet"), "did you mean imagenet"),
    (dict(data="nowhere"), "nowhere"),
    (dict(dtype="fp16"), "unknown dtype 'fp16'"),
    (dict(measures=("norm",)), "unknown measure 'norm': did you mean norms"),
    (dict(per_task={"colour": dict(lr=1.0)}),
     "unknown task in config.per_task 'colour': did you mean colours"),
    (dict(backbone="vit_s0"), "unknown backbone 'vit_s0'"),
    # Before weights and data are read, which may be a download.
    (dict(score="tailor", data="nowhere", weights="nowhere.npz"),
     "unknown score 'tailor': did you mean taylor"),
    (dict(k=385, backbone="vit_s16", weights="nowhere.npz"),
     "config.k is 385; it selects among the 384 channels"),
    (dict(measures=("norm",), data="nowhere", weights="nowhere.npz"),
     "unknown measure"),
])
def test_bad_input_is_refused_before_any_work(
    data, weights, tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    session(data, weights, tmp_path, **changes)
  assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("args,message", [
    (["--config=configs/none.py"], "configuration 'configs/none.py' does not"),
    (["--config=configs/vtab.py:taks=a"], "did you mean task"),
    (["--config=configs/vtab.py", "--config.lrr=1"], "lrr"),
    (["--config=configs/vtab.py", "--config.epochs=x"], "config.epochs"),
    (["--config=configs/vtab.py:task=digits", "method=linear"],
     "unexpected argument 'method=linear'"),
])
def test_a_wrong_flag_is_one_sentence_and_exit_code_2(args, message):
  done = run_command("main", *args)
  assert done.returncode == 2
  assert message in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_runlocal_shrinks_everything():
  c = default()
  run_locally(c)
  assert c.epochs <= 2 and c.limit <= 64 and c.weights == "random"


@pytest.mark.parametrize("given,backbone,weights,size", [
    ("runlocal", "vit_ti16", "random", 32),
    ("weights=random,runlocal", "vit_ti16", "random", 32),
    ("backbone=vit_s16,runlocal", "vit_s16", "random", 32),
    ("weights=a.npz,runlocal", "", "a.npz", 32),
    ("backbone=vit_s16,weights=a.npz,size=48,runlocal", "vit_s16", "a.npz", 48),
    ("backbone=vit_s16,weights=a.npz", "vit_s16", "a.npz", 224)])
def test_runlocal_replaces_nothing_that_is_given(
    given, backbone, weights, size):
  c = config_file.load("configs/vtab.py", f"task=digits,{given}")
  assert (c.backbone, c.weights, c.image_size) == (backbone, weights, size)


def test_run_names_tell_settings_apart(config):
  def name(**changes):
    c = config.copy_and_resolve_references()
    c.update(changes)
    method = Method((), "ttc", {"k": c.k, "score": c.score})
    return Run("a/b", "ttc", c, method, "val", 0, "digest", "sha").name
  assert name() == name() and "/" not in name()
  assert len({name(), name(lr=0.5), name(k=5), name(score="l2")}) == 4
  assert name() == name(cache="elsewhere", seeds=(1, 2))


def test_the_demo_s_tasks_need_no_file():
  from ttc_jax import tasks
  for name in ("sprites_location", "sprites_orientation", "scene_count",
               "scene_distance", "digits"):
    task = tasks.load(name, size=32)
    assert len(task.labels["trainval"]) == 1000
    assert len(task.labels["test"]) >= 797


def test_load_from_python_in_two_lines(weights):
  module, params = backbones.load("vit_ti16", weights=str(weights),
                                  image_size=48)
  features = module.apply(
      {"params": params}, np.zeros((2, 48, 48, 3), np.float32))
  assert features.shape == (2, WIDTH) and features.dtype == "float32"
  assert trees.count(params) == trees.count(jax.eval_shape(
      module.init, jax.random.key(0), np.zeros((1, 48, 48, 3)))["params"])


def test_pictures_in_folders_are_a_task_and_few_shots_the_same_for_all(
    data, weights, tmp_path):
  pets = tmp_path / "pets"
  for i, path in enumerate(sorted((data / "colours").glob("*.png"))):
    folder = pets / ("red", "green")[int(path.stem.rsplit("_")[-1]) % 2]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, folder / f"{i}.png")
  digests = set()
  for method in ("linear", "layernorm"):
    done = run_command(
        "main", f"--config=configs/vtab.py:data={pets},method={method},"
        f"weights={weights},size=32,few_shot=8", "--config.epochs=1",
        f"--config.cache={tmp_path / 'cache'}", "--config.batch_size=16",
        f"--workdir={tmp_path / method}")
    assert done.returncode == 0, done.stderr
    assert ("pets: 2 classes: green, red\n"
            "  train  16 images, 8 of each class\n") in done.stdout
    assert "are a division of" in done.stdout
    (row,) = rows(tmp_path / method)
    assert (row["task"], row["few_shot"], row["train_count"]) == ("pets", 8, 16)
    digests.add(row["data_digest"])
  assert len(digests) == 1 and "few_shot 8" in done.stdout
