"""Rows are read, merged and chosen; tables hold the numbers done by hand."""
import csv
import io
import json
import re

import numpy as np
import pytest
from scipy import stats

from ttc_jax import report
from ttc_jax.errors import UserError
from ttc_jax.report import formats, published, tables
from ttc_jax.report import rows as rows_lib
from ttc_jax.runs.workdir import WorkDir
from ttc_jax.vtab import rows as vtab


def row(task, variant, seed, test, group="Natural", **more):
  return {"task": task, "variant": variant, "seed": seed, "group": group,
          "run": f"{task}-{variant}-final-s{seed}-0a", "method": variant,
          "options": {}, "protocol": "final", "test_top1": test,
          "val_top1": None, "module_params": 1000, "norm_params": 20,
          "head_params": 5, "backbone": "vit_ti16", "image_size": 64,
          "weights": "w.npz", "weights_sha256": "0" * 64, "lr": 0.1,
          "weight_decay": 0.0, **more}


ROWS = [row("a", "ttc", 0, 50.0), row("a", "ttc", 1, 54.0),
        row("b", "ttc", 0, 70.0), row("b", "ttc", 1, 70.0),
        row("c", "ttc", 0, 10.0, "Structured"),
        row("c", "ttc", 1, 20.0, "Structured"),
        row("a", "linear", 0, 40.0, head_params=7)]


def vtab_rows(variant="ssf", top1=None, seed=0, **more):
  return [row(task, variant, seed, (top1 or {}).get(task, 50.0), r.group,
              **more) for task, r in vtab.ROWS.items()]


def cells(line):
  return [c.strip() for c in line.strip("|").split("|")]


# --- Tables -------------------------------------------------------------------

def test_table_by_hand():
  text = formats.markdown(tables.make(ROWS, "final"))
  _, header, rule, ttc, linear, *notes = filter(None, text.split("\n"))
  assert cells(header) == ["", "a", "b", "c", "Natural", "mean of 3",
                           "mean of groups", "module", "norm", "head", "seeds"]
  assert set(rule) <= set("|-:")
  # Sample deviation of 50, 54: sqrt(8) = 2.83. Means: 52, 70, 15; Natural's
  # are 60 and 62, all: 43.3 and 48, the groups': (60 + 10) / 2 and 41.
  assert cells(ttc) == ["ttc", "52.0 ± 2.8", "70.0 ± 0.0", "15.0 ± 7.1",
                        "61.0 ± 1.4", "45.7 ± 3.3", "38.0 ± 4.2", "1,000",
                        "20", "5", "2"]
  assert cells(linear)[:7] == ["linear", "40.0", *"-----"]
  assert "deviation" in notes[0] and notes[1].startswith("-:")


def test_the_interval_is_students():
  rng = np.random.default_rng(0)
  for n in (2, 3, 5, 30):
    seeds = rng.normal(70, 3, n)
    low, high = stats.t.interval(0.95, n - 1, seeds.mean(), stats.sem(seeds))
    score = tables.Score(seeds.mean(), tuple(seeds))
    np.testing.assert_allclose(score.interval, (high - low) / 2)
  # Of 50, 54: 12.706 sqrt(8) / sqrt(2) = 25.4.
  text = formats.text(tables.make(ROWS, "final"), interval=True)
  assert "52.0 ± 25.4" in text and "95 % interval" in text
  assert tables.Score(1.0, (1.0,)).interval is None


def test_a_mean_without_whole_seeds_has_no_spread():
  rows = [row("a", "ttc", 0, 10.0), row("b", "ttc", 1, 30.0)]
  *_, mean = tables.make(rows, "final").lines[0].scores
  assert mean.mean == 20.0 and mean.deviation is None


def test_columns_have_vtabs_order_whatever_that_of_the_rows():
  rows = vtab_rows()[::-1] + [row("extra", "ssf", 0, 1.0, "Other"),
                              row("more", "ssf", 0, 1.0, "Natural")]
  titles = [c.title for c in tables.make(rows, "final").columns]
  names = list(vtab.ROWS)
  assert titles == [*names[:7], "more", *names[7:], "extra", "Natural",
                    "Specialized", "Structured", "mean of 21",
                    "mean of groups"]


