"""Counts, histograms and checksums of tasks, for two sites to compare."""
from collections.abc import Iterable
import json
import os
from typing import Any

from ttc_jax import errors, files

_COMPARED = ("count", "labels", "sha256")


def of(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
  """Returns what two sites compare, of the tasks that were read in full."""
  return {r["name"]: _fields(r) for r in reports
          if r["splits"] and all(s["sha256"] for s in r["splits"].values())}


def _fields(task: dict[str, Any]) -> dict[str, Any]:
  return {"tfds": task["tfds"] and str(task["tfds"]), "splits": {
      part: {key: split[key] for key in _COMPARED}
      for part, split in task["splits"].items()}}


def save(reports: Iterable[dict[str, Any]], path: str) -> None:
  """Writes their fingerprint as JSON, whole or not at all."""
  text = json.dumps(of(reports), indent=1) + "\n"
  try:
    files.write_text(files.expand(path), text)
  except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
    raise errors.UserError(f"cannot write {path} ({error.strerror}): give a "
                           "file in a folder that exists") from error


def check_place(path: str) -> None:
  """Raises UserError where `save` could not write."""
  folder = os.path.dirname(os.path.abspath(files.expand(path)))
  if not os.access(folder, os.W_OK) or os.path.isdir(files.expand(path)):
    raise errors.UserError(f"cannot write {path}: give --save=FILE in a folder "
                           "that is there and may be written")


def read(path: str) -> dict[str, Any]:
  """Reads what `save` wrote; errors.UserError for anything else."""
  try:
    tasks = files.read_json(files.expand(path))
    return {name: _fields(task) for name, task in tasks.items()}
  except OSError as error:
    raise errors.UserError(f"cannot read {path} ({error.strerror}): give a "
                           "file that --save wrote") from error
  except (ValueError, AttributeError, LookupError, TypeError) as error:
    raise errors.UserError(
        f"{path} is no fingerprint: give a file that --save wrote") from error


def compare(report: dict[str, Any], theirs: dict[str, Any], path: str) -> None:
  """Notes in a report how each split compares with a fingerprint of the task.

  Args:
    report: as `check` returns it; `reference` and `wrong` are changed.
    theirs: the task in what `read` returns.
    path: of the fingerprint, for the sentences.
  """
  for part, split in report["splits"].items():
    want = theirs["splits"].get(part)
    if want is None:
      split["reference"] = f"not in {path}"
      report["wrong"].append(f"{part}: {path} has no such split")
      continue
    if split["sha256"] == want["sha256"]:
      split["reference"] = f"as in {path}"
      continue
    split["reference"] = f"not as in {path}"
    same = split["labels"] == want["labels"]
    report["wrong"].append(
        f"{part}: not as in {path} ({theirs['tfds'] or 'a folder'}): "
        + ("the same number of each class, but other examples or another order"
           if same else "other numbers of the classes"))
