"""The reader of TFDS's data sets, with one that is none of VTAB's."""
import shutil

import numpy as np
from PIL import Image
import pytest

from tests.vtab_sets import rewrite_as_tfrecord
from ttc_jax import tasks
from ttc_jax.errors import UserError
from ttc_jax.tasks import tfds as reader

SIZES = {"train": 20, "test": 8, "shifted": 6}
SPLITS = {"train": "train[:80%]", "val": "train[80%:]", "test": "test",
          "v2": "shifted[2:]"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """The data set "shades": the grey level of image i is i, coarse is i % 3."""
  tfds = pytest.importorskip("tensorflow_datasets")
  root, pictures = map(tmp_path_factory.mktemp, ("tfds", "pictures"))
  with tfds.core.registered.skip_registration():
    class Shades(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.2.0")

      def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(4, 6, 3)),
                "coarse": tfds.features.ClassLabel(names=["a", "b", "c"]),
                "level": np.int64}))

      def _split_generators(self, manager):
        del manager
        return {s: self._generate_examples(n) for s, n in SIZES.items()}

      def _generate_examples(self, count):
        for i in range(count):
          file = pictures / f"{i}.png"  # arrays would need TensorFlow
          Image.new("RGB", (6, 4), (i, i, i)).save(file)
          yield i, {"image": str(file), "coarse": i % 3, "level": i}
  Shades(data_dir=root, file_format="array_record").download_and_prepare(
      download_config=tfds.download.DownloadConfig(num_shards=2))
  return root


@pytest.fixture(params=["array_record", "tfrecord"])
def data(request, root, tmp_path):
  if request.param == "array_record":
    return root
  (tmp_path / "shades").mkdir()
  rewrite_as_tfrecord(root / "shades" / "1.2.0", tmp_path / "shades" / "1.2.0")
  return tmp_path


def load(spec, data, tmp_path, **settings):
  return tasks.at_size(reader.task("shades", spec, str(data)), 4,
                       cache=str(tmp_path / "cache"), **settings)


def test_any_data_set_is_a_task_with_its_test_sets(data, tmp_path):
  task = load(reader.Spec("shades", SPLITS, "coarse"), data, tmp_path)
  assert task.tests == ("test", "v2") and task.classes == ("a", "b", "c")
  assert task.group == "Other"
  counts = {"train": 16, "val": 4, "trainval": 20, "test": 8, "v2": 4}
  for part, count in counts.items():
    split = task.split(part)
    assert split.images.shape == (count, 4, 4, 3)
    levels = split.images[:, 0, 0, 0]
    assert len(set(levels)) == count
    assert (split.labels == levels % 3).all()
  train, val, both = (task.split(p).images for p in tasks.ROLES)
  assert (np.concatenate([train, val]) == both).all()
  assert len({task.split(p).digest for p in task.splits}) == 5


def test_a_copy_is_the_same_task_also_where_it_is_streamed(data, tmp_path):
  copy = tmp_path / "copied"
  shutil.copytree(data, copy, copy_function=shutil.copyfile)
  digests = {load(reader.Spec("shades", SPLITS, "coarse"), place, tmp_path,
                  cache_gib=0).split("train").digest for place in (data, copy)}
  assert len(digests) == 1


