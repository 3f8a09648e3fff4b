"""Tasks: lists them, and prepares, checks and exports their data.

  python -m ttc_jax.tasks [list] [NAME...] [--data=DIR] [--json]
  python -m ttc_jax.tasks prepare [NAME...] --data=DIR
  python -m ttc_jax.tasks check [NAME...] --data=DIR [--json]
  python -m ttc_jax.tasks export [NAME...] --data=DIR --out=DIR

DIR may also be a folder of pictures, a zip of it, hf:NAME or tfds:NAME.

`check` reads every image: of VTAB-1K's data sets as TFDS prepared them, and of
other tasks. `prepare` and `export` are for VTAB's.
"""
import json
import os
from typing import Any

from absl import flags

from ttc_jax import cli, errors, files, tasks
from ttc_jax.tasks import archive, fgvc, folder, pictures
from ttc_jax.tasks import check as check_lib
from ttc_jax.tasks import vtab as family
from ttc_jax.vtab import check as vtab_check
from ttc_jax.vtab import export as export_lib
from ttc_jax.vtab import fingerprint
from ttc_jax.vtab import prepare as prepare_lib
from ttc_jax.vtab import rows as vtab

# --- list ---------------------------------------------------------------------

def vtab_row(name: str, data: str | None) -> dict[str, Any]:
  """One of the 19, and whether its data is there."""
  row = vtab.ROWS[name]
  return {"name": name, "group": row.group,
          "tfds": f"{row.tfds}:{row.versions[0]}", **row.splits,
          "num_classes": row.classes, "test_count": row.test_count,
          "status": _status(name, data)}


def fgvc_row(name: str, data: str | None) -> dict[str, Any]:
  """One of the five of FGVC, and whether its data is there."""
  row = fgvc.ROWS[name]
  splits = {**row.splits, "trainval": f"{row.splits['train']}+"
            f"{row.splits['val']}"} if row.tfds else {}
  found = name in tasks.names(data)
  return {"name": name, "group": "Other", "tfds": row.tfds or None,
          **{key: splits.get(key) for key in vtab.SPLITS},
          "num_classes": row.classes, "test_count": row.counts[2],
          "status": "fgvc" if found else "missing" if data else "unknown"}


def _status(name: str, data: str | None) -> str:
  if data is None:
    return "unknown"
  if tasks.family_of(name, data) not in ("vtab", None):
    return "folder"
  path = family.prepared(name, data)
  if path is None:
    return "missing"
  try:
    stored = files.read_json(os.path.join(path, "dataset_info.json")).get(
        "fileFormat") or "tfrecord"
  except (OSError, ValueError, AttributeError):
    return f"damaged {os.path.basename(path)}"
  return f"{stored} {os.path.basename(path)}"


def other_row(name: str, data: str | None) -> dict[str, Any]:
  """A task that is not VTAB's; what TFDS would say is None."""
  unknown = dict.fromkeys(("tfds", *vtab.SPLITS))
  status = tasks.family_of(name, data)
  if status == tasks.family_of(name, None):
    status = "built in"
  try:
    task = tasks.find(name, data)
    count = len(task.labels[task.tests[0]])
  except errors.UserError as error:
    return {"name": name, "group": "Other", **unknown, "num_classes": None,
            "test_count": None, "status": f"damaged: {error}"}
  return {"name": name, "group": task.group, **unknown,
          "num_classes": len(task.classes), "test_count": count,
          "status": status}


def rows(data: str | None, names: list[str] | None = None
         ) -> list[dict[str, Any]]:
  """A row for each task, or for each of `names`.

  Without names and data: the 19 of VTAB-1K only. FGVC's are shown where they
  are there or asked for. With data that is no folder
  of tasks: what it holds.
  """
  if data and not _is_directory(data):  # it is one task
    known = list(tasks.in_data(data))
  else:
    others = [n for n in tasks.names(data) if n not in vtab.ROWS]
    known = [*vtab.ROWS, *others]
  names = _in_sets(names or [])
  known += [n for n in fgvc.ROWS if n in names and n not in known]
  for name in names:
    errors.check_known("task", name, known)
  shown = [n for n in known if n in names] if names else (
      known if data else list(vtab.ROWS))
  kinds = {**dict.fromkeys(vtab.ROWS, vtab_row),
           **dict.fromkeys(fgvc.ROWS, fgvc_row)}
  return [kinds.get(name, other_row)(name, data) for name in shown]


def _in_sets(names: list[str]) -> list[str]:
  """The names, with words as "vtab" replaced by what they mean."""
  sets = tasks.sets()
  return [name for given in names for name in sets.get(given, (given,))]


