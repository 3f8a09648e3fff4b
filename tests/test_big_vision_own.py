"""Big Vision's own trainer beside ours: its configuration in examples/, loaded
with stand-ins for what it imports, and its metrics file in the report."""
import ast
import csv
import importlib.util
import io
import json
import re
import sys
import types

import ml_collections
import numpy as np
import pytest

from tests.command import ROOT, run_command
from tests.test_report import cells, row
from ttc_jax import config_file
from ttc_jax.errors import UserError
from ttc_jax.report import big_vision, formats, tables
from ttc_jax.runs import plan as jobs
from ttc_jax.runs.workdir import WorkDir
from ttc_jax.vtab import rows as vtab

EXAMPLE = ROOT / "examples" / "big_vision"


def parse_arg(arg, **spec):
  """What big_vision.configs.common.parse_arg does with "key=value,...", """
  given = dict(pair.split("=", 1) for pair in (arg or "").split(",") if pair)
  assert given.keys() <= spec.keys()
  return ml_collections.ConfigDict(
      {k: type(v)(given[k]) if k in given else v for k, v in spec.items()},
      type_safe=False)


def module(name, **values):
  found = types.ModuleType(name)
  vars(found).update(values)
  return found


def run_file(name):
  spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
  found = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(found)
  return found


@pytest.fixture
def example(monkeypatch):
  common = module("big_vision.configs.common", parse_arg=parse_arg)
  configs = module("big_vision.configs", common=common)
  for name, stub in (("big_vision", module("big_vision", configs=configs)),
                     ("big_vision.configs", configs),
                     ("big_vision.configs.common", common)):
    monkeypatch.setitem(sys.modules, name, stub)
  return run_file("vtab")


def ours(arg):
  return jobs.variants(config_file.load("configs/bigvision.py", arg))


# --- The configuration --------------------------------------------------------

@pytest.mark.parametrize("task", vtab.ROWS)
def test_splits_classes_and_data_sets_are_ours(example, task):
  known = vtab.ROWS[task]
  assert list(example.TASKS) == list(vtab.ROWS)
  for protocol, trained, name in (("val", "train", "val"),
                                  ("final", "trainval", "test")):
    c = example.get_config(f"task={task},protocol={protocol}")
    assert c.input.data.split == known.splits[trained]
    assert c.evals[name].data.split == known.splits[name]
    assert list(c.evals) == [name]
    tfds, _, version = c.input.data.name.partition(":")
    assert tfds == known.tfds and version in known.versions
    assert c.evals[name].data.name == c.input.data.name
    assert c.num_classes == known.classes
  assert (task in example.BINARY) == known.binary
  key = example.TASKS[task][-1]
  if key:  # the label that our rule reads
    assert known.label({key: 3}) == 3


@pytest.mark.parametrize("crop", ["resmall_crop", "inception_crop", "none"])
@pytest.mark.parametrize("method", ["full", "linear"])
def test_the_recipe_is_that_of_our_configuration(example, crop, method):
  arg = f"crop={crop},size=224,steps=300,warmup=60"
  c = example.get_config(f"{arg},method={method}")
  found = ours(f"{arg},method=bv_{method}")[f"bv_{method}"]
  steps = 1000 // found.batch_size
  assert c.total_steps == found.epochs * steps
  warmup = c.schedule[0][1] if method == "linear" else c.schedule
  assert warmup["warmup_steps"] == found.warmup_epochs * steps
  assert warmup["decay_type"] == "cosine"
  assert c.grad_clip_norm == found.clip_norm
  assert c.input.batch_size == found.batch_size
  assert c.lr in found.grid.lr
  assert not c.wd and found.weight_decay == 0
  assert c.model_load.dont_load == ["head/kernel", "head/bias"]
  pp, = c.evals.values() if method == "full" else [c.evals.val]
  used = dict(re.findall(r"(\w+)\((\d+)\)", f"{c.input.pp}|{pp.pp_fn}"))
  crop_to = {"resmall_crop": ("random_crop", "central_crop"),
             "inception_crop": ("inception_crop", "central_crop"),
             "none": ("resize",)}[crop]
  assert {int(used[name]) for name in crop_to} == {found.image_size}
  assert int(used.get("resize_small", 0)) == found.crop_from
  assert ("flip_lr" in c.input.pp) == found.flip
  assert "flip_lr" not in pp.pp_fn


