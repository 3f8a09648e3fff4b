"""The command that answers for images: files, folders, damaged ones."""
import csv
import io
import json
import os

import numpy as np
from PIL import Image
import pytest

from tests import made_bundles
from tests.command import run_command
from ttc_jax import bundles, predict
from ttc_jax.backbones import vit
from ttc_jax.errors import UserError
from ttc_jax.predict.__main__ import image_paths

SIZE = made_bundles.SIZE


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  monkeypatch.setitem(vit.SIZES, "ti", (32, 2, 2, 64))


@pytest.fixture
def bundle(tmp_path):
  base = made_bundles.save_base(str(tmp_path / "base.safetensors"), "vit_ti8")
  path = str(tmp_path / "pets.safetensors")
  bundles.pack(path, made_bundles.make(
      base, "linear", classes=("\x1b]0;owned\x07a\t1.0\nb.png", "=1+1", "c")))
  return path


@pytest.fixture
def folder(tmp_path):
  """Six images; two files are damaged, three are no images by their names."""
  rng, place = np.random.default_rng(0), tmp_path / "images"
  for name in ("b.png", "a.JPG", "deep/er/c.webp", "cut.png", "\n.png",
               ".hidden.png"):
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)).save(
        place / name)
  cut = (place / "cut.png").read_bytes()
  (place / "cut.png").write_bytes(cut[:len(cut) // 2])
  (place / "empty.png").write_bytes(b"")
  (place / "notes.txt").write_text("no image")
  os.symlink(place, place / "deep" / "around")
  return place


def command(bundle, *args):
  return run_command("predict", f"--bundle={bundle}", *args)


def test_a_folder_is_answered_and_all_damage_is_listed(bundle, folder):
  done = command(bundle, folder)
  assert done.returncode == 1
  lines = [line.split("\t") for line in done.stdout.splitlines()]
  assert [os.path.relpath(line[0], folder) for line in lines] == [
      "\\n.png", "a.JPG", "b.png", "deep/er/c.webp"]
  assert all(len(line) == 3 for line in lines)
  assert "\x1b" not in done.stdout
  *errors, count = done.stderr.splitlines()
  assert len(errors) == 2
  assert "cut.png" in errors[0] and "empty.png" in errors[1]
  assert count == "error: 2 of 6 images cannot be read"


def test_a_folder_that_cannot_be_read_is_not_passed_over(
    monkeypatch, tmp_path):
  (tmp_path / "a").mkdir()
  real = os.scandir

  def scandir(path):
    if os.fspath(path).endswith("a"):
      raise PermissionError(13, "Permission denied", path)
    return real(path)
  monkeypatch.setattr(os, "scandir", scandir)
  with pytest.raises(UserError, match="a' cannot be read .Permission denied"):
    image_paths([str(tmp_path)])


def test_the_first_20_of_many_damaged_images(bundle, tmp_path):
  names = [str(tmp_path / f"{i:02}.png") for i in range(23)]
  done = command(bundle, *names)
  assert (done.returncode, done.stdout) == (1, "")
  *errors, count = done.stderr.splitlines()
  assert len(errors) == 20 and names[19] in errors[-1]
  assert count.endswith(
      "23 of 23 images cannot be read; the first 20 are listed")


def test_json_and_csv_hold_what_the_library_says(bundle, folder):
  tuned = predict.load(bundle)
  image = np.asarray(Image.open(folder / "b.png").resize((SIZE, SIZE)))
  want = tuned.predict(image[None])[0]
  done = command(bundle, "--json", "--top=3", folder / "b.png",
                 folder / "cut.png")
  good, bad = json.loads(done.stdout)
  assert done.returncode == 1 and bad.keys() == {"image", "error"}
  order = np.argsort(-want)
  assert [c["class"] for c in good["classes"]] == [
      tuned.meta["classes"][i] for i in order]
  np.testing.assert_allclose(
      [c["probability"] for c in good["classes"]], want[order], atol=1e-6)
  done = command(bundle, "--csv", "--top=3", folder / "b.png")
  assert done.returncode == 0 and done.stderr == ""
  header, *rows = csv.reader(io.StringIO(done.stdout))
  assert header == ["image", "rank", "class", "probability"]
  assert [row[1] for row in rows] == ["1", "2", "3"]
  assert "'=1+1" in [row[2] for row in rows] and len(rows) == 3
  np.testing.assert_allclose(
      [float(row[3]) for row in rows], want[order], atol=1e-6)


def test_many_batches_give_the_same_answers(bundle, folder, monkeypatch):
  from ttc_jax.predict import __main__ as main
  paths = main.image_paths([str(folder)])
  tuned = predict.load(bundle)
  whole = list(main.answers(tuned, paths, 2))
  monkeypatch.setattr(main, "_BATCH", 2)
  for one, other in zip(whole, main.answers(tuned, paths, 2), strict=True):
    assert (one.path, one.error) == (other.path, other.error)
    assert [n for n, _ in one.classes] == [n for n, _ in other.classes]
    np.testing.assert_allclose([p for _, p in one.classes],
                               [p for _, p in other.classes], atol=1e-6)


@pytest.mark.parametrize("args, words", [
    (["--json", "--csv", "x.png"], "not both"),
    ([], "at least one image or folder"),
    (["."], "no image in the folder '.'"),
    (["--frozen_dtype=int4", os.devnull], "unknown frozen_dtype 'int4'")])
def test_wrong_arguments_are_one_sentence(args, words, bundle, tmp_path):
  (tmp_path / "nothing").mkdir()
  done = run_command("predict", f"--bundle={bundle}", *args,
                     cwd=tmp_path / "nothing")
  assert done.returncode == 2 and words in done.stderr
  assert done.stderr.count("\n") == 1
