"""ImageNet-1K and the test sets that shift it (Table 6), prepared by TFDS.

  imagenet   trained on 99 % of imagenet2012's train, "val" is the rest; with
             few_shot=16 on 16 images of each class

Test sets, those that are prepared in the data folder, the first one always:

  test     imagenet2012's validation    sketch   imagenet_sketch
  v2       imagenet_v2/matched-frequency
  a        imagenet_a                   r        imagenet_r

Labels are matched by the names of the classes, since a and r have 200 of the
1,000; `config.masked_tests` compares those alone, by default all (as NOAH).
NOAH's list of 16 images a class is not reproduced: few_shot's sample is our
own, decided by a hash and the order of the examples in TFDS. The labels of all
training images are read at the start, which takes minutes.
"""
import hashlib

import numpy as np

from ttc_jax import errors
from ttc_jax.tasks import Task, tfds

NAME = "imagenet"
_BASE = tfds.Spec("imagenet2012", {
    "train": "train[:99%]", "val": "train[99%:]", "test": "validation"})
_TESTS = {
    "v2": tfds.Spec("imagenet_v2/matched-frequency", dict.fromkeys(
        ("train", "val", "test"), "test")),
    **{short: tfds.Spec(f"imagenet_{name}", dict.fromkeys(
        ("train", "val", "test"), "test"))
       for short, name in (("sketch", "sketch"), ("a", "a"), ("r", "r"))},
}


def names(data: str | None) -> tuple[str, ...]:
  """Returns no name: the task is asked for by name; see `nested`."""
  del data
  return ()


def nested(data: str | None) -> tuple[str, ...]:
  """Returns "imagenet" where imagenet2012 is prepared."""
  return (NAME,) if data and tfds.prepared(_BASE, data) else ()


def hint(name: str, data: str | None) -> str | None:
  """Returns what to do about "imagenet" where it is not prepared."""
  if name != NAME:
    return None
  return (f"; imagenet2012 is not prepared in data={data}: "
          "tfds build imagenet2012 --data_dir=DIR, with the files that "
          "image-net.org gives, then imagenet_v2, imagenet_sketch, imagenet_a "
          "and imagenet_r")


def load(name: str, data: str) -> Task:
  """Opens the data sets that are prepared; see `tasks.find`."""
  task = tfds.task(name, _BASE, data)
  labels, sources = dict(task.labels), dict(task.sources)
  tests, digests = ["test"], [task.digest]
  for short, spec in _TESTS.items():
    if tfds.prepared(spec, data) is None:
      continue
    # Its test set alone is used, so its other roles may be the same.
    other = tfds.as_task(short, tfds.open_set(spec, data), "Other")
    labels[short] = _matched(other, task.classes)
    sources[short] = other.sources["test"]
    tests.append(short)
    digests.append(other.digest)
  return Task(
      name, "Other", task.classes, labels, sources,
      hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16],
      tests=tuple(tests))


def _matched(task: Task, classes: tuple[str, ...]) -> np.ndarray:
  """The labels of a test set in the numbers of ImageNet-1K's classes."""
  place = {name: i for i, name in enumerate(classes)}
  unknown = [name for name in task.classes if name not in place]
  if unknown:
    raise errors.UserError(
        f"imagenet_{task.name} has the class {unknown[0]!r}, which "
        f"imagenet2012 has not, and {len(unknown)} such classes in all: "
        "prepare both with the same version of TFDS")
  table = np.array([place[name] for name in task.classes], np.int32)
  found = table[task.labels["test"]]
  found.setflags(write=False)
  return found