def test_the_readmes_table():
  """Groups of one task have no column of their own."""
  rows = [row("sprites_location", "linear", 0, 51.7, "Structured"),
          row("digits", "linear", 0, 89.6, "Other", head_params=1930)]
  _, header, _, linear, *notes = filter(None, formats.markdown(
      tables.make(rows, "final")).split("\n"))
  assert cells(header) == ["", "sprites_location", "digits", "mean of 2",
                           "mean of groups", "module", "norm", "head", "seeds"]
  assert cells(linear) == ["linear", "51.7", "89.6", "70.7", "70.7", "1,000",
                           "20", "5 to 1,930", "1"]
  assert len(notes) == 1  # no ± to explain


def test_a_planned_task_without_a_run_is_a_hole():
  rows = [row(t, "lora", 0, 1.0) for t in ("dtd", "svhn")]
  table = tables.make(rows, "final", planned=["eurosat", "dtd", "mine"])
  assert [c.title for c in table.columns] == [
      "dtd", "svhn", "eurosat", "mine", "Natural", "mean of 4",
      "mean of groups"]
  assert formats.cells(table.lines[0])[:8] == [
      "lora", "1.0", "1.0", "-", "-", "1.0", "-", "-"]
  assert "| eurosat |" in report.summary(rows, ["eurosat"])


def test_further_test_sets_have_columns_and_enter_no_mean():
  def tests(first, hard):
    return {"test": {"top1": first, "count": 9},
            "hard": {"top1": hard, "count": 3}}
  rows = [row("a", "ttc", 0, 50.0, tests=tests(50.0, 10.0)),
          row("a", "ttc", 1, 60.0, tests=tests(60.0, 30.0)),
          row("b", "ttc", 0, 70.0, tests={"new": {"top1": 70.0, "count": 2}}),
          row("b", "ttc", 1, 70.0)]
  table = tables.make(rows, "final")
  assert [c.title for c in table.columns] == ["a", "a/hard", "b", "mean of 2"]
  line, = table.lines
  assert [s.mean for s in line.scores] == [55.0, 20.0, 70.0, 62.5]
  assert line.scores[1].seeds == (10.0, 30.0) and line.seeds == (2, 2)
  back = [(r["task"], r["test"], float(r["top1"])) for r in csv.DictReader(
      io.StringIO(formats.csv(table)))]
  assert back == [("a", "test", 50.0), ("a", "hard", 10.0), ("a", "test", 60.0),
                  ("a", "hard", 30.0), ("b", "new", 70.0), ("b", "test", 70.0)]
  found, = json.loads(formats.json(table))
  assert found["top1"]["a/hard"]["mean"] == 20.0


def test_one_task_has_no_mean():
  table = tables.make([row("a", "ttc", 0, 1.0)], "final")
  assert [c.title for c in table.columns] == ["a"]


def test_no_row_is_an_error():
  with pytest.raises(UserError, match="no finished run"):
    tables.make([row("a", "ttc", 0, 1.0)], "val")


def test_costs_by_hand():
  more = dict(flops=3e6, flops_merged=2e6, images_per_second=10.0,
              test_images_per_second=20.0, step_memory_bytes=2 ** 21,
              bundle_bytes=4096)
  rows = [row("a", "ttc", 0, 50.0, **more), row("b", "ttc", 0, 60.0, **more),
          row("a", "ttc", 1, 52.0, **{**more, "bundle_bytes": 8192}),
          row("b", "ttc", 1, 62.0, **{**more, "images_per_second": 30.0}),
          row("a", "ttc", 2, 99.0, **more)]  # of a seed that lacks a task
  _, _, line = report.costs(rows).split("\n")
  # Means over tasks: 55 and 57.
  assert cells(line) == ["ttc", "56.0 ± 1.4", "1,000", "20", "5", "3", "2",
                         "14", "20", "2", "8"]
  for r in rows:
    r["step_memory_bytes"] = None
  assert cells(report.costs(rows).split("\n")[2])[-2] == "-"


