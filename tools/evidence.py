"""Runs the experiments of docs/evidence.md, one after another, for hours.

  python tools/evidence.py run --data=DIR --weights=ViT-S14.safetensors
  python tools/evidence.py save      # while it runs, or after
  python tools/evidence.py page      # docs/evidence.md, of what was saved

Finished rows, measures, failures, plans and Table 4 lie in
docs/evidence/SET.jsonl; `run` and `save` put them into the work directory
first, so nothing is run twice or lost, on whatever machine, and a killed
command goes on. To throw runs away, take their lines out of that file too.
`page` is always of all sets. SET is one backbone with its tasks.
`--only=SET,...` runs some; `--tasks=N` the first N tasks of each, to have every
experiment on these before the others; `--until=HOURS` starts no further
experiment after that time. `--at_once=6` runs the tasks of all sets beside one
another, six at a time, where there are cores or a GPU for them; a GPU that
processes share needs XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

from absl import flags

from ttc_jax import cli, experiments, files
from ttc_jax.errors import UserError
from ttc_jax.evidence import forest
from ttc_jax.evidence import page as evidence
from ttc_jax.report import formats
from ttc_jax.runs.workdir import WorkDir, from_lines, to_lines

# {set: (tasks, arguments, experiments of configs/paper.py, the most telling
# first)}; table6 is configs/domain.py.
SETS = {
    "s14": (("rsscn7", "gtsrb", "shapes_location"),
            "backbone=vit_s14,weights={weights},size=56,"
            "normalisation=imagenet,epochs=20",
            ("table8", "table5a", "table3", "fig2", "fig3", "fig7", "scores",
             "table7", "table5d", "table1", "fig4")),
    "s14_224": (("rsscn7", "gtsrb", "shapes_location"),
                "backbone=vit_s14,weights={weights},size=224,"
                "normalisation=imagenet,epochs=20",
                ("table8", "table3", "table5a", "fig2", "fig3", "fig7",
                 "table5d", "table1", "fig4", "table7", "table5c", "table5b",
                 "scores")),
    "s14_224_long": (("gtsrb",),
                     "backbone=vit_s14,weights={weights},size=224,"
                     "normalisation=imagenet,epochs=40,method=linear,layernorm,"
                     "layernorm_2x,ttc,ttc_random", ("table3",)),
    "ti16": (("shapes_location", "rsscn7", "gtsrb", "dtd10", "fashion_mnist",
              "shapes_count"),
             "backbone=vit_ti16,size=64,epochs=20",
             ("table8", "table5a", "table3", "scores", "rates", "table5b",
              "table5c", "table5d", "table7", "selection", "table1")),
    # What takes long in the set before, all from one stage 1.
    "ti16_tuned": (("gtsrb", "rsscn7", "shapes_count"),
                   "backbone=vit_ti16,size=64,epochs=20",
                   ("rates", "selection")),
    # Does the choice of channels matter where training is short?
    "ti16_short": (("shapes_location", "gtsrb", "rsscn7"),
                   "backbone=vit_ti16,size=64,epochs=8", ("selection",)),
    "domains": (("pacs/from_photo", "pacs/from_cartoon",
                 "pacs/from_art_painting", "pacs/except_photo"),
                "backbone=vit_ti16,size=64,epochs=50,method=linear,layernorm,"
                "layernorm_2x,ttc,ttc_random,lora,ssf,noah", ("table6",)),
    "domains_s14": (("pacs/from_photo",),
                    "backbone=vit_s14,weights={weights},size=56,"
                    "normalisation=imagenet,epochs=50,method=layernorm,"
                    "layernorm_2x,ttc", ("table6",)),
    "shifted": (("scene_count_shifted", "sprites_location_shifted",
                 "sprites_orientation_shifted"),
                "backbone=vit_ti16,size=64,epochs=20,augment=false,"
                "method=linear,layernorm,layernorm_2x,ttc,lora", ("table6",)),
    "swin": (("shapes_location", "rsscn7", "gtsrb"),
             "backbone=swin_mu,size=64,epochs=20", ("table2",)),
    "b16": ((), "backbone=vit_b16,weights=random,size=224", ("table4",)),
}
HERE = os.path.dirname(os.path.abspath(__file__))
FOLDER = os.path.join(HERE, os.pardir, "docs", "evidence")
BEGIN, END = "<!-- claims -->\n", "<!-- /claims -->\n"  # README's table

_DATA = flags.DEFINE_string("data", None, "folder of the tasks")
_WEIGHTS = flags.DEFINE_string("weights", None, "of the ViT-S/14")
_WORKDIR = flags.DEFINE_string(
    "workdir", os.path.join(HERE, os.pardir, "checkpoints", "runs",
                            "evidence"), "a folder for each set")
_ONLY = flags.DEFINE_list("only", list(SETS), "sets")
_EXPERIMENTS = flags.DEFINE_list("experiments", None, "default: all of a set")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "of the computation")
_TASKS = flags.DEFINE_integer("tasks", None, "the first ones of each set",
                              lower_bound=1)
_AT_ONCE = flags.DEFINE_integer("at_once", 1, "processes", lower_bound=1)
_UNTIL = flags.DEFINE_float("until", float("inf"), "hours")


def workdir(name: str) -> WorkDir:
  """Returns the work directory of a set."""
  return WorkDir(os.path.join(_WORKDIR.value, name))


def restore(name: str, place: WorkDir) -> None:
  """Puts what docs/evidence has of a set into a work directory."""
  path = os.path.join(FOLDER, f"{name}.jsonl")
  for line in from_lines(path) if os.path.exists(path) else ():
    if "file" in line:
      place.store.create(line["file"], json.dumps(line["content"]).encode())
      continue
    row, measures = line["row"], line["measures"]
    if place.row(row["run"]) is None:
      place.write_row(row)
    for measure, value in measures.items():
      if place.measure(row["run"], measure) is None:
        place.write_measure(row["run"], measure, value)


def save(name: str) -> None:
  """Writes what a work directory has to show to docs/evidence, beside what
  that has already."""
  place = workdir(name)
  if not place.exists():
    return
  restore(name, place)
  os.makedirs(FOLDER, exist_ok=True)
  lines = [{"row": row, "measures": place.measures(row["run"])}
           for row in place.rows()]
  kept = [file for file in place.store.names("") if file.startswith("plan-")]
  kept += [f"runs/{failure['run']}/failure.json"
           for failure in place.failures()
           if place.row(failure["run"]) is None]
  kept += [f"{place.experiment(experiment)}/{experiment}.json"
           for experiment in place.experiments()
           if not experiments.trains(experiment)]
  lines += [{"file": file, "content": json.loads(content)} for file in kept
            if (content := place.store.read(file))]
  if lines:
    files.write_text(os.path.join(FOLDER, f"{name}.jsonl"), to_lines(lines))
    print(f"{name}: {len(lines)} rows")


def page() -> None:
  """Writes docs/evidence.md, its introduction first, and README's table."""
  docs = os.path.join(FOLDER, os.pardir)
  with tempfile.TemporaryDirectory() as scratch:
    places = [WorkDir(os.path.join(scratch, name)) for name in SETS]
    for name, place in zip(SETS, places, strict=True):
      restore(name, place)
    sections = [evidence.gather(str(place)) for place in places
                if place.experiments()]
    out = os.path.join(scratch, "page")
    evidence.write(sections, out)
    for old in glob.glob(os.path.join(docs, "evidence-*.png")):
      os.remove(old)
    for file in glob.glob(os.path.join(out, "*.png")):
      shutil.copy(file, docs)
    heading, _, rest = read(out, "evidence.md").partition("\n\n")
  introduction = read(FOLDER, "introduction.md")
  files.write_text(os.path.join(docs, "evidence.md"),
                   f"{heading}\n\n{introduction}\n{rest}")
  before, begin, rest = read(HERE, "../README.md").partition(BEGIN)
  _, end, after = rest.partition(END)
  files.write_text(os.path.join(HERE, "../README.md"), "".join((
      before, begin, claims(sections), end, after)))