def test_linear_probing_trains_the_head_and_adds_the_closed_form(example):
  c = example.get_config("task=dtd,method=linear,protocol=final")
  (tuned, _), (rest, frozen) = c.schedule
  assert re.fullmatch(tuned, "head/kernel") and frozen is None
  assert re.fullmatch(rest, "Transformer/encoder_norm/scale")
  fewshot = c.evals.fewshot
  assert fewshot.datasets["dtd"] == (
      c.input.data.name, c.input.data.split, c.evals.test.data.split)
  found = ours("method=fewshot_lsr")["fewshot_lsr"]
  assert fewshot.l2_reg == found.l2 and fewshot.l2_reg in found.grid.l2
  assert "fewshot" not in example.get_config("task=kitti,method=linear").evals


@pytest.mark.parametrize("task", vtab.ROWS)
def test_pipelines_are_calls_of_known_operations(example, task):
  known = {"decode", "resize_small", "random_crop", "central_crop", "flip_lr",
           "value_range", "onehot", "keep", "vtab_label", "vtab_binary"}
  c = example.get_config(f"task={task},method=linear")
  texts = [c.input.pp, *(e.get("pp_fn") or e.pp_train
                         for e in c.evals.values())]
  for text in texts:
    names = []
    for part in text.split("|"):
      call = ast.parse(part, mode="eval").body
      names.append(call.id if isinstance(call, ast.Name) else call.func.id)
      for x in getattr(call, "args", []):
        ast.literal_eval(x)
    assert set(names) <= known
    own = {"vtab_label", "vtab_binary"} & set(names)
    assert not own or "ops_vtab" in c.pp_modules
  assert ("vtab_binary" in texts[0]) == vtab.ROWS[task].binary
  json.loads(c.to_json())  # as its metrics writer stores it


def test_the_readme_s_rates_are_our_grid():
  text = (EXAMPLE / "README.md").read_text()
  rates = [float(x) for x in re.search("for lr in (.*);", text)[1].split()]
  assert rates == list(ours("method=bv_full")["bv_full"].grid.lr)


def numpy_as_tensorflow():
  return module(
      "tensorflow", int64=np.int64, float32=np.float32, constant=np.asarray,
      shape=np.shape, where=np.where, concat=np.concatenate,
      reduce_min=np.min, reduce_sum=np.sum, math=np,
      cast=lambda x, dtype: np.asarray(x).astype(dtype))


@pytest.fixture(params=["numpy", "tensorflow"])
def ops(monkeypatch, request):
  """ops_vtab with TensorFlow where it is installed, and with numpy."""
  if request.param == "numpy":
    monkeypatch.setitem(sys.modules, "tensorflow", numpy_as_tensorflow())
  else:
    pytest.importorskip("tensorflow")
  registered = {}

  class Registry:
    @staticmethod
    def register(name):
      return lambda fn: registered.setdefault(name, fn)
  registry = module("big_vision.pp.registry", Registry=Registry)
  for name, stub in (("big_vision", module("big_vision")),
                     ("big_vision.pp", module("big_vision.pp")),
                     ("big_vision.pp.registry", registry)):
    monkeypatch.setitem(sys.modules, name, stub)
  run_file("ops_vtab")
  return registered


