"""What leaves: other libraries' own models give our logits.

Tiny backbones under the real names; every leaf that a method tunes is random.
"""
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from tests import made_bundles
from tests.conftest import import_transformers
from tests.torch_models import import_timm
from ttc_jax import bundles, export, parallel, predict
from ttc_jax.backbones import swin, vit
from ttc_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
SIZE = made_bundles.SIZE
TARGETS = export.targets()
EXACT = {"gelu": "exact"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  monkeypatch.setitem(vit.SIZES, "ti", (32, 2, 2, 64))
  monkeypatch.setitem(swin.SIZES, "ti", (16, (2, 2), 2))


def save(folder, method="ttc", backbone="vit_ti8", fields=EXACT, **more):
  """A bundle's path, and beside it its base weights."""
  weights = made_bundles.save_base(
      str(folder / "base.safetensors"), backbone, **fields)
  path = str(folder / "bundle")
  bundles.save(path, made_bundles.make(weights, method, backbone, **more))
  return path


def pictures(count=5):
  rng = np.random.default_rng(5)
  return rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def our_logits(bundle, images):
  """Of the model as it was tuned: nothing merged, nothing exported."""
  tuned = predict.load(bundle, merge=False)
  params, buffers = map(
      parallel.unreplicate, (tuned.params, tuned.buffers))
  return np.asarray(jax.jit(tuned.model.logits)(params, images, buffers))


def exported(bundle, target, out):
  return pathlib.Path(export.write(
      export.load(bundle), TARGETS[target], str(out)))


def code_of(folder):
  return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(),
                   re.DOTALL)[1]


def card_logits(folder, monkeypatch, image):
  """What the lines of the card give."""
  monkeypatch.chdir(folder.parent)
  Image.fromarray(image).convert("RGBA").save("image.png")
  space = {}
  exec(compile(code_of(folder), "README.md", "exec"), space)
  logits = space["logits"]
  return np.asarray(logits.detach() if hasattr(logits, "detach") else logits)


def check_close(found, expected, what):
  difference = np.abs(found - expected).max()
  print(f"{what}: largest difference {difference:.1e} of "
        f"{np.abs(expected).max():.1f}")
  assert found.shape == expected.shape and difference < 1e-4, what


# --- Programs -----------------------------------------------------------------

def run_stablehlo(folder, images):
  program = jax.export.deserialize(
      (folder / "model.jax_export").read_bytes())
  return np.asarray(program.call(images))


def run_onnx(folder, images):
  runtime = pytest.importorskip("onnxruntime")
  session = runtime.InferenceSession(str(folder / "model.onnx"))
  return session.run(["logits"], {"images": images})[0]


def run_tf(folder, images):
  tf = pytest.importorskip("tensorflow")
  served = tf.saved_model.load(str(folder)).signatures["serving_default"]
  return served(images=tf.constant(images))["logits"].numpy()


PROGRAMS = {"stablehlo": run_stablehlo, "onnx": run_onnx,
            "tf-saved-model": run_tf}


def need(target):
  for library in TARGETS[target].libraries:
    pytest.importorskip(library)


@pytest.mark.sweep(keep=2)
@pytest.mark.parametrize("backbone, method", [
    ("vit_ti8", "ttc"), ("vit_ti8", "vpt_deep"), ("swin_ti", "adapter")])
@pytest.mark.parametrize("target", PROGRAMS)
def test_programs(tmp_path, monkeypatch, target, backbone, method):
  need(target)
  bundle = save(tmp_path, method, backbone, normalisation="imagenet")
  folder = exported(bundle, target, tmp_path / "out")
  images = pictures()
  expected = our_logits(bundle, images)
  check_close(PROGRAMS[target](folder, images), expected,
              f"{target} {backbone} {method}")
  # The card's lines, and another number of images.
  check_close(card_logits(folder, monkeypatch, images[0]), expected[:1],
              f"{target}'s card")


