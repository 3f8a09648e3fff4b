"""Laws of tasks: folders, decoding, the cache, streaming, digits."""
import ast
import errno
import json
import os
import pathlib
import re
import shutil
import sys
import warnings

import numpy as np
from PIL import Image
import pytest

from ttc_jax import errors, tasks
from ttc_jax.tasks import folder, images

pytestmark = pytest.mark.filterwarnings("error")

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "tasks"
PARTS = {"train": (0, 6), "val": (6, 8), "trainval": (0, 8), "test": (8, 12)}


@pytest.fixture(name="data")
def _data(tmp_path):
  """A folder with the task "toy": 12 noise images, 3 classes, no names."""
  toy = tmp_path / "data" / "toy"
  (toy / "images").mkdir(parents=True)
  rng = np.random.default_rng(0)
  for i in range(12):
    noise = rng.integers(0, 256, (9, 14, 3), np.uint8)
    Image.fromarray(noise).save(toy / "images" / f"no {i}.png")
  for part, (a, b) in PARTS.items():
    lines = [f"images/no {i}.png {i % 3}\n" for i in range(a, b)]
    (toy / f"{folder.LISTS[part]}.txt").write_text("".join(lines))
  return tmp_path / "data"


@pytest.fixture(name="load")
def _load(data, tmp_path):
  def load(**kw):
    kw = {"size": 5, "cache": str(tmp_path / "cache")} | kw
    return tasks.load("toy", data=str(data), **kw)
  return load


@pytest.fixture(name="reads")
def _reads(monkeypatch):
  """The paths of all images that are decoded from now on."""
  seen, read = [], images.read
  monkeypatch.setattr(images, "read", lambda p: seen.append(p) or read(p))
  return seen


def edit(data, name, line, text):
  path = data / "toy" / name
  lines = path.read_text().splitlines()
  lines[line - 1] = text
  path.write_text("\n".join(lines) + "\n")


# The interface.

def test_names_lists_built_in_tasks_and_folders(data):
  (data / "not_a_task").mkdir()
  assert set(tasks.names(None)) == {
      "digits", "scene_count", "scene_distance", "sprites_location",
      "sprites_orientation", "scene_count_shifted", "sprites_location_shifted",
      "sprites_orientation_shifted"}
  assert set(tasks.names(str(data))) == {"toy", *tasks.names(None)}


@pytest.mark.parametrize("name, where, words", [
    ("digit", None, ["task 'digit'", "did you mean digits", "data=DIR"]),
    ("toy", None, ["data=DIR"]),
    ("half", "data", ["half holds no train800.txt"]),
    ("toy", "data/toy", ["is itself a task"]),
    ("toyy", "data", ["did you mean toy"]),
    ("digits", "nowhere", ["nowhere", "No such file"]),
])
def test_unknown_tasks_are_refused_with_a_hint(data, name, where, words,
                                               monkeypatch):
  (data / "half").mkdir()
  monkeypatch.chdir(data.parent)
  with pytest.raises(errors.UserError) as error:
    tasks.load(name, size=8, data=where)
  assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("kw, word", [
    ({"size": 0}, "size"), ({"size": 2.5}, "size"),
    ({"resample": "bicubik"}, "bicubic"), ({"cache_gib": -1}, "cache_gib"),
    ({"cache_gib": float("nan")}, "cache_gib")])
def test_bad_settings_are_refused_before_decoding(load, kw, word):
  with pytest.raises(errors.UserError, match=word):
    load(**kw)


def test_unknown_split_is_refused(load):
  with pytest.raises(errors.UserError, match="test, train, trainval, val"):
    load().split("train800")


def test_a_folder_wins_over_a_built_in_task_of_its_name(data):
  (data / "toy").rename(data / "digits")
  assert len(tasks.load("digits", size=8, data=str(data)).classes) == 3


