"""`python -m ttc_jax.tasks`: listing, preparing, checking, exporting."""
import hashlib
import importlib.util
import io
import json
import os
import shutil
import types

import numpy as np
from PIL import Image
import pytest

from tests.command import run_command
from tests.vtab_sets import build, builder, rewrite_as_tfrecord, small
from ttc_jax import tasks
from ttc_jax.errors import UserError
from ttc_jax.tasks import __main__ as cli
from ttc_jax.tasks import folder
from ttc_jax.tasks import tfds as reader
from ttc_jax.tasks import vtab as family
from ttc_jax.vtab import check, export, facts, fingerprint, prepare
from ttc_jax.vtab import rows as vtab

SETS = ["caltech101", "dtd", "oxford_flowers102", "svhn_cropped", "dsprites",
        "cifar100"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  pytest.importorskip("tensorflow_datasets")
  root = tmp_path_factory.mktemp("tfds")
  build(root, tmp_path_factory.mktemp("pictures"), SETS)
  return root


@pytest.fixture
def small_rows(monkeypatch):
  for name, row in list(vtab.ROWS.items()):
    monkeypatch.setitem(vtab.ROWS, name, small(row))


def options(**given):
  return types.SimpleNamespace(**dict.fromkeys(
      ("data", "json", "save", "against", "out")) | given)


def run(*args):
  return run_command("tasks", *args)


# --- The command line ---------------------------------------------------------

def test_list_names_the_protocol():
  done = run("list", "--json")
  assert done.returncode == 0, done.stderr
  rows = json.loads(done.stdout)
  assert [r["name"] for r in rows] == list(vtab.ROWS)
  assert rows[2] == {
      "name": "dtd", "group": "Natural", "tfds": "dtd:3.*.*",
      "train": "train[:800]", "val": "validation[:200]",
      "trainval": "train[:800]+validation[:200]", "test": "test",
      "num_classes": 47, "test_count": 1880, "status": "unknown"}
  assert {r["name"]: r["tfds"] for r in rows if r["group"] == "Structured"} == {
      "clevr_count": "clevr:3.*.*", "clevr_dist": "clevr:3.*.*",
      "dmlab": "dmlab:2.0.1", "kitti": "kitti:3.1.0",
      "dsprites_loc": "dsprites:2.*.*", "dsprites_ori": "dsprites:2.*.*",
      "smallnorb_azi": "smallnorb:2.*.*", "smallnorb_ele": "smallnorb:2.*.*"}


@pytest.mark.parametrize("args, sentence", [
    (["lst"], "did you mean list"),
    (["check"], "--data=DIR"),
    (["export", "dtd", "--data=."], "--out=DIR"),
    (["export", "--json", "--data=."], "export takes no --json"),
    (["check", "dttd", "--data=."], "did you mean dtd"),
    (["prepare", "digits", "--data=."], "unknown task of VTAB 'digits'")])
def test_bad_input_is_a_sentence(args, sentence, tmp_path, capsys,
                                 monkeypatch):
  """In process, as the flags would be."""
  given = dict(a.removeprefix("--").split("=") if "=" in a
               else (a.removeprefix("--"), True)
               for a in args if a.startswith("--"))
  monkeypatch.setattr(cli.flags, "FLAGS", options(**given))
  with pytest.raises(UserError, match=sentence) as error:
    cli.main(["tasks", *(a for a in args if not a.startswith("--"))])
  assert "\n" not in str(error.value)


def test_bad_input_exits_with_2(tmp_path):
  (tmp_path / "file").touch()
  done = run("check", "dtd", f"--data={tmp_path / 'file'}")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == f"error: --data={tmp_path / 'file'} is no folder: " \
                        "give one\n"


def test_a_missing_data_set_names_the_command(tmp_path):
  with pytest.raises(UserError, match="ttc_jax.tasks prepare dtd --data="):
    cli.check(["dtd"], options(data=str(tmp_path)))
  with pytest.raises(UserError, match="no task in data="):
    cli.check([], options(data=str(tmp_path)))


# --- list ---------------------------------------------------------------------

def test_the_list_tells_what_is_there(prepared, tmp_path):
  shutil.copytree(prepared / "svhn_cropped", tmp_path / "svhn_cropped")
  (tmp_path / "dtd").mkdir()
  rewrite_as_tfrecord(prepared / "dtd" / "3.0.1", tmp_path / "dtd" / "3.0.1")
  for name, labels in (("mine", "0 1 2"), ("broken", "0 x")):
    (tmp_path / name).mkdir()
    for part in folder.LISTS.values():
      (tmp_path / name / f"{part}.txt").write_text("".join(
          f"{part}_{i}.png {y}\n" for i, y in enumerate(labels.split())))
      for i in range(3):
        (tmp_path / name / f"{part}_{i}.png").touch()
  rows = {r["name"]: r for r in cli.rows(str(tmp_path))}
  assert rows["svhn"]["status"] == "array_record 3.0.0"
  assert rows["dtd"]["status"] == "tfrecord 3.0.1"
  assert rows["kitti"]["status"] == "missing"
  assert rows["mine"]["status"] == "folder"
  assert (rows["mine"]["num_classes"], rows["mine"]["test_count"]) == (3, 3)
  assert rows["broken"]["status"].startswith("damaged: ")
  assert rows["digits"]["status"] == "built in"
  assert rows["digits"]["test_count"] == 797
  text = cli.table(list(rows.values()))
  assert "tfrecord 3.0.1" in text and "10,000" in text


def test_names_are_listed_without_a_folder(capsys):
  pytest.importorskip("sklearn")
  assert cli.list_(["digits"], options(json=True)) == 0
  (row,) = json.loads(capsys.readouterr().out)
  assert (row["num_classes"], row["status"]) == (10, "built in")
  assert cli.list_(["dtd", "scene_count"], options()) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == ["name", "dtd", "scene_count"]
  with pytest.raises(UserError, match="did you mean digits"):
    cli.list_(["digit"], options())


# --- Tasks in folders ---------------------------------------------------------

EVIL = "a\x1b[31m\u202e\nb"


@pytest.fixture
def folders(tmp_path):
  """Tasks "good", "cut" (one image is) and one whose name is not for print."""
  rng = np.random.default_rng(0)
  for name in ("good", "cut", EVIL):
    (tmp_path / name / "inner").mkdir(parents=True)
    for part, n in (("train800", 0), ("val200", 1), ("test", 2)):
      noise = rng.integers(0, 256, (9, 9, 3), np.uint8)
      Image.fromarray(noise).save(tmp_path / name / f"{n}.png")
      (tmp_path / name / f"{part}.txt").write_text(f"{n}.png {n}\n")
    (tmp_path / name / "train800val200.txt").write_text("0.png 0\n1.png 1\n")
  for path in (tmp_path / "good").glob("*.txt"):
    (tmp_path / "good" / "inner" / path.name).write_text(path.read_text())
  (tmp_path / "cut" / "1.png").write_bytes(b"?")
  return tmp_path


def test_check_reads_folders(folders, capsys):
  assert cli.check(["good"], options(data=str(folders))) == 0
  assert "all well" in capsys.readouterr().out
  assert cli.check([], options(data=str(folders), json=True)) == 1
  reports = {r["name"]: r for r in json.loads(capsys.readouterr().out)}
  assert set(reports) == {"good", "good/inner", "cut", EVIL}
  assert reports["good"]["splits"] == reports["good/inner"]["splits"]
  (wrong,) = reports["cut"]["wrong"]
  assert wrong.startswith("val: cannot decode image ") and "1.png" in wrong
  with pytest.raises(UserError, match="did you mean good"):
    cli.check(["goood"], options(data=str(folders)))


def test_check_reads_built_in_tasks_without_a_folder(capsys):
  assert cli.check(["digits"], options()) == 0
  assert "all well" in capsys.readouterr().out
  for names in ([], ["caltech101"]):
    with pytest.raises(UserError, match="--data=DIR"):
      cli.check(names, options())


def test_a_folder_that_is_a_task_is_named_so(folders):
  with pytest.raises(UserError, match="itself a task: give the folder above"):
    cli.check([], options(data=str(folders / "good" / "inner")))


def test_a_fingerprint_tells_folders_apart(folders, capsys):
  file = str(folders / "ours.json")
  assert cli.check(["good"], options(data=str(folders), save=file)) == 0
  (folders / "good" / "test_new.txt").write_text("2.png 2\n")
  Image.new("RGB", (9, 9)).save(folders / "good" / "2.png")
  assert cli.check(["good"], options(data=str(folders), against=file)) == 1
  out = capsys.readouterr().out
  assert out.count(f"(as in {file})") == 3
  assert "test: not as in" in out and "has no such split" in out


def test_names_are_printed_without_what_acts_on_a_terminal(folders, capsys):
  assert cli.list_([EVIL], options(data=str(folders))) == 0
  assert cli.check([EVIL], options(data=str(folders))) == 0
  out = capsys.readouterr().out
  assert out.count(r"a\x1b[31m\u202e\nb") == 2
  assert "\x1b" not in out and "\u202e" not in out


# --- prepare ------------------------------------------------------------------

@pytest.fixture
def everything_installed(monkeypatch):
  find = importlib.util.find_spec
  packages = ("tensorflow", "cv2", "h5py")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: (
      object() if name in packages else find(name, *a)))


