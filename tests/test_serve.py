"""Bundles as folders and files; many of them on one base."""
import concurrent.futures
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy
import scipy.special

from tests import made_bundles
from tests.command import ROOT, run_command
from ttc_jax import bundles, methods, predict, serve
from ttc_jax.backbones import swin, vit
from ttc_jax.errors import UserError
from ttc_jax.model import Model

SIZE = made_bundles.SIZE
CASES = [*(("vit_ti8", m) for m in methods.names()),
         ("swin_ti", "ttc")]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  monkeypatch.setitem(vit.SIZES, "ti", (32, 2, 2, 64))
  monkeypatch.setitem(swin.SIZES, "ti", (16, (2, 2), 2))


@pytest.fixture
def base(tmp_path):
  return {name: made_bundles.save_base(
      str(tmp_path / f"{name}.safetensors"), name)
          for name in ("vit_ti8", "swin_ti")}


@pytest.fixture
def pets(base, tmp_path):
  """A packed bundle's path."""
  path = str(tmp_path / "pets.safetensors")
  bundles.pack(path, made_bundles.make(base["vit_ti8"]))
  return path


def pictures(count=5, size=SIZE):
  rng = np.random.default_rng(5)
  return rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def add(model, folder, name, weights, *args, merge=False, **kwargs):
  """Adds a made bundle; -> the probabilities that it alone gives, unmerged."""
  path = str(folder / name)
  bundles.save(path, made_bundles.make(weights, *args, **kwargs))
  model.add(name, path, merge=merge)
  alone = predict.on_base(path, merge=False)
  return lambda images: scipy.special.softmax(
      alone.model.logits(alone.params, images, alone.buffers), axis=-1)


def test_products_are_as_precise_as_in_training_on_every_device(
    base, tmp_path, monkeypatch):
  """A CPU knows one precision; so what the programs are told is looked at."""
  path, told = base["vit_ti8"], []
  known = Model.logits

  def logits(self, *args, **kwargs):
    told.append(jax.config.jax_default_matmul_precision)
    return known(self, *args, **kwargs)
  monkeypatch.setattr(Model, "logits", logits)
  model = serve.load(path)
  for name in ("highest", "default"):
    bundle = str(tmp_path / name)
    bundles.save(bundle, made_bundles.make(path, matmul_precision=name))
    predict.load(bundle).logits(pictures(2))
    model.add(name, bundle)
  assert set(told) == {"highest", None} and told[-1] is None
  del told[:]
  model.logits(pictures(2), task=["highest", "default"])
  assert sorted(map(str, told)) == ["None", "highest"]
  with pytest.raises(UserError, match="no good 'matmul_precision'"):
    bundles.pack(str(tmp_path / "b.safetensors"),
                 made_bundles.make(path, matmul_precision="exact"))
    bundles.load(str(tmp_path / "b.safetensors"))


def test_one_array_of_the_size_is_prepared_and_pictures_are_cropped(
    base, tmp_path):
  path = str(tmp_path / "cropped")
  bundles.save(path, made_bundles.make(base["vit_ti8"], resample=(
      f"bicubic/{2 * SIZE}")))
  model, alone = serve.load(base["vit_ti8"]), predict.load(path)
  model.add("a", path)
  images = pictures(3)
  for given in (images, list(images)):
    np.testing.assert_allclose(model.logits(given), alone.logits(given),
                               rtol=1e-4, atol=1e-4)
  assert not np.allclose(alone.logits(images), alone.logits(list(images)),
                         atol=1e-3)


# --- One file -----------------------------------------------------------------

def assert_equal(one, other):
  assert json.dumps(one.meta) == json.dumps(other.meta)
  for a, b in ((one.tuned, other.tuned), (one.buffers, other.buffers)):
    assert a.keys() == b.keys()
    for name in a:
      assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
      assert (a[name] == b[name]).all(), name


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.sweep(keep=4)
def test_a_folder_and_a_file_hold_the_same_bits(method, base, tmp_path):
  bundle = made_bundles.make(base["vit_ti8"], method)
  folder, file = str(tmp_path / "folder"), str(tmp_path / "file")
  bundles.save(folder, bundle)
  bundles.pack(file, bundles.load(folder))
  assert_equal(bundle, bundles.load(folder))
  assert_equal(bundle, bundles.load(file))


