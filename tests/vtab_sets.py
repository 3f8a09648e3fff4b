"""Small data sets with the features of VTAB's, as TFDS prepares them."""
import json
import shutil
import struct

import google_crc32c
import numpy as np
from PIL import Image

SMALL = {"train": 1010, "validation": 205, "test": 410}


def features(f):
  """As the builders of TFDS specify them: {tfds name: (version, features)}."""
  def labelled(version, count, shape=(None, None, 3), **more):
    return version, {"image": f.Image(shape=shape),
                     "label": f.ClassLabel(num_classes=count), **more}
  text, box = f.Text(), f.BBoxFeature

  def vector():
    return f.Tensor(shape=(3,), dtype=np.float32)
  return {
      "cifar100": labelled("3.0.2", 100, (32, 32, 3), id=text,
                           coarse_label=f.ClassLabel(num_classes=20)),
      "caltech101": labelled("3.0.1", 102, **{"image/file_name": text}),
      "dtd": labelled("3.0.1", 47, file_name=text),
      "oxford_flowers102": labelled("2.1.1", 102, file_name=text),
      "oxford_iiit_pet": labelled(
          "3.2.0", 37, species=f.ClassLabel(names=["Cat", "Dog"]),
          file_name=text),
      "svhn_cropped": labelled("3.0.0", 10, (32, 32, 3)),
      "sun397/tfds": labelled("4.0.0", 397, file_name=text),
      "patch_camelyon": labelled("2.0.0", 2, (96, 96, 3), id=text),
      "eurosat/rgb": labelled("2.0.0", 10, (64, 64, 3), filename=text),
      "resisc45": labelled("3.0.0", 45, (256, 256, 3), filename=text),
      "diabetic_retinopathy_detection/btgraham-300": labelled(
          "3.0.0", 5, name=text),
      "dmlab": labelled("2.0.1", 6, (360, 480, 3), filename=text),
      "clevr": ("3.1.0", {
          "image": f.Image(), "file_name": text,
          "objects": f.Sequence({
              "color": f.ClassLabel(num_classes=8),
              "3d_coords": vector(), "pixel_coords": vector(),
              "rotation": np.float32}),
          "question_answer": f.Sequence({"question": text, "answer": text})}),
      "kitti": ("3.2.0", {
          "image": f.Image(), "image/file_name": text,
          "objects": f.Sequence({
              "type": f.ClassLabel(num_classes=8), "truncated": np.float32,
              "occluded": f.ClassLabel(num_classes=4), "alpha": np.float32,
              "bbox": box(), "dimensions": vector(), "location": vector(),
              "rotation_y": np.float32})}),
      "dsprites": ("2.0.0", {
          "image": f.Image(shape=(64, 64, 1)),
          "label_shape": f.ClassLabel(num_classes=3),
          "label_scale": f.ClassLabel(num_classes=6),
          "label_orientation": f.ClassLabel(num_classes=40),
          "label_x_position": f.ClassLabel(num_classes=32),
          "label_y_position": f.ClassLabel(num_classes=32),
          "value_orientation": np.float32}),
      "smallnorb": ("2.0.0", {
          "image": f.Image(shape=(96, 96, 1)),
          "image2": f.Image(shape=(96, 96, 1)),
          "label_category": f.ClassLabel(num_classes=5),
          "instance": f.ClassLabel(num_classes=10),
          "label_elevation": f.ClassLabel(num_classes=9),
          "label_azimuth": f.ClassLabel(num_classes=18),
          "label_lighting": f.ClassLabel(num_classes=6)}),
  }