def test_tasks_never_import_jax_or_what_is_above_them():
  allowed = sys.stdlib_module_names | {
      "ttc_jax", "numpy", "PIL", "sklearn", "tensorflow_datasets",
      "google_crc32c", "datasets", "huggingface_hub", "fsspec"}
  for path in pathlib.Path(tasks.__file__).parent.glob("*.py"):
    if path.name == "__main__.py":  # a command stands above
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      found = [a.name for a in getattr(node, "names", [])]
      if isinstance(node, ast.ImportFrom):
        found = [f"{node.module}.{name}" for name in found]
      elif not isinstance(node, ast.Import):
        continue
      for name in found:
        assert name.split(".")[0] in allowed, (path, name)
        if name.startswith("ttc_jax"):
          assert name.startswith((
              "ttc_jax.config", "ttc_jax.errors", "ttc_jax.files",
              "ttc_jax.interrupt", "ttc_jax.tasks", "ttc_jax.vtab.rows",
              )), path


# Folders.

def test_load_reads_labels_without_decoding(load, reads):
  task = load()
  assert (task.name, task.group) == ("toy", "Other")
  assert task.classes == ("0", "1", "2")
  for part, (a, b) in PARTS.items():
    assert task.labels[part].dtype == np.int32
    assert task.labels[part].tolist() == [i % 3 for i in range(a, b)]
  assert reads == []


def test_split_gives_the_images_as_pillow_resizes_them(load, data):
  for resample in ("bicubic", "bilinear"):
    split = load(resample=resample).split("val")
    assert split.images.shape == (2, 5, 5, 3)
    assert split.images.dtype == np.uint8
    assert split.labels.tolist() == [0, 1]
    for i in range(2):
      with Image.open(data / "toy" / "images" / f"no {6 + i}.png") as image:
        want = image.resize((5, 5), getattr(Image.Resampling,
                                            resample.upper()))
      np.testing.assert_array_equal(split.images[i], want)


def test_blank_lines_at_the_end_windows_ends_and_a_bom_are_fine(load, data):
  path = data / "toy" / "val200.txt"
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n")
                   + b"\r\n  \r\n\n")
  assert load().labels["val"].tolist() == [0, 1]


def test_a_line_that_is_there_twice_is_told(load, data):
  path = data / "toy" / "test.txt"
  path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
  assert "test.txt names an image again in 1 lines" in load().notes


def test_classes_txt_names_the_classes(load, data):
  (data / "toy" / "classes.txt").write_text("a cat\ndog\nowl\nunseen\n\n")
  assert load().classes == ("a cat", "dog", "owl", "unseen")


@pytest.mark.parametrize("name, group", [
    ("cifar", "Natural"), ("sun397", "Natural"), ("eurosat", "Specialized"),
    ("dsprites_loc", "Structured"), ("smallnorb_ele", "Structured")])
def test_vtab_names_have_their_group(data, name, group):
  (data / "toy").rename(data / name)
  assert tasks.load(name, size=5, data=str(data)).group == group


@pytest.mark.parametrize("text, word", [
    ("images/no 7.png", "label must be a whole number"),
    ("7", "expected 'relative/path label'"), ("", "expected"),
    ("images/no 7.png 1.0", "whole number >= 0, not '1.0'"),
    ("images/no 7.png -1", "whole number >= 0, not '-1'"),
    ("images/no 7.png ²", "whole number"),
    ("images/no 7.png 100000", "out of range"),
    ("images/no 7.png " + "9" * 5000, "out of range"),
    ("../toy2/out.png 1", "leads out of"), ("../.. 1", "leads out of"),
    ("../nowhere/a.png 1", "leads out of"),
    ("{abs}/images/no 7.png 1", "must be relative"),
    ("images/gone.png 1", "no image file"),
    ("linked/../../toy2/out.png 1", "leads out of"),
    ("images\\no 7.png 1", "separated by '/'"),
    ("images/no 7.png,1", "label must be a whole number"),
    ("images/no 77.png 1", "no image file 'images/no 77.png'"),
    ("images 1", "no image file"), ("images/\0 1", "no image file"),
    ("images/" + "a" * 5000 + " 1", "no image file"),
])
def test_bad_lines_are_named(load, data, text, word):
  (data / "toy2").mkdir()
  Image.new("L", (2, 2)).save(data / "toy2" / "out.png")
  (data / "toy" / "images" / "gone.png").symlink_to(data / "toy2" / "gone")
  (data / "toy" / "linked").symlink_to(data / "toy2")
  edit(data, "val200.txt", 1, text.format(abs=data / "toy"))
  with pytest.raises(errors.UserError) as error:
    load()
  assert "val200.txt:1: " in str(error.value) and word in str(error.value)