def test_the_file_is_plain_safetensors_and_json(pets):
  with open(pets, "rb") as f:
    length = int.from_bytes(f.read(8), "little")
    header = json.loads(f.read(length))
  meta = json.loads(header["__metadata__"]["ttc_jax_bundle"])
  assert meta["method"] == "ttc" and meta["format"] == "1"
  tensors = safetensors.numpy.load_file(pets)
  assert tensors["tuned/head/bias"].shape == (3,)
  assert tensors["buffers/fc2/0/channels"].dtype.kind == "i"


def test_ttc_on_vit_b16_takes_less_than_a_megabyte_beside_the_head(tmp_path):
  """110,592 + 38,400 floats are 0.6 MB (method.md)."""
  module = vit.make("vit_b16", 224)
  K, D, L = module.default_k, module.width, module.depth
  rng = np.random.default_rng(0)
  norms = [path for paths in module.norms.values() for path in paths]
  tuned = {f"backbone/{path}/{leaf}": rng.normal(size=D).astype("f4")
           for path in norms for leaf in ("scale", "bias")}
  tuned |= {f"adapter/fc2/{i}/kernel": rng.normal(size=(K, K)).astype("f4")
            for i in range(L)}
  assert sum(x.size for x in tuned.values()) == 110_592 + 38_400
  tuned |= {"head/kernel": np.zeros((D, 100), "f4"),
            "head/bias": np.zeros(100, "f4")}
  buffers = {f"fc2/{i}/{leaf}": x for i in range(L) for leaf, x in (
      ("channels", np.arange(K, dtype=np.int32)), ("scale", np.float32(1)))}
  meta = {"method": "ttc", "options": {}, "backbone": "vit_b16", "fields": {},
          "image_size": 224, "normalisation": "half", "resample": "bicubic",
          "dtype": "float32", "weights_sha256": "0" * 64,
          "weights_source": "x", "classes": ["a class"] * 100}
  bundle = bundles.Bundle(tuned, buffers, meta)
  path = tmp_path / "file"
  bundles.pack(str(path), bundle)
  assert path.stat().st_size - bundles.sizes(bundle)["head_bytes"] < 1e6


def rewrite(path, change):
  """Changes the tensors and the metadata of a packed file, and signs it."""
  tensors = safetensors.numpy.load_file(path)
  with safetensors.safe_open(path, framework="numpy") as file:
    meta = json.loads(file.metadata()["ttc_jax_bundle"])
  change(tensors, meta)
  del meta["sha256"]
  parts = {part: {name.removeprefix(f"{part}/"): x
                  for name, x in tensors.items() if name.startswith(part)}
           for part in ("tuned", "buffers")}
  meta["sha256"] = bundles.digest(bundles.Bundle(
      **parts, meta={k: v for k, v in meta.items() if k != "format"}))
  safetensors.numpy.save_file(
      tensors, path, {"ttc_jax_bundle": json.dumps(meta)})


def put(where, name, value):
  def change(tensors, meta):
    (tensors if where == "tensor" else meta)[name] = value
  return change


def take(name):
  def change(tensors, meta):
    del tensors[name]
  return change


