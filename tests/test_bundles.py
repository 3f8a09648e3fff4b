"""Bundles are data: sealed, bounded, without secrets, and never a command."""
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from tests import made_bundles
from tests.command import ROOT, run_command
from ttc_jax import (
  bundles,
  checkpoint,
  errors,
  export,
  files,
  predict,
  serve,
)
from ttc_jax.backbones import swin, vit
from ttc_jax.errors import UserError, printable
from ttc_jax.runs.workdir import WorkDir
from ttc_jax.weights import sources

SIZE = made_bundles.SIZE


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  monkeypatch.setitem(vit.SIZES, "ti", (32, 2, 2, 64))
  monkeypatch.setitem(swin.SIZES, "ti", (16, (2, 2), 2))


@pytest.fixture
def base(tmp_path):
  return made_bundles.save_base(str(tmp_path / "base.safetensors"), "vit_ti8")


def packed(folder, bundle, **meta):
  path = str(folder / "pets.safetensors")
  bundles.pack(path, bundle._replace(meta=bundle.meta | meta))
  return path


# --- Sealed -------------------------------------------------------------------

def test_the_digest_covers_names_dtypes_shapes_and_bytes():
  one = {"a": np.arange(6, dtype=np.float32), "b": np.int32(3)}
  digest = checkpoint.digest_arrays(one)
  assert digest == checkpoint.digest_arrays(dict(reversed(one.items())))
  assert digest == checkpoint.digest_arrays(
      one | {"a": np.arange(6, dtype=">f4")})
  for other in ({"c": one["a"], "b": one["b"]}, one | {"b": np.int64(3)},
                one | {"a": one["a"].reshape(2, 3)}, one | {"b": np.int32(2)},
                one | {"a": one["a"].view(np.int32)}, {"a": one["a"]}):
    assert checkpoint.digest_arrays(other) != digest


@pytest.mark.parametrize("write", [bundles.save, bundles.pack])
def test_a_flipped_bit_is_noticed_or_does_no_harm(write, base, tmp_path,
                                                  capfd):
  bundle = made_bundles.make(base, "linear")
  whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
  write(whole, bundle)
  assert bundles.digest(bundles.load(whole)) == bundles.digest(bundle)
  files = [os.path.join(place, name) for place, _, names in os.walk(whole)
           for name in names] or [whole]
  files = [f for f in files if os.path.getsize(f)]
  rng, noticed = random.Random(0), 0
  for _ in range(40):
    shutil.rmtree(broken, ignore_errors=True)
    (shutil.copytree if os.path.isdir(whole) else shutil.copy)(whole, broken)
    file = rng.choices(files, list(map(os.path.getsize, files)))[0]
    flip(file.replace(whole, broken), rng)
    try:
      assert bundles.digest(bundles.load(broken)) == bundles.digest(bundle)
    except UserError as error:
      assert "\n" not in str(error)
      noticed += 1
  assert noticed > 10
  assert "Traceback" not in capfd.readouterr().err


def flip(path, rng):
  with open(path, "r+b") as f:
    data = bytearray(f.read())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    f.seek(0)
    f.write(data)


@pytest.mark.parametrize("change, words", [
    (lambda meta: meta["classes"].reverse(), "is damaged"),
    (lambda meta: meta.update(normalisation="none"), "is damaged"),
    (lambda meta: meta.pop("sha256"), "has no digest")])
def test_changed_metadata_is_one_sentence(change, words, base, tmp_path):
  path = packed(tmp_path, made_bundles.make(base))
  tensors = safetensors.numpy.load_file(path)
  with safetensors.safe_open(path, framework="numpy") as file:
    meta = json.loads(file.metadata()["ttc_jax_bundle"])
  change(meta)
  safetensors.numpy.save_file(
      tensors, path, {"ttc_jax_bundle": json.dumps(meta)})
  with pytest.raises(UserError, match=words):
    bundles.load(path)