def test_links_inside_the_folder_and_to_it_are_followed(data, load):
  (data / "toy" / "images" / "no 7.png").rename(data / "toy" / "seven")
  (data / "toy" / "images" / "no 7.png").symlink_to("../seven")
  (data / "toy").rename(data.parent / "elsewhere")
  (data / "toy").symlink_to(data.parent / "elsewhere")
  assert load().split("val").images.shape == (2, 5, 5, 3)


@pytest.mark.parametrize("how", ["folder", "files"])
def test_links_out_of_the_folder_are_followed(data, load, how):
  """The images may be on another disk; the same digests as without links."""
  want, task = load(), data / "toy" / "images"
  disk = data.parent / "disk"
  task.rename(disk)
  if how == "folder":
    task.symlink_to(disk)
  else:
    task.mkdir()
    for path in disk.iterdir():
      (task / path.name).symlink_to(path)
  got = load()
  assert got.digest == want.digest
  for part in got.splits:
    assert got.split(part).digest == want.split(part).digest
  edit(data, "test.txt", 1, "other.png 0")  # a leak under another name
  (data / "toy" / "other.png").symlink_to(disk / "no 3.png")
  with pytest.raises(errors.UserError, match="other.png also stands in"):
    load()


# Further test sets, and tasks within tasks.

def test_a_file_test_NAME_is_a_further_test_set(data, load):
  digest = load().digest
  Image.new("L", (2, 2)).save(data / "toy" / "images" / "new.png")
  (data / "toy" / "test_v2.txt").write_text("images/new.png 2\n")
  (data / "toy" / "test_a-b.txt").write_text("images/no 9.png 0\n")
  task = load()
  assert task.tests == ("test", "a-b", "v2")
  assert task.splits == ("train", "val", "trainval", "test", "a-b", "v2")
  assert task.split("v2").labels.tolist() == [2]
  assert (task.split("v2").images == 0).all()
  assert task.digest != digest
  edit(data, "test_v2.txt", 1, "images/no 7.png 1")
  with pytest.raises(errors.UserError, match=(
      r"test_v2.txt:1: images/no 7.png also stands in train800val200.txt")):
    load()
  edit(data, "test_v2.txt", 1, "images/no 10.png 9")
  (data / "toy" / "classes.txt").write_text("a\nb\nc\n")
  with pytest.raises(errors.UserError, match=r"test_v2.txt:1: the label 9"):
    load()


@pytest.mark.parametrize("name", ["val", "test", "trainval", "a b", "-"])
def test_a_test_set_cannot_have_any_name(data, load, name):
  (data / "toy" / f"test_{name}.txt").write_text("images/no 9.png 0\n")
  with pytest.raises(errors.UserError, match="rename the file"):
    load()


def test_a_task_within_a_task_finds_the_images_above(data, load):
  inner = data / "toy" / "inner"
  inner.mkdir()
  for path in (data / "toy").glob("*.txt"):
    (inner / path.name).write_text(path.read_text())
  assert "toy/inner" in tasks.names(str(data))
  assert folder.names(str(data)) == ("toy",)  # "all" means those
  task = tasks.load("toy/inner", size=5, data=str(data))
  assert task.name == "toy/inner" and task.digest == load().digest
  (data / "toy" / "classes.txt").write_text("a\nb\nc\n")
  (inner / "images").mkdir()
  Image.new("L", (2, 2)).save(inner / "images" / "no 6.png")
  task = tasks.load("toy/inner", size=5, data=str(data))
  assert task.classes == ("a", "b", "c")
  assert (task.split("val").images[0] == 0).all()  # the nearest one
  for path, word in (("../images/no 6.png", "leads out"),
                     ("toy/images/no 6.png", "no image file")):
    edit(data, "inner/val200.txt", 1, f"{path} 0")
    with pytest.raises(errors.UserError, match=word):
      tasks.load("toy/inner", size=5, data=str(data))