@pytest.fixture
def tfds_builds(monkeypatch, tmp_path):
  """TFDS's own `builder` gives small ones; returns what it was asked for."""
  tfds = pytest.importorskip("tensorflow_datasets")
  asked, pictures = [], tmp_path / "pictures"
  pictures.mkdir()

  def small_builder(name, data_dir):
    asked.append(name)
    path, _, version = name.partition(":")
    if path == "svhn_cropped":
      raise ConnectionError("no route\nto host")
    made = builder(path, data_dir, pictures)
    if not made.version.match(version):
      raise AssertionError(f"cannot be loaded at version {version}")
    return made
  monkeypatch.setattr(tfds, "builder", small_builder)
  return asked


def test_what_can_be_built_is_built_and_what_is_there_is_left(
    everything_installed, tfds_builds, tmp_path):
  lines, data = [], str(tmp_path / "data")
  names = ["dtd", "svhn", "resisc45", "dsprites_loc", "dsprites_ori"]
  missing = prepare.prepare(names, data, lines.append)
  assert set(missing) == {"svhn_cropped", "resisc45"}
  assert tfds_builds == ["dtd:3.*.*", "svhn_cropped:3.*.*", "dsprites:2.*.*"]
  assert family.names(data) == ("dtd", "dsprites_loc", "dsprites_ori")
  assert cli.vtab_row("dtd", data)["status"] == "array_record 3.0.1"
  assert "no route to host" in missing["svhn_cropped"]
  assert lines[-1] == ("2 of 4 data sets are there; missing: svhn_cropped, "
                       "resisc45")
  assert not any("\n" in line for line in lines)
  tfds_builds.clear()
  assert prepare.prepare(["dtd"], data, lines.append) == {}
  assert tfds_builds == []