def test_a_label_may_be_a_function_and_the_folder_a_path(data, tmp_path):
  spec = reader.Spec(str(data / "shades" / "1.2.0"), SPLITS,
                     lambda example: int(example["level"]) // 10, classes=2)
  task = load(spec, None, tmp_path)
  assert task.classes == ("0", "1")
  split = task.split("trainval")
  assert (split.labels == split.images[:, 0, 0, 0] // 10).all()


def test_the_digest_follows_splits_and_label(root):
  one = reader.Spec("shades", SPLITS, "coarse")
  digests = {reader.task("shades", spec, str(root)).digest for spec in (
      one, one._replace(splits=SPLITS | {"val": "train[90%:]"}),
      one._replace(label="level", classes=20))}
  assert len(digests) == 3
  moved = one._replace(name=str(root / "shades" / "1.2.0"))
  assert reader.task("shades", moved).tests == ("test", "v2")


def without(key):
  return {k: v for k, v in SPLITS.items() if k != key}


@pytest.mark.parametrize("change, word", [
    ({"name": "shade"}, "tfds build shade --data_dir="),
    ({"versions": ("2.*.*",)}, "is not prepared"),
    ({"label": "course"}, "did you mean coarse"),
    ({"label": "level"}, "give `classes`"),
    ({"splits": without("val")}, "add 'val'"),
    ({"splits": {"train": "train[:9]", "val": "train[9:]"}}, "add a test set"),
    ({"splits": SPLITS | {"v2": "shift"}}, "did you mean shifted"),
    ({"splits": SPLITS | {"v2": "test[a:]"}}, "like .train"),
    ({"splits": SPLITS | {"val": "train[60%:]"}}, "share 4 examples"),
    ({"splits": SPLITS | {"v2": "shifted+train[19:]"}}, "share 1 examples"),
    ({"splits": SPLITS | {"trainval": "train+test[:3]"}},
     r"test=test and trainval=train\+test\[:3\] share 3 examples"),
])
def test_what_is_not_there_is_a_sentence(root, change, word):
  spec = reader.Spec("shades", SPLITS, "coarse")._replace(**change)
  with pytest.raises(UserError, match=word) as error:
    reader.task("shades", spec, str(root))
  assert "\n" not in str(error.value)


def test_a_label_out_of_range_is_named(root):
  spec = reader.Spec("shades", SPLITS, "level", classes=5)
  with pytest.raises(UserError, match=r"train\[:80%\] has the label \d+, "
                     "expected 0 to 4"):
    reader.task("shades", spec, str(root)).labels["train"]


# --- data=tfds:NAME -----------------------------------------------------------

def test_a_name_of_tfds_is_a_task_divided_by_index(data, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(data))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  given = "tfds:shades?label=coarse"
  assert tasks.in_data(given) == ("shades",)
  task = tasks.load("shades", size=4, data=given)
  assert task.classes == ("a", "b", "c") and task.tests == ("test",)
  levels = {p: task.split(p).images[:, 0, 0, 0] for p in task.splits}
  for part in task.splits:
    assert (task.labels[part] == levels[part] % 3).all()
  both = [*levels["train"], *levels["val"]]
  assert sorted(both) == list(range(20)) and both == list(levels["trainval"])
  assert sorted(levels["test"]) == list(range(8))
  assert np.bincount(task.labels["val"]).tolist() == [1, 1, 1]
  assert "division of 20 images" in task.notes[0]
  again = tasks.load("shades", size=4, data=f"{given}&dir={data}")
  assert [again.split(p).digest for p in again.splits] == [
      task.split(p).digest for p in task.splits]
  folder = data / "shades" / "1.2.0"
  moved = tasks.load("shades", size=4, data=f"tfds:{folder}?label=coarse")
  assert moved.digest == task.digest
  divided = tasks.find(
      "shades", f"{given}&train=train[:50%]+train[60%:80%]&test=train[80%:]")
  assert [divided.sources[p].count for p in ("trainval", "test")] == [14, 4]
  other = tasks.find("shades", f"{given}&val=shifted")
  assert [other.sources[p].count for p in other.splits] == [20, 6, 26, 8]


@pytest.mark.parametrize("given, word", [
    ("tfds:shade", "tfds build shade --data_dir="),
    ("tfds:", "names no data set"),
    ("tfds:shades?labl=coarse", "did you mean label"),
    ("tfds:shades?label=", "has no value"), ("tfds:shades?x", "unknown option"),
    ("tfds:shades", "unknown feature"),
    ("tfds:shades?label=coarse&test=tset", "did you mean test"),
    ("tfds:shades?label=level", "give `classes`"),
    ("tfds:shades?label=coarse&test=train[80%:]",
     r"test=train\[80%:\] and train=train share 4 examples"),
    ("tfds:shades?label=coarse&val=train[80%:]", "share 4 examples"),
    ("tfds:shades?label=coarse&test=train", "which one is trained on"),
    ("tfds:shades?label=coarse&test=train&train=train", "is both"),
    ("tfds:shades?label=coarse&val=test&test=test", "is both val and test"),
])
def test_a_wrong_name_of_tfds_is_a_sentence(root, monkeypatch, given, word):
  monkeypatch.setenv("TFDS_DATA_DIR", str(root))
  with pytest.raises(UserError, match=word) as error:
    tasks.find(tasks.in_data(given)[0], given)
  assert "\n" not in str(error.value)


def test_a_name_of_vtab_is_not_taken(root):
  del root
  assert tasks.in_data("tfds:dtd") == ("tfds_dtd",)
  assert tasks.in_data("tfds:sun397/tfds") == ("sun397_tfds",)
  assert "shades" not in tasks.names("hf:shade")