def claims(sections: Sequence[evidence.Section]) -> str:
  """Returns README's table and picture of the claims."""
  table = evidence.summary(sections)
  if not table.lines:
    return "No claim was measured on three tasks yet.\n"
  return (f"{formats.pipes([table.header, *table.lines])}\n\n"
          f"![{forest.TITLE}](docs/evidence-claims.png)\n")


def read(folder: str, name: str) -> str:
  with open(os.path.join(folder, name), encoding="utf-8") as file:
    return file.read()


def tasks_of(name: str) -> tuple[str, ...]:
  """Returns the tasks of a set that are asked for."""
  return SETS[name][0][:_TASKS.value]


def run(name: str, tasks: Sequence[str], end: float) -> None:
  """Runs the experiments of a set on some of its tasks, until a time."""
  for experiment in _EXPERIMENTS.value or SETS[name][2]:
    if time.monotonic() < end:
      run_experiment(name, experiment, tasks)
      save(name)


def run_experiment(name: str, experiment: str, tasks: Sequence[str]) -> None:
  """Runs an experiment to its end."""
  arguments = (f"task={','.join(tasks)},"
               f"{SETS[name][1].format(weights=_WEIGHTS.value)}")
  config = ("domain.py:" if experiment == "table6" else
            f"paper.py:{experiment},") + f"{arguments},data={_DATA.value}"
  subprocess.run([
      sys.executable, "-m", "ttc_jax.main", f"--workdir={workdir(name)}",
      f"--config={os.path.join(HERE, os.pardir, 'configs', config)}",
      f"--config.dtype={_DTYPE.value}", "--config.keep_stages"], check=True)


def run_all() -> None:
  """Runs everything, at last with all tasks of a set, which draws it."""
  end = time.monotonic() + 3600 * _UNTIL.value
  for name in _ONLY.value:
    if not _DATA.value or not _WEIGHTS.value and "{weights}" in SETS[name][1]:
      raise UserError("run needs --data=DIR, and --weights=FILE for the "
                      "ViT-S/14")
    restore(name, workdir(name))
  if _AT_ONCE.value > 1:
    with ThreadPoolExecutor(_AT_ONCE.value) as pool:
      for done in [pool.submit(run, name, [task], end)
                   for name in _ONLY.value for task in tasks_of(name)]:
        done.result()
  for name in _ONLY.value:
    run(name, tasks_of(name), end)


def main(argv: list[str]) -> None:
  if argv[1:] == ["page"]:
    page()
  elif argv[1:] == ["save"]:
    for name in _ONLY.value:
      save(name)
  elif argv[1:] == ["run"]:
    run_all()
  else:
    raise UserError("say run, save or page")


if __name__ == "__main__":
  cli.run(main)
