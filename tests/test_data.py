"""Laws of data as people have it: pictures, zips, few shots, FGVC."""
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile

import numpy as np
from PIL import Image
import pytest

from tests.command import ROOT, run_command
from tests.vtab_sets import build
from ttc_jax import errors, tasks
from ttc_jax.tasks import archive, division, fgvc, pictures, summary

COUNTS = {"cat": 10, "dog": 7, "owl": 3}


def picture(path, seed):
  """Writes noise of 6 x 5 pixels, without loss."""
  path.parent.mkdir(parents=True, exist_ok=True)
  noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
  Image.fromarray(noise).save(path)


def fill(folder, counts=COUNTS, start=0):
  for c, (name, count) in enumerate(counts.items()):
    for i in range(count):
      picture(folder / name / f"{name} {i}.png", start + 1000 * c + i)
  return folder


@pytest.fixture
def pets(tmp_path):
  return fill(tmp_path / "pets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def load(data, name="pets", **kw):
  return tasks.load(name, size=6, data=str(data), **kw)


def counts(task):
  return {part: np.bincount(task.labels[part], minlength=3).tolist()
          for part in task.splits}


def digests(task):
  return task.digest, {part: task.split(part).digest for part in task.splits}


def named(task, part):
  source = task.sources[part]
  return [source.name(i).rpartition("/pets/")[2] for i in range(source.count)]


def lists(folder):
  return {path.name: path.read_bytes()
          for path in sorted(folder.glob("ttc_jax_*list.txt"))}


# --- The division -------------------------------------------------------------

def test_a_division_is_stratified_disjoint_total_and_shown(pets):
  assert tasks.in_data(str(pets)) == ("pets",)
  task = load(pets)
  assert task.classes == ("cat", "dog", "owl") and task.tests == ("test",)
  assert counts(task) == {"train": [6, 5, 1], "val": [2, 1, 1],
                          "trainval": [8, 6, 2], "test": [2, 1, 1]}
  parts = [set(named(task, part)) for part in ("train", "val", "test")]
  assert not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]
  assert set.union(*parts) == {
      str(p.relative_to(pets)) for p in pets.rglob("*.png")}
  assert named(task, "trainval") == named(task, "train") + named(task, "val")
  (note,) = task.notes
  assert "division of 20 images" in note and str(pets) in note
  for part in ("train", "val", "test"):
    text = (pets / f"ttc_jax_{part}list.txt").read_text()
    assert text == "".join(f"{name} {label}\n" for name, label in zip(
        named(task, part), task.labels[part], strict=True))
    for i, name in enumerate(named(task, part)):
      with Image.open(pets / name) as image:
        want = np.asarray(image.resize((6, 6), Image.Resampling.BICUBIC))
      np.testing.assert_array_equal(task.split(part).images[i], want)


def test_the_order_in_which_images_are_found_changes_nothing():
  rng = np.random.default_rng(0)
  names = [f"c{i % 3}/é {i}.jpg" for i in range(50)]
  labels = np.array([i % 3 for i in range(50)])

  def made(order):
    return {role: [names[order[i]] for i in rows] for role, rows in
            division.divide([names[i] for i in order], labels[order],
                            ("test", "val"), "abc", "x").items()}
  want = made(np.arange(50))
  for _ in range(5):
    assert made(rng.permutation(50)) == want
  assert division.divide(names, labels, ("test",), "abcd", "x") == (
      division.divide(names, labels, ("test",), "abc", "x"))
  # Decomposed accents, as some systems store them, are the same names.
  assert division.in_order([n.replace("é", "e\u0301") for n in names]
                           ) == division.in_order(names)


