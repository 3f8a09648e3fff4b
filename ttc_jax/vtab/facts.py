"""What is certain about VTAB's data sets; `check` compares them with it.

Taken from the papers that published them and from the code of TFDS's builders;
what is only likely is left out.
"""
from collections.abc import Callable

COUNTS = {"train": 800, "val": 200, "trainval": 1000}

# Test images of each class, where the makers fixed them.
TEST = {
    "cifar100": (100,) * 100,
    "dtd": (40,) * 47,
    "svhn": (1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595),
}

# No class can have more images, because the split that they are from has none.
MOST = {
    "caltech101": {"trainval": 30},
    "dtd": {"train": 40, "val": 40},
    "oxford_flowers102": {"train": 10, "val": 10},
}

# The feature that names an example; without one its pixels do.
IDS = {
    "cifar100": "id", "caltech101": "image/file_name", "dtd": "file_name",
    "oxford_flowers102": "file_name", "oxford_iiit_pet": "file_name",
    "sun397/tfds": "file_name", "patch_camelyon": "id",
    "eurosat/rgb": "filename", "resisc45": "filename",
    "diabetic_retinopathy_detection/btgraham-300": "name",
    "clevr": "file_name", "dmlab": "filename", "kitti": "image/file_name",
}


def _numbered(pattern: str, spelled: str = "", /, **counts: int
              ) -> Callable[[str, tuple[str, ...]], list[str]]:
  """Returns (split, classes) -> `pattern` filled with the split and 0, 1, ...

  Args:
    pattern: takes the split's name and a number.
    spelled: name of the validation split, if it is another in the pattern.
    counts: examples of each split.
  """
  def names(split, classes):
    del classes
    name = spelled if split == "validation" else split
    return [pattern.format(name, i) for i in range(counts[split])]
  return names


# (split, classes) -> all its ids, where they are known: together with KEYS
# they tell which example stands where.
NAMES = {
    "cifar100": _numbered("{}_{:05d}", train=50_000, test=10_000),
    "patch_camelyon": _numbered("{}_{}", "valid", train=262_144,
                                validation=32_768, test=32_768),
    "clevr": _numbered("CLEVR_{}_{:06d}.png", "val", train=70_000,
                       validation=15_000),
    "resisc45": lambda split, classes: [
        f"{name}_{i:03d}.jpg" for name in classes for i in range(1, 701)],
}


def _doubled(name: str) -> str:
  """Returns the key of an id: "River_River_7.jpg" of "River_7.jpg"."""
  return f"{name.rsplit('_', 1)[0]}_{name}"


# Id -> the key by whose hash TFDS orders a split, where it is not the id.
# Of caltech101 the id does not tell the key.
KEYS = {"cifar100": lambda name: str(int(name[-5:])),
        "eurosat/rgb": _doubled, "resisc45": _doubled, "caltech101": None}

IN_A_CLASS = ("caltech101",)  # whose names are unique within a class only
IN_A_SPLIT = ("dmlab",)       # whose names may be those of another split
