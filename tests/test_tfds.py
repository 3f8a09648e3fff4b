"""The reader of TFDS's data sets, with one that is none of VTAB's."""
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


def load(spec, data, tmp_path):
  return tasks.at_size(reader.task("shades", spec, str(data)), 4,
                       cache=str(tmp_path / "cache"))


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