@pytest.mark.parametrize("change, words", [
    (put("meta", "format", "2"), "format '2'"),
    (put("meta", "method", 3), "'method'"),
    (put("meta", "method", "tcc"), "did you mean ttc"),
    (put("meta", "classes", []), "'classes'"),
    (put("meta", "normalisation", "quarter"), "'normalisation'"),
    (put("meta", "normalisation", {"mean": [0, 0, 0], "std": [1, 0, 1]}),
     "'normalisation'"),
    (put("meta", "normalisation", {"mean": [0, 0], "std": [1, 1]}),
     "'normalisation'"),
    (put("meta", "classes", ["a", "b"]), r"\(3,\), expected \(2,\)"),
    (put("meta", "weights_sha256", "abc"), "'weights_sha256'"),
    (put("meta", "options", {}), "its options are not those of ttc"),
    (put("meta", "image_size", 2 ** 40), "'image_size'"),
    (put("meta", "resample", "nearest"), "'resample'"),
    (put("meta", "task", None), "'task'"),
    (put("meta", "versions", [1]), "'versions'"),
    (put("meta", "test_top1", "high"), "'test_top1'"),
    (put("meta", "test_top1", float("nan")), "'test_top1'"),
    (put("meta", "test_top1", 10 ** 400), "'test_top1'"),
    (put("meta", "module_params", 10 ** 400), "'module_params'"),
    (put("meta", "lr", float("inf")), "'lr'"),
    (put("meta", "k", [1, 2]), "'k'"),
    (put("meta", "seed", [1]), "'seed'"),
    (put("meta", "variant", [{}]), "'variant'"),
    (put("meta", "stages", ["align", 1]), "'stages'"),
    (put("meta", "versions", {"jax": [1]}), "'versions'"),
    (put("meta", "backbone", 'vit-base-patch16-224"+__import__("os")+"'),
     "'backbone'"),
    (put("meta", "fields", {"gelu": "exact"}), "'epsilon' is missing"),
    (put("meta", "fields", {"gelu": "exact", "epsilon": 1e-6, "window": 4}),
     "no field 'window'|does not have"),
    (take("tuned/backbone/Transformer/encoder_norm/scale"),
     "encoder_norm/scale' has the shape none, but ttc"),
    (put("tensor", "tuned/backbone/cls", np.zeros((1, 1, 32), "f4")),
     "'backbone/cls'.*tunes none"),
    (put("tensor", "tuned/head/bias", np.full(3, np.nan, "f4")), "not finite"),
    (put("tensor", "tuned/head/kernel", np.zeros((9, 3), "f4")),
     "do not fit ttc on vit_ti8"),
    (put("tensor", "tuned/adapter/fc2/0/kernel", np.zeros((5, 5), "f4")),
     "do not fit ttc on vit_ti8"),
    (put("tensor", "tuned/adapter/fc2/7/kernel", np.zeros((4, 4), "f4")),
     "no place for 'fc2/7/kernel'"),
    (put("tensor", "tuned/backbone/nothing/scale", np.zeros(4, "f4")),
     "'backbone/nothing/scale'"),
    (put("tensor", "tuned/backbone/Transformer/encoder_norm/scale",
         np.zeros(4, "f4")), r"has the shape \(4,\)"),
    (put("tensor", "buffers/fc2/0/channels", np.array([0, 1, 2, 32])),
     "channels beyond the 32"),
    (put("tensor", "elsewhere/x", np.zeros(4, "f4")), "belongs to no part"),
])
@pytest.mark.sweep(keep=8)
def test_a_wrong_bundle_is_one_sentence(pets, change, words):
  rewrite(pets, change)
  with pytest.raises(UserError, match=words):
    predict.load(pets)


def test_nothing_beside_a_bundle_is_touched(base, tmp_path):
  bundle = made_bundles.make(base["vit_ti8"])
  neighbour = tmp_path / "here" / "bundle.tmp"
  neighbour.mkdir(parents=True)
  (neighbour / "notes").write_text("precious")
  for _ in range(2):
    bundles.save(str(tmp_path / "here" / "bundle"), bundle)
  assert sorted(os.listdir(neighbour.parent)) == ["bundle", "bundle.tmp"]
  assert (neighbour / "notes").read_text() == "precious"


def test_merged_and_unmerged_by_name(pets, base):
  model = serve.load(base["vit_ti8"])
  model.add("pets", pets)
  images = pictures()
  before = model.predict(images, task="pets")
  assert any(n.startswith("adapter/") for n in model._tasks["pets"].tuned)
  model.merge("pets")
  assert not any(n.startswith("adapter/") for n in model._tasks["pets"].tuned)
  np.testing.assert_allclose(model.predict(images, task="pets"), before,
                             atol=1e-5)
  model.unmerge("pets")
  np.testing.assert_array_equal(model.predict(images, task="pets"), before)
  with pytest.raises(UserError, match="unknown task 'pet'"):
    model.merge("pet")