def test_a_difference_has_a_sign_and_nothing_is_no_negative():
  numbers = [formats.number(tables.Score(x), signed=True)
             for x in (1.25, -0.01, 0.0, -3.0)]
  assert numbers == ["+1.2", "+0.0", "+0.0", "-3.0"]


# --- Published ----------------------------------------------------------------

# As printed: Natural, Specialized, Structured, all 19 (two decimals).
PRINTED = {
    "Full": (75.89, 83.38, 47.64, 65.57),
    "Linear": (68.93, 77.15, 26.85, 52.94),
    "BitFit": (73.30, 78.25, 44.10, 62.05),
    "Adapter": (79.01, 84.08, 58.49, 71.44),
    "AdaptFormer": (80.56, 84.88, 58.83, 72.32),
    "VPT-Shallow": (76.81, 79.67, 46.98, 64.85),
    "VPT-Deep": (78.49, 82.42, 55.00, 69.43),
    "LoRA": (79.49, 84.55, 59.78, 72.25),
    "SSF": (81.57, 86.55, 58.96, 73.10),
    "NOAH": (80.26, 84.88, 61.30, 73.25),
    "SCT": (82.23, 85.90, 59.87, 73.59)}


@pytest.mark.parametrize("known", published.ROWS, ids=lambda p: p.name)
def test_published_means_come_out_of_their_numbers(known):
  if not known.top1:
    assert known.stated
    return
  assert len(known.top1) == 19
  natural, specialized, structured = np.split(np.array(known.top1), [7, 11])
  want = [*map(np.mean, (natural, specialized, structured)),
          np.mean(known.top1)]
  np.testing.assert_allclose(PRINTED[known.name], want, atol=0.0051)
  names = list(vtab.ROWS)
  groups = (names[:7], names[7:11], names[11:])
  np.testing.assert_allclose(
      [*(known.mean([g]) for g in groups), known.mean([names])], want)
  np.testing.assert_allclose(known.mean(groups), np.mean(want[:3]))


def test_differences_are_ours_minus_theirs():
  ssf = dict(zip(vtab.ROWS, next(
      p.top1 for p in published.ROWS if p.name == "SSF"), strict=True))
  rows = vtab_rows(top1={t: x + 2.0 for t, x in ssf.items()})
  table = tables.make(rows, "final", compare=True)
  lines = {x.name: x for x in table.lines}
  np.testing.assert_allclose(
      [s.mean for s in lines["ssf - SSF"].scores], 2.0)
  assert [x.name for x in table.lines if x.kind == "difference"] == [
      "ssf - SSF"]
  assert lines["SSF (published)"].beside == ["ssf"]
  text = formats.text(table)
  assert "V-PETL Bench" in text and "arXiv 2303.07910" in text
  assert "Backbone vit_ti16 at 64 px" in text and "ViT-B/16" in text


def test_published_means_are_of_the_tables_own_tasks():
  rows = [row(t, "lora", 0, 1.0) for t in ("dtd", "svhn")]
  table = tables.make(rows, "final", compare=True)
  lines = {x.name: [s.mean for s in x.scores] for x in table.lines}
  np.testing.assert_allclose(lines["LoRA (published)"],
                             [69.4, 85.3, (69.4 + 85.3) / 2])
  assert "TTC (published)" not in lines  # its text has no such number


def test_a_task_that_vtab_lacks_leaves_a_hole_in_what_was_published():
  rows = [row(t, "lora", 0, 1.0) for t in ("dtd", "x")]
  lines = tables.make(rows, "final", compare=True).lines
  assert [x.scores[1:] for x in lines if x.kind != "run"] == [
      [None, None]] * (len(lines) - 1)
  none = tables.make([row("x", "lora", 0, 1.0)], "final", compare=True)
  assert len(none.lines) == 1 and "No published number" in none.sources[-1]