def test_computed_labels_are_ours(ops, example):
  rng = np.random.default_rng(0)
  computed = [t for t, known in example.TASKS.items() if not known[-1]]
  assert len(computed) == 5
  for i in range(60):
    count = rng.integers(0 if i % 3 else 3, 11)
    place = np.zeros((count, 3), np.float32)
    place[:, 2] = rng.choice([4, 8, 8.5, 8.7, 9, 9.2, 9.8, 20, 25, 40], count)
    examples = {
        "clevr_count": {"objects": {"color": np.zeros(count + 3, np.int64)}},
        "clevr_dist": {"objects": {"pixel_coords": np.pad(
            place, ((0, 1), (0, 0)), constant_values=11)}},
        "kitti": {"objects": {"type": rng.integers(0, 9, count),
                              "location": place}},
        "dsprites_loc": {"label_x_position": np.int64(rng.integers(32))},
        "dsprites_ori": {"label_orientation": np.int64(rng.integers(40))}}
    assert set(examples) == set(computed)
    for task, one in examples.items():
      label = ops["preprocess_ops.vtab_label"](task)(one)["label"]
      assert int(label) == vtab.ROWS[task].label(one), (task, one)
  image = np.array([[[0], [1]]], np.uint8)
  found = ops["preprocess_ops.vtab_binary"]()({"image": image})["image"]
  np.testing.assert_array_equal(np.asarray(found), image * 255)


# --- The report ---------------------------------------------------------------

