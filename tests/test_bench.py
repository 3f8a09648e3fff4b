"""The benchmark, and the one number of it that must not drift: FLOPs."""
import importlib.util
import json
import os
import re
import subprocess
import sys

from absl import flags
from absl.testing import flagsaver
import jax
import numpy as np
import pytest

from tests.command import ROOT
from tests.torch_models import import_timm
from ttc_jax import (
  backbones,
  hardware,
  methods,
  parallel,
  quantisation,
  trees,
)
from ttc_jax.backbones import vit as vit_lib
from ttc_jax.backbones.swin import Swin
from ttc_jax.backbones.vit import ViT
from ttc_jax.bench import __main__ as bench
from ttc_jax.bench import memory, pipeline, programs, suite, timing
from ttc_jax.config import FROZEN_DTYPES, default
from ttc_jax.errors import UserError
from ttc_jax.model import Model
from ttc_jax.vtab import rows as vtab

BATCH = 8


def step_flops(model, stage, base):
  return programs.epoch(model, stage, base, BATCH, 2, 0).flops


@pytest.mark.parametrize("backbone", [
    ViT(128, 2, 2, 512, patch=8, image_size=32, pool="cls"),
    ViT(128, 2, 2, 512, patch=8, image_size=32, pool="gap"),
    # Grids of 10 and 5 tokens a side, padded to 12 and 8.
    Swin(64, (1, 1), 2, image_size=40, window=4)])
@pytest.mark.slow
def test_the_compiled_step_has_no_gradient_of_a_frozen_weight(backbone):
  config = default()
  config.k, config.score = 16, "random"
  method, model = methods.load("ttc", config, backbone), Model(backbone, "half")
  base, (align, adapt) = backbones.init(backbone), method.stages
  tune_all, = methods.load("full", config, backbone).stages
  forward = programs.forward(model, base, BATCH, 0).flops
  full = step_flops(model, tune_all, base)
  stage_1 = step_flops(model, align, base)
  stage_2 = step_flops(
      model._replace(handlers=method.handlers), adapt, base)
  assert full > 2.7 * forward  # what the bounds below would let through
  for step in stage_1, stage_2:
    assert step < 2.2 * forward
    assert step < 0.75 * full
  # The compiled program does the needed work, and little besides.
  needed = programs.flops_needed(backbone, config.k, programs.CLASSES)
  for name, flops in (("forward", forward), ("stage 1", stage_1),
                      ("stage 2", stage_2)):
    assert 1 <= flops / (BATCH * needed[name]) < 1.1, name


def test_flops_needed_equal_a_count_by_hand():
  # 4 patches of 12 numbers and cls: 5 tokens, of which the last block has
  # keys and values, and the query, the projection and the MLP of one.
  vit = ViT(width=4, depth=2, heads=2, hidden=8, patch=2, image_size=4)
  patches = 2 * 4 * 12 * 4
  square, mlp = 2 * 4 * 4, 2 * 2 * 4 * 8  # of one token
  linear = 5 * (4 * square + mlp) + 5 * 2 * square + 1 * (2 * square + mlp)
  attention = 2 * 2 * (5 * 5 + 1 * 5) * 4
  head = 2 * 4 * 3
  forward = patches + linear + attention + head
  backward = linear + 2 * attention + 2 * head
  adapter = 2 * (5 + 1) * 2 * 2
  assert programs.flops_needed(vit, k=2, classes=3) == {
      "forward": forward, "stage 1": forward + backward,
      "stage 2": forward + backward + 3 * adapter}


def test_swins_flops_needed_equal_a_count_by_hand():
  # 3 x 3 tokens of width 4, padded to 16 for windows of 4, then 2 x 2 of 8.
  swin = Swin(4, (2, 2), 2, image_size=12, window=2)
  patches = 2 * 9 * 48 * 4
  first = 2 * 2 * (3 * 16 * 4 * 4 + 9 * 4 * 4 + 9 * 2 * 4 * 16)
  merge = 2 * 4 * 16 * 8
  second = 2 * 2 * (4 * 4 * 8 * 8 + 4 * 2 * 8 * 32)
  attention = 2 * 2 * (16 * 2 * 4 * 4 + 4 * 2 * 4 * 8)
  head = 2 * 8 * 3
  forward = patches + first + merge + second + attention + head
  backward = first + merge + second + 2 * attention + 2 * head
  adapter = 2 * (9 + 4 + 4) * 2 * 2  # a half of the first stage, the second
  assert swin.default_blocks == 3
  assert programs.flops_needed(swin, k=2, classes=3) == {
      "forward": forward, "stage 1": forward + backward,
      "stage 2": forward + backward + 3 * adapter}


