"""`data=tfds:NAME`: any data set that TFDS prepared, as one task.

  data=tfds:cifar10                            of $TFDS_DATA_DIR, or of
                                               ~/tensorflow_datasets
  data=tfds:/disk/cifar10/3.0.2                a version's folder
  data=tfds:cifar100?label=coarse_label&dir=DIR

After "?": dir, the TFDS directory; label, the key of the label; train, val and
test, the splits in TFDS's words, where they have other names. `division` makes
the splits that are not there. Nothing is downloaded; see `tfds`. The task is
called NAME, or tfds_NAME where VTAB-1K has a task of the name.
"""
import itertools
import os
from urllib import parse

from ttc_jax import errors, files
from ttc_jax.tasks import Task, division, images, tfds

PREFIX = "tfds:"
OPTIONS = ("dir", "label", "train", "val", "test")
SPLITS = {"train": ("train",), "val": ("validation", "valid", "val", "dev"),
          "test": ("test",)}


def names(data: str | None) -> tuple[str, ...]:
  """Returns the name of the one task that `data` is."""
  if data is None:
    return ()
  path, _ = options(data, PREFIX, OPTIONS)
  parts = [p for p in path.split("/") if p]
  if os.path.isabs(files.expand(path)) and len(parts) > 1:
    parts = parts[-2:-1]  # of NAME/VERSION
  return (division.own_name("_".join(parts), "tfds"),)


def options(data: str, prefix: str, known: tuple[str, ...]
            ) -> tuple[str, dict[str, str]]:
  """Splits "PREFIX:NAME?key=value&key=value" into the name and the values.

  Raises:
    errors.UserError: there is no name, an unknown key, or no value.
  """
  name, _, query = data.removeprefix(prefix).partition("?")
  if not name.strip("/"):
    raise errors.UserError(f"data={data} names no data set: give {prefix}NAME")
  # A "+" is one: TFDS joins splits by it.
  given = dict(parse.parse_qsl(query.replace("+", "%2B"),
                               keep_blank_values=True))
  for key, value in given.items():
    errors.check_known(f"option of {prefix}{name}", key, known)
    if not value:
      raise errors.UserError(f"data={data}: {key} has no value: give "
                             f"?{key}=VALUE")
  if query and not given:
    raise errors.UserError(f"data={data}: after '?' come key=value&...: "
                           f"{', '.join(known)}")
  return name, given


def roles(given: dict[str, str], found: list[str],
          words: dict[str, tuple[str, ...]], what: str) -> dict[str, str]:
  """Returns {"train", perhaps "val" and "test": name of a split}.

  Args:
    given: by the user.
    found: the data set's splits; if there is one only, it is train.
    words: names of splits that mean a role.
    what: the data set, for sentences.

  Raises:
    errors.UserError: no split is train, or one split has two roles.
  """
  chosen: dict[str, str] = {role: given[role] for role in words
                            if role in given}
  for role, candidates in words.items():
    mine = [word for word in candidates if word in found
            and word not in chosen.values()]
    if role not in chosen and mine:
      chosen[role] = mine[0]
  if "train" not in chosen and len(found) == 1:
    chosen["train"] = found[0]
  if "train" not in chosen:
    raise errors.UserError(f"{what} has the splits {', '.join(found)}: say "
                           "which one is trained on, ?train=NAME")
  for one, other in itertools.combinations(chosen, 2):
    if chosen[one] == chosen[other]:
      raise errors.UserError(
          f"{what}: {chosen[one]} is both {one} and {other}: give one of them "
          f"another split, ?{other}=NAME")
  return chosen


def load(name: str, data: str) -> Task:
  """Opens a prepared data set and divides it; see `tasks.find`."""
  path, given = options(data, PREFIX, OPTIONS)
  root = files.expand(given.get("dir") or os.environ.get("TFDS_DATA_DIR")
                      or os.path.join("~", "tensorflow_datasets"))
  spec = tfds.Spec(path, {}, given.get("label", "label"))
  if tfds.prepared(spec, root) is None:
    raise errors.UserError(
        f"{path} is not prepared in {root}: tfds build {path} "
        f"--data_dir={root}, or say where it is, data={PREFIX}{path}?dir=DIR")
  chosen = roles(given, tfds.split_names(spec, root), SPLITS, data)
  whole = {"train": chosen["train"],  # those that are not there are unused
           **{role: chosen.get(role, chosen["train"])
              for role in ("val", "test")}}
  spec = spec._replace(splits=whole)
  tfds.check_apart(spec, root, itertools.combinations(chosen, 2))
  dataset = tfds.open_set(spec, root)
  opened = tfds.as_task(name, dataset, "Other")
  parts = {role: _part(opened, role, split)
           for role, split in chosen.items()}
  place = f"{name}-{tfds.digest(dataset)}"
  return division.complete(
      name, parts, dataset.classes,
      (os.path.join(files.cache_folder("divisions"), place),), data)


def _part(task: Task, role: str, split: str) -> division.Part:
  source = task.sources[role]
  return division.Part(
      [f"{split}/{i:07d}" for i in range(source.count)], task.labels[role],
      lambda rows: images.subset(source, rows))
