"""Runs the experiments of docs/evidence.md, one after another, for hours.

  python tools/evidence.py run --data=DIR --weights=ViT-S14.safetensors
  python tools/evidence.py save      # while it runs, or after

Finished rows and measures lie in docs/evidence/SET.jsonl; `run` puts them into
the work directory first, so nothing is run twice, on whatever machine, and a
killed command goes on. SET is one backbone with its tasks. `--only=SET,...`
runs some; `--until=HOURS` starts no further experiment after that time.
"""
import os
import subprocess
import sys
import time

from absl import flags

from ttc_jax import cli, files
from ttc_jax.errors import UserError
from ttc_jax.runs.workdir import WorkDir, from_lines, to_lines

# {set: (arguments of configs/paper.py, experiments, the most telling first)}.
SETS = {
    "s14": ("task=rsscn7,gtsrb,shapes_location,backbone=vit_s14,"
            "weights={weights},size=56,normalisation=imagenet,epochs=20",
            ("table3", "table5a", "table8", "scores", "fig7", "fig2", "fig3",
             "fig4", "table7", "table5d", "table1")),
    "ti16": ("task=shapes_location,rsscn7,gtsrb,dtd10,fashion_mnist,"
             "shapes_count,backbone=vit_ti16,size=64,epochs=20",
             ("table3", "table5a", "scores", "table5d", "table5b", "table5c",
              "table7", "table8", "table1", "selection")),
}
HERE = os.path.dirname(os.path.abspath(__file__))
FOLDER = os.path.join(HERE, os.pardir, "docs", "evidence")

_DATA = flags.DEFINE_string("data", None, "folder of the tasks")
_WEIGHTS = flags.DEFINE_string("weights", None, "of the ViT-S/14")
_WORKDIR = flags.DEFINE_string(
    "workdir", os.path.join(HERE, os.pardir, "checkpoints", "runs",
                            "evidence"), "a folder for each set")
_ONLY = flags.DEFINE_list("only", list(SETS), "sets")
_EXPERIMENTS = flags.DEFINE_list("experiments", None, "default: all of a set")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "of the computation")
_UNTIL = flags.DEFINE_float("until", float("inf"), "hours")


def workdir(name: str) -> WorkDir:
  """Returns the work directory of a set."""
  return WorkDir(os.path.join(_WORKDIR.value, name))


def restore(name: str) -> None:
  """Puts the rows and measures of docs/evidence into the work directory."""
  path, place = os.path.join(FOLDER, f"{name}.jsonl"), workdir(name)
  for line in from_lines(path) if os.path.exists(path) else ():
    row, measures = line["row"], line["measures"]
    if place.row(row["run"]) is None:
      place.write_row(row)
    for measure, value in measures.items():
      if place.measure(row["run"], measure) is None:
        place.write_measure(row["run"], measure, value)


def save(name: str) -> None:
  """Writes the rows and measures of the work directory to docs/evidence."""
  place = workdir(name)
  os.makedirs(FOLDER, exist_ok=True)
  lines = [{"row": row, "measures": place.measures(row["run"])}
           for row in place.rows()]
  if lines:
    files.write_text(os.path.join(FOLDER, f"{name}.jsonl"), to_lines(lines))
    print(f"{name}: {len(lines)} rows")


def run(name: str, experiment: str) -> None:
  """Runs an experiment of a set to its end."""
  arguments, _ = SETS[name]
  subprocess.run([
      sys.executable, "-m", "ttc_jax.main", f"--workdir={workdir(name)}",
      f"--config={os.path.join(HERE, os.pardir, 'configs', 'paper.py')}:"
      f"{experiment},{arguments.format(weights=_WEIGHTS.value)},"
      f"data={_DATA.value}", f"--config.dtype={_DTYPE.value}",
      "--config.keep_stages"], check=True)


def main(argv: list[str]) -> None:
  begin = time.monotonic()
  if argv[1:] not in (["run"], ["save"]):
    raise UserError("say run or save")
  for name in _ONLY.value:
    if argv[1] == "save":
      save(name)
      continue
    if not _DATA.value or not _WEIGHTS.value and name == "s14":
      raise UserError("run needs --data=DIR, and --weights=FILE for s14")
    restore(name)
    for experiment in _EXPERIMENTS.value or SETS[name][1]:
      if time.monotonic() - begin < 3600 * _UNTIL.value:
        run(name, experiment)
        save(name)


if __name__ == "__main__":
  cli.run(main)