def test_another_process_and_another_place_divide_alike(pets, tmp_path):
  task = load(pets)
  other = tmp_path / "elsewhere" / "pets"
  shutil.copytree(pets, other, ignore=shutil.ignore_patterns("ttc_jax_*"))
  done = subprocess.run(
      [sys.executable, "-c", "import sys; from ttc_jax import tasks; "
       "print(tasks.find('pets', sys.argv[1]).digest)", str(other)],
      cwd=ROOT, text=True, capture_output=True,
      env={**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C"})
  assert done.stdout.strip() == task.digest, done.stderr
  assert lists(other) == lists(pets)
  assert digests(load(other)) == digests(task)


def test_a_division_never_changes(pets):
  want, kept = digests(load(pets)), lists(pets)
  assert digests(load(pets)) == want
  picture(pets / "cat" / "new.png", 77)
  with pytest.raises(errors.UserError, match=(
      r"images in none of the lists .*: 1 \(cat/new.png\): take them out")):
    load(pets)
  with open(pets / "ttc_jax_trainlist.txt", "a") as file:
    file.write("cat/new.png 0\n")
  assert counts(load(pets))["train"] == [7, 5, 1]
  (pets / "ttc_jax_trainlist.txt").write_bytes(kept["ttc_jax_trainlist.txt"])
  (pets / "cat" / "new.png").unlink()
  assert digests(load(pets)) == want and lists(pets) == kept
  (pets / "cat" / "cat 3.png").rename(pets / "cat" / "dead.bak")
  with pytest.raises(errors.UserError, match=r"are gone: 1 \(cat/cat 3.png\)"):
    load(pets)
  for path in pets.glob("ttc_jax_*"):
    path.unlink()
  assert sum(counts(load(pets))["trainval"]) == 15


@pytest.mark.parametrize("change, word", [
    (lambda p: fill(p, {"bee": 5}), "classes were added"),
    (lambda p: (p / "ttc_jax_vallist.txt").unlink(), "vallist.txt is missing"),
    (lambda p: fill(p / "test", COUNTS) and fill(p / "train", COUNTS),
     "ttc_jax_testlist.txt is there"),
    (lambda p: (p / "ttc_jax_vallist.txt").write_text("cat/cat 0.png\n"),
     "ttc_jax_vallist.txt:1: the label must be a whole number"),
    (lambda p: shutil.copy(p / "ttc_jax_vallist.txt",
                           p / "ttc_jax_testlist.txt"), "also stands in"),
    (lambda p: (p / "ttc_jax_vallist.txt").write_bytes(b"\xff\n"),
     "not UTF-8"),
])
def test_lists_that_do_not_fit_are_refused(pets, change, word):
  load(pets)
  change(pets)
  with pytest.raises(errors.UserError, match=word) as error:
    load(pets)
  assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_keeps_its_lists_in_the_cache(
    pets, tmp_path, monkeypatch):
  write = division.files.write_text

  def refusing(path, text):
    if path.startswith(str(pets)):
      raise PermissionError(13, "Permission denied", path)
    write(path, text)
  monkeypatch.setattr(division.files, "write_text", refusing)
  task = load(pets)
  assert not lists(pets) and str(tmp_path / "xdg") in task.notes[0]
  picture(pets / "cat" / "new.png", 77)
  monkeypatch.undo()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  with pytest.raises(errors.UserError, match="in none of the lists"):
    load(pets)  # the first division counts, whatever can be written now
  (pets / "cat" / "new.png").unlink()
  assert load(pets).digest == task.digest and not lists(pets)


def test_given_splits_are_kept(tmp_path):
  root = tmp_path / "pets"
  fill(root / "Train")
  fill(root / "test", {"cat": 2, "owl": 1}, start=50)
  task = load(root)
  assert counts(task) == {"train": [8, 6, 2], "val": [2, 1, 1],
                          "trainval": [10, 7, 3], "test": [2, 0, 1]}
  assert set(lists(root)) == {"ttc_jax_trainlist.txt", "ttc_jax_vallist.txt"}
  fill(root / "valid", {"dog": 4}, start=60)
  with pytest.raises(errors.UserError, match="does not fit the given splits"):
    load(root)
  for path in root.glob("ttc_jax_*"):
    path.unlink()
  fill(root / "test_v2", {"dog": 1}, start=70)
  task = load(root)
  assert counts(task) == {
      "train": [10, 7, 3], "val": [0, 4, 0], "trainval": [10, 11, 3],
      "test": [2, 0, 1], "v2": [0, 1, 0]}
  assert task.tests == ("test", "v2") and not task.notes and not lists(root)
  shutil.rmtree(root / "test")
  shutil.rmtree(root / "test_v2")
  task = load(root)  # the given val is the test set
  assert counts(task)["test"] == [0, 4, 0]
  assert counts(task)["val"] == [2, 1, 1] and len(task.notes) == 2


# --- Folders of pictures ------------------------------------------------------

def test_a_folder_of_folders_of_pictures_holds_several_tasks(tmp_path, pets):
  fill(tmp_path / "dtd" / "train", {"a": 4, "b": 4})
  (tmp_path / "empty" / "a").mkdir(parents=True)
  assert tasks.in_data(str(tmp_path)) == ("pictures_dtd", "pets")
  assert load(tmp_path, "pictures_dtd").classes == ("a", "b")
  assert load(tmp_path).digest == load(pets).digest
  assert not {"pets"} & set(tasks.names(None))


def test_hidden_files_and_others_are_left_out_with_one_warning(pets, caplog):
  want = load(pets)
  assert not caplog.records
  (pets / "cat" / ".x.png").touch()
  (pets / ".git" / "deep").mkdir(parents=True)
  (pets / "dog" / "Thumbs.db").touch()
  (pets / "read me.txt").touch()
  (pets / "bird").mkdir()
  assert digests(load(pets)) == digests(want)
  caplog.clear()
  load(pets)
  (record,) = caplog.records
  assert "2 hidden" in record.getMessage()
  assert "2 no pictures (dog/Thumbs.db, read me.txt)" in record.getMessage()
  assert "1 folders without pictures (bird)" in record.getMessage()


def test_folders_beside_the_splits_are_named(pets, caplog):
  fill(pets / "train", {"cat": 4, "owl": 4})
  fill(pets / "more", {"cat": 1})
  (pets / "notes").mkdir()
  assert load(pets).classes == ("cat", "owl")
  assert ("4 folders of pictures beside the splits (cat, dog, more, ...)"
          in caplog.text)


def test_a_class_may_be_called_as_a_split(pets):
  (pets / "dog").rename(pets / "test")
  assert load(pets).classes == ("cat", "owl", "test")


@pytest.mark.parametrize("how", ["all", "class", "files"])
def test_links_are_followed(pets, tmp_path, how):
  want = digests(load(pets))
  for path in pets.glob("ttc_jax_*"):
    path.unlink()
  disk = tmp_path / "disk"
  moved = {"all": pets, "class": pets / "cat", "files": pets / "dog"}[how]
  moved.rename(disk)
  if how == "files":
    moved.mkdir()
    for path in disk.iterdir():
      (moved / path.name).symlink_to(path)
  else:
    moved.symlink_to(disk)
  assert digests(load(pets)) == want


def test_pictures_at_any_depth_are_of_the_class(pets):
  (pets / "cat" / "tabby" / "1").mkdir(parents=True)
  (pets / "cat" / "cat 0.png").rename(pets / "cat" / "tabby" / "1" / "x.PNG")
  assert "cat/tabby/1/x.PNG" in set(named(load(pets), "trainval")
                                    + named(load(pets), "test"))
  (pets / "cat" / "round").symlink_to(pets / "cat")
  with pytest.raises(errors.UserError, match="link to a folder above it"):
    load(pets)


@pytest.mark.parametrize("change, word", [
    (lambda p: shutil.rmtree(p / "dog") or shutil.rmtree(p / "owl"),
     "pictures in one folder only, cat"),
    (lambda p: [shutil.rmtree(p / c) for c in COUNTS] and picture(
        p / "a.png", 0), "no folders of classes"),
    (lambda p: [shutil.rmtree(p / c) for c in COUNTS], "no task in data="),
    (lambda p: [shutil.rmtree(p / c) for c in COUNTS] and [picture(
        p / s / "a.png", 0) for s in ("train", "test")], "but not by class"),
    (lambda p: (p / "owl" / "owl 0.png").unlink(),
     r"a class needs 3 images or more, .* owl \(2\)"),
    (lambda p: (p / "owl" / "a\nb.png").touch(), "has a line break"),
    (lambda p: open(os.fsencode(p) + b"/owl/\xff.png", "w").close(),
     "is not UTF-8"),
    (lambda p: fill(p / "train", {"cat": 3, "owl": 3}) and fill(
        p / "val", {"cat": 1}) and fill(p / "valid", {"cat": 1}),
     "both mean val"),
    (lambda p: (p / "owl" / "a.png").symlink_to(p / "cat" / "cat 0.png"),
     "cat/cat 0.png and owl/a.png are one file"),
    (lambda p: fill(p / "train", {"cat": 3, "owl": 3}) and fill(
        p / "test", {"cat": 1, "cow": 1}), "test has pictures of 'cow'"),
    (lambda p: fill(p / "train", {"cat": 3, "owl": 3}) and (
        p / "test").mkdir(), "test holds no pictures"),
    (lambda p: fill(p / "test", {"cat": 3, "owl": 3}), "there is no train"),
    (lambda p: fill(p / "test_v2", {"cat": 3}), "or rename test_v2"),
    (lambda p: picture(p / "bird\n" / "a.png", 0), "has a line break"),
    (lambda p: picture(p / "owl" / "a\nb" / "a.png", 0), "has a line break"),
    (lambda p: (p / "owl").rename(p / os.fsdecode(b"caf\xe9")),
     "is not UTF-8"),
])
def test_what_is_wrong_with_a_folder_is_one_sentence(pets, change, word):
  change(pets)
  with pytest.raises(errors.UserError, match=word) as error:
    load(pets, *tasks.in_data(str(pets)))
  assert "\n" not in str(error.value)


def test_a_damaged_picture_is_named(pets):
  (pets / "cat" / "cat 0.png").write_bytes(b"no picture")
  task = load(pets)
  with pytest.raises(errors.DataError, match="cat 0.png"):
    for part in task.splits:
      task.split(part)


def test_a_task_in_lists_is_no_folder_of_pictures(pets):
  for part in ("train800", "val200", "train800val200", "test"):
    (pets / f"{part}.txt").write_text("cat/cat 0.png 0\n")
  assert not pictures.is_task(str(pets))
  assert tasks.in_data(str(pets.parent)) == ("pets",)
  assert tasks.family_of("pets", str(pets.parent)) == "folder"


# --- Zip files ----------------------------------------------------------------

def zipped(folder, path, above=""):
  with zipfile.ZipFile(path, "w") as file:
    for picture_ in sorted(folder.rglob("*.png"), reverse=True):
      file.write(picture_, above + str(picture_.relative_to(folder)))
    file.writestr("__MACOSX/pets/cat/._x.png", b"?")
  return path


@pytest.mark.parametrize("above", ["", "pets/", "./pets/"])
def test_a_zip_equals_its_folder(pets, tmp_path, above):
  path = zipped(pets, tmp_path / "pets.ZIP", above)
  task = load(path)
  assert digests(task) == digests(load(pets))
  assert str(tmp_path / "xdg") in task.notes[0]
  assert tasks.in_data(str(path)) == ("pets",)
  picture(pets / "cat" / "new.png", 5)
  before = archive.unpacked(str(path))
  zipped(pets, path, above)
  assert archive.unpacked(str(path)) != before  # another archive
  assert len(load(path).labels["trainval"]) + 4 == 21


@pytest.mark.parametrize("cache_gib", [0, 1])
def test_hosts_that_unpack_a_zip_have_the_same_task(
    cache_gib, pets, tmp_path, monkeypatch):
  path = zipped(pets, tmp_path / "pets.zip")
  found = set()
  for host in ("one", "two"):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / host))
    archive._unpacked.cache_clear()
    found.add(load(path, cache_gib=cache_gib).split("train").digest)
  picture(pets / "cat" / "cat 0.png", 12345)
  zipped(pets, path)
  archive._unpacked.cache_clear()
  found.add(load(path, cache_gib=cache_gib).split("train").digest)
  assert len(found) == 2


