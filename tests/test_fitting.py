"""`ttc_jax.fit`: a tuned model from Python, the same as the command line's."""
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

import ttc_jax
from ttc_jax import backbones, fitting, importance, predict, train, weights
from ttc_jax.backbones import vit as vit_lib
from ttc_jax.errors import UserError
from ttc_jax.model import Model
from ttc_jax.tasks import images as images_lib

SMALL = dict(epochs=2, batch_size=16, lr=1e-2, image_size=32, progress=False)


@pytest.fixture(scope="module", autouse=True)
def small():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(vit_lib.SIZES, "ti", (32, 3, 2, 64))
    yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp("weights") / "ti16.safetensors"
  module = backbones.make("vit_ti16", 32)
  weights.write(str(path), backbones.init(module),
                {"gelu": "tanh", "epsilon": 1e-6}, normalisation="half")
  return str(path)


def pictures(count=40, seed=0):
  """Red and green pictures (N, 20, 30, 3), and their colours."""
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 90, (count, 20, 30, 3), dtype=np.uint8)
  labels = ["red" if i % 2 == 0 else "green" for i in range(count)]
  for i in range(count):
    pixels[i, ..., i % 2] += 150
  return pixels, labels


@pytest.fixture(scope="module")
def result(source):
  return ttc_jax.fit(*pictures(), weights=source, **SMALL)


def test_it_learns_and_answers_by_name(result):
  images, labels = pictures(24, seed=1)
  assert result.classes == ("green", "red")
  assert result.accuracy(images, labels) > 90
  named = result.classify(list(images[:4]))
  assert [a == b for a, b in zip(named, labels, strict=False)].count(True) >= 3
  assert result.predict(images).shape == (24, 2)
  np.testing.assert_allclose(result.predict(images).sum(1), 1, rtol=1e-5)
  assert result.predict([]).shape == (0, 2)
  assert [(r["stage"], r["epoch"]) for r in result.history] == [
      ("align", 1), ("align", 2), ("adapt", 1), ("adapt", 2)]


def test_arrays_pictures_and_paths_are_the_same_images(result, tmp_path):
  images, _ = pictures(4)
  paths = []
  for i, pixels in enumerate(images):
    paths.append(tmp_path / f"{i}.png")
    Image.fromarray(pixels).save(paths[-1])
  want = result.predict(images)
  np.testing.assert_array_equal(result.predict(paths), want)
  np.testing.assert_array_equal(
      result.predict([Image.fromarray(x) for x in images]), want)