def test_the_exit_code_tells_whether_all_is_there(
    everything_installed, tfds_builds, tmp_path, capsys):
  asks = options(data=str(tmp_path / "data"))
  assert cli.prepare(["dtd"], asks) == 0
  assert cli.prepare(["dtd", "svhn"], asks) == 1
  assert "missing: svhn_cropped" in capsys.readouterr().out


def test_a_version_that_tfds_has_given_up_gives_way_to_the_next(
    everything_installed, tfds_builds, monkeypatch, tmp_path):
  row = vtab.ROWS["dtd"]
  monkeypatch.setitem(vtab.ROWS, "dtd",
                      row._replace(versions=("2.*.*", "3.*.*")))
  assert prepare.prepare(["dtd"], str(tmp_path), lambda line: None) == {}
  assert tfds_builds == ["dtd:2.*.*", "dtd:3.*.*"]


def test_data_that_only_people_get_say_what_goes_where(
    everything_installed, tmp_path):
  """The builder of resisc45 builds once the folder is there."""
  why = prepare.prepare(["resisc45"], str(tmp_path), lambda line: None)
  folder = tmp_path / "downloads" / "manual"
  assert f"below {folder} (there is no NWPU-RESISC45 yet)" in why["resisc45"]
  why = prepare.prepare(["diabetic_retinopathy"], str(tmp_path),
                        lambda line: None)
  assert "no sample, train, test, trainLabels.csv yet" in str(why)