def test_one_is_in_use_by_name(pets, base, tmp_path):
  other = str(tmp_path / "cars")
  bundles.save(other, made_bundles.make(
      base["vit_ti8"], "lora", seed=1, classes=("a", "b")))
  model, images = serve.load(base["vit_ti8"]), pictures()
  for call in (model.merge, model.unmerge, lambda: model.predict(images)):
    with pytest.raises(UserError, match="no task is in use: name one, or call"):
      call()
  model.add("pets", pets)
  model.add("cars", other)
  assert model.in_use == "pets"  # the first
  logits = model.logits(images, "cars")
  assert logits.shape == (5, 2) and logits.dtype == np.float32
  np.testing.assert_array_equal(model.logits(images), model.logits(
      images, task="pets"))
  model.use("cars")
  np.testing.assert_array_equal(model.logits(images), logits)
  np.testing.assert_allclose(model.predict(images), scipy.special.softmax(
      logits, -1), rtol=1e-6)
  assert model.classify(images) == model.classify(images, "cars")
  model.merge()
  assert "alone" in model._tasks["cars"].group
  assert "alone" not in model._tasks["pets"].group
  np.testing.assert_allclose(model.logits(images), logits, atol=1e-4)
  model.unmerge()
  np.testing.assert_array_equal(model.logits(images), logits)
  with pytest.raises(UserError, match="unknown task 'car': did you mean cars"):
    model.use("car")
  model.remove("cars")
  assert model.in_use is None and [*model.tasks] == ["pets"]
  model.use("pets")
  assert model.predict(images).shape == (5, 3)


def test_logits_of_a_loaded_bundle_are_in_the_order_of_its_classes(pets):
  tuned, images = predict.load(pets), pictures()
  alone = predict.on_base(pets)
  want = alone.model.logits(alone.params, images, alone.buffers)
  np.testing.assert_allclose(tuned.logits(images), want, rtol=1e-5, atol=1e-5)
  assert tuned.classes == tuple(tuned.meta["classes"])
  np.testing.assert_allclose(
      tuned.predict(images), scipy.special.softmax(want, -1), rtol=1e-4)
  assert tuned.features(images).shape == (5, 32)
  assert tuned.logits([]).shape == (0, 3)


def test_images_that_are_none(pets, base):
  tuned, size = predict.load(pets), made_bundles.SIZE
  assert tuned.predict(np.zeros((0, size, size, 3), np.uint8)).shape == (0, 3)
  for images in (np.zeros((2, size, size, 3), np.float32),
                 np.zeros((size, size, 3), np.uint8)):  # one image, no list
    with pytest.raises(UserError, match="expected uint8 .H, W, 3."):
      tuned.predict(images)
  wide = np.random.default_rng(0).integers(
      0, 256, (2, size, size + 9, 3), dtype=np.uint8)
  resized = np.stack([np.asarray(Image.fromarray(x).resize(
      (size, size), Image.Resampling.BICUBIC)) for x in wide])
  np.testing.assert_array_equal(tuned.predict(wide), tuned.predict(resized))
  for wrong in (0, "3", 2.0):
    with pytest.raises(UserError, match=f"batch_size is {wrong!r}"):
      serve.load(base["vit_ti8"], batch_size=wrong)
  model = serve.load(base["vit_ti8"])
  model.add("pets", pets)
  for wrong in ("image.png", None, 3, iter(pictures())):
    for call in (model.predict, model.classify):
      with pytest.raises(UserError, match="expected a sequence"):
        call(wrong, task="pets")
  assert serve.load(base["vit_ti8"], batch_size=np.int64(4)).batch_size == 4
  for wrong in (3, ["pets"] * 4 + [["pets"]]):
    with pytest.raises(UserError, match="a name of a task is .*expected text"):
      model.predict(pictures(), task=wrong)
  with pytest.raises(UserError, match="a name of a task is 3"):
    model.add(3, pets)
  with pytest.raises(UserError, match="a bundle is None"):
    predict.load(None)
  found = model.classify(pictures(), task=(n for n in ["pets"] * 5))
  assert found == model.classify(pictures(), task=["pets"] * 5) and found