def test_stated_means_stand_under_what_they_are_of():
  options = {"score": "taylor", "stage1": "norm", "tune": "channels",
             "position": "mlp", "tune_norm": True, "scale": 1.0, "k": 24,
             "blocks": 12}
  rows = (vtab_rows("ttc", options=options) +
          vtab_rows("ttc_random", method="ttc",
                    options=options | {"score": "random"}))
  table = tables.make(rows, "final", compare=True)
  titles = [c.title for c in table.columns]
  ttc = next(x for x in table.lines if x.name == "TTC (published)")
  assert {t: s.mean for t, s in zip(titles, ttc.scores, strict=True)
          if s} == {
      "Specialized": 86.7, "Structured": 61.5, "mean of 19": 74.8}
  assert ttc.beside == ["ttc"]  # not the variant with random channels
  of_ttc, = (p for p in published.ROWS if p.name == "TTC")
  for other in ({"k": 4}, {"blocks": 2}, {"position": "mhsa"}, {"scale": 0.1},
                {"tune_norm": False}):
    assert of_ttc.is_of(rows[0]) and not of_ttc.is_of(
        rows[0] | {"options": options | other})


def test_an_adapter_stands_beside_the_one_of_its_placement():
  for placement, name in (("parallel", "AdaptFormer"), ("pfeiffer", "Adapter")):
    mine = row("dtd", "adapter", 0, 1.0, options={
        "adapter": {"placement": placement, "width": 8}})
    assert [p.name for p in published.ROWS if p.is_of(mine)] == [name]


# --- Formats ------------------------------------------------------------------

def test_csv_is_tidy_and_comes_back():
  rows = [row("dtd", "lora", s, 100 / 3 + s) for s in (0, 1)]
  table = tables.make(rows, "final", compare=True)
  back = list(csv.DictReader(io.StringIO(formats.csv(table))))
  mine = [r for r in back if r["kind"] == "run"]
  assert [(r["task"], r["seed"], float(r["top1"])) for r in mine] == [
      ("dtd", "0", 100 / 3), ("dtd", "1", 103 / 3)]
  theirs, = [r for r in back if r["variant"] == "LoRA (published)"]
  assert (theirs["top1"], theirs["seed"], theirs["task"]) == ("69.4", "", "dtd")


def test_json_is_a_list_of_objects():
  found = json.loads(formats.json(tables.make(ROWS, "final")))
  assert [x["name"] for x in found] == ["ttc", "linear"]
  assert found[0]["top1"]["a"]["seeds"] == [50.0, 54.0]
  assert found[0]["top1"]["a"]["mean"] == 52.0
  assert found[1]["top1"]["b"] is None
  assert found[1]["head_params"] == [7, 7]


def test_latex_has_whole_lines_and_escapes():
  rows = vtab_rows("ttc_random") + vtab_rows("[a&b*]")
  text = formats.latex(tables.make(rows, "final", compare=True))
  columns = re.search(r"\\begin\{tabular\}\{(l r*|lr*)\}", text)[1]
  body = text.partition("\\toprule\n")[2].partition("\\bottomrule")[0]
  lines = [x for x in body.split("\n") if x and not x.startswith(
      ("\\midrule", "\\cmidrule"))]
  for line in lines:
    spans = [int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line)]
    assert line.endswith(" \\\\")
    assert len(re.split(r"(?<!\\)&", line)) + sum(spans) == len(columns)
  assert "ttc\\_random &" in body and "{[}a\\&b{*}{]}" not in body
  assert "{[}a\\&b{*}] &" in body
  assert not re.search(r"(?<!\\)[_%#]", text.partition("\n")[2].replace(
      "{!}{%\n", ""))
  assert text.count("{") - text.count("\\{") == (
      text.count("}") - text.count("\\}"))
  assert text.count("\\begin") == text.count("\\end{tabular}") == 1


ODD = {"\x1b[31mred": r"\x1b[31mred", "a\nb": r"a\nb",
       "\u202egnp": r"\u202egnp"}


@pytest.mark.parametrize("form", formats.FORMATS)
def test_names_act_on_no_terminal_and_end_no_line(form):
  rows = [row(f"t{name}", f"v{name}", 0, 1.0) for name in ODD]
  plain = [row(f"t{i}", f"v{i}", 0, 1.0) for i, _ in enumerate(ODD)]
  write = formats.FORMATS[form].write
  text = write(tables.make(rows, "final"), False)
  assert text.isprintable() or set(text) - {"\n"} <= set(
      filter(str.isprintable, text))
  assert text.count("\n") == write(
      tables.make(plain, "final"), False).count("\n")
  if form in ("text", "csv"):
    assert all(f"v{shown}" in text for shown in ODD.values())