@pytest.mark.parametrize("name", ["../data/toy", "toy/../toy", "toy/", "/toy",
                                  "toy/images", "", "."])
def test_no_name_leads_out_of_the_data_folder(data, name):
  with pytest.raises(errors.UserError, match="unknown task"):
    tasks.load(name, size=5, data=str(data))


def test_a_family_is_one_file(tmp_path, monkeypatch):
  (tmp_path / "toy_family.py").write_text('''
import numpy as np
from PIL import Image
from ttc_jax.tasks import Task, images

def names(data):
  return ("grey",)

def load(name, data):
  source = images.Source(3, lambda i: Image.new("RGB", (4, 4), (i, i, i)))
  parts = ("train", "val", "trainval", "easy", "hard")
  return Task(name, "Other", ("a", "b"), dict.fromkeys(
      parts, np.array([0, 1, 1], np.int32)), dict.fromkeys(parts, source),
      "1", tests=("easy", "hard"))
''')
  monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
  tasks._families.cache_clear()
  try:
    assert "grey" in tasks.names(None)
    split = tasks.load("grey", size=2).split("hard")
    assert split.images[:, 0, 0, 0].tolist() == [0, 1, 2]
  finally:
    tasks._families.cache_clear()
    sys.modules.pop("ttc_jax.tasks.toy_family", None)


# What identifies a split.

def test_the_digest_of_a_split_is_that_of_its_pixels_and_labels(
    load, data, tmp_path):
  digests = {part: load().split(part).digest for part in load().splits}
  assert len(set(digests.values())) == 4
  assert all(len(d) == 32 for d in digests.values())
  split = load().split("val")
  plain = tasks.Split(np.array(split.images), split.labels)
  assert plain.digest == split.digest == digests["val"]  # cached or not
  images_, labels = split  # unpacks
  assert tasks.Split(images_, labels).digest == split.digest
  assert tasks.Split(images_[::-1], labels).digest != split.digest
  assert tasks.Split(images_, labels[::-1]).digest != split.digest
  assert load(size=6).split("val").digest != split.digest
  (data / "toy").rename(data / "other")  # wherever it lies
  moved = tasks.load("other", size=5, data=str(data),
                     cache=str(tmp_path / "elsewhere"))
  assert {p: moved.split(p).digest for p in moved.splits} == digests


def test_the_digest_of_a_stream_follows_sizes_times_and_a_sample(load, data):
  def stream():
    return load(cache_gib=0).split("val").digest
  first = stream()
  assert first == stream()
  path = data / "toy" / "images" / "no 6.png"
  stat = os.stat(path)
  os.utime(path, ns=(1, 1))
  assert stream() != first
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert stream() == first
  noise = np.full((9, 14, 3), 7, np.uint8)
  content = path.read_bytes()
  Image.fromarray(noise).save(path)
  path.write_bytes(path.read_bytes().ljust(len(content), b"\0"))
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert os.stat(path).st_size == stat.st_size
  assert stream() != first


def test_a_split_is_decoded_opened_and_hashed_once(load, reads, monkeypatch):
  hashed, digest = [], images.digest
  monkeypatch.setattr(images, "digest",
                      lambda rows: hashed.append(1) or digest(rows))
  task = load()
  splits = [task.split("val") for _ in range(3)]
  assert splits[0] is splits[2] and len(reads) == 2
  assert len({s.digest for s in splits}) == 1
  assert len(hashed) == 1  # on opening the cache


def test_a_task_without_a_size_says_so():
  pytest.importorskip("sklearn")
  task = tasks.find("digits", None)
  with pytest.raises(ValueError, match="tasks.at_size"):
    task.split("val")
  assert tasks.at_size(task, 8).split("val").images.shape == (200, 8, 8, 3)


