import json

import pytest

from ttc_jax import report
from ttc_jax.errors import UserError


def row(task, variant, seed, test, group="Natural", **more):
  return {"task": task, "variant": variant, "seed": seed, "group": group,
          "protocol": "final", "test_top1": test, "val_top1": None,
          "module_params": 1000, "norm_params": 20, "head_params": 5,
          "backbone": "vit_ti16", "image_size": 64, "weights": "w.npz",
          "weights_sha256": "0" * 64, "lr": 0.1, "weight_decay": 0.0, **more}


def cells(line):
  return [c.strip() for c in line.strip("|").split("|")]


def test_table_by_hand():
  rows = [row("a", "ttc", 0, 50.0), row("a", "ttc", 1, 54.0),
          row("b", "ttc", 0, 70.0), row("b", "ttc", 1, 70.0),
          row("c", "ttc", 0, 10.0, "Structured"),
          row("c", "ttc", 1, 20.0, "Structured"),
          row("a", "linear", 0, 40.0, head_params=7)]
  header, rule, ttc, linear = report.table(rows, "final").split("\n")
  assert cells(header) == ["", "a", "b", "c", "mean of 3", "mean of groups",
                           "module", "norm", "head", "seeds"]
  assert set(rule) <= set("|-:")
  # Sample deviation of 50, 54: sqrt(8) = 2.83. Means: 52, 70, 15; the groups'
  # are (52 + 70) / 2 = 61 and 15.
  assert cells(ttc) == ["ttc", "52.0 ± 2.8", "70.0 ± 0.0", "15.0 ± 7.1",
                        "45.7", "38.0", "1,000", "20", "5", "2"]
  assert cells(linear)[:6] == ["linear", "40.0", "-", "-", "-", "-"]


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


def test_no_row_is_an_error():
  with pytest.raises(UserError, match="no finished run"):
    report.table([row("a", "ttc", 0, 1.0)], "val")


def test_best_takes_the_smaller_value_of_equals():
  rows = [row("a", "ttc", 0, None, val_top1=v, lr=lr, weight_decay=wd)
          for v, lr, wd in ((50., 0.1, 0.), (60., 0.2, 0.), (60., 0.1, 1.),
                            (60., 0.1, 0.))]
  best, = report.best(rows)
  assert (best["val_top1"], best["lr"], best["weight_decay"]) == (60., .1, 0.)


def test_of_equal_scales_too_the_smaller_is_best():
  rows = [row("a", "ttc", 0, None, val_top1=60., lr=0.1, weight_decay=0.,
              scale=s) for s in (1., 0.5, 0.7)]
  best, = report.best(rows)
  assert best["scale"] == 0.5


def test_a_line_cut_short_is_skipped_and_the_next_row_is_whole(tmp_path):
  path = str(tmp_path / "results.jsonl")
  report.append(path, {"run": 1})
  with open(path, "a") as f:
    f.write('{"run": 2, "tes')
  report.append(path, {"run": 3})
  assert report.read(path) == [{"run": 1}, {"run": 3}]
  with open(path) as f:
    assert json.loads(f.read().split("\n")[2]) == {"run": 3}


def test_no_file_is_no_row(tmp_path):
  assert report.read(str(tmp_path / "results.jsonl")) == []