def test_a_zip_of_tasks_in_lists_is_read_too(pets, tmp_path):
  for part, image in (("train800", 0), ("val200", 1), ("train800val200", 0),
                      ("test", 2)):
    (pets / f"{part}.txt").write_text(
        f"cat/cat {image}.png 0\ndog/dog {image}.png 1\n")
  path = tmp_path / "all.zip"
  with zipfile.ZipFile(path, "w") as file:
    for found in pets.rglob("*.*"):
      file.write(found, f"pets/{found.relative_to(pets)}")
  assert tasks.family_of("pets", str(path)) == "folder"
  assert load(path).split("test").images.shape == (2, 6, 6, 3)


def member(name, **fields):
  info = zipfile.ZipInfo("x")
  info.filename = name
  for key, value in fields.items():
    setattr(info, key, value)
  return info


@pytest.mark.parametrize("name, fields, word", [
    ("../a.png", {}, "leads out of its folder"),
    ("a/../../a.png", {}, "leads out"), ("/a.png", {}, "leads out"),
    ("C:/a.png", {}, "leads out"), ("a\\..\\a.png", {}, "leads out"),
    ("a/l.png", {"external_attr": (stat.S_IFLNK | 0o777) << 16},
     "is a symbolic link"),
])
def test_a_zip_cannot_write_elsewhere(tmp_path, pets, name, fields, word):
  path = zipped(pets, tmp_path / "pets.zip")
  with zipfile.ZipFile(path, "a") as file:
    file.writestr(member(name, **fields), b"x")
  with pytest.raises(errors.UserError, match=word):
    tasks.in_data(str(path))
  assert not (tmp_path / "xdg" / "ttc_jax" / "unpacked").exists()
  assert not list(tmp_path.rglob("a.png"))


