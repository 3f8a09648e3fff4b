"""VTAB's 19 rows: label rules by hand, and data sets that TFDS wrote."""
import json
import operator
import shutil

import numpy as np
import pytest

from tests.vtab_sets import (
  SMALL,
  build,
  features,
  rewrite_as_tfrecord,
  small,
  write_tfrecord,
)
from ttc_jax import tasks
from ttc_jax.errors import UserError
from ttc_jax.tasks import tfds as reader
from ttc_jax.tasks import tfrecord
from ttc_jax.tasks import vtab as family
from ttc_jax.vtab import rows as vtab

# --- Label rules --------------------------------------------------------------


@pytest.mark.parametrize("distance, want", [
    (0.1, 0), (8.0, 0), (8.001, 1), (8.5, 1), (8.6, 2), (9.0, 2), (9.1, 3),
    (9.5, 3), (9.6, 4), (10.0, 4), (10.1, 5), (100.0, 5)])
def test_clevr_dist_takes_the_closest_and_a_threshold_counts_below(
    distance, want):
  places = [np.array([1.0, 2.0, d]) for d in (50.0, distance, 99.0)
            if d == distance or d > distance]
  assert vtab.clevr_dist({"objects": {"pixel_coords": places}}) == want


@pytest.mark.parametrize("objects, want", [(3, 0), (4, 1), (10, 7)])
def test_clevr_count(objects, want):
  assert vtab.clevr_count({"objects": {"color": [0] * objects}}) == want


@pytest.mark.parametrize("objects, want", [
    ([], 3), ([(3, 5.0)], 3), ([(7, 1.0)], 3),  # no car, van or truck
    ([(0, 8.0)], 0), ([(1, 8.01)], 1), ([(2, 20.0)], 1), ([(0, 20.1)], 2),
    ([(0, 999.0)], 2), ([(0, -3.0)], 0),
    ([(0, 50.0), (3, 2.0), (2, 9.0)], 1)])
def test_kitti_is_by_the_closest_vehicle(objects, want):
  assert vtab.kitti({"objects": {
      "type": [kind for kind, _ in objects],
      "location": [np.array([0.0, 0.0, z]) for _, z in objects]}}) == want


@pytest.mark.parametrize("name, key, pairs", [
    ("dsprites_loc", "label_x_position", [(0, 0), (1, 0), (2, 1), (31, 15)]),
    ("dsprites_ori", "label_orientation",
     [(0, 0), (2, 0), (3, 1), (4, 1), (5, 2), (39, 15)]),
    ("smallnorb_azi", "label_azimuth", [(0, 0), (17, 17)]),
    ("smallnorb_ele", "label_elevation", [(0, 0), (8, 8)]),
    ("svhn", "label", [(9, 9)])])
def test_other_labels(name, key, pairs):
  for value, want in pairs:
    assert vtab.ROWS[name].label({key: np.int64(value)}) == want


def test_the_rows_are_the_benchmark():
  groups = [row.group for row in vtab.ROWS.values()]
  assert {g: groups.count(g) for g in set(groups)} == {
      "Natural": 7, "Specialized": 4, "Structured": 8}
  for row in vtab.ROWS.values():
    start, end = row.val.split("[")[1].rstrip("]").split(":")
    assert int(end) - int(start or 0) == 200
    assert row.splits["trainval"] == f"train[:800]+{row.val}"


# --- Data sets ----------------------------------------------------------------

@pytest.fixture(scope="module")
def array_records(tmp_path_factory):
  """All 16 data sets, small, prepared by TFDS as array_record."""
  pytest.importorskip("tensorflow_datasets")
  root = tmp_path_factory.mktemp("tfds")
  build(root, tmp_path_factory.mktemp("pictures"))
  return root


@pytest.fixture(scope="module")
def tfrecords(array_records, tmp_path_factory):
  """The same 16 data sets as TFRecord."""
  root = tmp_path_factory.mktemp("tfrecord")
  for info in array_records.rglob("dataset_info.json"):
    target = root / info.parent.relative_to(array_records)
    target.parent.mkdir(parents=True, exist_ok=True)
    rewrite_as_tfrecord(info.parent, target)
  return root