def test_timms_swin_tunes_what_stage_2_tunes():
  import_timm()
  from ttc_jax.bench import pytorch
  swin = Swin(16, (2, 2), 2, image_size=32, window=4)
  model = pytorch.make_model(swin, 4, 5)
  tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
  norms = 2 * (16 + 2 * 2 * (16 + 32) + 64 + 32)
  assert tuned == norms + swin.default_blocks * 4 * 4 + 33 * 5


@pytest.fixture
def tiny(monkeypatch):
  monkeypatch.setitem(vit_lib.SIZES, "ti", (32, 2, 2, 64))
  monkeypatch.setattr(programs, "_PRODUCTS", {"cpu": (32, 64)})
  monkeypatch.setattr(timing, "TURNS", 2)
  return programs.settings(
      backbone="vit_ti16", image_size=32, batch_size=4, gelu="exact")


def assert_rows(result, names):
  assert [row["name"] for row in result["rows"]] == names
  for row in result["rows"]:
    theirs = "torch" in row["name"]
    for key, value in row.items():
      none = theirs and key in ("temp_bytes", "argument_bytes",
                                "flops_compiled")
      none |= row["name"] == "stage 2, torch" and key == "compile_seconds"
      assert value is None if none else key == "name" or value > 0, (row, key)


@pytest.mark.filterwarnings("ignore")  # PyTorch's own
@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(tiny, tmp_path, capsys):
  file = tmp_path / "bench.json"
  names, arguments = ["forward", "stage 1", "stage 2"], []
  if importlib.util.find_spec("torch"):
    names, arguments = [*names, "stage 2, torch"], ["--against=torch"]
  with flagsaver.flagsaver():
    flags.FLAGS(["bench", "--backbone=vit_ti16", "--size=32", "--batch=4",
                 "--seconds=0.01", f"--json={file}", *arguments])
    bench.main([])
  result = json.loads(file.read_text())
  if arguments and not result["left_out"]:  # there is a C++ compiler
    names.append("stage 2, torch.compile")
  assert_rows(result, names)
  assert (result["times_as_fast"] is None) == (not arguments)
  assert result["settings"]["k"] == 4
  assert len(result["ceiling_by_turn"]) == 2
  heading, _, _, *table = capsys.readouterr().out.splitlines()
  assert "2 x cpu" in heading
  table = table[:1 + len(names)]
  assert len(set(map(len, table))) == 1  # aligned


@pytest.fixture
def pytorch():
  pytest.importorskip("torch")
  from ttc_jax.bench import pytorch
  return pytorch


def test_the_faster_of_pytorchs_ways_is_the_other_side(
    tiny, pytorch, monkeypatch):
  """Without a compiler too; the ceiling is of the faster library's product."""
  ways = {"torch": pytorch.Way("slow", None, None),
          "torch.compile": pytorch.Way("fast", 9.0, None)}
  monkeypatch.setattr(pytorch, "make_ways", lambda *_: (ways, "why"))
  monkeypatch.setattr(pytorch, "make_product", lambda *_: "torch's")
  monkeypatch.setattr(programs, "products", lambda dtype: {
      "product 32": programs.Program("ours", 2 * 32 ** 3)})
  monkeypatch.setattr(programs, "of_backbone", lambda *_: {
      "stage 2": programs.Program("stage 2", 1e6)})
  seconds = {"slow": 4.0, "fast": 3.0, "ours": 2.0, "torch's": 1.0,
             "stage 2": 2.0}
  monkeypatch.setattr(timing, "timings", lambda programs, _: {
      name: [[seconds[p.run]]] for name, p in programs.items()})
  result = timing.measure(tiny, "torch", 2, 1)
  assert result["faster"] == "stage 2, torch.compile"
  assert result["times_as_fast"] == 1.5
  assert result["left_out"] == "why"
  assert result["ceiling"] == 2 * 64 ** 3 / 1.0


@pytest.mark.filterwarnings("ignore")  # PyTorch's own
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiler_that_is_missing_leaves_eager_pytorch(
    tiny, pytorch, monkeypatch, dtype):
  def broken(fn):
    raise RuntimeError("no C++ compiler")
  monkeypatch.setattr(pytorch.torch, "compile", broken)
  tiny.dtype = dtype
  ways, why = pytorch.make_ways(
      programs.make_backbone(tiny), tiny, programs.CLASSES)
  assert [*ways] == ["torch"]
  assert why == "RuntimeError: no C++ compiler"
  ways["torch"].step()
  pytorch.make_product(32, dtype)()


