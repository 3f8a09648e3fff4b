"""Domains of a folder: what is trained on and what is tested on."""
import os

import numpy as np
from PIL import Image
import pytest

from ttc_jax import tasks
from ttc_jax.errors import UserError
from ttc_jax.tasks import domains

NAMES = ("photo", "sketch", "cartoon")
SHARED = os.path.join(os.path.dirname(__file__), "../../shared/tasks")


@pytest.fixture
def data(tmp_path):
  """Three domains of two classes, ten training and four test images each."""
  folder = tmp_path / "kinds"
  folder.mkdir()
  for d, domain in enumerate(NAMES):
    lines = []
    for i in range(14):
      name = f"{domain}_{i}.png"
      Image.new("RGB", (8, 8), (40 * d, 10 * i, 90)).save(folder / name)
      lines.append(f"{name} {i % 2}\n")
    for end, part in (("_train", lines[:10]), ("_test", lines[10:]),
                      ("", lines)):
      (folder / f"{domain}{end}.txt").write_text("".join(part))
  (folder / "classes.txt").write_text("dog\ncat\n")
  return tmp_path


def test_folders_of_domains_are_no_classes(data):
  """Where the pictures lie in a folder for each domain."""
  for domain in NAMES:
    for label, name in enumerate(("dog", "cat")):
      folder = data / "kinds" / domain / name
      folder.mkdir(parents=True)
      Image.new("RGB", (8, 8), (9, 9, label)).save(folder / "a.png")
  assert "kinds" not in tasks.names(str(data))
  with pytest.raises(UserError, match=r"its tasks of domains are named: "
                     r"task=kinds/from_cartoon and so on, 6 in all"):
    tasks.in_data(str(data))
  with pytest.raises(UserError, match="kinds/except_photo"):
    tasks.find("kinds/from_paint", str(data))


def test_a_domain_without_the_list_of_all_its_images_names_it(data):
  for name in NAMES:
    (data / "kinds" / f"{name}.txt").unlink()
  with pytest.raises(UserError, match="has cartoon_train.txt and "
                     "cartoon_test.txt, but no cartoon.txt, the list of all"):
    tasks.find("kinds/from_photo", str(data))


def names_of(task, split):
  source = task.sources[split]
  return [source.read(i).getpixel((0, 0)) for i in range(source.count)]


def test_names_are_both_ways_of_every_domain(data):
  assert set(domains.nested(str(data))) == {
      f"kinds/{how}_{d}" for how in ("from", "except") for d in NAMES}
  assert domains.names(str(data)) == ()
  assert domains.nested(None) == ()


def test_from_a_domain_tests_on_it_and_on_all_others_whole(data):
  task = tasks.find("kinds/from_photo", str(data))
  assert task.tests == ("test", "cartoon", "sketch")
  assert task.classes == ("dog", "cat")
  assert {s: len(x) for s, x in task.labels.items()} == {
      "train": 8, "val": 2, "trainval": 10, "test": 4, "cartoon": 14,
      "sketch": 14}
  for split in ("trainval", "test"):
    assert {p[0] for p in names_of(task, split)} == {0}  # photographs
  assert {p[0] for p in names_of(task, "cartoon")} == {80}


def test_except_a_domain_trains_on_the_others(data):
  task = tasks.find("kinds/except_photo", str(data))
  assert task.tests == ("test", "photo")
  assert {s: len(x) for s, x in task.labels.items()} == {
      "train": 16, "val": 4, "trainval": 20, "test": 8, "photo": 14}
  assert {p[0] for p in names_of(task, "trainval")} == {40, 80}


@pytest.mark.parametrize("name", ["kinds/from_photo", "kinds/except_sketch"])
def test_val_is_a_fifth_of_each_class_and_apart(data, name):
  task = tasks.find(name, str(data))
  train, val = names_of(task, "train"), names_of(task, "val")
  assert not set(train) & set(val)
  assert sorted(train + val) == sorted(names_of(task, "trainval"))
  for label in (0, 1):
    whole = (task.labels["trainval"] == label).sum()
    assert (task.labels["val"] == label).sum() == round(whole / 5)


def test_the_division_does_not_depend_on_the_order_of_the_list(data):
  before = names_of(tasks.find("kinds/from_photo", str(data)), "val")
  path = data / "kinds" / "photo_train.txt"
  path.write_text("".join(reversed(path.read_text().splitlines(True))))
  assert names_of(tasks.find("kinds/from_photo", str(data)), "val") == before


def test_an_image_of_training_and_test_is_refused(data):
  path = data / "kinds" / "photo_test.txt"
  path.write_text(path.read_text() + "photo_0.png 0\n")
  with pytest.raises(UserError, match="photo_0.png stands in a training list"):
    tasks.find("kinds/from_photo", str(data))


def test_one_domain_is_no_task(data):
  for domain in NAMES[1:]:
    (data / "kinds" / f"{domain}.txt").unlink()
  assert domains.nested(str(data)) == ()


@pytest.mark.skipif(not os.path.isdir(f"{SHARED}/pacs"),
                    reason="no ../shared/tasks/pacs")
def test_pacs():
  task = tasks.find("pacs/from_photo", SHARED)
  assert task.tests == ("test", "art_painting", "cartoon", "sketch")
  counts = {s: len(x) for s, x in task.labels.items()}
  assert counts == {"train": counts["train"], "val": 624 - counts["train"],
                    "trainval": 624, "test": 156, "art_painting": 780,
                    "cartoon": 780, "sketch": 780}
  assert len(task.classes) == 6 and np.abs(counts["val"] - 125) < 6