@pytest.fixture(params=["array_record", "tfrecord"])
def data(request):
  return request.getfixturevalue(f"{request.param}s")


@pytest.fixture
def small_rows(monkeypatch):
  for name, row in list(vtab.ROWS.items()):
    monkeypatch.setitem(vtab.ROWS, name, small(row))


def test_all_19_are_found(data):
  assert family.names(str(data)) == tuple(vtab.ROWS)
  assert set(vtab.ROWS) <= set(tasks.names(str(data)))


def features_of(row):
  tfds = pytest.importorskip("tensorflow_datasets")
  return features(tfds.features)[row.tfds][1]


@pytest.mark.parametrize("name", vtab.ROWS)
@pytest.mark.sweep(keep=6)
def test_a_row_reads_its_data_set(data, small_rows, tmp_path, name):
  task = tasks.load(name, size=16, data=str(data), cache=str(tmp_path))
  row = vtab.ROWS[name]
  assert task.group == row.group and len(task.classes) == row.classes
  for part in vtab.SPLITS:
    split = task.split(part)
    assert split.labels.dtype == np.int32
    count = {"train": 800, "val": 200, "trainval": 1000}.get(part)
    assert len(split.labels) == len(split.images) > 0
    assert count in (None, len(split.labels))
    assert 0 <= split.labels.min() and split.labels.max() < row.classes
    np.testing.assert_array_equal(split.labels, task.labels[part])
  both = task.split("trainval")
  np.testing.assert_array_equal(both.labels, np.concatenate(
      [task.labels["train"], task.labels["val"]]))
  if "label" in features_of(row):  # of the example that the picture shows
    low, high, _ = both.images[:, 8, 8].astype(int).T
    np.testing.assert_array_equal(both.labels, (low + 256 * high) % row.classes)
  if row.binary:
    assert both.images.min() == 0 and both.images.max() == 255


def test_the_digest_follows_the_data(data, small_rows, tmp_path):
  one = tasks.load("dtd", size=8, data=str(data), cache=str(tmp_path)).digest
  two = tasks.load("svhn", size=8, data=str(data), cache=str(tmp_path)).digest
  assert one != two
  assert one == tasks.load(
      "dtd", size=16, data=str(data), cache=str(tmp_path)).digest


def test_another_test_set_is_refused(data, tmp_path):
  with pytest.raises(UserError, match="has 410 images, VTAB's has 1880"):
    tasks.load("dtd", size=8, data=str(data), cache=str(tmp_path))


def test_missing_data_name_the_command(tmp_path):
  with pytest.raises(UserError, match="tfds build svhn_cropped --data_dir="):
    tasks.load("svhn", size=8, data=str(tmp_path))


def test_damaged_data_are_one_sentence(data, small_rows, tmp_path):
  folder = tmp_path / "dtd" / "3.0.1"
  shutil.copytree(data / "dtd" / "3.0.1", folder)
  for shard in folder.glob("*record-*"):
    shard.unlink()
  with pytest.raises(UserError, match="prepare"):
    task = tasks.load("dtd", size=8, data=str(tmp_path), cache=str(tmp_path))
    task.labels["train"]
  (folder / "features.json").write_text("{")
  with pytest.raises(UserError, match="is no whole TFDS data set"):
    tasks.load("dtd", size=8, data=str(tmp_path), cache=str(tmp_path))


@pytest.mark.parametrize("other", ["riegeli", "parquet"])
def test_another_format_names_the_fix(array_records, tmp_path, other):
  folder = tmp_path / "dtd" / "3.0.1"
  shutil.copytree(array_records / "dtd" / "3.0.1", folder)
  info = folder / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", other))
  with pytest.raises(UserError, match=f"is stored as {other}, expected"):
    tasks.load("dtd", size=8, data=str(tmp_path))


def test_what_names_no_format_is_tfrecord(tfrecords, small_rows, tmp_path):
  """Data sets that TFDS prepared before it knew other formats."""
  folder = tmp_path / "dtd" / "3.0.1"
  shutil.copytree(tfrecords / "dtd" / "3.0.1", folder)
  info = json.loads((folder / "dataset_info.json").read_text())
  del info["fileFormat"]
  (folder / "dataset_info.json").write_text(json.dumps(info))
  assert len(tasks.load("dtd", size=8, data=str(tmp_path)).labels["test"])