def test_a_pipe_is_no_column_of_markdown():
  rows = [row("a|b", "v|w", 0, 1.0), row("a|b", "x", 0, 1.0)]
  lines = formats.markdown(tables.make(rows, "final")).split("\n")[2:6]
  assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
  assert r"a\|b" in lines[0] and r"v\|w" in lines[2]


@pytest.mark.parametrize("name", ["=1+1", "+x", "-2", "@sum", "=cmd|' /C'!A0"])
def test_a_name_is_no_formula_of_a_spreadsheet(name):
  table = tables.make([row(name, name, 0, 1.0, lr=-0.5)], "final")
  found, = csv.DictReader(io.StringIO(formats.csv(table)))
  assert found["task"] == found["variant"] == "'" + name
  assert found["lr"] == "-0.5"  # a number is none


def test_a_name_with_a_sign_is_no_formula_of_latex():
  rows = [row("-a_b", "+c", 0, 1.0), row("x", "+c", 0, 1.0)]
  text = formats.latex(tables.make(rows, "final"))
  assert "$-a" not in text and "-a\\_b &" in text


def test_settings_are_shown_where_they_matter(caplog):
  def notes(*rows):
    return tables.make(rows, "final").sources[1:]
  same = dict(epochs=5, limit=0, dtype="float32", device="1 x cpu")
  assert notes(row("a", "x", 0, 1.0, **same)) == ["Settings: epochs 5."]
  assert notes(row("a", "x", 0, 1.0, **same | {"limit": 64})) == [
      "Settings: epochs 5; limit 64."]
  assert notes(row("a", "x", 0, 1.0, **same),
               row("a", "y", 0, 1.0, **same | {"epochs": 9, "device": "gpu"}),
               row("a", "z", 0, 1.0, **same)) == [
      "Settings: epochs 5 (x, z), 9 (y); device 1 x cpu (x, z), gpu (y)."]
  assert not caplog.text


def test_rows_that_cannot_be_compared_are_warned_of(caplog):
  rows = [row("a", "x", 0, 1.0, limit=0, epochs=5),
          row("a", "x", 1, 1.0, limit=64, epochs=6),
          row("a", "y", 0, 1.0, limit=0, epochs=7, normalisation="none")]
  text = formats.text(tables.make(rows, "final"))
  assert "Settings: epochs 5 (x), 6 (x), 7 (y); limit 0 (x, y), 64 (x)." in text
  for sentence in ("Mixed in this table, so its lines cannot be compared: "
                   "limit.", "Seeds of x on a differ in more than the seed: "
                   "epochs."):
    assert sentence in text and sentence in caplog.text


def test_every_format_takes_a_hole():
  for form in formats.FORMATS.values():
    for interval in (False, True):
      text = form.write(tables.make(ROWS, "final", True), interval)
      assert text.endswith("\n") and "linear" in text


def test_a_summary_has_both_protocols():
  more = dict(flops=3e6, flops_merged=2e6, images_per_second=10.0,
              test_images_per_second=20.0, step_memory_bytes=2 ** 21,
              bundle_bytes=4096)
  rows = [row("a", v, 0, 50.0, **more) for v in ("x", "y")]
  rows += [row("a", v, 0, None, val_top1=60.0, protocol="val", **more)
           for v in ("x", "y")]
  text = report.summary(rows)
  final, val = text.split("Top-1 (%) on val,")
  assert "| x |   50.0 |" not in val and "What they cost" in final
  assert "60.0" in val and "Backbone vit_ti16 at 64 px" in val


# --- Rows ---------------------------------------------------------------------

def test_best_takes_the_smaller_value_of_equals():
  rows = [row("a", "ttc", 0, None, val_top1=v, lr=lr, weight_decay=wd)
          for v, lr, wd in ((50., 0.1, 0.), (60., 0.2, 0.), (60., 0.1, 1.),
                            (60., 0.1, 0.))]
  best, = report.best(rows)
  assert (best["val_top1"], best["lr"], best["weight_decay"]) == (60., .1, 0.)


