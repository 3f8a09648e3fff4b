"""A prepared data set of TFDS, written as a folder in the vtab-1k format.

Images that are stored as JPEG or PNG are copied byte for byte; others become
PNG. `tasks.folder` reads the same pixels, labels and classes from it.
"""
import io
import os
import shutil
import uuid

from ttc_jax import files
from ttc_jax.tasks import folder as folder_format
from ttc_jax.tasks import images, vtab

_SUFFIX = {"JPEG": ".jpg", "PNG": ".png"}


def export(name: str, data: str, out: str) -> str:
  """Writes OUT/NAME, whole or not at all, and returns its path.

  Raises:
    UserError: it exists, or the data set is missing or damaged.
  """
  target = files.new(os.path.join(out, name))
  dataset = vtab.open_set(name, data)
  vtab.check_count(name, dataset)
  # One folder deeper, so that no list of OUT's tasks shows it.
  scratch = os.path.join(os.path.dirname(target), f".{uuid.uuid4().hex}")
  folder = os.path.join(scratch, name)
  os.makedirs(os.path.join(folder, "images"))
  try:
    _write(dataset, folder)
    os.rename(folder, target)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return target


def _write(dataset, folder):
  lines = {part: _write_images(dataset, part, folder)
           for part in ("train", "val", "test")}
  lines["trainval"] = lines["train"] + lines["val"]
  names = {folder_format.LISTS[part]: content
           for part, content in lines.items()}
  for part, content in (names | {"classes": dataset.classes}).items():
    files.write_text(os.path.join(folder, f"{part}.txt"),
                     "".join(f"{line}\n" for line in content))


def _write_images(dataset, part, folder):
  """Writes the images of a split; returns the lines of its list."""
  source, binary, lines = dataset.sources[part], dataset.spec.binary, []
  for i, label in enumerate(dataset.labels[part]):
    data, suffix = _stored(source, i, binary)
    path = f"images/{folder_format.LISTS[part]}_{i:05d}{suffix}"
    with open(os.path.join(folder, path), "wb") as file:
      file.write(data)
    lines.append(f"{path} {label}")
  return lines


def _stored(source, i, binary):
  """Bytes and suffix of an image file that decodes to the image."""
  example = source[i]
  pixels = source.decode(example, i, binary)  # also checks that it is whole
  with images.open_image(io.BytesIO(example["image"])) as image:
    if image.format in _SUFFIX and not binary:
      return example["image"], _SUFFIX[image.format]
  out = io.BytesIO()
  pixels.save(out, "PNG")
  return out.getvalue(), ".png"
