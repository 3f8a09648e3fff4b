"""ImageNet with its shifted test sets, from small sets that TFDS wrote."""
import numpy as np
from PIL import Image
import pytest

from ttc_jax import tasks
from ttc_jax.errors import UserError

CLASSES = ["n01", "n02", "n03", "n04"]


def write(root, name, classes, splits, pictures, config=None):
  """Prepares a data set; the grey level of image i is 10 i."""
  tfds = pytest.importorskip("tensorflow_datasets")

  def info(self):
    return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(4, 4, 3)),
            "label": tfds.features.ClassLabel(names=classes)}))

  def generators(self, manager):
    return {s: self._generate_examples(n) for s, n in splits.items()}

  def examples(self, count):
    for i in range(count):
      file = pictures / f"{i}.png"
      Image.new("RGB", (4, 4), (10 * i,) * 3).save(file)
      yield i, {"image": str(file), "label": i % len(classes)}
  body = dict(VERSION=tfds.core.Version("5.1.0"), _info=info,
              _split_generators=generators, _generate_examples=examples,
              name=name)
  if config:
    body["BUILDER_CONFIGS"] = [tfds.core.BuilderConfig(name=config)]
  with tfds.core.registered.skip_registration():
    builder = type("Made", (tfds.core.GeneratorBasedBuilder,), body)
  builder(data_dir=root, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  root, pictures = map(tmp_path_factory.mktemp, ("tfds", "pictures"))
  write(root, "imagenet2012", CLASSES, {"train": 100, "validation": 12},
        pictures)
  write(root, "imagenet_a", ["n04", "n02"], {"test": 6}, pictures)
  write(root, "imagenet_v2", CLASSES, {"test": 8}, pictures,
        "matched-frequency")
  return root


def test_test_sets_are_those_that_are_prepared(data):
  task = tasks.find("imagenet", str(data))
  assert task.tests == ("test", "v2", "a")
  assert {s: len(x) for s, x in task.labels.items()} == {
      "train": 99, "val": 1, "trainval": 100, "test": 12, "v2": 8, "a": 6}
  assert task.classes == tuple(CLASSES)


def test_labels_of_a_subset_are_matched_by_name(data):
  task = tasks.find("imagenet", str(data))
  grey = [task.sources["a"].read(i).getpixel((0, 0))[0] // 10
          for i in range(6)]  # TFDS has shuffled the examples
  names = [CLASSES[i] for i in task.labels["a"]]
  assert names == [["n04", "n02"][g % 2] for g in grey]


def test_few_shot_takes_so_many_of_each_class(data):
  task = tasks.few_shot(tasks.find("imagenet", str(data)), 5)
  assert np.bincount(task.labels["train"]).tolist() == [5] * 4


def test_a_class_that_imagenet_lacks_is_refused(data, tmp_path):
  write(tmp_path, "imagenet2012", CLASSES, {"train": 100, "validation": 4},
        tmp_path)
  write(tmp_path, "imagenet_r", ["n02", "n99"], {"test": 4}, tmp_path)
  with pytest.raises(UserError, match="imagenet_r has the class 'n99'"):
    tasks.find("imagenet", str(tmp_path))


def test_without_it_the_sentence_says_what_to_build(tmp_path):
  with pytest.raises(UserError, match="tfds build imagenet2012"):
    tasks.find("imagenet", str(tmp_path))


def test_masked_top1_compares_the_classes_that_the_labels_have(
    model, params, split):
  from ttc_jax import evaluate, parallel
  on_devices = parallel.replicate(params)
  logits = evaluate.logits(model, on_devices, {}, split.images)
  rows = np.isin(split.labels, (0, 2))
  images, labels = np.asarray(split.images)[rows], split.labels[rows]
  got = evaluate.top1(model, on_devices, {}, images, labels, masked=True)
  best = np.where(logits[rows][:, 0] >= logits[rows][:, 2], 0, 2)
  assert got == pytest.approx(100 * (best == labels).mean())