def test_the_latest_of_final_runs_counts():
  rows = [row("a", "ttc", 0, 1.0), row("a", "ttc", 1, 2.0),
          row("a", "ttc", 0, 3.0, run="later", lr=0.2)]
  assert [r["test_top1"] for r in report.chosen(rows, "final")] == [3.0, 2.0]


def test_of_equal_scales_too_the_smaller_is_best():
  rows = [row("a", "ttc", 0, None, val_top1=60., lr=0.1, weight_decay=0.,
              scale=s) for s in (1., 0.5, 0.7)]
  best, = report.best(rows)
  assert best["scale"] == 0.5


@pytest.mark.parametrize("rates, smallest", [
    ((1.0, 0.0, 0.1), 0.0), ((1.0, 0.1), 0.1)])
def test_of_equal_rates_of_stage_2_the_smaller_is_best(rates, smallest):
  """Also beside a row of an earlier version, whose rate is 1."""
  rows = [row("a", "ttc", 0, None, val_top1=60.),
          *(row("a", "ttc", 0, None, val_top1=60., stage2_lr=x)
            for x in rates)]
  best, = report.best(rows)
  assert best["stage2_lr"] == smallest


def test_a_damaged_line_of_a_results_file_is_left_out_aloud(tmp_path, caplog):
  path = tmp_path / "results.jsonl"
  whole = ROWS[0], ROWS[2]
  path.write_bytes(json.dumps(whole[0]).encode() + b'\n{"run": "a\xff"}\n'
                   b'{"run": 2, "tes\n[1]\n'
                   + json.dumps(whole[1]).encode() + b'\n{"run": "cut')
  assert report.read(str(path)) == report.collect([str(path)]) == [*whole]
  assert [f":{n} is damaged" in caplog.text for n in range(1, 7)] == [
      False, True, True, True, False, False]


def test_a_damaged_row_of_a_work_directory_costs_that_row(tmp_path, caplog):
  place = WorkDir(tmp_path)
  for r in ROWS:
    place.write_row(r)
  file = tmp_path / "runs" / ROWS[1]["run"] / "row.json"
  file.write_bytes(b'{"run": "\xff"}')
  assert {r["run"] for r in report.collect([str(tmp_path)])} == {
      r["run"] for r in ROWS} - {ROWS[1]["run"]}
  assert "is damaged and left out" in caplog.text


def test_merged_work_directories_are_one_table():
  one, two = ROWS[:3], ROWS[2:]  # a row in common
  merged = rows_lib.merge({"one": one, "two": two})
  assert merged == ROWS
  assert tables.make(merged, "final") == tables.make(ROWS, "final")


@pytest.mark.parametrize("change", [
    {"test_top1": 51.0}, {"run": "other", "lr": 0.2},
    {"task": "b", "run": "b", "backbone": "vit_b16"},
    {"seed": 1, "run": "s1", "options": {"k": 3}},
    {"seed": 1, "run": "s1", "limit": 64},
    {"seed": 1, "run": "s1", "frozen_dtype": "int8"},
    {"seed": 1, "run": "s1", "data_digest": "changed"}])
def test_what_differs_between_work_directories_stays_apart(change):
  one = [row("a", "ttc", 0, 50.0), row("a", "linear", 0, 40.0)]
  two = [one[0] | change, row("b", "linear", 0, 45.0)]
  merged = rows_lib.merge({"runs/one": one, "runs/two": two})
  assert [r["variant"] for r in merged] == [
      "ttc (runs/one)", "linear", "ttc (runs/two)", "linear"]


def test_seeds_of_several_work_directories_come_together():
  one, two = [row("a", "ttc", 0, 50.0)], [row(
      "a", "ttc", 1, 54.0, limit=0, frozen_dtype="float32")]
  line, = tables.make(rows_lib.merge({"one": one, "two": two}), "final").lines
  assert line.name == "ttc" and line.scores[0].seeds == (50.0, 54.0)