@pytest.mark.parametrize(
    "name", ["val200.txt", "train800val200.txt", "test.txt"])
def test_missing_and_empty_lists_are_named(load, data, name):
  (data / "toy" / name).write_text("\n\n")
  with pytest.raises(errors.UserError, match=f"{name} is empty"):
    load()
  (data / "toy" / name).unlink()
  with pytest.raises(errors.UserError, match=f"/{name} is missing"):
    load()


def test_unreadable_lists_are_named(load, data):
  (data / "toy" / "test.txt").write_bytes(b"\xff\xfe 1\n")
  with pytest.raises(errors.UserError, match="test.txt.*UTF-8"):
    load()
  (data / "toy" / "test.txt").unlink()
  (data / "toy" / "test.txt").mkdir()
  with pytest.raises(errors.UserError, match="cannot read .*test.txt"):
    load()


@pytest.mark.parametrize("text, word", [
    ("a\nb\n", r"train800.txt:3: the label 2 has no name.* 0 to 1"),
    ("a\n\nc\n", r"classes.txt:2: a blank line"), ("", "classes.txt is empty"),
    ("a\nb\na\n", "classes.txt:3: the class 'a' stands in line 1 too")])
def test_bad_class_names_are_refused(load, data, text, word):
  (data / "toy" / "classes.txt").write_text(text)
  with pytest.raises(errors.UserError, match=word):
    load()


def test_leaks_are_refused(load, data):
  edit(data, "val200.txt", 2, "images/../images/no 3.png 0")
  with pytest.raises(errors.UserError, match=(
      r"val200.txt:2: images/no 3.png also stands in train800.txt.* 1 image")):
    load()
  edit(data, "val200.txt", 2, "images/no 7.png 1")
  for line in (2, 4):
    edit(data, "test.txt", line, f"images/no {line}.png 0")
  with pytest.raises(errors.UserError, match=(
      r"test.txt:2: images/no 2.png.* train800val200.txt.* 2 images")):
    load()


def test_a_test_image_in_val200_alone_is_refused(load, data):
  """Where train800val200 is not the union, `select` would tune on it."""
  first = (data / "toy" / "test.txt").read_text().splitlines()[0]
  edit(data, "val200.txt", 2, first)
  with pytest.raises(errors.UserError, match="also stands in val200.txt"):
    load()


def test_an_image_of_two_labels_is_refused(load, data):
  edit(data, "train800val200.txt", 2, "images/no 1.png 2")
  with pytest.raises(errors.UserError, match=(
      "train800val200.txt:2: images/no 1.png has the label 2 here and 1 in "
      "train800.txt")):
    load()


def test_lists_that_do_not_fit_together_are_noted(load, data):
  assert load().notes == ()
  edit(data, "val200.txt", 2, "images/no 1 more.png 1")
  shutil.copy(data / "toy/images/no 7.png", data / "toy/images/no 1 more.png")
  note, = load().notes
  assert "is not train800.txt and val200.txt together: 2 images" in note


def test_classes_without_an_image_are_noted_and_one_class_is_refused(
    load, data):
  for part in folder.LISTS.values():
    path = data / "toy" / f"{part}.txt"
    path.write_text(re.sub("0$", "4", path.read_text(), flags=re.M))
  note, = load().notes
  assert note == "no list has an image of 2 of 5 classes (0, 3)"
  for part in folder.LISTS.values():
    path = data / "toy" / f"{part}.txt"
    path.write_text(re.sub("[0-9]$", "0", path.read_text(), flags=re.M))
  with pytest.raises(errors.UserError, match="has one class only, '0'"):
    load()


# Decoding.

def saved(tmp_path, image, name="a.png", **kw):
  image.save(tmp_path / name, **kw)
  return np.asarray(images.read(str(tmp_path / name)))


