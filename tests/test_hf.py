"""data=hf:NAME, on folders and parquet files that the tests make."""
import os
import sys

import numpy as np
import pytest

from tests.command import run_command
from tests.test_data import counts, fill, named, picture
from ttc_jax import tasks
from ttc_jax.errors import UserError
from ttc_jax.tasks import hf, images


@pytest.fixture(scope="module")
def library(tmp_path_factory):
  patch = pytest.MonkeyPatch()
  home = tmp_path_factory.mktemp("hub")
  for key, value in (("HF_HOME", home), ("HF_HUB_OFFLINE", 1),
                     ("HF_DATASETS_OFFLINE", 1)):
    patch.setenv(key, str(value))
  yield pytest.importorskip("datasets")
  patch.undo()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def pets(tmp_path):
  root = tmp_path / "pets"
  for i, split in enumerate(("train", "test")):
    fill(root / split, {"cat": 10, "dog": 7}, start=100 * i)
  return root


def load(data, name="pets"):
  return tasks.load(name, size=6, data=f"hf:{data}")


def pixels(task, *parts):
  return sorted((image.tobytes(), int(label)) for part in parts
                for image, label in zip(*task.split(part), strict=True))


def as_parquet(library, pets, folder, **more):
  for split in ("train", "test"):
    rows = [(path.read_bytes(), i) for i, c in enumerate(("cat", "dog"))
            for path in sorted((pets / split / c).iterdir())]
    features = library.Features({
        "image": library.Image(),
        "label": library.ClassLabel(names=["cat", "dog"])})
    found = library.Dataset.from_dict(
        {"image": [{"bytes": b, "path": None} for b, _ in rows],
         "label": [i for _, i in rows]}, features=features)
    for name, values in more.items():
      found = found.add_column(name, values(len(rows)))
    folder.mkdir(exist_ok=True)
    found.to_parquet(folder / f"{split}-00000-of-00001.parquet")
  return folder


def test_a_folder_parquet_and_pictures_have_the_same_pixels(
    library, pets, tmp_path):
  want = tasks.load("pets", size=6, data=str(pets))
  for path in pets.glob("ttc_jax_*"):
    path.unlink()
  parquet = as_parquet(library, pets, tmp_path / "parquet")
  for name, data in (("pets", pets), ("parquet", parquet)):
    assert tasks.in_data(f"hf:{data}") == (name,)
    task = load(data, name)
    assert task.classes == ("cat", "dog") and task.tests == ("test",)
    assert counts(task) == counts(want)
    assert pixels(task, "train", "val") == pixels(want, "trainval")
    assert pixels(task, "test") == pixels(want, "test")
    assert task.notes and str(tmp_path / "xdg") in task.notes[0]
    again = load(data, name)
    assert again.digest == task.digest
    assert [again.split(p).digest for p in again.splits] == [
        task.split(p).digest for p in task.splits]


def test_what_save_to_disk_wrote_and_one_file_are_read(library, pets, tmp_path):
  parquet = as_parquet(library, pets, tmp_path / "parquet")
  file = parquet / "train-00000-of-00001.parquet"
  task = load(file, "train-00000-of-00001")
  assert sum(counts(task)["train"]) + sum(counts(task)["val"]) + sum(
      counts(task)["test"]) == 17
  library.Dataset.from_parquet(str(file)).save_to_disk(tmp_path / "saved")
  saved = load(tmp_path / "saved", "saved")
  assert pixels(saved, *saved.tests, "trainval") == pixels(
      task, *task.tests, "trainval")


def test_options_choose_columns_and_splits(library, pets, tmp_path):
  parquet = as_parquet(
      library, pets, tmp_path / "parquet",
      breed=lambda n: ["xyz"[i % 3] for i in range(n)],
      secret=lambda n: [i % 2 if n < 99 else -1 for i in range(n)])
  task = load(f"{parquet}?label=breed", "parquet")
  assert task.classes == ("x", "y", "z")
  rows = [int(name.split("/")[1]) for name in named(task, "trainval")]
  assert (task.labels["trainval"] == np.array(rows) % 3).all()
  task = load(f"{parquet}?train=test&test=train&label=secret", "parquet")
  assert task.classes == ("0", "1")


@pytest.mark.parametrize("data, word", [
    ("", "names no data set"), ("/nowhere/pets", "cannot be loaded"),
    ("{parquet}?labels=x", "did you mean label"),
    ("{parquet}?label=lable", "did you mean label"),
    ("{parquet}?train=trian", "did you mean train"),
    ("{parquet}?image=imago", "did you mean image"),
    ("{parquet}?test=train", "which one is trained on"),
    ("{parquet}?val=test&test=test", "test is both val and test"),
    ("{parquet}?label=odd", "split test has 17 images without a class"),
    ("{texts}", "no columns of images"),
])
def test_what_is_wrong_is_one_sentence(library, pets, tmp_path, data, word):
  parquet = as_parquet(library, pets, tmp_path / "parquet")
  for split, number in (("train", 1), ("test", 5)):
    path = str(parquet / f"{split}-00000-of-00001.parquet")
    found = library.Dataset.from_parquet(path)
    found.add_column("odd", [number + i % 2 for i in range(17)]
                     ).to_parquet(path)
  (tmp_path / "texts").mkdir()
  library.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(
      tmp_path / "texts" / "train.parquet")
  given = "hf:" + data.format(parquet=parquet, texts=tmp_path / "texts")
  with pytest.raises(UserError, match=word) as error:
    tasks.find(tasks.in_data(given)[0], given)
  assert "\n" not in str(error.value)