def test_a_lacking_package_is_said_before_anything_is_downloaded(
    tfds_builds, monkeypatch, tmp_path):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: (
      None if name in ("tensorflow", "cv2") else find(name, *a)))
  why = prepare.prepare(["kitti", "dtd"], str(tmp_path), lambda line: None)
  assert "needs tensorflow and cv2" in why["kitti"]
  assert "needs tensorflow to" in why["dtd"]
  assert all("pip install -e '.[tf]'" in reason for reason in why.values())
  assert tfds_builds == []


@pytest.mark.parametrize("name", vtab.ROWS)
def test_the_installed_tfds_knows_the_row(name, tmp_path):
  """The version, what is downloaded by hand, the ids and the classes."""
  tfds = pytest.importorskip("tensorflow_datasets")
  row = vtab.ROWS[name]
  made = prepare._builder(tfds, row, str(tmp_path))
  assert bool(made.MANUAL_DOWNLOAD_INSTRUCTIONS) == (
      row.tfds in prepare.MANUAL)
  assert str(made.data_dir).startswith(str(tmp_path / row.tfds))
  features = made.info.features
  if row.tfds in facts.IDS:
    assert facts.IDS[row.tfds] in features
  if "label" in features:
    assert features["label"].num_classes == row.classes


# --- check --------------------------------------------------------------------

def by_hand(prepared, tfds_name, version, split, key):
  """Ids and labels of a split, by TFDS alone."""
  import tensorflow_datasets as tfds
  source = tfds.builder_from_directory(
      prepared / tfds_name / version).as_data_source(split)
  for example in source:
    if key is None:
      image = Image.fromarray(example["image"]).convert("RGB")
      size = f"{image.width}x{image.height} ".encode()
      yield hashlib.sha256(size + image.tobytes()).hexdigest(), example
    else:
      yield example[key].decode(), example


@pytest.mark.parametrize("name, tfds_name, version, key", [
    ("oxford_flowers102", "oxford_flowers102", "2.1.1", "file_name"),
    ("svhn", "svhn_cropped", "3.0.0", None)])
def test_what_check_reports_is_what_tfds_reads(
    prepared, small_rows, monkeypatch, name, tfds_name, version, key):
  monkeypatch.delitem(facts.TEST, "svhn")
  report = check.check(name, str(prepared))
  assert report["wrong"] == []
  assert report["tfds"] == f"{tfds_name}:{version}"
  assert report["shared"] == {"ids": 0, "pixels": 0}
  row = vtab.ROWS[name]
  for part, split in report["splits"].items():
    rows = list(by_hand(prepared, tfds_name, version, row.splits[part], key))
    labels = [int(example["label"]) for _, example in rows]
    assert split["count"] == len(rows)
    assert split["labels"] == [labels.count(c) for c in range(row.classes)]
    lines = "".join(f"{i}\t{y}\n"
                    for (i, _), y in zip(rows, labels, strict=True))
    assert split["sha256"] == hashlib.sha256(lines.encode()).hexdigest()


def test_what_stands_in_the_tables_is_whole():
  for name, counts in facts.TEST.items():
    assert len(counts) == vtab.ROWS[name].classes
    assert sum(counts) == vtab.ROWS[name].test_count
  for name, most in facts.MOST.items():
    for part, count in most.items():
      assert count * vtab.ROWS[name].classes >= facts.COUNTS[part]