def test_weights_are_no_bundle(base):
  with pytest.raises(UserError, match="is no packed bundle"):
    bundles.load(base["vit_ti8"])


def test_the_command_packs_and_inspects(base, tmp_path):
  def call(*arguments):
    return run_command("bundles", *arguments, cwd=tmp_path)
  bundle = made_bundles.make(base["vit_ti8"])
  bundles.save(str(tmp_path / "bundle"), bundle)
  done = call("pack", "bundle", "--out=pets.safetensors")
  assert done.returncode == 0, done.stderr
  assert_equal(bundle, bundles.load(str(tmp_path / "pets.safetensors")))
  done = call("inspect", "pets.safetensors", "bundle", "--json")
  file, folder = json.loads(done.stdout)
  assert file | {"bundle": ""} == folder | {"bundle": ""}
  assert file["sites"] == ["fc2"] and file["method"] == "ttc"
  assert file["head_bytes"] == 4 * 33 * 3
  assert call("unpack", "pets.safetensors", "--out=again").returncode == 0
  assert_equal(bundle, bundles.load(str(tmp_path / "again")))
  for arguments, words in (
      (["pack", "bundle"], "--out"), (["pack", "no", "--out=x"], "not exist"),
      (["pack", "bundle", "--out=again"], "exists and is not overwritten"),
      ([], "say inspect")):
    done = call(*arguments)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


# --- Serving ------------------------------------------------------------------

@pytest.mark.parametrize("backbone, method", CASES)
@pytest.mark.sweep(keep=1)
def test_a_mixed_batch_equals_each_task_alone(backbone, method, base, tmp_path):
  model, weights = serve.load(base[backbone]), base[backbone]
  alone = {name: add(model, tmp_path, name, weights, method, backbone,
                     seed=seed, classes=[f"c{i}" for i in range(count)])
           for seed, (name, count) in enumerate([("a", 3), ("b", 7)])}
  images, names = pictures(), ["b", "a", "a", "b", "a"]
  want = {name: probabilities(images) for name, probabilities in alone.items()}
  for i, p in enumerate(model.predict(images, task=names)):
    np.testing.assert_allclose(p, want[names[i]][i], atol=1e-5)
  one = model.predict(images, task="b")
  assert one.shape == (5, 7)
  np.testing.assert_allclose(one, want["b"], atol=1e-5)
  assert np.abs(one[0] - one[1]).max() > 1e-3  # the images matter


@pytest.mark.slow
def test_methods_sizes_and_merged_tasks_in_one_call(base, tmp_path):
  weights = base["vit_ti8"]
  model = serve.load(weights)
  alone = {
      "ttc": add(model, tmp_path, "ttc", weights, "ttc"),
      "lora": add(model, tmp_path, "lora", weights, "lora"),
      "big": add(model, tmp_path, "big", weights, "ttc", size=48,
                 normalisation="imagenet"),
      "merged": add(model, tmp_path, "merged", weights, "ttc", seed=1,
                    merge=True)}
  names = ["merged", "big", "lora", "ttc", "big"]
  images = [*pictures(1), *pictures(1, 48), Image.fromarray(pictures()[2]),
            pictures()[3], pictures(2, 48)[1]]
  got = model.predict(images, task=names)
  for name, image, p in zip(names, images, got, strict=True):
    np.testing.assert_allclose(
        p, alone[name](np.asarray(image)[None])[0], atol=1e-5)
  path = tmp_path / "image.png"
  images[2].save(path)
  (name, p), = model.classify([str(path)], task="lora")[0]
  assert name == model.tasks["lora"][got[2].argmax()]
  assert p == pytest.approx(got[2].max(), abs=1e-5)