def test_grey_palette_and_cmyk_become_rgb(tmp_path):
  grey = Image.new("L", (1, 1), 77)
  assert saved(tmp_path, grey).tolist() == [[[77, 77, 77]]]
  assert saved(tmp_path, grey.convert("1")).tolist() in (
      [[[0, 0, 0]]], [[[255, 255, 255]]])
  palette = Image.new("P", (1, 1), 1)
  palette.putpalette([9, 9, 9, 10, 20, 30])
  assert saved(tmp_path, palette).tolist() == [[[10, 20, 30]]]
  cmyk = Image.new("CMYK", (1, 1), (255, 0, 0, 0))
  assert saved(tmp_path, cmyk, "a.tif").tolist() == [[[0, 255, 255]]]


def test_alpha_is_composited_over_white(tmp_path):
  want = round(100 * 51 / 255 + 255 * 204 / 255)  # a fifth grey, rest white
  for image in (Image.new("LA", (1, 1), (100, 51)),
                Image.new("RGBA", (1, 1), (100, 100, 100, 51))):
    assert saved(tmp_path, image).tolist() == [[[want] * 3]]
  palette = Image.new("P", (2, 1), 1)
  palette.putpixel((1, 0), 0)
  palette.putpalette([9, 9, 9, 10, 20, 30])
  for transparency in (1, b"\xff\x00"):
    got = saved(tmp_path, palette, transparency=transparency)
    assert got.tolist() == [[[255, 255, 255], [9, 9, 9]]]
  grey = Image.new("L", (1, 1), 7)
  assert saved(tmp_path, grey, transparency=7).tolist() == [[[255] * 3]]


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bit_grey_is_scaled(tmp_path, mode):
  levels = np.array([[0, 257, 32768, 65535]])
  dtype = np.uint16 if mode == "I;16" else np.int32
  image = Image.fromarray(levels.astype(dtype))
  assert image.mode == mode
  for name in ("a.png", "a.tif") if mode == "I;16" else ("a.tif",):
    got = saved(tmp_path, image, name)
    assert got.shape == (1, 4, 3)
    assert got[0, :, 0].tolist() == [0, 1, 128, 255], name


def test_float_pixels_are_refused(tmp_path):
  with pytest.raises(errors.UserError, match="a.tif .*float"):
    saved(tmp_path, Image.new("F", (1, 1)), "a.tif")


