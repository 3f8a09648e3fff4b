"""VTAB-1K's tasks: which there are, how to get them, whether they are right.

  python -m ttc_jax.tasks [list] [--data=DIR] [--json]
  python -m ttc_jax.tasks prepare [NAME...] --data=DIR
  python -m ttc_jax.tasks check [NAME...] --data=DIR [--json]
  python -m ttc_jax.tasks export [NAME...] --data=DIR --out=DIR
"""
import json
import os
from typing import Any

from absl import flags

from ttc_jax import cli, errors, files, tasks
from ttc_jax.tasks import folder, tfds
from ttc_jax.tasks import vtab as family
from ttc_jax.vtab import check as check_lib
from ttc_jax.vtab import export as export_lib
from ttc_jax.vtab import fingerprint
from ttc_jax.vtab import prepare as prepare_lib
from ttc_jax.vtab import rows as vtab


# --- list ---------------------------------------------------------------------

def vtab_row(name: str, data: str | None) -> dict[str, Any]:
  """One of the 19 and where it stands."""
  row = vtab.ROWS[name]
  return {"name": name, "group": row.group,
          "tfds": f"{row.tfds}:{row.versions[0]}", **row.splits,
          "num_classes": row.classes, "test_count": row.count,
          "status": _status(name, data)}


def _status(name, data):
  if data is None:
    return "unknown"
  if name in folder.names(data):
    return "folder"
  path = tfds.prepared(vtab.ROWS[name], data)
  if path is None:
    return "missing"
  try:
    with open(os.path.join(path, "dataset_info.json"), encoding="utf-8") as f:
      stored = json.load(f).get("fileFormat") or "tfrecord"
  except (OSError, ValueError, AttributeError):
    return f"damaged {os.path.basename(path)}"
  return f"{stored} {os.path.basename(path)}"


def other_row(name: str, data: str) -> dict[str, Any]:
  """A task that is not VTAB's; what TFDS would say is None."""
  unknown = dict.fromkeys(("tfds", *vtab.SPLITS))
  status = "folder" if name in folder.names(data) else "built in"
  try:
    task = tasks.load(name, size=1, data=data)
    labels = len(task.labels["test"])
  except errors.UserError as error:
    return {"name": name, "group": "Other", **unknown, "num_classes": None,
            "test_count": None, "status": f"damaged: {error}"}
  return {"name": name, "group": task.group, **unknown,
          "num_classes": len(task.classes), "test_count": labels,
          "status": status}


def rows(data: str | None) -> list[dict[str, Any]]:
  """The 19 and, of a folder, all that it and this package have beside them."""
  others = [n for n in tasks.names(data) if n not in vtab.ROWS] if data else []
  return ([vtab_row(name, data) for name in vtab.ROWS]
          + [other_row(name, data) for name in others])


def table(listed: list[dict[str, Any]]) -> str:
  """The list as text, a task a line."""
  show = lambda value: "" if value is None else (
      f"{value:,}" if isinstance(value, int) else value)
  keys = [key for key in listed[0] if key != "trainval"]
  lines = [keys] + [[show(r[key]) for key in keys] for r in listed]
  widths = [max(map(len, column)) for column in zip(*lines)]
  numbers = [keys.index(key) for key in ("num_classes", "test_count")]
  return "\n".join("  ".join(
      c.rjust(w) if i in numbers else c.ljust(w)
      for i, (c, w) in enumerate(zip(line, widths))).rstrip()
                   for line in lines)


def list_(names: list[str], options: Any) -> int:
  """Prints the tasks."""
  listed = rows(options.data)
  for name in names:
    errors.check_known("task", name, [r["name"] for r in listed])
  listed = [r for r in listed if not names or r["name"] in names]
  print(json.dumps(listed, indent=2) if options.json else table(listed))
  return 0


# --- prepare, check, export ---------------------------------------------------

def prepare(names: list[str], options: Any) -> int:
  """Downloads and builds; 1 if a data set is still missing."""
  _need(options, "data")
  return int(bool(prepare_lib.prepare(_known(names) or vtab.ROWS,
                                      options.data)))


def check(names: list[str], options: Any) -> int:
  """Reads everything; 1 if something is wrong."""
  against = options.against
  known = fingerprint.read(against) if against else {}
  reports = []
  for name in _prepared(names, options):
    report = check_lib.check(name, options.data)
    if name in known:
      fingerprint.compare(report, known[name], against)
    reports.append(report)
    if not options.json:
      print(check_lib.text(report), flush=True)
  if options.json:
    print(json.dumps(reports, indent=2))
  if options.save:
    fingerprint.save(reports, options.save)
  return int(any(r["wrong"] for r in reports))


def export(names: list[str], options: Any) -> int:
  """Writes folders in the vtab-1k format."""
  _need(options, "out")
  names = _prepared(names, options)
  for name in names:  # before hours are spent
    files.new(os.path.join(options.out, name))
  for name in names:
    print(export_lib.export(name, options.data, options.out), flush=True)
  return 0


def _need(options, key):
  folder_ = getattr(options, key)
  if not folder_:
    raise errors.UserError(f"give a folder: --{key}=DIR")
  if os.path.exists(os.path.expanduser(folder_)) and not os.path.isdir(
      os.path.expanduser(folder_)):
    raise errors.UserError(f"--{key}={folder_} is no folder: give one")


def _known(names):
  for name in names:
    errors.check_known("task of VTAB", name, vtab.ROWS)
  return list(dict.fromkeys(names))


def _prepared(names, options):
  """The names given, or all whose data set is there."""
  _need(options, "data")
  found = _known(names) or list(family.names(options.data))
  for name in found:
    if tfds.prepared(vtab.ROWS[name], options.data) is None:
      raise errors.UserError(
          f"{name} is not prepared{vtab.hint(name, options.data)}")
  if not found:
    raise errors.UserError(
        f"no data set of VTAB is prepared under {options.data}: give another "
        f"--data, or run python -m ttc_jax.tasks prepare "
        f"--data={options.data}")
  return found


COMMANDS = {"list": (list_, ("data", "json")), "prepare": (prepare, ("data",)),
            "check": (check, ("data", "json", "save", "against")),
            "export": (export, ("data", "out"))}


def main(argv: list[str]) -> int:
  command = argv[1] if len(argv) > 1 else "list"
  errors.check_known("command", command, COMMANDS)
  run, takes = COMMANDS[command]
  for key in ("data", "json", "save", "against", "out"):
    if getattr(flags.FLAGS, key) and key not in takes:
      raise errors.UserError(
          f"{command} takes no --{key}: it takes "
          f"{' and '.join(f'--{k}' for k in takes)}")
  return run(argv[2:], flags.FLAGS)


if __name__ == "__main__":
  flags.DEFINE_string("data", None, "TFDS directory, or folder of tasks")
  flags.DEFINE_bool("json", False, "of list and check: for machines")
  flags.DEFINE_string("save", None, "of check: a file for the fingerprint")
  flags.DEFINE_string("against", None, "of check: a file of --save")
  flags.DEFINE_string("out", None, "of export: the folder that gets folders")
  cli.run(main)