def test_both_formats_have_one_checksum(prepared, small_rows, tmp_path):
  (tmp_path / "caltech101").mkdir()
  rewrite_as_tfrecord(prepared / "caltech101" / "3.0.1",
                      tmp_path / "caltech101" / "3.0.1")
  one, two = (check.check("caltech101", str(d)) for d in (prepared, tmp_path))
  assert one == two and one["wrong"] == []


def test_another_histogram_or_count_is_wrong(prepared, small_rows, monkeypatch):
  wrong = check.check("dtd", str(prepared))["wrong"]
  assert wrong == ["test: class 0 has 9 images, expected 40"]
  monkeypatch.setitem(facts.MOST, "dtd", {"train": 17})
  assert "train: class" in check.check("dtd", str(prepared))["wrong"][0]
  monkeypatch.undo()
  wrong = check.check("dtd", str(prepared))["wrong"]
  assert "test: 410 examples, expected 1880" in wrong


def test_labels_out_of_range_are_wrong(prepared, small_rows, monkeypatch):
  monkeypatch.setitem(vtab.ROWS, "dtd", vtab.ROWS["dtd"]._replace(
      label=lambda example: int(example["label"]) + 40))
  wrong = check.check("dtd", str(prepared))["wrong"]
  assert any("labels are out of range" in w and "expected 0 to 46" in w
             for w in wrong)


def test_an_image_in_two_splits_is_wrong_where_it_has_a_name(
    prepared, small_rows, monkeypatch):
  leak = "train[795:1000]"
  for name in ("oxford_flowers102", "dsprites_loc"):
    monkeypatch.setitem(vtab.ROWS, name, vtab.ROWS[name]._replace(
        val=leak.replace("1000", "995"), test=leak, test_count=205))
  named = check.check("oxford_flowers102", str(prepared))
  assert named["shared"] == {"ids": 200, "pixels": 200}
  assert any(w.startswith("val: 5 of its examples also stand in train")
             for w in named["wrong"])
  assert any(w.startswith("test: 200 of its") for w in named["wrong"])
  pictures = check.check("dsprites_loc", str(prepared))  # all look the same
  assert pictures["shared"]["pixels"] == 1 and pictures["wrong"] == []


def test_an_example_that_stands_twice_is_wrong(prepared, small_rows,
                                               monkeypatch):
  monkeypatch.setitem(vtab.ROWS, "oxford_flowers102",
                      vtab.ROWS["oxford_flowers102"]._replace(
                          val="validation[:100]+validation[:100]"))
  wrong = check.check("oxford_flowers102", str(prepared))["wrong"]
  assert wrong[0].startswith("val: 100 examples stand in it more than once")


@pytest.mark.parametrize("name", ["oxford_flowers102", "cifar100", "eurosat",
                                  "resisc45", "dmlab", "patch_camelyon"])
@pytest.mark.sweep(keep=2)
def test_another_order_than_tfdss_is_wrong(prepared, small_rows, monkeypatch,
                                           tmp_path_factory, name):
  row = vtab.ROWS[name]
  if not family.prepared(name, str(prepared)):
    build(prepared, tmp_path_factory.mktemp("pictures"), [row.tfds])
  monkeypatch.delitem(facts.TEST, name, raising=False)
  monkeypatch.delitem(facts.NAMES, row.tfds, raising=False)
  assert check.check(name, str(prepared))["wrong"] == []
  # the last two trade places, as two shards would
  read = reader.Source.__getitem__

  def traded(self, i):
    return read(self, {198: 199, 199: 198}.get(i, i)
                if len(self) == 200 else i)
  monkeypatch.setattr(reader.Source, "__getitem__", traded)
  wrong = check.check(name, str(prepared))["wrong"]
  assert wrong[0].startswith("val: 1 examples do not stand where TFDS puts")