def metrics(folder, lines, config=None):
  """A metrics file as `BigVisionMetricWriter` writes it."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "big_vision_metrics.txt"
  path.write_text("".join(
      x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
  if config is not None:
    (folder / "config.json").write_text(json.dumps(config))
  return str(path)


DTD = [{"step": 1, "global_schedule": 0.0, "training_loss": 3.85},
       {"step": 100, "training_loss": 1.2, "test/prec@1": 0.5, "test/loss": 2},
       {"step": 500, "test/prec@1": 0.6875, "test/loss": 1.1,
        "fewshot/a/dtd_1000shot-seed-0": 0.625}]
ROWS = [row("dtd", "ttc", 0, 70.0), row("svhn", "ttc", 0, 80.0),
        row("dtd", "linear", 0, 60.0)]
CONFIG = dict(task="dtd", method="linear", total_steps=500, lr=0.01,
              model_init="howto-i21k-B/16")


def table(rows=ROWS, protocol="final"):
  return tables.make(rows, protocol)


def test_a_run_of_theirs_is_a_line_after_ours(tmp_path):
  path = metrics(tmp_path / "bv", DTD, CONFIG)
  found = big_vision.add(table(), [path])
  lines = formats.markdown(found).split("\n")
  assert [cells(x)[0] for x in lines if x.startswith("| ")] == [
      "", "ttc", "linear", "linear (Big Vision)", "fewshot_lsr (Big Vision)"]
  by_name = {cells(x)[0]: cells(x) for x in lines if x.startswith("| ")}
  header = by_name[""]
  at = header.index("dtd")
  assert by_name["linear (Big Vision)"][at] == "68.8"
  assert by_name["fewshot_lsr (Big Vision)"][at] == "62.5"
  assert by_name["linear (Big Vision)"][header.index("svhn")] == "-"
  assert by_name["linear (Big Vision)"][header.index("mean of 2")] == "-"
  assert by_name["linear (Big Vision)"][-4:] == ["", "", "", "1"]
  assert (f"(Big Vision): '{path}', step 500, lr 0.01, howto-i21k-B/16, "
          "test/prec@1.") in found.sources


def test_seeds_tasks_and_means(tmp_path):
  def one(task, seed, top1):
    return metrics(tmp_path / f"{task}{seed}", [{"step": 9, "test/prec@1": top1}
                                                ], {"task": task})
  given = [one("dtd", 0, 0.5), one("dtd", 1, 0.6), one("svhn", 0, 0.9)]
  line = big_vision.add(table(), given).lines[2]
  scores = {c.title: s for c, s in zip(table().columns, line.scores,
                                       strict=True)}
  assert (line.name, line.kind, line.seeds) == ("(Big Vision)", "theirs",
                                                (1, 2))
  assert scores["dtd"].mean == pytest.approx(55)
  assert scores["dtd"].deviation == pytest.approx(50 ** 0.5)
  assert scores["mean of 2"].mean == pytest.approx((55 + 90) / 2)


def test_the_task_is_said_or_the_only_one(tmp_path):
  path = metrics(tmp_path / "a", [{"step": 9, "test/prec@1": 0.5}])
  one = table([row("dtd", "ttc", 0, 70.0)])
  for given in (path, f"dtd={path}", str(tmp_path / "a")):
    assert big_vision.add(one, [given]).lines[1].scores[0].mean == 50
  with pytest.raises(UserError, match="give --big_vision=TASK=FILE"):
    big_vision.add(table(), [path])
  with pytest.raises(UserError, match="unknown task of --big_vision 'dtt'"):
    big_vision.add(table(), [f"dtt={path}"])


def test_val_is_read_for_val(tmp_path):
  path = metrics(tmp_path, [{"step": 9, "val/prec@1": 0.75}], {"task": "dtd"})
  rows = [dict(row("dtd", "ttc", 0, None), protocol="val", val_top1=60.0)]
  assert big_vision.add(table(rows, "val"), [path]).lines[1].scores[0].mean == (
      75)
  with pytest.raises(UserError, match="no 'test/prec@1'; it has 'val/prec@1'"):
    big_vision.add(table(), [path])


def test_every_format_has_the_line(tmp_path):
  found = big_vision.add(table(), [metrics(tmp_path, DTD, CONFIG)])
  for form in formats.FORMATS.values():
    assert "(Big Vision)" in form.write(found, False)
  lines = list(csv.DictReader(io.StringIO(formats.csv(found))))
  theirs = [x for x in lines if x["kind"] == "theirs"]
  assert [(x["variant"], x["task"], float(x["top1"])) for x in theirs] == [
      ("linear (Big Vision)", "dtd", 68.75),
      ("fewshot_lsr (Big Vision)", "dtd", 62.5)]


def test_a_line_that_is_still_written_is_left_out(tmp_path):
  path = metrics(tmp_path, [*DTD, '{"step": 600, "test/pr'], {"task": "dtd"})
  assert big_vision.read(path, ["dtd"], "final")[0].top1 == 68.75


@pytest.mark.parametrize("lines,config,message", [
    ([], None, "no 'test/prec@1'; it has no accuracy"),
    (["step 1\n"], None, "line 1: Expecting value"),
    (["[1]\n"], None, "line 1: no object with a step"),
    (["[" * 100_000 + "\n"], None, "line 1: "),
    ([{"test/prec@1": 0.5}], None, "line 1: no object with a step"),
    ([{"step": 9, "test/prec@1": 68.7}], None, "is 68.7; expected a share"),
    ([{"step": 9, "test/prec@1": float("nan")}], None, "is nan; expected"),
    ([{"step": 9, "test/prec@1": [3, 3]}], None, r"is \[3, 3\]; expected"),
    ([{"step": 9, "test/prec@1": 0.5}], {"total_steps": 500},
     "of step 9 of 500; wait"),
    ([{"step": 9, "test/prec@1": 0.5}], "{", "config.json'.*mend it"),
])
def test_a_bad_file_is_one_sentence(tmp_path, lines, config, message):
  path = metrics(tmp_path, lines)
  if config is not None:
    (tmp_path / "config.json").write_text(
        config if isinstance(config, str) else json.dumps(config))
  with pytest.raises(UserError, match=message) as caught:
    big_vision.read(path, ["dtd"], "final")
  assert "\n" not in str(caught.value)


def test_the_command_shows_the_line_and_refuses_in_one_sentence(tmp_path):
  work = WorkDir(tmp_path / "work")
  for one in ROWS:
    work.write_row(one)
  path = metrics(tmp_path / "bv", DTD, CONFIG)
  done = run_command("report", work, f"--big_vision={path}")
  assert done.returncode == 0, done.stderr
  assert re.search(r"^linear \(Big Vision\) +68\.8", done.stdout, re.MULTILINE)
  (tmp_path / "bv" / "big_vision_metrics.txt").write_bytes(b"\xff\xfe\n")
  for bad in (path, tmp_path / "none"):
    done = run_command("report", work, f"--big_vision={bad}")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "metrics file" in done.stderr