def test_a_zip_that_is_damaged_encrypted_or_a_bomb_is_refused(
    tmp_path, pets, monkeypatch):
  path = tmp_path / "pets.zip"
  path.write_bytes(b"PK no zip")
  with pytest.raises(errors.UserError, match="is no whole zip file"):
    tasks.in_data(str(path))
  zipped(pets, path)
  content = bytearray(path.read_bytes())
  content[60:64] = b"????"  # within the first picture
  path.write_bytes(content)
  with pytest.raises(errors.UserError, match="damaged|no whole zip"):
    tasks.in_data(str(path))
  unpacked = tmp_path / "xdg" / "ttc_jax" / "unpacked"
  assert not [p for p in unpacked.rglob("*.png")]
  zipped(pets, path)
  with zipfile.ZipFile(path, "a") as file:
    info = member("cat/secret.png")
    file.writestr(info, b"x")
    info.flag_bits |= 1
  with pytest.raises(errors.UserError, match="is encrypted"):
    tasks.in_data(str(path))
  for key, value, word in (("MAX_FILES", 3, "would unpack to"),
                           ("MAX_TOTAL", 9, "would unpack to"),
                           ("MAX_FILE", 9, "more than 9")):
    with monkeypatch.context() as patch:
      patch.setattr(archive, key, value)
      archive._unpacked.cache_clear()
      zipped(pets, path)
      with pytest.raises(errors.UserError, match=word):
        tasks.in_data(str(path))