def test_a_damaged_image_is_named(library, pets, tmp_path):
  parquet = as_parquet(library, pets, tmp_path / "parquet")
  path = str(parquet / "test-00000-of-00001.parquet")
  found = library.Dataset.from_parquet(path)
  rows = [{"bytes": b"?", "path": None}] * 2 + [
      found.cast_column("image", library.Image(decode=False))[i]["image"]
      for i in range(2, 17)]
  library.Dataset.from_dict(
      {"image": rows, "label": found["label"][:]}, features=found.features
  ).to_parquet(path)
  with pytest.raises(UserError, match="2 images: test/[01] of .*test/[01]"):
    load(parquet, "parquet").split("test")


def test_without_the_library_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(UserError, match=r"pip install 'ttc_jax\[hf\]'"):
    load("beans", "beans")


def test_the_commands_know_it(library, pets):
  del library
  picture(pets / "train" / "cat" / "more.png", 9)
  done = run_command("tasks", "check", f"--data=hf:{pets}")
  assert done.returncode == 0, done.stderr
  assert "all well" in done.stdout and "2 of 2 classes" in done.stdout
  done = run_command("tasks", "list", f"--data=hf:{pets}")
  assert done.stdout.splitlines()[1].split() == ["pets", "Other", "2", "17",
                                                 "hf"]


def paths_alone(library, folder, paths):
  """Parquet files of rows that hold no bytes, only where the images lie."""
  folder.mkdir(exist_ok=True)
  found = library.Dataset.from_dict({
      "image": [{"bytes": None, "path": str(path)} for path in paths],
      "label": [i % 2 for i in range(len(paths))]},
      features=library.Features({
          "image": library.Image(),
          "label": library.ClassLabel(names=["cat", "dog"])}))
  found.to_parquet(folder / "named.parquet")
  return folder / "named.parquet"


def test_images_that_rows_only_name_are_read_anew_when_they_change(
    library, tmp_path):
  folder = tmp_path / "named"
  files = [folder / "images" / f"{i}.png" for i in range(24)]
  for i, path in enumerate(files):
    picture(path, i)
  data = paths_alone(library, folder, files)
  old = load(data, "named")
  before, digest = pixels(old, "trainval", "test"), old.split("train").digest
  for i, path in enumerate(files):
    picture(path, 100 + i)
  new = load(data, "named")
  assert new.split("train").digest != digest
  assert pixels(new, "trainval", "test") != before


@pytest.mark.parametrize("where", ["outside/x.png", "rows/../outside/x.png",
                                   "rows/folder"])
def test_rows_name_no_image_outside_of_their_data_set(
    library, tmp_path, where):
  (tmp_path / "rows" / "folder").mkdir(parents=True)
  picture(tmp_path / "outside" / "x.png", 0)
  data = paths_alone(library, tmp_path / "rows", [tmp_path / where] * 24)
  with pytest.raises(UserError, match="not in its folder|is no file"):
    load(data, "named").split("train")


def test_a_link_to_a_data_set_is_the_data_set(library, pets, tmp_path):
  (tmp_path / "link").symlink_to(pets.parent)
  assert pixels(load(tmp_path / "link" / "pets"), "trainval") == pixels(
      load(pets), "trainval")


def test_an_image_is_hashed_for_its_own_parts_alone(
    library, pets, monkeypatch):
  """Once in train or val and once in trainval, or once in test."""
  hashed = []
  digest = images.file_digest
  monkeypatch.setattr(images, "file_digest",
                      lambda path: hashed.append(path) or digest(path))
  task = load(pets)
  for split in task.splits:
    task.split(split)
  assert max(map(hashed.count, hashed)) <= 2 and len({*hashed}) == 34


def test_the_time_of_a_download_is_no_part_of_a_stream(
    library, pets, tmp_path, monkeypatch):
  """The user's own images have theirs; what the library fetched has none."""
  files = sorted(pets.rglob("*.png"))
  data = paths_alone(library, pets.parent, files)

  def digest(time):
    for path in files:
      os.utime(path, (time, time))
    return tasks.load("named", size=6, data=f"hf:{data}",
                      cache_gib=0).split("train").digest
  assert digest(1) != digest(2)
  monkeypatch.setattr(hf, "_roots", lambda data: (
      (), (f"{pets}{os.sep}",)))
  assert digest(1) == digest(2)
