"""data=gs://: what a task needs is copied, once, and is the same task."""
import os
import pathlib
import shutil
from unittest import mock

import pytest

from tests import gcs_emulator
from tests.test_data import fill
from ttc_jax import errors, tasks
from ttc_jax.tasks import bucket


@pytest.fixture
def objects(tmp_path, monkeypatch):
  """The objects of a bucket that gs://b is."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  bucket._objects.cache_clear()
  bucket._whole.clear()
  with gcs_emulator.running() as (objects, environment):
    with mock.patch.dict(os.environ, environment):
      yield objects
  bucket._objects.cache_clear()


def upload(objects, folder, prefix):
  for path in sorted(pathlib.Path(folder).rglob("*")):
    if path.is_file():
      objects.put(f"{prefix}/{path.relative_to(folder).as_posix()}",
                  path.read_bytes())


def lists(folder, names=("one", "two")):
  """A folder of tasks in the vtab-1k format."""
  for name in names:
    fill(folder / name)
    (folder / name / "cat" / "cat 1.png").rename(
        folder / name / "cat" / "cat[1]*.png")
    paths = sorted(p.relative_to(folder / name).as_posix()
                   for p in (folder / name).rglob("*.png"))
    lines = [f"{path} {i % 2}" for i, path in enumerate(paths)]
    for role, part in (("train800", lines[:8]), ("val200", lines[8:12]),
                       ("train800val200", lines[:12]), ("test", lines[12:])):
      (folder / name / f"{role}.txt").write_text("\n".join(part))
  return folder


def same(one, two):
  for split in one.splits:
    assert (one.split(split).images == two.split(split).images).all()
    assert (one.labels[split] == two.labels[split]).all()
  assert one.classes == two.classes


def test_a_task_of_lists_is_the_task_of_the_folder(objects, tmp_path):
  folder = lists(tmp_path / "tasks")
  upload(objects, folder, "some/tasks")
  assert set(tasks.in_data("gs://b/some/tasks")) == {"one", "two"}
  same(tasks.load("one", size=8, data="gs://b/some/tasks"),
       tasks.load("one", size=8, data=str(folder)))
  copied = list((tmp_path / "cache").rglob("*.png"))
  assert copied and not [p for p in copied if "two" in p.parts]


def test_pictures_and_their_zip_are_tasks(objects, tmp_path):
  pets = fill(tmp_path / "pets")
  upload(objects, pets, "pets")
  archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path,
                                "pets")
  objects.put("x/pets.zip", pathlib.Path(archive).read_bytes())
  want = tasks.load("pets", size=8, data=str(pets))
  same(tasks.load("pets", size=8, data="gs://b/pets"), want)
  same(tasks.load("pets", size=8, data="gs://b/x/pets.zip"), want)


def test_what_was_copied_is_not_copied_again_unless_it_changed(
    objects, tmp_path, monkeypatch):
  folder = lists(tmp_path / "tasks", ["one"])
  upload(objects, folder, "t")
  copied = []
  get = bucket._get

  def watched(data, root, found, names):
    copied.extend(names)
    return get(data, root, found, names)
  monkeypatch.setattr(bucket, "_get", watched)

  def again():
    copied.clear()
    bucket._objects.cache_clear()
    bucket._whole.clear()
    tasks.load("one", size=8, data="gs://b/t")
    return sorted(copied)
  assert len(again()) == 24 and again() == []
  objects.put("t/one/test.txt", objects.contents["t/one/test.txt"][1] + b"\n")
  assert again() == ["one/test.txt"]
  lost = next((tmp_path / "cache").rglob("cat 0.png"))
  lost.unlink()
  assert again() == ["one/cat/cat 0.png"]


def test_what_left_the_bucket_leaves_the_copy(objects, tmp_path):
  pets = fill(tmp_path / "pets")
  upload(objects, pets, "pets")
  tasks.load("pets", size=8, data="gs://b/pets")
  for path in (tmp_path / "cache").rglob("ttc_jax_*list.txt"):
    path.unlink()  # for a new division
  bucket._objects.cache_clear()
  bucket._whole.clear()
  one, other, *_ = sorted(pets.rglob("*.png"))
  one.unlink()
  other.rename(other.with_name("renamed.png"))
  for path in (one, other):
    del objects.contents[f"pets/{path.relative_to(pets).as_posix()}"]
  upload(objects, pets, "pets")
  same(tasks.load("pets", size=8, data="gs://b/pets"),
       tasks.load("pets", size=8, data=str(pets)))
  copied, = (tmp_path / "cache").rglob("buckets/*/pets")
  assert {p.relative_to(copied) for p in copied.rglob("*.png")} == {
      p.relative_to(pets) for p in pets.rglob("*.png")}


def test_the_lists_of_a_division_stay_beside_the_copy(objects, tmp_path):
  """So that no image that was trained on is ever tested on."""
  pets = fill(tmp_path / "pets")
  upload(objects, pets, "pets")

  def again():
    bucket._objects.cache_clear()
    bucket._whole.clear()
    return tasks.load("pets", size=8, data="gs://b/pets")
  before = again()
  lists_ = sorted((tmp_path / "cache").rglob("ttc_jax_*list.txt"))
  assert len(lists_) == 3
  same(again(), before)
  gone, = pets.rglob("cat 3.png")
  del objects.contents[f"pets/{gone.relative_to(pets).as_posix()}"]
  with pytest.raises(errors.UserError, match="cat 3.png"):
    again()
  assert sorted((tmp_path / "cache").rglob("ttc_jax_*list.txt")) == lists_


@pytest.mark.parametrize("name", ["t/../../x.txt", "t/a\\b.txt"])
def test_a_name_that_leads_elsewhere_is_refused(name, objects):
  objects.put(name, b"x")
  with pytest.raises(errors.UserError, match="no path of a file: rename it"):
    tasks.in_data("gs://b/t")


def test_an_empty_address_is_one_sentence(objects):
  with pytest.raises(errors.UserError, match="gs://b/none holds nothing"):
    tasks.load("pets", size=8, data="gs://b/none")