# --- Few shots ----------------------------------------------------------------

def test_few_shot_has_n_of_each_class_all_of_train(tmp_path):
  task, smaller = load(fill(tmp_path / "pets", {"cat": 10, "dog": 7})), set()
  for count in (1, 2, 4):
    few = tasks.few_shot(task, count)
    for part in ("train", "trainval"):
      assert np.bincount(few.labels[part]).tolist() == [count, count]
    mine = named(few, "train")
    assert smaller <= set(mine) <= set(named(task, "train"))
    smaller = set(mine)
    rows = [named(task, "train").index(name) for name in mine]
    for part in ("train", "trainval"):
      np.testing.assert_array_equal(few.split(part).images,
                                    task.split("train").images[rows])
    for part in ("val", "test"):
      assert few.split(part).digest == task.split(part).digest
    assert few.digest != task.digest and "of each class" in few.notes[-1]
  with pytest.raises(errors.UserError, match="class 'dog' .* give few_shot=5"):
    tasks.few_shot(task, 6)


def test_few_shot_works_for_every_family():
  pytest.importorskip("sklearn")
  for name in ("digits", "scene_count"):
    few = tasks.few_shot(tasks.load(name, size=8), 3)
    assert set(np.bincount(few.labels["train"])) == {3}
    assert few.split("train").images.shape[0] == 3 * len(few.classes)