def test_other_examples_than_tfdss_are_wrong(prepared, small_rows,
                                             monkeypatch):
  """The ids of the small set are 0, 1, ... through its splits."""
  start = {"train": 0, "validation": 1010, "test": 1215}
  count = {"train": 1010, "validation": 205, "test": 410}
  monkeypatch.setitem(
      facts.NAMES, "oxford_flowers102",
      lambda split, classes: [str(start[split] + i)
                              for i in range(count[split])])
  assert check.check("oxford_flowers102", str(prepared))["wrong"] == []
  monkeypatch.setitem(vtab.ROWS, "oxford_flowers102",
                      vtab.ROWS["oxford_flowers102"]._replace(
                          val="validation[:200]"))
  count["validation"] = 204  # the last id is not known: what follows moves up
  wrong = check.check("oxford_flowers102", str(prepared))["wrong"]
  assert [w.split(" ")[0] for w in wrong] == ["val:", "trainval:"]
  assert "are not those that TFDS puts there" in wrong[0]


@pytest.mark.parametrize("name, split, first", [
    ("cifar100", "train", "train_00000"), ("cifar100", "test", "test_00000"),
    ("patch_camelyon", "validation", "valid_0"),
    ("clevr_count", "validation", "CLEVR_val_000000.png"),
    ("resisc45", "train", "airplane_001.jpg")])
def test_known_names_are_as_many_as_the_split(name, split, first):
  row = vtab.ROWS[name]
  classes = ("airplane", *map(str, range(row.classes - 1)))
  names = facts.NAMES[row.tfds](split, classes)
  assert names[0] == first and len(set(names)) == len(names)
  if row.test == split:
    assert len(names) == row.test_count
  else:
    assert len(names) == {"cifar100": 50_000, "patch_camelyon": 32_768,
                          "resisc45": 31_500}[name]


def test_damage_is_reported_and_the_rest_is_read(prepared, small_rows, tmp_path,
                                                 capsys):
  folder = tmp_path / "oxford_flowers102" / "2.1.1"
  folder.parent.mkdir()
  rewrite_as_tfrecord(prepared / "oxford_flowers102" / "2.1.1", folder)
  (folder / "oxford_flowers102-test.tfrecord-00001-of-00003").unlink()
  shard = folder / "oxford_flowers102-train.tfrecord-00000-of-00003"
  data = bytearray(shard.read_bytes())
  data[20] ^= 1
  shard.write_bytes(data)
  report = check.check("oxford_flowers102", str(tmp_path))
  assert [w.split(":")[0] for w in report["wrong"]] == [
      "train", "trainval", *["test"] * 21]
  assert "record 0 is damaged" in report["wrong"][0]
  assert "more examples cannot be read" in report["wrong"][-1]
  assert report["splits"]["val"]["sha256"]
  assert report["splits"]["test"]["sha256"] is None
  assert fingerprint.of([report]) == {}
  assert cli.check([], options(data=str(tmp_path))) == 1
  out = capsys.readouterr().out
  assert "wrong: test: " in out and "all well" not in out


def test_a_data_set_that_does_not_open_does_not_end_the_check(
    prepared, small_rows, tmp_path, capsys):
  for name in ("caltech101", "oxford_flowers102"):
    shutil.copytree(prepared / name, tmp_path / name)
  (tmp_path / "caltech101" / "3.0.1" / "features.json").write_text("{")
  assert cli.check([], options(data=str(tmp_path))) == 1
  first, second = capsys.readouterr().out.split("oxford_flowers102  ")
  assert "wrong: " in first and "is no whole TFDS data set" in first
  assert "all well" in second


def test_a_fingerprint_tells_two_sites_apart(prepared, small_rows, tmp_path,
                                             monkeypatch, capsys):
  file = str(tmp_path / "fingerprint.json")
  names, here = ["oxford_flowers102", "caltech101"], str(prepared)
  assert cli.check(names[:1], options(data=here, save=file)) == 0
  assert "(no reference)" in capsys.readouterr().out
  assert cli.check(names, options(data=here, against=file)) == 0
  out = capsys.readouterr().out
  assert out.count(f"(as in {file})") == 4 and out.count("no reference") == 4
  row = vtab.ROWS["oxford_flowers102"]
  monkeypatch.setitem(vtab.ROWS, "oxford_flowers102",
                      row._replace(test="test[1:]+test[:1]"))
  assert cli.check(names, options(data=here, against=file, json=True)) == 1
  wrong = json.loads(capsys.readouterr().out)[0]["wrong"]
  assert len(wrong) == 1 and wrong[0].startswith("test: not as in")
  assert "another order" in wrong[0]