def test_half_made_and_later_versions_are_passed_by(tmp_path):
  row = vtab.ROWS["oxford_iiit_pet"]
  for version in ("3.1.0", "3.10.0", "3.9.0.incomplete_A1", "4.0.0", "5.0.0"):
    folder = tmp_path / row.tfds / version
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").touch()
  assert family.prepared("oxford_iiit_pet", str(tmp_path)).endswith("3.10.0")
  shutil.rmtree(tmp_path / row.tfds / "3.10.0")
  shutil.rmtree(tmp_path / row.tfds / "3.1.0")
  assert family.prepared("oxford_iiit_pet", str(tmp_path)).endswith("4.0.0")


# --- TFRecord -----------------------------------------------------------------

SLICES = ["train", "train[:800]", "train[450:650]", "train[900:]",
          "validation[:200]", "test[50%:]", "train[:80%]",
          "train[:800]+train[800:1000]", "train[300:340]+test[:7]"]


@pytest.mark.parametrize("split", SLICES)
def test_the_order_is_that_of_tfds(array_records, tfrecords, split):
  """Against TFDS's own reading of the array_record copy."""
  tfds = pytest.importorskip("tensorflow_datasets")
  theirs = tfds.builder_from_directory(
      array_records / "dtd" / "3.0.1").as_data_source(
          split, decoders={"image": tfds.decode.SkipDecoding()})
  theirs = [e["file_name"] for e in theirs]
  builder = tfds.builder_from_directory(tfrecords / "dtd" / "3.0.1")
  ours = reader.Source(builder, split, "folder", {})
  assert [ours[i]["file_name"] for i in range(len(ours))] == theirs
  # and from the end, with nothing indexed yet
  ours = reader.Source(builder, split, "folder", {})
  assert [ours[i]["file_name"] for i in reversed(range(len(ours)))
          ] == theirs[::-1]


def test_only_the_shards_that_are_needed_are_opened(tfrecords, tmp_path):
  folder = tmp_path / "3.0.1"
  shutil.copytree(tfrecords / "dtd" / "3.0.1", folder)
  tfds = pytest.importorskip("tensorflow_datasets")
  builder = tfds.builder_from_directory(folder)
  ours = reader.Source(builder, "train[:800]", "folder", {})
  (folder / "dtd-train.tfrecord-00002-of-00003").unlink()
  ours[0], ours[500]
  with pytest.raises(UserError, match="00002-of-00003 cannot be read .No such"):
    ours[799]


def test_as_tensorflow_writes_it(tmp_path):
  """The tests' writer too: the same bytes."""
  tf = pytest.importorskip("tensorflow")
  records = [b"", b"a", bytes(range(256)) * 300]
  with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
    for record in records:
      writer.write(record)
  write_tfrecord(tmp_path / "ours", records)
  assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
  ours = tfrecord.Records([tfrecord.Part(str(tmp_path / "theirs"), 0, 3)])
  assert list(ours) == records


@pytest.mark.parametrize("split", SLICES)
def test_what_tfds_wrote_as_tfrecord_reads_as_tfds_reads_it(
    tmp_path_factory, split):
  """TFDS's own writer and reader, which need TensorFlow."""
  pytest.importorskip("tensorflow")
  import tensorflow_datasets as tfds
  root = tmp_path_factory.getbasetemp() / "by_tfds"
  if not root.exists():
    by_tfds(tfds, root)
  builder = tfds.builder_from_directory(root / "shapes" / "1.0.0")
  assert builder.info.file_format.value == "tfrecord"
  def theirs(**how):
    return list(builder.as_dataset(
        split, decoders={"image": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(**how)).as_numpy_iterator())
  ours = reader.Source(builder, split, "folder", {})
  ours = [ours[i] for i in range(len(ours))]
  assert ours == theirs(interleave_cycle_length=1) != []
  # By default it reads several shards in turns: the same examples.
  number = operator.itemgetter("file_name")
  assert sorted(ours, key=number) == sorted(theirs(), key=number)


def by_tfds(tfds, root):
  """Prepares a data set in TFDS's default format, in 3 shards a split."""
  with tfds.core.registered.skip_registration():
    class Shapes(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")

      def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=7),
                "file_name": tfds.features.Text()}))

      def _split_generators(self, manager):
        del manager
        return {s: self._generate_examples(n) for s, n in SMALL.items()}

      def _generate_examples(self, count):
        for i in range(count):
          yield i, {"image": np.full((2, 3, 3), i % 256, np.uint8),
                    "label": i % 7, "file_name": f"{i}.png"}
  Shapes(data_dir=root).download_and_prepare(
      download_config=tfds.download.DownloadConfig(num_shards=3))