# --- What is printed ----------------------------------------------------------

def test_the_summary_says_classes_counts_and_division(pets):
  lines = summary.lines(load(pets))
  assert lines[:4] == [
      "pets: 3 classes: cat, dog, owl",
      "  train  12 images, 1 (owl) to 6 (cat) of a class",
      "  val     4 images, 1 (dog) to 2 (cat) of a class",
      "  test    4 images"]
  assert "division of 20 images" in lines[4]
  assert summary.line(load(pets)).startswith(
      "pets: 3 classes; train 12, val 4, test 4; train, val and test are a")


def test_the_commands_know_pictures_and_zips(pets, tmp_path):
  path = zipped(pets, tmp_path / "pets.zip")
  reports = []
  for data in (pets, path):
    done = run_command("tasks", "list", f"--data={data}", "--json")
    (row,) = json.loads(done.stdout)
    assert (row["name"], row["num_classes"], row["test_count"],
            row["status"]) == ("pets", 3, 4, "pictures"), done.stderr
    done = run_command("tasks", "check", f"--data={data}", "--json")
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)
    assert report["splits"]["train"]["labels"] == [6, 5, 1]
    reports.append(report["splits"]["train"]["count"])
  assert len(set(reports)) == 1
  done = run_command("tasks", "check", f"--data={tmp_path / 'none.zip'}")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith("error: cannot read the folder data=")
  (tmp_path / "empty").mkdir()
  done = run_command("tasks", "list", "digits", f"--data={tmp_path / 'empty'}")
  assert done.returncode == 0 and "built in" in done.stdout, done.stderr


# --- FGVC ---------------------------------------------------------------------

@pytest.fixture
def small_fgvc(monkeypatch):
  for name, row in fgvc.ROWS.items():
    monkeypatch.setitem(fgvc.ROWS, name, row._replace(counts=(6, 2, 3)))


def split_files(root, **changes):
  """CUB as VPT's split files have it, with 2 classes."""
  folder = root / "CUB_200_2011"
  listed = {"train": range(6), "val": range(6, 8), "test": range(8, 11)}
  for part, rows in listed.items():
    entries = {}
    for i in rows:
      bird = ("001.Albatross", "017.Cardinal")[i % 2]
      picture(folder / "images" / bird / f"{i}.png", i)
      entries[f"{bird}/{i}.png"] = (1, 17)[i % 2]
    (folder / f"{part}.json").write_text(
        changes.get(part) or json.dumps(entries))
  return root