def test_exif_orientation_is_not_applied(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by 90 degrees
  got = saved(tmp_path, Image.new("RGB", (6, 3)), "a.jpg", exif=exif)
  assert got.shape == (3, 6, 3)


def test_aspect_is_not_kept():
  image = Image.new("RGB", (40, 10), "black")
  image.paste("white", (20, 0, 40, 10))
  got = images.resize(image, 4, "bilinear")[:, :, 0]
  assert got.shape == (4, 4)
  assert (got[:, 0] == 0).all() and (got[:, 3] == 255).all()


def test_bad_images_are_named(tmp_path, monkeypatch):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  Image.fromarray(noise).save(tmp_path / "whole.jpg")
  whole = (tmp_path / "whole.jpg").read_bytes()
  for content in (b"", b"not an image", whole[:len(whole) // 2]):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(errors.UserError, match="cannot decode .*bad.jpg"):
      images.read(str(tmp_path / "bad.jpg"))
  for limit in (64 * 64 - 1, 64 * 64 // 3):  # Pillow warns, Pillow raises
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(errors.UserError, match="whole.jpg .*bomb"):
      images.read(str(tmp_path / "whole.jpg"))


def test_bombs_are_refused_where_pillow_only_warns(tmp_path, monkeypatch):
  Image.new("L", (4, 4)).save(tmp_path / "a.png")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with pytest.raises(errors.UserError, match="a.png .*4 x 4 pixels"):
      images.read(str(tmp_path / "a.png"))


# Cache and streaming.

def cached(tmp_path):
  """The files of the cache, but for its locks, which stay and are empty."""
  return sorted((tmp_path / "cache").glob("[!.]*"))


def test_cache_is_reused_and_equals_decoding(load, reads, tmp_path):
  first = load().split("train").images
  assert len(reads) == 6 and isinstance(first, np.memmap)
  assert not first.flags.writeable
  again = load().split("train").images
  assert len(reads) == 6
  np.testing.assert_array_equal(first, again)
  np.testing.assert_array_equal(
      first, load(cache_gib=0).split("train").images[:])
  assert sorted(p.suffix for p in cached(tmp_path)) == [".json", ".npy"]


def test_the_cache_is_keyed_by_content(load, data, reads):
  """Another image of the same size and time of change is another image."""
  path = data / "toy" / "images" / "no 6.png"
  stat = os.stat(path)
  first = np.array(load().split("val").images)
  white = Image.new("RGB", (14, 9), "white")
  white.save(path)
  path.write_bytes(path.read_bytes().ljust(stat.st_size, b"\0"))
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (
      stat.st_size, stat.st_mtime_ns)
  images_ = load().split("val").images
  assert (images_[0] == 255).all() and (images_[1] == first[1]).all()
  os.utime(path, ns=(1, 1))  # a copy is the same image
  (data / "toy").rename(data / "copy")
  tasks.load("copy", size=5, data=str(data),
             cache=str(data.parent / "cache")).split("val")
  assert len(reads) == 4


def test_cache_follows_size_resample_and_file_changes(load, reads, data):
  small, task = load().split("val").images, load(size=6)
  assert task.split("val").images.shape == (2, 6, 6, 3)
  load(resample="bilinear").split("val")
  assert len(reads) == 6
  path = data / "toy" / "images" / "no 6.png"
  Image.new("RGB", (9, 9), "red").save(path)
  os.utime(path, ns=(1, 1))
  assert load().split("val").images[0].tolist() == [[[255, 0, 0]] * 5] * 5
  assert small[0].tolist() != [[[255, 0, 0]] * 5] * 5


def damage(path, how):
  content = bytearray(path.read_bytes())
  if how == "flip":
    content[-3] ^= 4
  path.write_bytes({"flip": content, "cut": content[:-20], "empty": b"",
                    "other": b"PK\x03\x04 zip?"}[how])


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "other"])
def test_damaged_cache_is_rebuilt_with_a_warning(load, reads, tmp_path,
                                                 caplog, how):
  want = np.array(load().split("val").images)
  (path,) = (tmp_path / "cache").glob("*.npy")
  damage(path, how)
  np.testing.assert_array_equal(load().split("val").images, want)
  assert len(reads) == 4
  assert [r.levelname for r in caplog.records] == ["WARNING"]
  load().split("val")
  assert len(reads) == 4


@pytest.mark.parametrize("note", [None, "", "{}", "[]", '{"crc32": 1}'])
def test_damaged_checksum_is_rebuilt(load, reads, tmp_path, note):
  load().split("val")
  (path,) = (tmp_path / "cache").glob("*.json")
  right = json.loads(path.read_text())
  path.unlink() if note is None else path.write_text(note)
  load().split("val")
  assert len(reads) == 4 and json.loads(path.read_text()) == right


@pytest.mark.parametrize("raised", [errors.UserError("bad"),
                                    KeyboardInterrupt()])
def test_nothing_stays_of_a_broken_off_cache(load, tmp_path, monkeypatch,
                                             raised):
  read = images.read
  def broken(path):
    if path.endswith("no 7.png"):
      raise raised
    return read(path)
  monkeypatch.setattr(images, "read", broken)
  with pytest.raises(type(raised)):
    load().split("val")
  assert cached(tmp_path) == []


@pytest.mark.parametrize("number, word", [
    (errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"),
    (errno.EROFS, "cannot use the image cache folder")])
def test_a_full_disk_says_where_and_leaves_nothing(
    load, tmp_path, monkeypatch, number, word):
  def full(file, header):
    file.write(b"half")
    raise OSError(number, os.strerror(number))
  monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
  message = f"{word}.*{tmp_path}/cache.*config.cache"
  with pytest.raises(errors.UserError, match=message):
    load().split("val")
  assert cached(tmp_path) == []


def test_an_impossible_cache_folder_names_the_setting(load, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="config.cache"):
    load(cache=str(tmp_path / "file" / "cache")).split("val")


def test_the_default_cache_follows_xdg(load, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  load(cache=None).split("val")
  assert len(list((tmp_path / "xdg/ttc_jax/images").glob("*.npy"))) == 1


def test_a_split_above_the_limit_streams_and_equals_the_cached(load, tmp_path):
  gib = (8 * 5 * 5 * 3 - 1) / 2**30  # one byte too little for 8 images
  want = np.array(load().split("trainval").images)
  stream = load(cache_gib=gib).split("trainval").images
  assert isinstance(stream, images.Stream) and stream.shape == want.shape
  assert len(stream) == 8 and len(cached(tmp_path)) == 2
  assert isinstance(load(cache_gib=gib).split("train").images, np.memmap)
  for index in (slice(0, 3), slice(3, 6), slice(6, 9), slice(0, 3),
                slice(5, 2), slice(None, None, 3), slice(-2, None), 4, -1,
                np.array([5, 0, 5]), np.array([], int)):
    np.testing.assert_array_equal(stream[index], want[index])
  with pytest.raises(IndexError):
    stream[8]
  np.testing.assert_array_equal(list(stream), want)


def test_streaming_decodes_the_next_slice_ahead_once():
  seen = []
  def row(i):
    seen.append(i)
    return np.full((1, 1, 3), i, np.uint8)
  stream = images.Stream(10, 1, row)
  for start in (0, 4, 8):
    rows = stream[start:start + 4]
    assert rows[:, 0, 0, 0].tolist() == list(range(start, min(start + 4, 10)))
    stream._pool.submit(int).result()
  assert sorted(seen) == list(range(10))  # ahead, and nothing twice
  stream[7:8]
  stream._pool.shutdown(wait=True)
  assert sorted(seen) == sorted([*range(10), 7])  # out of order: none ahead


def test_a_corrupt_image_in_a_stream_is_named(load, data):
  (data / "toy" / "images" / "no 7.png").write_bytes(b"?")
  stream = load(cache_gib=0).split("val").images
  with pytest.raises(errors.UserError, match="no 7.png"):
    stream[0:2]


def test_an_image_that_vanishes_is_named(load, data):
  task = load()
  (data / "toy" / "images" / "no 7.png").unlink()
  with pytest.raises(errors.UserError, match="no 7.png"):
    task.split("val")


# Digits and real folders.

def test_digits_are_scikit_learns_split_once_each():
  datasets = pytest.importorskip("sklearn.datasets")
  task = tasks.load("digits", size=8)
  splits = {s: task.split(s) for s in task.splits}
  assert [len(s.labels) for s in splits.values()] == [800, 200, 1000, 797]
  assert (np.bincount(splits["train"].labels) == 80).all()
  assert (np.bincount(splits["val"].labels) == 20).all()
  for part, split in splits.items():
    np.testing.assert_array_equal(split.labels, task.labels[part])
  np.testing.assert_array_equal(
      splits["trainval"].images,
      np.concatenate([splits["train"].images, splits["val"].images]))
  def key(image, label):  # at native size the pixels come back exactly
    return (np.round(image / 255 * 16).astype(int).tobytes(), int(label))
  got = [key(i[..., 0], y) for part in ("trainval", "test")
         for i, y in zip(splits[part].images, splits[part].labels,
                                           strict=True)]
  pixels, target = datasets.load_digits(return_X_y=True)
  want = [key(x * 255 / 16, y) for x, y in zip(pixels, target, strict=True)]
  assert sorted(got) == sorted(want)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/tasks is absent")
@pytest.mark.parametrize("name, classes", [
    ("fashion_mnist", 10), ("shapes_count", 8)])
def test_real_folders_load(name, classes, tmp_path):
  task = tasks.load(name, size=16, data=str(SHARED), cache=str(tmp_path))
  split = task.split("val")
  assert len(task.classes) == classes and len(task.labels["train"]) == 800
  assert split.images.shape == (200, 16, 16, 3) and split.images.std() > 10