def test_saving_replaces_a_bundle_and_nothing_else(base, tmp_path, monkeypatch):
  bundle, path = made_bundles.make(base), tmp_path / "models"
  bundles.save(str(path), bundle)
  again = bundle._replace(meta=bundle.meta | {"task": "again"})
  bundles.save(str(path), again)
  assert bundles.load(path).meta["task"] == "again"
  assert [n for n in os.listdir(tmp_path) if "models" in n] == ["models"]
  known = os.replace

  def full(source, target):
    if source == bundles.temporary(str(path)):
      raise OSError(28, "No space left on device")
    known(source, target)
  with monkeypatch.context() as patch, pytest.raises(UserError):
    patch.setattr(os, "replace", full)
    bundles.save(str(path), bundle)
  assert bundles.load(path).meta["task"] == "again"
  shutil.rmtree(path)
  path.mkdir()
  bundles.save(str(path), bundle)  # an empty folder is free
  shutil.rmtree(path)
  path.mkdir()
  (path / "thesis.txt").write_text("years")
  with pytest.raises(UserError, match="is there and is no bundle"):
    bundles.save(str(path), bundle)
  assert (path / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("mine, given, fits", [
    ("a.npz:img", "b.npz:img", True), ("a.npz:img", "b.npz", True),
    ("a.npz", "b.npz:img", True), ("a.npz:img", "b.npz:teacher", False)])
def test_the_part_of_a_file_is_that_of_the_tuning(mine, given, fits):
  meta = {"weights_sha256": "0" * 64, "weights_source": mine}
  source = sources.Source(given, given, "0" * 64)
  if fits:
    assert predict.base.check("b", meta, source) == source
  else:
    with pytest.raises(UserError, match="on the part 'img' of its weights"):
      predict.base.check("b", meta, source)


def test_a_work_directory_is_no_bundle(base, tmp_path):
  bundles.save(str(tmp_path / "w" / "runs" / "a" / "bundle"),
               made_bundles.make(base))
  with pytest.raises(UserError, match=r"holds no bundle.*WORKDIR/runs/RUN"):
    bundles.load(str(tmp_path / "w"))


@pytest.mark.skipif(sys.platform != "linux", reason="paths are bytes there")
def test_a_path_that_is_not_utf8_is_one_sentence(base, tmp_path):
  folder = tmp_path / os.fsdecode(b"caf\xe9")
  folder.mkdir()
  bundle, weights = made_bundles.make(base), str(folder / "base.safetensors")
  shutil.copy(base, weights)
  for use in (lambda: bundles.load(str(folder)),
              lambda: bundles.save(str(folder / "b"), bundle),
              lambda: sources.open_source(weights),
              lambda: files.new(str(folder / "new.safetensors")),
              lambda: WorkDir(folder / "work").adopt({}, {})):
    with pytest.raises(UserError, match="is not UTF-8: rename") as error:
      use()
    printable(str(error.value)).encode()
  assert os.listdir(folder) == ["base.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="paths are bytes there")
def test_names_are_utf8_whatever_the_locale(base, tmp_path):
  path = str(tmp_path / "K\u00e4fer")
  bundles.save(path, made_bundles.make(base, "linear"))
  done = subprocess.run(
      [sys.executable, "-m", "ttc_jax.bundles", "inspect", path], cwd=ROOT,
      capture_output=True, env=os.environ | {
          "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
  assert done.returncode == 0 and done.stderr == b"", done.stderr
  assert br"/K\xe4fer" in done.stdout  # the terminal's encoding: ASCII


# --- Nothing that a bundle names is fetched -----------------------------------

@pytest.mark.parametrize("source", [
    "https://example.org/x.npz", "gs://bucket/x.npz", "hf://owner/name",
    "file:///etc/hostname", "reference://k::data:x", "simplecache::/x.npz"])
def test_a_source_is_printed_and_not_fetched(source, base, tmp_path,
                                             monkeypatch):
  path = packed(tmp_path, made_bundles.make(base), weights_source=source)
  for function in ("locate", "open_source"):  # a call would be an error
    monkeypatch.setattr(sources, function, None)
  for use in (predict.load, export.load):
    with pytest.raises(UserError, match="is never fetched") as error:
      use(path)
    assert source in str(error.value) and "--weights=" in str(error.value)


def test_a_local_file_is_used_if_its_hash_matches(base, tmp_path, monkeypatch):
  bundle = made_bundles.make(base)
  monkeypatch.chdir("/")
  assert predict.load(packed(tmp_path, bundle)).meta["task"] == "colours"
  secret = tmp_path / "secret"
  secret.write_text("s")
  for source, words in ((str(secret), "holds something else"),
                        ("/dev/zero", "does not exist here"),
                        (str(tmp_path), "does not exist here"),
                        (str(tmp_path / "none"), "does not exist here")):
    path = packed(tmp_path, bundle, weights_source=source)
    with pytest.raises(UserError, match=words) as error:
      predict.load(path)
    assert sources.sha256(str(secret)) not in str(error.value)
    # The user's own file serves, wherever the bundle says it was.
    assert predict.load(path, base).meta["task"] == "colours"
    server = serve.load(base)
    server.add("colours", path)


@pytest.mark.parametrize("source, shown", [
    ("https://me:pw@example.org:80/a/x.npz?X-Signature=ab#sha256=" + "0" * 64,
     "https://example.org:80/a/x.npz"),
    ("https://example.org/x.npz", "https://example.org/x.npz"),
    ("https://me@host/x@y.npz?token=1", "https://host/x@y.npz"),
    ("hf://owner/name@main/model.safetensors",
     "hf://owner/name@main/model.safetensors"),
    ("zip://x.npz::https://me:pw@host/a.zip?sig=1",
     "zip://x.npz::https://host/a.zip"),
    ("https://[me:pw@host/x", "https://host/x"),
    ("http://me:pw@[::1]:80/x.npz?sig=1", "http://[::1]:80/x.npz"),
    ("gs://bucket/x.npz", "gs://bucket/x.npz"),
    ("/home/me/what?/x@y.npz", "/home/me/what?/x@y.npz")])
def test_no_bundle_keeps_a_secret(source, shown, base, tmp_path):
  assert bundles.public(source) == shown
  bundle = made_bundles.make(base)
  bundle.meta.update(weights_source=source, weights=os.path.basename(source))
  path = packed(tmp_path, bundle)
  bundles.save(str(tmp_path / "bundle"), bundle)
  for found in (bundles.load(path), bundles.load(str(tmp_path / "bundle"))):
    assert found.meta["weights_source"] == shown
    assert "pw" not in json.dumps(found.meta)
    assert "sig" not in found.meta["weights"].lower()


# --- Bounds -------------------------------------------------------------------

@pytest.mark.parametrize("backbone, size, words", [
    ("vit_ti1", 9999, "patches an image"),
    ("vit_b9999", 9999, "parameters"),
    ("vit_g2", 512, "FLOPs an image"),
    ("swin_b", 8192, "patches an image")])
def test_a_model_of_absurd_size_costs_no_memory(backbone, size, words, base,
                                                tmp_path, monkeypatch):
  fields = {"window": 7} if backbone.startswith("swin") else {}
  path = packed(
      tmp_path, made_bundles.make(base, "linear"), backbone=backbone,
      image_size=size, weights_source="random", weights_sha256="random",
      fields={"gelu": "exact", "epsilon": 1e-6} | fields)
  monkeypatch.setattr(predict.base.backbones, "init", None)
  monkeypatch.setattr(predict.base.backbones, "shapes", None)
  with pytest.raises(UserError, match=words):
    predict.load(path)


def test_compressed_zeros_cost_no_memory(base, tmp_path, monkeypatch):
  path = str(tmp_path / "bundle")
  bundle = made_bundles.make(base, "linear")
  bundle.tuned["head/zeros"] = np.zeros(2 ** 22, np.float32)  # 16 MiB
  bundles.save(path, bundle)
  bundles.load(path)
  monkeypatch.setattr(bundles, "_SPARE", 2 ** 20)
  monkeypatch.setattr(checkpoint, "_unfill", None)  # read nothing
  with pytest.raises(UserError, match="declares 16,[0-9,]+ bytes of arrays in"):
    bundles.load(path)


@pytest.mark.parametrize("value", [{}, {"a": {}}, [], "x\ny", None, 1e400])
@pytest.mark.parametrize("key", ["position", "k", "score", "scale"])
def test_forged_options_are_one_line(key, value, base, tmp_path):
  bundle = made_bundles.make(base)
  path = packed(tmp_path, bundle,
                options=bundle.meta["options"] | {key: value})
  try:
    predict.on_base(path, base)
  except UserError as error:
    assert "\n" not in str(error) and len(str(error)) < 500


def test_real_models_are_within_the_bounds():
  for name, size in (("vit_g14", 518), ("vit_b8", 768), ("vit_b16", 1024),
                     ("swin_l", 1024), ("vit_so400m14", 896)):
    module = predict.base.backbones.make(name, size)
    predict.base._check_size("x", {}, module)


# --- Normalisation ------------------------------------------------------------

def test_a_normalisation_may_be_numbers(base, tmp_path):
  numbers = "0.485,0.456,0.406/0.229,0.224,0.225"
  rng = np.random.default_rng(0)
  pictures = rng.integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
  found = []
  for how in ("imagenet", numbers):
    path = packed(tmp_path, made_bundles.make(base, normalisation=how))
    found.append(predict.load(path).predict(pictures))
    server = serve.load(base)
    server.add("x", path)
    np.testing.assert_allclose(
        server.predict(pictures, task="x"), found[-1], atol=1e-5)
    assert export.preprocessing(bundles.load(path).meta)["mean"] == (
        [0.485, 0.456, 0.406])
  np.testing.assert_allclose(*found, atol=1e-6)


# --- What is printed ----------------------------------------------------------

@pytest.mark.parametrize("text, shown", [
    ("a\x1b]0;x\x07\n\tb", "a\\x1b]0;x\\x07\\n\\tb"),
    ("\u202egpj.exe", "\\u202egpj.exe"), ("a\u2028b", "a\\u2028b"),
    ("\udc80", "\\udc80"), ("\x9b31m", "\\x9b31m"),
    ("na\u00efve \u732b \U0001f408 a|b\\c", None)])
def test_printable(text, shown):
  assert printable(text) == (shown or text)
  assert errors.printable(printable(text)) == printable(text)


def test_inspect_and_cards_escape_what_a_bundle_says(base, tmp_path):
  bad = "\x1b[2Jcat|dog\nowned"
  path = packed(tmp_path, made_bundles.make(base, classes=(bad, "b")),
                task=bad, group=bad)
  done = run_command("bundles", "inspect", path)
  assert done.returncode == 0 and "\x1b" not in done.stdout
  assert "\nowned" not in done.stdout
  out = export.write(export.load(path), export.targets()["stablehlo"],
                     str(tmp_path / "out"))
  with open(os.path.join(out, "README.md"), encoding="utf-8") as f:
    card = f.read()
  assert "\x1b" not in card and "\nowned" not in card