def table(listed: list[dict[str, Any]]) -> str:
  """The list as text, a task a line."""
  def show(value):
    if value is None:
      return ""
    return f"{value:,}" if isinstance(value, int) else errors.printable(value)
  keys = [key for key in listed[0] if key != "trainval"]
  lines = [keys] + [[show(r[key]) for key in keys] for r in listed]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  numbers = [keys.index(key) for key in ("num_classes", "test_count")]
  return "\n".join("  ".join(
      c.rjust(w) if i in numbers else c.ljust(w)
      for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
                   for line in lines)


def list_(names: list[str], options: Any) -> int:
  """Prints the tasks."""
  listed = rows(options.data, names)
  print(json.dumps(listed, indent=2) if options.json else table(listed))
  return 0


# --- prepare, check, export ---------------------------------------------------

def prepare(names: list[str], options: Any) -> int:
  """Downloads and builds; 1 if a data set is still missing."""
  _need(options, "data")
  return int(bool(prepare_lib.prepare(_known(names) or vtab.ROWS,
                                      options.data)))


def check(names: list[str], options: Any) -> int:
  """Reads every image; 1 if something is wrong."""
  against = options.against
  known = fingerprint.read(against) if against else {}
  if options.save:  # before hours of reading
    fingerprint.check_place(options.save)
  reports = []
  for name in _checked(names, options):
    report = _check(name, options.data)
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


def _check(name: str, data: str) -> dict[str, Any]:
  if tasks.family_of(name, data) == "vtab":
    return vtab_check.check(name, data)
  return check_lib.check(name, data)


def _checked(names: list[str], options: Any) -> list[str]:
  """The names given, or all tasks of the data folder."""
  data, names = options.data, _in_sets(names)
  built_in = names and {*names} <= {*tasks.names(None)}
  if not data and not built_in or data and not (
      archive.is_archive(data) or ":" in data):
    _need(options, "data")
  known = tasks.names(data)
  for name in names:
    errors.check_known("task", name, {*vtab.ROWS, *fgvc.ROWS, *known})
  found = list(dict.fromkeys(names or (*tasks.in_data(data), *_nested(data))))
  for name in found:
    if name not in known:
      raise errors.UserError(f"{name} is not there{tasks.hint(name, data)}")
  return found


def _nested(data: str) -> tuple[str, ...]:
  return folder.nested(data) if _is_directory(data) else ()


def _is_directory(data: str) -> bool:
  """Tells whether `data` is a folder that may hold many tasks."""
  return os.path.isdir(files.expand(data)) and not pictures.is_task(data)


def export(names: list[str], options: Any) -> int:
  """Writes folders in the vtab-1k format."""
  _need(options, "out")
  names = _prepared(names, options)
  for name in names:  # before hours are spent
    files.new(os.path.join(options.out, name))
  for name in names:
    print(export_lib.export(name, options.data, options.out), flush=True)
  return 0


def _need(options: Any, key: str) -> None:
  given = getattr(options, key)
  if not given:
    raise errors.UserError(f"give a folder: --{key}=DIR")
  path = files.expand(given)
  if os.path.exists(path) and not os.path.isdir(path):
    raise errors.UserError(f"--{key}={given} is no folder: give one")


def _known(names: list[str]) -> list[str]:
  names = _in_sets(names)
  for name in names:
    errors.check_known("task of VTAB", name, vtab.ROWS)
  return list(dict.fromkeys(names))


def _prepared(names: list[str], options: Any) -> list[str]:
  """The names given, or all of VTAB whose data set is there."""
  _need(options, "data")
  found = _known(names) or list(family.names(options.data))
  for name in found:
    if family.prepared(name, options.data) is None:
      raise errors.UserError(
          f"{name} is not prepared{vtab.hint(name, options.data)}")
  if not found:
    raise errors.UserError(_nothing(options.data))
  return found


def _nothing(data: str) -> str:
  return (f"no data set of VTAB is prepared under {data}: give another --data, "
          f"or run python -m ttc_jax.tasks prepare --data={data}")


COMMANDS = {"list": (list_, ("data", "json")), "prepare": (prepare, ("data",)),
            "check": (check, ("data", "json", "save", "against")),
            "export": (export, ("data", "out"))}


def main(argv: list[str]) -> int:
  """Runs a command; see above."""
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
  flags.DEFINE_string("data", None, "TFDS directory, folder of tasks or of "
                      "pictures, .zip, hf:NAME, tfds:NAME")
  flags.DEFINE_bool("json", False, "of list and check: for machines")
  flags.DEFINE_string("save", None, "of check: a file for the fingerprint")
  flags.DEFINE_string("against", None, "of check: a file of --save")
  flags.DEFINE_string("out", None, "of export: the folder that gets folders")
  cli.run(main)
