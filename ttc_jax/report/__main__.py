"""Prints tables of one or several work directories, at any time.

  python -m ttc_jax.report WORKDIR... --published --format=latex
  python -m ttc_jax.report WORKDIR... --watch
  python -m ttc_jax.report WORKDIR... --big_vision=FILE,TASK=FILE

  python -m ttc_jax.report paper WORKDIR... --out=DIR

Work directories are only read, whether or not a run is going on. `paper` takes
those of experiments (configs/paper.py) and writes evidence.html, one page that
needs no other file, and evidence.md with its pictures. --big_vision adds runs
of Big Vision's own trainer, from the big_vision_metrics.txt that it writes.
"""
from collections.abc import Sequence
import os
import sys
import time

from absl import flags

from ttc_jax import cli, files, report
from ttc_jax.errors import UserError, check_known, printable
from ttc_jax.report import big_vision, formats, status, tables


def watch(workdirs: Sequence[str], every: float) -> None:
  """Prints the progress; on a terminal repeatedly, until Ctrl-C."""
  try:
    while True:
      shown = "\n\n".join(
          f"{printable(path)}\n\n{status.text(status.gather(path))}"
          for path in workdirs)
      if not sys.stdout.isatty():
        print(shown)
        return
      print(f"\x1b[2J\x1b[H{shown}\n\nevery {every:g} s; Ctrl-C ends",
            flush=True)
      time.sleep(every)
  except KeyboardInterrupt:
    print()


def show(workdirs: Sequence[str]) -> None:
  """Prints the table; with --out, writes the files too."""
  rows = report.collect(workdirs)
  planned = [task for workdir in workdirs
             for task in status.planned(workdir)]
  if _TASKS.value:
    planned = [check_known("task", t, {r["task"] for r in rows} | {*planned})
               for t in _TASKS.value]
    rows = [r for r in rows if r["task"] in planned]
  protocol = _PROTOCOL.value or (*report.protocols(rows), "final")[0]
  if _PUBLISHED.value and protocol == "val":
    raise UserError("published numbers are of the test set: add "
                    "--protocol=final, or leave --published out")
  table = tables.make(rows, protocol, _PUBLISHED.value, planned)
  table = big_vision.add(table, _BIG_VISION.value or ())
  form = formats.FORMATS[_FORMAT.value]
  text = form.write(table, _INTERVAL.value)
  if _OUT.value:
    try:
      os.makedirs(_OUT.value, exist_ok=True)
      write(table, text, _OUT.value, form.suffix)
    except OSError as e:
      raise UserError(f"--out='{_OUT.value}' cannot be written: "
                      f"{e.strerror}") from e
  print(text, end="")


def paper(workdirs: Sequence[str], folder: str) -> None:
  """Writes the page of claims, tables and figures as HTML and Markdown."""
  from ttc_jax.evidence import page
  sections = [page.gather(workdir) for workdir in workdirs]
  try:
    written = page.write(sections, folder)
  except OSError as e:
    raise UserError(f"--out='{folder}' cannot be written: {e.strerror}") from e
  for *start, found in page.findings(sections):
    print(printable("  ".join([*start, found.measured, found.verdict])))
  for path in written:
    print(f"written: {printable(path)}", file=sys.stderr)


def write(table: tables.Table, text: str, folder: str, suffix: str) -> None:
  """Writes the table and, with --plot, the pictures into a folder."""
  path = os.path.join(folder, f"table.{suffix}")
  files.write_text(path, text)
  written = [path]
  if _PLOT.value:
    from ttc_jax import plots  # an extra
    written += plots.save(plots.by_task(table, _INTERVAL.value),
                          os.path.join(folder, "tasks"))
  for path in written:
    print(f"written: {printable(path)}", file=sys.stderr)


def main(argv: list[str]) -> None:
  workdirs = argv[1:]
  if not workdirs:
    raise UserError("name a work directory: python -m ttc_jax.report DIR...")
  if _PLOT.value and not _OUT.value:
    raise UserError("--plot writes files: add --out=DIR")
  if _WATCH.value and _FORMAT.value != "text":
    raise UserError("--watch shows text: leave --format out")
  if workdirs[0] == "paper" and workdirs[1:]:
    paper(workdirs[1:], _OUT.value or ".")
  elif _WATCH.value:
    watch(workdirs, _EVERY.value)
  else:
    show(workdirs)


if __name__ == "__main__":
  _PROTOCOL = flags.DEFINE_enum(
      "protocol", None, ["val", "final"],
      "accuracy on val200 or on the test set; default: final if there is one")
  _TASKS = flags.DEFINE_list(
      "tasks", None, "those alone; default: all that were planned or run")
  _FORMAT = flags.DEFINE_enum("format", "text", list(formats.FORMATS),
                              "csv has a line per run, the others a table")
  _INTERVAL = flags.DEFINE_bool(
      "interval", False, "± is half of the 95 % interval over seeds, not the "
      "standard deviation")
  _PUBLISHED = flags.DEFINE_bool(
      "published", False, "adds what papers printed for VTAB-1K, and how far "
      "the runs are from it")
  _BIG_VISION = flags.DEFINE_list(
      "big_vision", None, "adds Big Vision's own runs: FILE or TASK=FILE, its "
      "big_vision_metrics.txt")
  _OUT = flags.DEFINE_string("out", None, "folder to write into as well")
  _PLOT = flags.DEFINE_bool("plot", False, "adds a picture to --out")
  _WATCH = flags.DEFINE_bool("watch", False, "how far the runs are, instead")
  _EVERY = flags.DEFINE_float(
      "every", 5.0, "seconds between two looks of --watch on a terminal",
      lower_bound=0.1)
  cli.run(main)