def test_fgvc_reads_the_split_files_of_vpt(tmp_path, small_fgvc, caplog):
  root = split_files(tmp_path)
  assert tasks.in_data(str(root)) == ("fgvc_cub",)
  task = load(root, "fgvc_cub")
  assert task.classes == ("001.Albatross", "017.Cardinal")
  assert [len(task.labels[p]) for p in task.splits] == [6, 2, 8, 3]
  for part in task.splits:
    assert [int(n.split("/")[-1][:-4]) % 2 for n in named(task, part)] == (
        task.labels[part].tolist())
  assert not lists(root / "CUB_200_2011") and not task.notes
  (record,) = caplog.records
  assert "2 classes" in record.getMessage() and "200" in record.getMessage()


@pytest.mark.parametrize("changes, word", [
    ({"val": "{"}, "val.json cannot be read"), ({"test": "[1]"}, "it is no"),
    ({"train": '{"../a.png": 1}'}, "leads out"),
    ({"train": '{"a.png": 1}'}, "no image file 'a.png'"),
    ({"test": '{"001.Albatross/8.png": 3}'}, "is of class 3"),
    ({"test": '{"001.Albatross/0.png": 1}'}, "stands in two of"),
])
def test_wrong_split_files_are_named(tmp_path, changes, word):
  with pytest.raises(errors.UserError, match=word):
    load(split_files(tmp_path, **changes), "fgvc_cub")


def test_fgvc_divides_what_tfds_prepared(tmp_path, tmp_path_factory,
                                         monkeypatch):
  pytest.importorskip("tensorflow_datasets")
  build(tmp_path, tmp_path_factory.mktemp("pictures"), ["oxford_flowers102"])
  assert tasks.in_data(str(tmp_path)) == ("oxford_flowers102",)
  assert "fgvc_flowers" in tasks.names(str(tmp_path))
  task = tasks.find("fgvc_flowers", str(tmp_path))
  assert [task.sources[p].count for p in ("train", "val", "test")] == [
      1010, 205, 410]
  row = fgvc.ROWS["fgvc_cub"]._replace(
      tfds="oxford_flowers102", classes=102, counts=(910, 100, 410))
  monkeypatch.setitem(fgvc.ROWS, "fgvc_cub", row)
  task = tasks.find("fgvc_cub", str(tmp_path))
  assert [task.sources[p].count for p in ("train", "val", "test")] == [
      910, 100, 410]
  assert "not VPT's" in task.notes[0]


def test_the_five_sizes_are_a_tenth_off_the_public_training_sets():
  public = {"fgvc_cub": 5_994, "fgvc_nabirds": 23_929, "fgvc_dogs": 12_000,
            "fgvc_cars": 8_144}
  for name, total in public.items():
    train, val, _ = fgvc.ROWS[name].counts
    assert train + val == total and val == -(-total // 10)
  assert tasks.sets()["fgvc"] == tuple(fgvc.ROWS)
  with pytest.raises(errors.UserError, match="nabirds with its images in "
                     "images and VPT's train.json"):
    tasks.find("fgvc_nabirds", None)


def test_the_commands_know_fgvc(tmp_path, small_fgvc):
  rows = json.loads(run_command("tasks", "list", "fgvc", "--json").stdout)
  assert [(r["name"], r["num_classes"], r["test_count"]) for r in rows] == [
      (name, row.classes, 3) for name, row in fgvc.ROWS.items()]
  root = split_files(tmp_path)
  rows = json.loads(run_command(
      "tasks", "list", "fgvc", f"--data={root}", "--json").stdout)
  assert [r["status"] for r in rows] == ["fgvc", *["missing"] * 4]
  done = run_command("tasks", "check", f"--data={root}")
  assert done.returncode == 0 and "fgvc_cub" in done.stdout, done.stderr
  done = run_command("tasks", "check", "fgvc", f"--data={root}")
  assert done.returncode == 2 and done.stderr.startswith(
      f"error: fgvc_nabirds is not there; fgvc_nabirds needs {root}/nabirds")