def test_a_work_directory_without_a_row_is_an_error(tmp_path):
  with pytest.raises(UserError, match="no work directory '.*none'"):
    report.collect([str(tmp_path / "none")])
  with pytest.raises(UserError, match="is no work directory: give"):
    report.collect([str(tmp_path)])
  WorkDir(tmp_path).adopt({}, {})
  with pytest.raises(UserError, match="no finished run in"):
    report.collect([str(tmp_path)])
  WorkDir(tmp_path).write_row({"run": "x"})
  with pytest.raises(UserError, match="row of x has no good 'task'"):
    report.collect([str(tmp_path)])


@pytest.mark.parametrize("change, key", [
    ({"test_top1": None}, "test_top1"), ({"test_top1": "50"}, "test_top1"),
    ({"protocol": "val"}, "val_top1"), ({"protocol": []}, "protocol"),
    ({"protocol": "best"}, "protocol"), ({"group": "Nature"}, "group"),
    ({"tests": [50.0]}, "tests"), ({"tests": {"test": 50.0}}, "tests"),
    ({"task": 1}, "task"), ({"weights_sha256": None}, "weights_sha256"),
    ({"finished": 2026}, "finished"), ({"seconds_train": "1"}, "seconds_train"),
    ({"augment": 0.8}, "augment"), ({"augment": {"mixup": "a"}}, "augment"),
    ({"epochs": [1]}, "epochs"), ({"flip": []}, "flip"),
    ({"device": ["cpu"]}, "device"), ({"versions": {"jax": []}}, "versions"),
    ({"weights_reading": []}, "weights_reading"), ({"dtype": []}, "dtype")])
def test_a_row_of_another_form_is_an_error(change, key, tmp_path):
  good = row("a", "ttc", 0, 50.0) | {
      "run": "x", "val_top1": None, "dtype": "float32", "epochs": 1}
  WorkDir(tmp_path / "good").write_row(good)
  assert report.collect([str(tmp_path / "good")]) == [good]
  WorkDir(tmp_path / "bad").write_row(good | change)
  with pytest.raises(UserError, match=f"row of x has no good '{key}'"):
    report.collect([str(tmp_path / "bad")])


@pytest.mark.parametrize("change", [
    dict(lr=0.5), dict(stage2_lr=0.1), dict(options={"k": 3}),
    dict(data_digest="b")])
def test_rows_of_another_setting_are_not_compared(change, caplog):
  """The newest row decides: of its variant, and about images of its task."""
  old = [row("a", "ttc", s, 50.0, run=f"old{s}", data_digest="a")
         for s in (0, 1)]
  new = row("a", "ttc", 2, 50.0, run="new", data_digest="a") | change
  other = row("b", "ttc", 0, 50.0, run="b", data_digest="a")
  assert rows_lib.of_one_setting([*old, other, new]) == [other, new]
  assert "old1 is left out: new has another" in caplog.text
  others = row("a", "linear", 0, 50.0, run="linear", data_digest="a")
  left = rows_lib.of_one_setting([others, *old, new])
  assert (others in left) == ("data_digest" not in change)
  assert rows_lib.of_one_setting(old) == old


@pytest.mark.parametrize("apart", [
    dict(splits=["trainval", "train", "val"]), dict(stages=["supernet"]),
    dict(image_size=32)])
def test_runs_that_read_other_splits_have_other_digests(apart):
  """NOAH's, which hold out validation images, and those of another size."""
  old = row("a", "ttc", 0, 50.0, data_digest="a", splits=["trainval"])
  new = row("a", "noah", 0, 50.0, run="noah", data_digest="b") | apart
  assert rows_lib.of_one_setting([old, new]) == [old, new]
  changed = new | {"run": "changed", "data_digest": "c", "variant": "other"}
  assert rows_lib.of_one_setting([old, new, changed]) == [old, changed]
  # Searches and tests read others; their digests tell nothing of each other.
  val = row("b", "ttc", 0, None, protocol="val", val_top1=1.0, data_digest="v")
  final = row("b", "ttc", 0, 50.0, data_digest="f")
  other = row("b", "ttc", 1, 50.0, data_digest="f", run="other")
  merged = rows_lib.merge({"one": [val, final], "two": [other]})
  assert {r["variant"] for r in merged} == {"ttc"}


