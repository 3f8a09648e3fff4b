"""The tools of the repository."""
import json
import os
import runpy
import shutil
import types

from absl import flags
import jax
import numpy as np
import pytest

from tests.command import ROOT, fresh_flags
from ttc_jax import backbones, bundles, checkpoint, tasks
from ttc_jax.errors import UserError
from ttc_jax.runs.workdir import WorkDir


def test_the_kills_aim_at_states_and_bundles(tmp_path, monkeypatch):
  """What fault_test waits for is there while they are written, only then."""
  with fresh_flags():
    writing = runpy.run_path(str(ROOT / "tools" / "fault_test.py"))["writing"]
  workdir, seen = WorkDir(tmp_path), []

  def watched(move):
    def moved(*args, **kwargs):
      seen.append(bool(writing(str(workdir))))
      return move(*args, **kwargs)
    return moved
  monkeypatch.setattr(os, "rename", watched(os.rename))
  monkeypatch.setattr(os, "replace", watched(os.replace))
  arrays = {"head/bias": np.ones(2, np.float32)}

  with checkpoint.Stages(workdir.store).open("a") as store:
    store.save(checkpoint.Saved(1, {"tuned": arrays}, {}))
  assert any(seen) and not writing(str(workdir))
  seen.clear()
  bundles.put(workdir.store, workdir.bundle_name("run"),
              bundles.Bundle(arrays, {}, {}))
  assert any(seen) and not writing(str(workdir))


def test_saving_evidence_loses_no_row(tmp_path, monkeypatch):
  """Where a work directory is new, the rows of earlier ones are kept."""
  with fresh_flags():
    tool = types.SimpleNamespace(
        **runpy.run_path(str(ROOT / "tools" / "evidence.py")))
    flags.FLAGS(["evidence.py", f"--workdir={tmp_path / 'runs'}"])
    names = tool.save.__globals__
    monkeypatch.setitem(names, "FOLDER", str(tmp_path))
    file = tmp_path / "swin.jsonl"
    tool.save("swin")
    assert not file.exists()  # no such work directory

    def saved(seed):
      place = tool.workdir("swin")
      place.write_row({"run": f"run{seed}", "seed": seed})
      place.write_measure(f"run{seed}", "norms", {"gamma": [1.0]})
      place.write_failure(f"bad{seed}", "t", "ttc", "NaN")
      tool.save("swin")
      shutil.rmtree(str(place))
      return file.read_text().splitlines()
    saved(0)
    lines = [json.loads(line) for line in saved(1)]
  assert [x["row"]["seed"] for x in lines if "row" in x] == [0, 1]
  assert all(x["measures"] == {"norms": {"gamma": [1.0]}}
             for x in lines if "row" in x)
  assert [x["file"] for x in lines if "file" in x] == [
      f"runs/bad{seed}/failure.json" for seed in (0, 1)]


@pytest.fixture(scope="module")
def pretrain():
  with fresh_flags():
    return types.SimpleNamespace(
        **runpy.run_path(str(ROOT / "tools" / "pretrain.py")))


@pytest.mark.parametrize("name, fields, count", [
    ("vit_ti16", {}, 1 + 16), ("swin_mu", dict(window=4), 4)])
def test_a_student_learns_every_token_of_its_teacher(
    pretrain, name, fields, count):
  student = backbones.make(name, 64, gelu="tanh", **fields)
  params = backbones.init(student)
  images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype("f")
  out = pretrain.tokens(student, params, images)
  assert out.shape == (2, count, student.width)
  target = np.random.default_rng(1).normal(size=(2, 17, 8)).astype("f")
  rng = np.random.default_rng(2)
  heads = {key: rng.normal(size=(student.width, n)).astype("f")
           for key, n in (("to_cls", 8), ("to_patches", 8), ("to_label", 3))}
  _, (cls, patches, _) = pretrain.loss_fn(
      {"backbone": params, **heads}, student, target, images,
      np.array([0, 2]))
  # The same by hand: a coarser grid learns the means of the teacher's.
  wanted = target[:, 1:] if count == 17 else np.stack([
      target[:, 1:].reshape(2, 4, 4, 8)[:, 2 * i:2 * i + 2, 2 * j:2 * j + 2
                                        ].mean((1, 2))
      for i in (0, 1) for j in (0, 1)], 1)
  out = np.asarray(out)
  own = out[:, 1:] if count == 17 else out
  assert patches == pytest.approx(np.square(
      own @ heads["to_patches"] - wanted).mean(), rel=1e-3)
  whole = out[:, 0] if count == 17 else out.mean(1)
  assert cls == pytest.approx(np.square(
      whole @ heads["to_cls"] - target[:, 0]).mean(), rel=1e-3)


@pytest.mark.parametrize("name, file", [
    ("vit_ti16", "vit_ti16_64"), ("swin_mu", "swin_mu_64")])
def test_the_weights_of_checkpoints_tell_digits_apart(name, file):
  module, params = backbones.load(
      name, weights=str(ROOT / f"checkpoints/{file}.safetensors"),
      image_size=64)
  data = tasks.load("digits", size=64)
  train, test = (data.split(split) for split in ("train", "test"))

  @jax.jit
  def features(params, images):
    return module.apply({"params": params}, images / np.float32(127.5) - 1)

  def correct(params):
    known, new = (np.asarray(features(params, x.images[:150]))
                  for x in (train, test))
    means = np.stack([known[train.labels[:150] == c].mean(0)
                      for c in range(10)])
    near = np.square(new[:, None] - means).sum(-1).argmin(1)
    return 100 * (near == test.labels[:150]).mean()
  assert correct(params) > correct(backbones.init(module)) + 5


@pytest.fixture
def evidence(tmp_path, monkeypatch):
  """`run(*flags)` of tools/evidence.py -> the commands that it gives."""
  def run(*given):
    with fresh_flags():
      script = runpy.run_path(str(ROOT / "tools" / "evidence.py"))
      flags.FLAGS(["evidence", "--data=D", f"--workdir={tmp_path / 'work'}",
                   *given])
      here = script["main"].__globals__
      monkeypatch.setitem(here, "FOLDER", str(tmp_path / "evidence"))
      commands: list[list[str]] = []
      monkeypatch.setitem(here, "subprocess", types.SimpleNamespace(
          run=lambda command, check: commands.append(command)))
      here["main"](["evidence", "run"])
      return here["SETS"], commands
  return run


def config_of(command):
  """The configuration that a command of `evidence` is given."""
  path, _, arg = next(word for word in command if word.startswith(
      "--config=")).removeprefix("--config=").partition(":")
  return runpy.run_path(path)["get_config"](arg)


def test_all_experiments_of_the_evidence_have_a_configuration(evidence):
  sets, commands = evidence("--weights=W")
  found = [(c.experiment, tuple(c.tasks)) for c in map(config_of, commands)]
  assert found == [(experiment, tasks) for tasks, _, experiments
                   in sets.values() for experiment in experiments]


def test_tasks_of_the_evidence_run_at_once_and_then_together(evidence):
  sets, commands = evidence("--only=ti16", "--experiments=table3,table8",
                            "--tasks=2", "--at_once=4")
  found = [(c.experiment, *c.tasks) for c in map(config_of, commands)]
  one, other = sets["ti16"][0][:2]
  assert sorted(found[:4]) == sorted(
      (experiment, task) for experiment in ("table3", "table8")
      for task in (one, other))
  assert found[4:] == [("table3", one, other), ("table8", one, other)]


def test_the_evidence_of_other_weights_needs_them(evidence):
  with pytest.raises(UserError, match="--weights=FILE"):
    evidence("--only=s14")