def made_result(against, steps, **values):
  """What `timing.measure` returns, of made numbers."""
  row = {"name": "stage 2", "images_per_second": 10.0, "median_seconds": 0.1,
         "fastest_turn_seconds": 0.09, "slowest_turn_seconds": 0.2,
         "share_of_ceiling": 0.5}
  return {"machine": hardware.machine(parallel.devices()),
          "versions": timing.versions(against),
          "settings": values | {"against": against, "steps": steps, "k": 4},
          "rows": [row, row | {"name": "stage 2, torch"}], "left_out": "why",
          "times_as_fast": 1.25, "times_as_fast_by_turn": [1.2, 1.3]}


def test_the_suite_goes_on_where_it_was_ended(tmp_path):
  path, calls = tmp_path / "bench.json", []
  options = {"against": "", "frozen_dtype": "float32",
             "gelu": "exact"}

  def measure(**values):
    if len(calls) == 3:
      raise KeyboardInterrupt
    calls.append(values)
    return made_result(**values)
  with pytest.raises(KeyboardInterrupt):
    suite.run(str(path), measure, options)
  assert len(json.loads(path.read_text())["results"]) == 3
  calls.clear()
  count = 2 * len(suite.SHAPES)

  def note(**values):
    calls.append(values)
    return made_result(**values)
  text = suite.run(str(path), note, options)
  assert len(calls) == count - 3
  assert (tmp_path / "bench.md").read_text() == text
  assert text.count(" 1.25 |") == count and "torch.compile: why." in text
  assert "90.0 to 200.0" in text
  # Everything again on another machine.
  results = json.loads(path.read_text())["results"]
  for result in results:
    result["machine"]["processor"] = "another"
  path.write_text(json.dumps({"results": results}))
  calls.clear()
  suite.run(str(path), note, options)
  assert len(calls) == count
  path.write_text("[]")
  with pytest.raises(UserError, match="is no file of --suite"):
    suite.run(str(path), note, options)


def test_the_processors_instructions_and_their_limits_are_told(
    tmp_path, monkeypatch):
  cpuinfo = tmp_path / "cpuinfo"
  cpuinfo.write_text("model name\t: A CPU\nflags\t\t: fpu avx2 avx512f\n\n"
                     "model name\t: Another\nflags\t\t: amx_bf16\n")
  machine = hardware.machine(parallel.devices(), str(cpuinfo))
  assert machine["processor"] == "A CPU"
  assert machine["instructions"] == ["AVX2", "AVX-512"]
  machine = hardware.machine(parallel.devices(), str(tmp_path / "none"))
  assert machine["processor"] and machine["instructions"] == []
  monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
  assert hardware.machine(parallel.devices())["limits"][
      "ATEN_CPU_CAPABILITY"] == "avx2"
  options = {"against": "", "steps": 2}
  assert "With ATEN_CPU_CAPABILITY=avx2." in suite.table([made_result(
      backbone="vit_ti16", image_size=64, batch_size=4, dtype="float32",
      **options)])


def test_torch_tunes_what_stage_2_tunes(tiny, pytorch):
  model = pytorch.make_model(
      programs.make_backbone(tiny), tiny.k, programs.CLASSES)
  tuned = {n: p.numel() for n, p in model.named_parameters()
           if p.requires_grad}
  assert all("norm" in n or "adapter" in n or "head" in n for n in tuned)
  assert sum(tuned.values()) == 5 * 2 * 32 + 2 * 4 * 4 + 33 * programs.CLASSES


def test_what_streams_is_timed_alone_and_together(tiny):
  found = pipeline.measure(tiny, 2, workers=1)
  assert all(found[key] > 0 for key in ("feed", "step", "together"))
  assert found["steps"] == 2
  assert len(pipeline.text(found).splitlines()) == 4


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason=(
    "XLA of JAX 0.10 on CPU plans the buffers of small programs otherwise"))
def test_memory_is_linear_in_depth_and_batch(tiny):
  """The formula's four small programs against a larger one, compiled."""
  terms = memory.line(tiny, False)
  found = memory.of_step(tiny, 6, 32, False)
  np.testing.assert_allclose(memory.total(terms, 6, 32), found, rtol=0.15)