def test_files_that_are_no_fingerprints_are_a_sentence(prepared, tmp_path):
  for text in ("{", "[]", '{"dtd": {}}', '{"dtd": {"splits": 3}}', "\xff"):
    (tmp_path / "f").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="is no fingerprint"):
      fingerprint.read(str(tmp_path / "f"))
  with pytest.raises(UserError, match="cannot read"):
    fingerprint.read(str(tmp_path / "none"))
  with pytest.raises(UserError, match="in a folder that exists"):
    fingerprint.save([], str(tmp_path / "none" / "f"))


# --- export -------------------------------------------------------------------

@pytest.mark.parametrize("name", ["dtd", "dsprites_loc", "svhn"])
@pytest.mark.sweep(keep=1)
def test_what_is_exported_loads_the_same(prepared, small_rows, tmp_path, name):
  out = str(tmp_path / "out")
  assert export.export(name, str(prepared), out) == os.path.join(out, name)
  assert os.listdir(out) == [name]
  theirs = family.open_set(name, str(prepared))
  one, two = (tasks.load(name, size=10, data=d, cache=str(tmp_path / "cache"))
              for d in (str(prepared), out))
  assert (one.classes, one.group) == (two.classes, two.group)
  for part in vtab.SPLITS:
    np.testing.assert_array_equal(one.labels[part], two.labels[part])
    with open(os.path.join(out, name, f"{folder.LISTS[part]}.txt")) as file:
      paths = [line.rsplit(" ", 1)[0] for line in file]
    for i in range(0, len(paths), 7):
      with Image.open(os.path.join(out, name, paths[i])) as image:
        want = theirs.sources[part].image(i, vtab.ROWS[name].binary)
        np.testing.assert_array_equal(image.convert("RGB"), want)
    assert (one.split(part).images == two.split(part).images).all()


def test_jpeg_and_png_are_copied_and_others_become_png(
    prepared, small_rows, tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  picture = Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8))

  def encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()
  kinds = {"JPEG": picture, "PNG": picture.convert("RGBA"), "BMP": picture,
           "GIF": picture.convert("P")}
  files = [encoded(image, kind) for kind, image in kinds.items()]
  read = reader.Source.__getitem__
  monkeypatch.setattr(reader.Source, "__getitem__", lambda self, i: (
      read(self, i) | {"image": files[i % 4]}))
  export.export("dtd", str(prepared), str(tmp_path))
  folder = tmp_path / "dtd" / "images"
  assert (folder / "test_00000.jpg").read_bytes() == files[0]
  assert (folder / "test_00001.png").read_bytes() == files[1]
  source = family.open_set("dtd", str(prepared)).sources["test"]
  for i in (2, 3):
    with Image.open(folder / f"test_{i:05d}.png") as image:
      assert image.format == "PNG"
      np.testing.assert_array_equal(image, source.image(i, False))


def test_an_export_is_whole_or_not_at_all(prepared, small_rows, tmp_path,
                                          monkeypatch):
  def full(*args):
    raise OSError(28, "No space left on device")
  with monkeypatch.context() as patch:
    patch.setattr(export.files, "write_text", full)
    with pytest.raises(OSError):
      export.export("dtd", str(prepared), str(tmp_path))
  assert os.listdir(tmp_path) == []
  (tmp_path / "dtd").mkdir()
  with pytest.raises(UserError, match="exists and is not overwritten"):
    cli.export(["svhn", "dtd"], options(data=str(prepared), out=str(tmp_path)))
  assert os.listdir(tmp_path) == ["dtd"]


def test_an_export_needs_vtabs_test_set(prepared, tmp_path):
  with pytest.raises(UserError, match="has 410 images, VTAB's has 1880"):
    export.export("dtd", str(prepared), str(tmp_path / "out"))
  assert not (tmp_path / "out").exists()