def test_a_program_needs_jax_alone(tmp_path):
  bundle = save(tmp_path)
  folder = exported(bundle, "stablehlo", tmp_path / "out")
  np.save(tmp_path / "images.npy", pictures())
  code = """
import sys
import jax.export, numpy as np, pathlib
program = jax.export.deserialize(
    pathlib.Path("out/model.jax_export").read_bytes())
np.save("logits.npy", program.call(np.load("images.npy")))
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"flax", "ttc_jax", "optax"}, loaded
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True,
                        capture_output=True, timeout=120,
                        env={**os.environ, "PYTHONPATH": ""})
  assert done.returncode == 0, done.stderr
  check_close(np.load(tmp_path / "logits.npy"),
              our_logits(bundle, pictures()), "another process")
  program = jax.export.deserialize(
      (folder / "model.jax_export").read_bytes())
  assert set(program.platforms) == {"cpu", "cuda", "tpu"}


# --- Other libraries' models --------------------------------------------------

VIT_S = [("vit_ti8", {"gelu": "exact", "epsilon": 1e-6}, m)
         for m in ("ttc", "ssf", "lora", "layernorm", "full")]
SCALED = ("vit_ti8", {"gelu": "tanh", "epsilon": 1e-6, "layer_scale": True},
          "ttc")
DINOV3 = ("vit_ti8", {"gelu": "exact", "epsilon": 1e-5, "registers": 2,
                      "rope": 100.0, "layer_scale": True}, "ttc")
REGISTERS = ("vit_ti8", {"gelu": "exact", "registers": 2, "layer_scale": True},
             "ttc")
SIGLIP = ("vit_ti8", {"gelu": "tanh", "pool": "map"}, "layernorm")
CLIP = ("vit_ti8", {"gelu": "quick", "pre_norm": True, "epsilon": 1e-5}, "lora")
FC_NORM = ("vit_ti8", {"gelu": "exact", "pool": "gap", "pool_norm": True,
                       "final_norm": False}, "layernorm")
SWIN = ("swin_ti", {"window": 4}, "ttc")


@pytest.mark.parametrize("backbone, fields, method", [
    *VIT_S, SCALED, SWIN, DINOV3, SIGLIP, CLIP, FC_NORM,
    ("vit_ti8", {"gelu": "exact", "pool": "gap"}, "layernorm")])
@pytest.mark.sweep(keep=3)
def test_timm_s_own_model(tmp_path, monkeypatch, backbone, fields, method):
  import_timm()
  bundle = save(tmp_path, method, backbone, fields)
  exported(bundle, "timm", tmp_path / "out")
  image = pictures()[0]
  check_close(card_logits(tmp_path / "out", monkeypatch, image),
              our_logits(bundle, image[None]), f"timm {backbone} {method}")


@pytest.mark.parametrize("backbone, fields, method", [
    *VIT_S, SCALED, SWIN, REGISTERS])
@pytest.mark.sweep(keep=4)
def test_hugging_face_s_own_model(tmp_path, monkeypatch, backbone, fields,
                                  method):
  import_transformers()
  bundle = save(tmp_path, method, backbone, fields, normalisation="imagenet")
  exported(bundle, "hf", tmp_path / "out")
  image = pictures()[0]
  check_close(card_logits(tmp_path / "out", monkeypatch, image),
              our_logits(bundle, image[None]), f"hf {backbone} {method}")


@pytest.mark.parametrize("pool", ["cls", "gap"])
@pytest.mark.sweep(keep=1)
def test_big_vision_s_file(tmp_path, monkeypatch, pool):
  bundle = save(tmp_path, "ssf", fields={"gelu": "tanh", "pool": pool})
  exported(bundle, "bigvision", tmp_path / "out")
  image = pictures()[0]
  check_close(card_logits(tmp_path / "out", monkeypatch, image),
              our_logits(bundle, image[None]), f"bigvision {pool}")


@pytest.mark.parametrize("target, more, words", [
    ("timm", {"method": "adapter"}, "its activation"),
    ("hf", {"method": "vpt_deep"}, "prompts are tokens"),
    ("hf", {"fields": {"gelu": "exact", "pool": "gap"}}, "pool='gap'"),
    ("bigvision", {"fields": EXACT}, "gelu='exact'"),
    ("bigvision", {"backbone": "swin_ti"}, "no Swin"),
    ("timm", {"backbone": "swin_ti"}, "windows of 7 are padded"),
    ("timm", {"backbone": "swin_ti", "fields": {"window": 8}}, "windows 8"),
    ("hf", {"backbone": "swin_ti"}, "windows 7")])
def test_what_a_target_cannot_hold_is_one_sentence(tmp_path, target, more,
                                                   words):
  bundle = save(tmp_path, **more)
  with pytest.raises(UserError, match=words):
    exported(bundle, target, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_nor_left_behind(tmp_path, monkeypatch):
  bundle = save(tmp_path)
  folder = exported(bundle, "timm", tmp_path / "out")
  note = json.loads((folder / "ttc_jax.json").read_text())
  assert note["bundle"]["weights_source"] == "base.safetensors"
  assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {
      0o666 & ~current_umask()}
  (folder / "notes.txt").write_text("precious")
  for out in (folder, folder / "notes.txt", folder / "notes.txt" / "x"):
    with pytest.raises(UserError, match="another path"):
      exported(bundle, "timm", out)
  assert (folder / "notes.txt").read_text() == "precious"
  there = sorted(tmp_path.iterdir())
  monkeypatch.setitem(
      TARGETS, "timm", TARGETS["timm"]._replace(write=lambda *args: 1 / 0))
  with pytest.raises(ZeroDivisionError):
    exported(bundle, "timm", tmp_path / "another")
  assert sorted(tmp_path.iterdir()) == there


def test_sigterm_tidies_up():
  code = """