def test_the_base_is_in_memory_once(base, tmp_path):
  weights = base["vit_ti8"]
  model = serve.load(weights)
  for i in range(3):
    add(model, tmp_path, f"t{i}", weights, seed=i)
  add(model, tmp_path, "big", weights, size=48)
  add(model, tmp_path, "merged", weights, merge=True)
  (_, host, there), (_, other, also) = model._bases.values()
  assert {n for n in host if host[n] is not other[n]} == {"pos_embedding"}
  assert {n for n in there if there[n] is not also[n]} == {"pos_embedding"}
  task = model._tasks["merged"]
  kernels = {n for n in task.tuned if n.endswith("/kernel")} - {"head/kernel"}
  assert kernels == {f"backbone/{s.path}/kernel" for s in vit.make(
      "vit_ti8", SIZE).sites["fc2"]}


def test_a_task_more_compiles_nothing_until_a_power_of_two(
    base, tmp_path, monkeypatch):
  weights = base["vit_ti8"]
  model = serve.load(weights)
  for i in range(3):
    add(model, tmp_path, f"t{i}", weights, seed=i)
  model.predict(pictures(5), task=["t0", "t1", "t2", "t0", "t1"])
  add(model, tmp_path, "t3", weights, seed=3,
      classes=[f"c{i}" for i in range(60)])
  traced, logits = [], Model.logits
  monkeypatch.setattr(Model, "logits", lambda *args: (
      traced.append(args), logits(*args))[1])
  model.predict(pictures(8), task=["t3", "t1"] * 4)
  assert not traced
  model.predict(pictures(9), task=["t3", "t1", "t0"] * 3)  # of 16
  assert traced


def test_another_base_is_refused_with_both_hashes(base, pets, tmp_path):
  other = made_bundles.save_base(
      str(tmp_path / "other.safetensors"), "vit_ti8", gelu="exact")
  model = serve.load(other)
  with pytest.raises(UserError) as error:
    model.add("pets", pets)
  assert len(set(re.findall("[0-9a-f]{64}", str(error.value)))) == 2
  assert model.tasks == {}


def test_names_are_taken_removed_and_unknown(base, pets, tmp_path):
  model = serve.load(base["vit_ti8"])
  model.add("pets", pets)
  with pytest.raises(UserError, match="already called 'pets'"):
    model.add("pets", pets)
  model.add("pets", pets, replace=True)
  assert list(model.tasks) == ["pets"]
  with pytest.raises(UserError, match="did you mean pets"):
    model.predict(pictures(), task="pest")
  with pytest.raises(UserError, match="5 images and 2 names"):
    model.predict(pictures(), task=["pets"] * 2)
  with pytest.raises(UserError, match="float64 of shape"):
    model.predict(np.zeros((1, SIZE, SIZE, 3)), task="pets")
  assert model.predict([], task="pets").shape == (0, 3)
  model.remove("pets")
  with pytest.raises(UserError, match="unknown task"):
    model.predict(pictures(), task="pets")


def test_threads_predict_while_tasks_come_and_go(base, pets, tmp_path):
  model = serve.load(base["vit_ti8"])
  model.add("pets", pets)
  want = model.predict(pictures(), task="pets")
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    calls = [pool.submit(model.predict, pictures(), "pets") for _ in range(12)]
    for _ in range(3):
      model.add("more", pets)
      model.remove("more")
    for call in calls:
      np.testing.assert_allclose(call.result(), want, atol=1e-6)


def test_the_frozen_products_of_a_mixed_batch_are_those_of_one_task(
    base, tmp_path):
  """FLOPs of a mixed pass: the kernels are not repeated for each example."""
  weights = base["vit_ti8"]
  model = serve.load(weights)
  for i in range(2):
    add(model, tmp_path, f"t{i}", weights, seed=i)
  group, = model._snapshot()[1].values()
  batch = serve.parallel.shard((np.zeros(8, np.int32), pictures(8)))
  one, each = (serve._program(group.model, one).lower(
      model._bases[group.base][2], group.stacked, *batch).compile()
               for one in (True, False))
  flops = [p.cost_analysis()["flops"] for p in (one, each)]
  assert flops[1] < 1.05 * flops[0]


def test_the_module_says_that_it_is_no_command():
  done = subprocess.run(
      [sys.executable, "-m", "ttc_jax.serve", "--bundle=x"], cwd=ROOT,
      capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  assert "ttc_jax.serve is a Python API" in done.stderr