def test_channels_are_the_top_of_the_scores_of_the_aligned_model(
    result, source):
  """Scores by `importance` on a model that stage 1 alone made."""
  images, labels = pictures()
  aligned = ttc_jax.fit(images, labels, weights=source, method="layernorm",
                        **SMALL)
  module, _ = ttc_jax.load("vit_ti16", weights=source, image_size=32)
  numbers = np.array([result.classes.index(x) for x in labels])
  pixels = ttc_jax.tasks.images.prepare_all(images, 32, "bicubic")
  want = importance.score(
      "taylor", Model(module, "half"),
      aligned._tuned.params, {}, pixels, numbers, ("fc2",))
  k = len(result.channels["fc2"][0])
  for block in range(3):
    np.testing.assert_allclose(result.scores["fc2"][block],
                               want["fc2"][block], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(
        result.channels["fc2"][block],
        importance.top_k(result.scores["fc2"][block], k))


def test_methods_without_channels_have_none(source):
  found = ttc_jax.fit(*pictures(), weights=source, method="linear", **SMALL)
  assert not found.scores and not found.channels


def test_plots_are_pictures(result, tmp_path):
  for what in (result.scores, result.channels):
    figure = what.plot()
    panel, bar = figure.axes
    assert panel.get_title() in ("Scores at fc2", "Selected channels at fc2")
    assert bar.get_ylabel()
    figure.savefig(tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
      assert picture.size[0] > 300


@pytest.mark.parametrize("name", ["pets", "pets.safetensors"])
def test_saved_and_loaded_it_gives_the_same(result, source, tmp_path, name):
  path = result.save(str(tmp_path / name))
  images, _ = pictures(8)
  tuned = predict.load(path, weights=source, merge=False)
  np.testing.assert_allclose(tuned.predict(images), result.predict(images),
                             rtol=1e-5, atol=1e-6)
  with pytest.raises(UserError, match="exists"):
    result.save(path)


def test_exported_it_is_what_the_command_writes(result, tmp_path):
  folder = result.export("bigvision", str(tmp_path / "out"))
  assert os.path.exists(os.path.join(folder, "README.md"))
  with pytest.raises(UserError, match="unknown target 'tim'"):
    result.export("tim", str(tmp_path / "other"))


def test_it_is_the_run_of_the_command_line(source, tmp_path):
  """The same images, labels and seed as a task: the same loss to the bit."""
  from ttc_jax.config import default
  from ttc_jax.runs.session import Session
  folder = tmp_path / "data" / "colours"
  folder.mkdir(parents=True)
  images, labels = pictures()
  lines = []
  for i, pixels in enumerate(images):
    Image.fromarray(pixels).save(folder / f"{i}.png")
    lines.append(f"{i}.png {['green', 'red'].index(labels[i])}\n")
  other, _ = pictures(4, seed=1)
  for i, pixels in enumerate(other):
    Image.fromarray(pixels).save(folder / f"other_{i}.png")
  test = [f"other_{i}.png {1 - i % 2}\n" for i in range(4)]
  for name, part in (("train800", lines[:32]), ("val200", lines[32:]),
                     ("train800val200", lines), ("test", test)):
    (folder / f"{name}.txt").write_text("".join(part))
  c = default()
  c.tasks, c.data, c.weights = ("colours",), str(folder.parent), source
  c.image_size, c.epochs, c.batch_size, c.lr = 32, 2, 16, 1e-2
  c.cache = str(tmp_path / "cache")
  session = Session(c, str(tmp_path / "work"), say=lambda line: None)
  session.run_all()
  row, = session.rows()
  curve = session.workdir.curve(row["run"])
  found = ttc_jax.fit(images, labels, weights=source, **SMALL)
  assert [r["loss"] for r in found.history] == [r["loss"] for r in curve]


@pytest.mark.parametrize("change,message", [
    (dict(labels=None), "fit needs labels: one class"),
    (dict(labels=["a"] * 39), "40 images and 39 labels"),
    (dict(labels=[0.5, None] * 20), "label is 0.5; give names"),
    (dict(labels=[None] * 40), "label is None; give names"),
    (dict(labels=np.eye(40)), "give names of classes, or whole numbers"),
    (dict(labels=[float("nan")] * 40), "give names of classes"),
    (dict(classes=["green", "red", "green"]), "'green' more than once"),
    (dict(classes=np.array(["red"])), "label 'green' is none of the 1"),
    (dict(images="cat.jpg"), "give a list"),
    (dict(images=Image.new("RGB", (4, 4))), "give a list"),
    (dict(images=3), "images are of type int"),
    (dict(images=[3] * 40), "an image is of type int"),
    (dict(images=[Image.new("F", (4, 4))] * 40), "float pixels"),
    (dict(resample="bicubic/20"), "the short side is below"),
    (dict(few_shot=5), "fit makes one run and reads no few_shot"),
    (dict(protocol="select", grid=dict(lr=(0.1, 0.2))), "reads no"),
    (dict(seeds=(0, 1)), "reads no seeds"),
    (dict(images="/none", labels=None), "cannot read the folder"),
    (dict(images=np.zeros((40, 4, 4, 3))), "expected uint8"),
    (dict(images=["/none/a.png"] * 40), "No such file"),
    (dict(classes=["red"]), "label 'green' is none of the 1 classes"),
    (dict(method="tcc"), "unknown method 'tcc': did you mean"),
    (dict(lrr=1.0), "unknown setting of fit 'lrr': did you mean lr"),
    (dict(lora=dict(rnk=3)), "unknown key of lora 'rnk': did you mean rank"),
    (dict(epochs="3"), "fit: epochs is '3'; give an integer, for example"),
    (dict(epochs={"a": 1}), "fit: epochs is .*; give an integer, for example"),
    (dict(lora=3), "fit: lora is 3; give a dictionary of alpha, "),
    (dict(lora=dict(rank="x")), "fit: lora.rank is 'x'; give an integer"),
    (dict(weights=None), "fit: weights is None; give a file"),
    (dict(val=np.zeros((2, 4, 4, 3))), "fit: val is no pair"),
    (dict(lr=-1.0), "config.lr is -1.0"),
    (dict(weights="/none.npz"), "none.npz"),
])
def test_mistakes_are_one_sentence(source, change, message):
  images, labels = pictures()
  arguments = dict(images=images, labels=labels, weights=source, **SMALL)
  arguments |= change
  with pytest.raises(UserError, match=message):
    ttc_jax.fit(arguments.pop("images"), arguments.pop("labels"), **arguments)


def test_calls_that_begin_alike_share_their_first_stage(source, monkeypatch):
  trained = []
  epoch = train.StageRun._epoch
  monkeypatch.setattr(train.StageRun, "_epoch", lambda self, *args: (
      trained.append(self.stage.name), epoch(self, *args))[1])
  images, labels = pictures(40, seed=3)
  settings = SMALL | dict(weights=source, k=4)
  alone = ttc_jax.fit(images, labels, seed=5, **settings)
  assert trained == ["align", "align", "adapt", "adapt"]
  norm = ttc_jax.fit(images, labels, seed=5, method="layernorm", **settings)
  assert len(trained) == 4 and norm.history == alone.history[:2]
  again = ttc_jax.fit(images, labels, seed=5, **settings)
  assert trained[4:] == ["adapt", "adapt"]
  np.testing.assert_array_equal(again.logits(images), alone.logits(images))
  for change in (dict(seed=6), dict(seed=5, lr=2e-2),
                 dict(seed=5, drop_path=0.1),
                 dict(seed=5, frozen_dtype="int8")):
    del trained[:]
    ttc_jax.fit(images, labels, method="layernorm", **settings | change)
    assert trained == ["align", "align"], change


def test_the_score_is_computed_once(source, monkeypatch):
  calls = []
  score = importance.score
  monkeypatch.setattr(importance, "score", lambda *args: (
      calls.append(args[0]), score(*args))[1])
  found = ttc_jax.fit(*pictures(), weights=source, **SMALL)
  assert calls == ["taylor"] and found.scores["fc2"][0].shape == (32,)
  found = ttc_jax.fit(*pictures(), weights=source, method="sct", k=4, **SMALL)
  assert calls == ["taylor", "class_l2"]
  np.testing.assert_array_equal(
      found.channels["attention"][1],
      importance.top_k(found.scores["attention"][1], 4))


def test_a_wrong_option_costs_no_reading_of_weights():
  with pytest.raises(UserError, match="config.k is 385; it selects among the "
                     "384 channels"):
    ttc_jax.fit(*pictures(), weights="nowhere.npz", backbone="vit_s16", k=385,
                image_size=32)


def test_programs_are_kept_where_the_command_line_keeps_them(source, tmp_path):
  """Also in a process where JAX has compiled before; "none": nowhere."""
  code = f"""
import os, warnings, jax, numpy as np
jax.jit(lambda x: x + 1)(1.0)
from ttc_jax.backbones import vit
vit.SIZES["ti"] = (32, 3, 2, 64)
import ttc_jax
show = warnings.showwarning
def fit(cache, count):  # another number compiles again
  images = np.zeros((count, 32, 32, 3), np.uint8)
  ttc_jax.fit(images, np.arange(count) % 2, weights={source!r}, epochs=1,
              method="linear", image_size=32, progress=False,
              compilation_cache=cache)
fit("none", 4)
assert not jax.config.values["jax_compilation_cache_dir"]
fit("programs", 8)
assert warnings.showwarning is show
"""
  env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path,
                 env=env | {"PYTHONPATH": os.getcwd()})
  assert any(files for _, _, files in os.walk(tmp_path / "programs"))


def test_logits_are_before_the_softmax_in_the_order_of_the_classes(result):
  images, _ = pictures(6)
  logits = result.logits(images)
  assert logits.shape == (6, 2) and logits.dtype == np.float32
  np.testing.assert_allclose(
      result.predict(images), np.exp(logits) / np.exp(logits).sum(
          1, keepdims=True), rtol=1e-5)
  assert result.classify(images) == [
      result.classes[i] for i in logits.argmax(1)]


def test_nothing_is_written_and_no_global_is_changed(source, tmp_path,
                                                     monkeypatch):
  monkeypatch.chdir(tmp_path)
  handlers = dict(os.environ), jax.config.values.copy()
  ttc_jax.fit(*pictures(), weights=source, method="linear", **SMALL)
  assert os.listdir(tmp_path) == []
  assert handlers == (dict(os.environ), jax.config.values)


def test_a_folder_of_pictures_is_enough(source, tmp_path):
  images, labels = pictures(60)
  for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
    (tmp_path / "pets" / label).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(tmp_path / "pets" / label / f"{i}.png")
  found = ttc_jax.fit(tmp_path / "pets", weights=source, method="linear",
                      cache=str(tmp_path / "cache"), **SMALL | dict(epochs=20))
  assert found.classes == ("green", "red")
  assert found.tests.keys() == {"test"} and found.tests["test"] > 90
  with pytest.raises(UserError, match="no task in data"):
    ttc_jax.fit(str(tmp_path / "cache"), weights=source, **SMALL)


def test_few_images_shrink_the_batch(source):
  found = ttc_jax.fit(*pictures(6), weights=source, method="linear",
                      **SMALL | dict(batch_size=64))
  assert len(found.history) == 2
  # The supernet trains on four fifths of the images.
  for count in (4, 10):
    found = ttc_jax.fit(*pictures(count), weights=source, method="noah",
                        **SMALL | dict(batch_size=64))
    assert found.history
  with pytest.raises(UserError, match="16 images does not divide into accum"):
    ttc_jax.fit(*pictures(40), weights=source, **SMALL | dict(accumulate=3))


def test_importing_is_quick_and_shows_a_small_api():
  assert set(ttc_jax.__all__) == {
      "__version__", "fit", "load", "predict", "serve"}
  code = ("import sys, ttc_jax; assert 'jax' not in sys.modules; "
          "print(ttc_jax.__version__)")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                        text=True, check=True)
  assert done.stdout.strip() == ttc_jax.__version__