@pytest.mark.parametrize("dtype", FROZEN_DTYPES)
def test_the_shapes_kept_are_those_of_what_is_stored(tiny, dtype):
  backbone = programs.make_backbone(tiny)
  params = jax.tree.map(lambda x: np.ones(x.shape, np.float32),
                        backbones.shapes(backbone))
  stored = trees.flatten(quantisation.store(params, backbone, dtype))
  kept = trees.flatten(memory.kept_shapes(backbone, dtype))
  assert {k: (x.shape, x.dtype) for k, x in kept.items()} == {
      k: (x.shape, x.dtype) for k, x in stored.items()}


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason=(
    "XLA of JAX 0.10 on CPU widens all kernels at once"))
def test_kernels_in_int8_need_less_memory(tiny):
  found = []
  for dtype in ("float32", "int8"):
    tiny.frozen_dtype = dtype
    found.append(memory.of_step(tiny, 2, 8, False))
  assert found[1] < found[0]


def test_parts_of_a_batch_need_less_memory(tiny):
  whole, parts = (
      memory.of_step(tiny, 6, 64, False, n) for n in (1, 8))
  assert parts < 0.5 * whole


def test_the_largest_batch_is_the_last_power_of_two_that_fits():
  terms = np.array([10.0, 2.0, 1.0, 0.5])  # at L = 4: 18 + 3 b
  assert [memory.largest(terms, 4, limit) for limit in (
      20, 21, 24, 66, 65.9)] == [0, 1, 2, 16, 8]


@pytest.mark.parametrize("flag, message", [
    ("--against=tensorflow", "unknown --against 'tensorflow'"),
    ("--backbone=resnet50", "unknown backbone 'resnet50'"),
    ("--batch=3", "--batch=3 does not divide among the 2 devices"),
    ("--memory=16GB", "give GB of devices, as 16,80, or step"),
    ("--suite --batch=8", "--suite has its own shapes: leave --batch out"),
])
def test_wrong_flags_are_one_sentence(flag, message):
  with flagsaver.flagsaver(), pytest.raises(UserError, match=message):
    flags.FLAGS(["bench", *flag.split()])
    bench.main([])


@pytest.mark.parametrize("broken, error", [
    ("torch", "ImportError('libcudart.so.12: cannot open')"),
    ("torch", "OSError('[WinError 126]')"),
    ("timm", "RuntimeError('operator torchvision::nms does not exist')")])
def test_a_broken_library_is_one_sentence(tmp_path, broken, error):
  (tmp_path / f"{broken}.py").write_text(f"raise {error}")
  done = subprocess.run(
      [sys.executable, "-m", "ttc_jax.bench", "--against=torch",
       "--backbone=swin_ti", "--size=32", "--batch=2"],
      env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"},
      capture_output=True, text=True)
  assert done.returncode == 2
  assert f"cannot be imported ({error.partition('(')[0]}: " in done.stderr
  assert "pip install" in done.stderr and done.stderr.count("\n") == 1


def test_the_page_of_costs_is_what_the_tool_prints():
  done = subprocess.run(
      [sys.executable, "tools/scale.py"], capture_output=True, text=True,
      env=os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": ""})
  assert (done.returncode, done.stderr) == (0, "")
  page = (ROOT / "docs" / "scale.md").read_text()
  assert done.stdout.strip() == page.partition("<!-- scale -->")[2].partition(
      "<!-- /scale -->")[0].strip()


def test_table_1_s_cost_by_hand():
  """TTC on 19 tasks: two stages of 50 epochs, three rates, three seeds."""
  tests = sum(row.test_count for row in vtab.ROWS.values())
  trained = 19 * 2 * 50 * (3 * 800 + 3 * 1000)
  seen = 3 * tests + 19 * (3 * 200 + 3 * 800 + 3 * 1000)
  needed = programs.flops_needed(backbones.make("vit_b16", 224), 96, 100)
  want = seen * needed["forward"] + trained * needed["stage 2"]
  page = (ROOT / "docs" / "scale.md").read_text()
  row, = re.findall(r"\n\| ttc +\|.*", page)
  assert float(row.split("|")[4]) == pytest.approx(want / 1e18, abs=0.005)


@pytest.mark.parametrize("platform, kind, instructions, want", [
    ("cpu", "cpu", ["AVX2", "AVX-512"], "2 x cpu (EPYC, AVX-512)"),
    ("cpu", "cpu", [], "2 x cpu (EPYC)"),
    ("gpu", "NVIDIA H100", ["AVX2"], "2 x NVIDIA H100")])
def test_a_row_tells_on_what_it_was_computed(
    monkeypatch, platform, kind, instructions, want):
  from ttc_jax.runs import row
  monkeypatch.setattr(hardware, "machine", lambda devices: dict(
      devices=2, kind=kind, platform=platform, processor="EPYC",
      instructions=instructions))
  assert row._device() == want