@pytest.fixture
def file(tmp_path):
  """Five records of 0, 10, ... 40 bytes."""
  path = tmp_path / "x.tfrecord"
  write_tfrecord(path, [bytes([i]) * 10 * i for i in range(5)])
  return path


def test_the_checksum_is_crc32c():
  """Bit by bit, by its polynomial; the reflected one is 0x82f63b78."""
  data = b"123456789"
  crc = 0xffffffff
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82f63b78 if crc & 1 else 0)
  crc ^= 0xffffffff
  assert crc == 0xe3069283  # the published check value
  rotated = (crc >> 15) | (crc << 17) % 2**32
  assert tfrecord.masked(data) == (rotated + 0xa282ead8) % 2**32


def test_parts_skip_and_take(file):
  def part(skip, take):
    return tfrecord.Part(str(file), skip, take)
  records = tfrecord.Records([part(3, 2), part(0, 0), part(1, 1)])
  assert [len(r) for r in records] == [30, 40, 10]
  with pytest.raises(IndexError):
    records[3]
  with pytest.raises(IndexError):
    records[-1]
  assert len(tfrecord.Records([])) == 0


@pytest.mark.parametrize("at, number, why", [
    (0, 0, "the checksum of its length"),  # the file begins with a length
    (8, 0, "the checksum of its length"),
    (12, 0, "the checksum of its data"),   # record 0 is empty: its crc
    (28, 1, "the checksum of its data"),
    (-1, 4, "the checksum of its data")])
def test_a_flipped_bit_is_one_sentence(file, at, number, why):
  data = bytearray(file.read_bytes())
  data[at] ^= 1
  file.write_bytes(data)
  records = tfrecord.Records([tfrecord.Part(str(file), 0, 5)])
  with pytest.raises(UserError, match=f"x.tfrecord: record {number} is "
                     f"damaged .{why}"):
    list(records)


@pytest.mark.parametrize("left, number, why", [
    (0, 0, "ends before it"), (11, 0, "ends before it"),
    (12, 0, "ends within it"), (40, 1, "ends within it"),
    (-1, 4, "ends within it")])
def test_a_file_cut_short_is_one_sentence(file, left, number, why):
  file.write_bytes(file.read_bytes()[:left])
  records = tfrecord.Records([tfrecord.Part(str(file), 0, 5)])
  with pytest.raises(UserError, match=f"record {number} is damaged .*{why}"):
    list(records)


def test_threads_read_the_same(tmp_path):
  from concurrent import futures
  want = [bytes([i % 256]) * (i % 97) for i in range(2000)]
  write_tfrecord(tmp_path / "x", want)
  records = tfrecord.Records([tfrecord.Part(str(tmp_path / "x"), 0, 2000)])
  order = np.random.default_rng(0).permutation(2000)
  with futures.ThreadPoolExecutor(8) as pool:
    got = list(pool.map(lambda i: records[int(i)], order))
  assert got == [want[i] for i in order]


def test_damaged_tfrecords_of_a_task_are_one_sentence(
    tfrecords, small_rows, tmp_path):
  folder = tmp_path / "dtd" / "3.0.1"
  shutil.copytree(tfrecords / "dtd" / "3.0.1", folder)
  shard = folder / "dtd-train.tfrecord-00000-of-00003"
  data = bytearray(shard.read_bytes())
  data[20] ^= 4
  shard.write_bytes(data)
  task = tasks.load("dtd", size=8, data=str(tmp_path), cache=str(tmp_path))
  with pytest.raises(UserError, match=r"00000-of-00003: record 0 is damaged"):
    task.labels["train"]