def test_accuracy_wants_a_label_for_each_image(result):
  images, labels = pictures(8)
  for some in (labels[:1], labels[:5], []):
    with pytest.raises(UserError, match=f"8 images and {len(some)} labels"):
      result.accuracy(images, some)
  with pytest.raises(UserError, match="at least one image"):
    result.accuracy([], [])
  assert result.features([]).shape == (0, 32)
  assert result.logits([]).shape == (0, 2)


def test_arrays_of_other_libraries_and_numbers_of_numpy_are_taken(
    result, source):
  import jax.numpy as jnp
  images, labels = pictures(8)
  want = result.logits(images)
  for given in ([jnp.asarray(x) for x in images], jnp.stack(
      [jnp.asarray(x) for x in images])):
    np.testing.assert_array_equal(result.logits(given), want)
  numbers = np.array([["green", "red"].index(x) for x in labels])
  found = ttc_jax.fit(images, numbers, weights=pathlib.Path(source), **SMALL | {
      "image_size": np.int64(32), "lr": np.float32(1e-2), "epochs": 1})
  assert found.classes == ("0", "1")


def test_pictures_are_cropped_and_prepared_images_are_not():
  picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  want = images_lib.prepare(Image.fromarray(picture), 32, "bicubic/40")
  np.testing.assert_array_equal(
      images_lib.prepare_all([picture], 32, "bicubic/40")[0], want)
  assert not np.array_equal(want, picture)
  prepared = np.stack([picture])
  assert images_lib.prepare_all(prepared, 32, "bicubic/40") is prepared


def test_blocks_of_other_widths_have_a_picture():
  """As a Swin's."""
  scores = fitting.PerBlock({"fc2": {0: np.ones(4), 1: np.ones(8)}},
                            {"fc2": {0: 4, 1: 8}})
  drawn = scores.plot().axes[0].images[0].get_array()
  assert drawn.shape == (2, 8) and np.isnan(np.asarray(drawn)[0, 4:]).all()


def test_a_head_that_is_solved_and_crops_of_larger_images(source):
  """Big Vision's probe and its crops, as keys of the configuration."""
  solved = ttc_jax.fit(*pictures(), weights=source, method="fewshot_lsr",
                       l2=1.0, **SMALL)
  assert [(r["stage"], r["epoch"]) for r in solved.history] == [("lsr", 1)]
  assert solved.meta["options"] == {"l2": 1.0}
  assert solved.accuracy(*pictures(24, seed=1)) > 90
  cropped = ttc_jax.fit(
      *pictures(), weights=source, method="linear", val=pictures(24, seed=1),
      crop_from=37, head_init="zeros", optimiser="sgd", clip_norm=1.0,
      **SMALL)
  assert cropped.history[-1]["val_top1"] == pytest.approx(
      cropped.accuracy(*pictures(24, seed=1)))