def example(tfds, spec, i, picture):
  """Number i of a data set: every label is i modulo its classes."""
  f = tfds.features

  def value(feature, i):
    if isinstance(feature, f.Image):
      return picture(feature.shape, i)
    if isinstance(feature, f.ClassLabel):
      return i % feature.num_classes
    if isinstance(feature, f.Text):
      return str(i)
    if isinstance(feature, f.BBoxFeature):
      return tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
    if isinstance(feature, f.Sequence):
      return [{k: value(v, j) for k, v in feature.feature.items()}
              for j in range(3 + i % 8)]
    shape = getattr(feature, "shape", ())
    return np.full(shape, i + 7.25, np.float32)[()]
  return {k: value(v, i) for k, v in f.FeaturesDict(spec).items()}


def build(root, pictures, names=None):
  """Prepares some or all of the 16 data sets, small, as array_record.

  pictures: a folder for their image files.
  """
  import tensorflow_datasets as tfds
  for name in names or features(tfds.features):
    builder(name, root, pictures, file_format="array_record"
            ).download_and_prepare(
                download_config=tfds.download.DownloadConfig(num_shards=2))


def builder(path, root, pictures, **options):
  """A builder of TFDS of one of the data sets, small."""
  import tensorflow_datasets as tfds
  version, spec = features(tfds.features)[path]
  name, _, config = path.partition("/")

  def picture(shape, i):
    grey, file = shape[-1] == 1, pictures / f"{shape[-1]}_{i}.png"
    if not file.exists():
      pixels = (np.indices((10, 12)).sum(0) % 2 if grey  # else its number
                else np.full((10, 12, 3), (i % 256, i // 256, 0)))
      Image.fromarray(pixels.astype(np.uint8)).save(file)
    return str(file)

  def examples(start, count):
    for i in range(start, start + count):
      key = f"{i}_{i}" if path in ("eurosat/rgb", "resisc45") else str(i)
      yield key, example(tfds, spec, i, picture)

  with tfds.core.registered.skip_registration():
    class Builder(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version(version)
      BUILDER_CONFIGS = [
          tfds.core.BuilderConfig(name=c) for c in (config,) if c]

      def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(spec))

      def _split_generators(self, manager):
        del manager
        starts = np.cumsum([0, *SMALL.values()])
        return {split: examples(start, count)
                for start, (split, count) in zip(
                    starts, SMALL.items(), strict=False)}

      def _generate_examples(self):  # abstract, but the splits bring theirs
        raise NotImplementedError
  Builder.name = name
  return Builder(data_dir=root, config=config or None, **options)


def write_tfrecord(path, records):
  """The format by its description, with no code of the reader's."""
  def crc(data):
    c = google_crc32c.value(data)
    rotated = c // 2**15 + c % 2**15 * 2**17
    return struct.pack("<I", (rotated + 0xa282ead8) % 2**32)
  with open(path, "wb") as file:
    for record in records:
      length = struct.pack("<Q", len(record))
      file.write(length + crc(length) + record + crc(record))


def rewrite_as_tfrecord(source, target, shards=3):
  """Copies a prepared version, as TFRecord in another number of shards."""
  import tensorflow_datasets as tfds
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  builder = tfds.builder_from_directory(source)
  shutil.copytree(source, target,
                  ignore=shutil.ignore_patterns("*.array_record*"))
  info = json.loads((target / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  for split in info["splits"]:
    records = builder.as_data_source(split["name"], deserialize_method=raw)
    records = [bytes(records[i]) for i in range(len(records))]
    parts = np.array_split(np.arange(len(records)), shards)
    split["shardLengths"] = [str(len(part)) for part in parts]
    for k, part in enumerate(parts):
      write_tfrecord(
          target / f"{builder.name}-{split['name']}.tfrecord-{k:05d}-of-"
          f"{shards:05d}", [records[i] for i in part])
  (target / "dataset_info.json").write_text(json.dumps(info))


def small(row):
  """The row with the splits of large sets moved to where the small ones are."""
  late = {"val": "train[800:1000]", "test": "train[1000:]"}
  row = row._replace(**{
      part: split for part, split in late.items()
      if getattr(row, part).startswith("train")})
  return row._replace(test_count={
      "train[1000:]": 10, "test[50%:]": 205}.get(row.test) or SMALL[row.test])