def test_rows_of_earlier_releases_are_compared_with_those_that_state_more():
  old = row("a", "ttc", 0, 50.0, run="old")
  new = row("a", "ttc", 1, 50.0, run="new", frozen_dtype="float32",
            stage2_lr=1.0, few_shot=0, limit=0)
  assert rows_lib.of_one_setting([old, new]) == [old, new]
  other = new | {"run": "other", "frozen_dtype": "int8"}
  assert rows_lib.of_one_setting([old, other]) == [other]


@pytest.mark.parametrize("change", [
    dict(drop_path=0.1), dict(label_smoothing=0.1), dict(head_init="zeros"),
    dict(clip_norm=1.0), dict(warmup_epochs=9.0), dict(min_lr=1e-5),
    dict(flip=True), dict(augment={"mixup": 0.8}), dict(smallest_crop=0.1),
    dict(lr=0.5), dict(stage2_lr=0.0)])
def test_seeds_that_train_otherwise_are_no_seeds_of_one_variant(change, caplog):
  usual = dict(drop_path=0.0, label_smoothing=0.0, head_init="normal",
               clip_norm=0.0, warmup_epochs=1.0, min_lr=0.0, flip=False,
               augment={"mixup": 0.0}, smallest_crop=1.0, stage2_lr=1.0)
  one = row("a", "ttc", 0, 50.0, **usual)
  two = row("a", "ttc", 1, 80.0, **usual) | change
  merged = rows_lib.merge({"one": [one], "two": [two]})
  assert [r["variant"] for r in merged] == ["ttc (one)", "ttc (two)"]
  assert rows_lib.of_one_setting([one, two]) == [two]
  tables.make([one, two], "final")
  assert (f"Seeds of ttc on a differ in more than the seed: {[*change][0]}."
          in caplog.text)
  # An older row, which does not state it, is of the same variant.
  if "lr" not in change and "stage2_lr" not in change:
    for key in change:
      del one[key]
    assert rows_lib.of_one_setting([one, two]) == [one, two]
    assert rows_lib.merge({"one": [one], "two": [two]}) == [one, two]


def test_settings_that_a_search_tries_are_compared_as_one_variant(caplog):
  """They are among the options of the method too."""
  tried = [row("a", "ttc", 0, None, protocol="val", val_top1=50.0, run=f"{x}",
               stage2_lr=x, options={"k": 3, "stage2_lr": x})
           for x in (0.1, 1.0)]
  assert rows_lib.of_one_setting(tried, searched=True) == tried
  other = tried[0] | {"options": {"k": 4, "stage2_lr": 0.1}, "run": "k4"}
  assert rows_lib.of_one_setting([other, *tried], searched=True) == tried
  assert "k4 is left out: 1.0 has another options" in caplog.text
  assert rows_lib.of_one_setting(tried) == tried[1:]
  one, two = (r | {"task": r["run"]} for r in tried)  # each its own task's
  assert rows_lib.merge({"one": [one], "two": [two]}) == [one, two]


def test_settings_that_a_search_tries_do_not_split_a_variant():
  def tried(seed, *rates):
    return [row("a", "ttc", seed, None, protocol="val", val_top1=50.0, lr=lr,
                run=f"{seed}{lr}") for lr in rates]
  one, two = tried(0, 0.1, 0.2), tried(1, 0.2, 0.3)
  assert rows_lib.merge({"one": one, "two": two}) == [*one, *two]
  # One rate in each was set by hand.
  one, two = tried(0, 0.1), tried(1, 0.2)
  assert [r["variant"] for r in rows_lib.merge({"one": one, "two": two})] == [
      "ttc (one)", "ttc (two)"]


def test_an_older_row_does_not_hide_what_others_tell():
  """Neither of another variant nor as the newest one."""
  one, two = (row("a", "ttc", s, 50.0, run=f"{s}", flip=s == 0) for s in (0, 1))
  old = row("a", "linear", 0, 40.0, run="old")
  merged = rows_lib.merge({"one": [one], "two": [two], "three": [old]})
  assert [r["variant"] for r in merged] == ["ttc (one)", "ttc (two)", "linear"]
  silent = row("a", "ttc", 2, 50.0, run="silent")
  assert rows_lib.of_one_setting([one, two, silent]) == [two, silent]