import os, signal, time
from ttc_jax import cli

def main(argv):
  try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
  finally:
    print("tidied")
cli.run(main)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                        text=True, timeout=120)
  assert (done.returncode, done.stdout) == (143, "tidied\n"), done.stderr


def current_umask():
  mask = os.umask(0)
  os.umask(mask)
  return mask


def test_an_odd_name_of_a_folder(tmp_path, monkeypatch):
  bundle = save(tmp_path)
  image = pictures()[0]
  folder = exported(bundle, "stablehlo", tmp_path / 'it"s {here}')
  check_close(card_logits(folder, monkeypatch, image),
              our_logits(bundle, image[None]), "an odd name")


TOY = """
import os

import numpy as np

from ttc_jax import export


def write(model, folder):
  head = {n: np.asarray(x) for n, x in model.params["head"].items()}
  np.savez(os.path.join(folder, "head.npz"), **head)


TARGET = export.Target(
    "toy", write, 'head = np.load("{folder}/head.npz")', merged=False,
    hub_library="numpy", limits=("It has no backbone.",))
"""


def test_a_target_is_one_new_file(tmp_path, monkeypatch, capsys):
  (tmp_path / "plugin").mkdir()
  (tmp_path / "plugin" / "toy_of_a_test.py").write_text(TOY)
  monkeypatch.setattr(
      export, "__path__", [*export.__path__, str(tmp_path / "plugin")])
  bundle = save(tmp_path, "vpt_deep")
  target = export.targets()["toy"]
  folder = pathlib.Path(export.write(
      export.load(bundle), target, str(tmp_path / "out")))
  assert sorted(os.listdir(folder)) == ["README.md", "head.npz", "ttc_jax.json"]
  card = (folder / "README.md").read_text()
  for words in ("It has no backbone.", 'library_name: "numpy"',
                'np.load("out/head.npz")', "exported for `toy`"):
    assert words in card
  assert json.loads((folder / "ttc_jax.json").read_text())["target"] == "toy"
  # Others name it among those that hold any computation.
  with pytest.raises(UserError, match="--to=stablehlo or .*--to=toy holds"):
    exported(bundle, "timm", tmp_path / "another")


def test_the_card_shows_the_preprocessing_and_a_program_s_limits(tmp_path):
  bundle = save(tmp_path, normalisation="imagenet")
  card = (exported(bundle, "hf", tmp_path / "out") / "README.md").read_text()
  assert "mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225]" in card
  assert "resizes with PyTorch" in card


def test_a_card_of_an_unknown_past_and_odd_names(tmp_path):
  gone = dict.fromkeys(bundles._OPTIONAL.keys() - {"weights", "seed"})
  bundle = save(tmp_path, **gone | dict(
      task="<img src=x>|", classes=["<b>", "a|b", "c"]))
  card = (exported(bundle, "hf", tmp_path / "out") / "README.md").read_text()
  body = card.rpartition("\n---\n")[2]
  assert r"\<img src=x>\|" in body and r"\<b>, a\|b, c" in body
  assert not re.search(r"(?<!\\)<", body) and "None" not in body


def test_big_vision_s_card_crops_the_centre(tmp_path, monkeypatch):
  """A model of Big Vision's recipe: the short side, then the centre."""
  bundle = save(tmp_path, fields={"gelu": "tanh"},
                resample=f"bilinear/{SIZE + 8}")
  folder = exported(bundle, "bigvision", tmp_path / "out")
  image = np.random.default_rng(0).integers(
      0, 256, (SIZE + 9, SIZE + 20, 3), dtype=np.uint8)
  found = card_logits(folder, monkeypatch, image)
  expected = predict.load(bundle, merge=False).logits([image])
  check_close(found, expected, "bigvision's card")
  assert f"the short side to {SIZE + 8} and the centre" in (
      folder / "README.md").read_text()
  with pytest.raises(UserError, match="--to=timm holds no centre crop"):
    exported(bundle, "timm", tmp_path / "other")
