"""Claims are judged by the rule that they state; the page holds them all."""
from html.parser import HTMLParser
import json
import re

import numpy as np
import pytest
from scipy import stats

from ttc_jax import experiments
from ttc_jax.errors import UserError
from ttc_jax.evidence import claims, forest, page
from ttc_jax.experiments import Grid, Results, selection
from ttc_jax.report import grid
from ttc_jax.report import rows as rows_lib
from ttc_jax.runs.workdir import Expected, WorkDir
from ttc_jax.vtab import rows as vtab


def row(variant, task, seed, top1, **more):
  """A finished row; the keys that the page and its tables read."""
  return dict(
      run=f"{task}-{variant}-{seed}", variant=variant, task=task, seed=seed,
      test_top1=top1, val_top1=None, protocol="final", lr=0.01,
      weight_decay=1e-4, method="ttc", group="Other", backbone="vit_ti16",
      image_size=64, weights="w", weights_sha256="0" * 64, dtype="float32",
      epochs=20, module_params=1, norm_params=2, head_params=3,
      finished="2026", limit=0, options={}) | more


def rows(gains, variants=("a", "b"), tasks=("t", "u", "v")):
  """Variant a is above b by `gains[seed]` on every task."""
  one, other = variants
  found = []
  for i, task in enumerate(tasks):
    for seed, gain in enumerate(gains):
      base = 50 + 10 * i + seed
      found += [row(other, task, seed, base), row(one, task, seed, base + gain)]
  return found


def results(found, tmp_path):
  return Results("t", found, ["t", "u", "v"], WorkDir(tmp_path))


def judged(gains, claimed, tmp_path):
  return claims.better("a", "b", claimed)(results(rows(gains), tmp_path))


@pytest.mark.parametrize("gains,claimed,verdict", [
    ((2.0, 2.2, 1.8), 1.0, claims.SUPPORTED),
    ((0.1, -0.1, 0.0), 3.0, claims.NOT_SUPPORTED),   # 3 points are excluded
    ((0.1, -0.1, 0.0), 0.0, claims.OPEN),
    ((3.0, -3.0, 1.0), 2.0, claims.OPEN),            # too noisy to tell
    ((-1.0, 0.5, -0.4), 0.0, claims.OPEN),
    ((-2.0, -2.2, -1.8), 0.0, claims.NOT_SUPPORTED),
    ((5.0,), 1.0, claims.OPEN),                      # one seed
])
def test_verdicts(gains, claimed, verdict, tmp_path):
  assert judged(gains, claimed, tmp_path).verdict == verdict


@pytest.mark.parametrize("other", [(3, 2, 2), (3, 2), (5, 5.1, 5)])
def test_interval_of_two_tasks_is_welch_s_of_half_of_their_sum(
    other, tmp_path):
  gains = dict(t=(1, 2, 6), u=other)
  found = [row(v, task, s, 50 + (gain if v == "a" else 0))
           for task, values in gains.items() for s, gain in enumerate(values)
           for v in ("a", "b")]
  got = claims.over_tasks(claims.differences(
      results(found, tmp_path), "a", "b"))
  # The sum of two means is the difference of one and the other's negative.
  low, high = stats.ttest_ind(
      gains["t"], np.negative(other), equal_var=False).confidence_interval()
  assert got.mean == pytest.approx((low + high) / 4)
  assert got.half == pytest.approx((high - low) / 4)
  assert got[2:] == (2, len(other))


def test_interval_of_one_task_is_that_of_paired_runs():
  ours, theirs = [60.0, 61.0, 65.0], [58.0, 60.5, 61.0]
  got = claims.over_tasks({"t": dict(enumerate(np.subtract(ours, theirs)))})
  low, high = stats.ttest_rel(ours, theirs).confidence_interval()
  assert (got.mean - got.half, got.mean + got.half) == pytest.approx(
      (low, high))


def test_seeds_that_agree_have_no_interval_and_one_seed_has_none():
  same = claims.over_tasks({t: {0: 2.0, 1: 2.0} for t in "tuv"})
  assert same == (2.0, 0.0, 3, 2)
  assert claims.over_tasks({"t": {0: 2.0, 1: 2.0}, "u": {0: 1.0}}).half is None


def test_seeds_and_tasks_that_one_variant_lacks_are_left_out(tmp_path):
  found = [*rows((1.0, 1.0, 1.0), tasks="tu"), row("a", "v", 0, 99),
           row("a", "t", 7, 99)]
  by_task = claims.differences(
      Results("t", found, ["t", "u", "v"], WorkDir(tmp_path)), "a", "b")
  assert by_task.keys() == {"t", "u"} and by_task["t"].keys() == {0, 1, 2}


def test_a_task_of_one_seed_is_left_out_beside_others_with_more(tmp_path):
  found = [*rows((1.0, 2.0), tasks="tu"), *rows((9.0,), tasks="v")]
  assert claims.differences(results(found, tmp_path), "a", "b").keys() == {
      "t", "u"}
  alone = rows((9.0,), tasks="tuv")
  assert len(claims.differences(results(alone, tmp_path), "a", "b")) == 3


@pytest.mark.parametrize("factors, left_out", [
    ((0.001, 0.001), True), ((0.0001, 0.001), True), ((0.001, 0.01), False),
    ((0.001, None), False), ((None, None), False),
    ((0.001, 0.001, 100.0), False), ((0.001, 0.001, 1.0), True)])
def test_two_variants_without_a_stage_2_tell_nothing_of_a_task(
    factors, left_out, tmp_path):
  found = rows((1.0, 2.0, 3.0))
  for r in found:
    if r["task"] == "v":
      r["stage2_lr"] = factors[r["variant"] == "b"]
      r["adapter_lr"] = factors[2] if factors[2:] else None
  by_task = claims.differences(results(found, tmp_path), "a", "b")
  assert ("v" not in by_task) == left_out and {"t", "u"} <= by_task.keys()


def test_a_task_that_one_variant_has_no_stage_2_on_is_named(tmp_path):
  found = rows((1.0, 2.0, 3.0))
  for r in found:
    r["stage2_lr"] = {"a": 0.001 if r["task"] == "u" else 0.1}.get(r["variant"])
  measured = claims.better("a", "b")(results(found, tmp_path)).measured
  assert measured.endswith("; val200 chose no stage 2 on u")


@pytest.mark.parametrize("mean, half, said", [
    (0.64, 0.57, "+0.64 ± 0.57"), (-0.55, 0.61, "-0.55 ± 0.61"),
    (0.64, 0.51, "+0.6 ± 0.5"), (1.0, None, "+1.0"),
    (0.644, 0.643, "+0.644 ± 0.643"), (0.643, 0.644, "+0.643 ± 0.644")])
def test_an_interval_shows_on_which_side_of_0_it_ends(mean, half, said):
  assert claims.interval(claims.Difference(mean, half, 3, 3), "") == said


@pytest.mark.parametrize("spread, shown", [(1.0, True), (40.0, False)])
def test_an_interval_that_tells_nothing_is_in_no_summary(
    spread, shown, tmp_path):
  finding = judged((-spread, 0.0, spread), 0.0, tmp_path)
  assert finding.gain.found.tasks == 3
  assert bool(claims.telling(finding)) == shown


def test_missing_runs_give_no_finding(tmp_path):
  assert claims.better("a", "c")(results(rows((1.0,)), tmp_path)) is None


def test_a_smaller_divergence_moves_less(tmp_path):
  found = [row(v, t, s, 50) for v in ("a", "b") for t in "tuv"
           for s in (0, 1)]
  work = WorkDir(tmp_path)
  for r in found:
    js = 0.01 if r["variant"] == "a" else 0.05 + 0.001 * r["seed"]
    work.write_measure(r["run"], "divergence", {"js": js})
  judge = claims.moves_less("a", "b")
  assert judge(results(found, tmp_path)).verdict == claims.SUPPORTED
  below = claims.Difference(-1.0, 0.5, 3, 3)
  assert claims.verdict(below, 0) == claims.NOT_SUPPORTED


def test_fewer_than_three_tasks_decide_nothing(tmp_path):
  for tasks, expected in (("tu", claims.OPEN), ("tuv", claims.SUPPORTED)):
    found = rows((2.0, 2.2, 1.8), tasks=tasks)
    judge = claims.better("a", "b", 1.0)
    assert judge(results(found, tmp_path)).verdict == expected


@pytest.fixture
def workdir(tmp_path):
  """A directory of Table 3, finished; names that a page must escape."""
  work = WorkDir(tmp_path / "a<b>")
  for r in rows((3.0, 2.9, 3.1), ("layernorm", "linear"), ("t<i>", "u|v")):
    work.write_row(r)
  plan = Expected(1, [0, 1, 2], "select", 20)
  work.write_plan({task: {v: plan for v in ("linear", "layernorm")}
                   for task in ("t<i>", "u|v")}, {}, "table3")
  return str(work)


class Balanced(HTMLParser):
  """Collects text and checks that scripts and outside addresses are absent."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text = set(), []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    for key, value in attrs:
      assert key not in ("src", "href") or value.startswith("#"), value

  def handle_data(self, data):
    self.text.append(data)


def test_page_is_whole_in_one_file_and_escapes_names(workdir):
  section = page.gather(workdir)
  html = Balanced(page.page([section]))
  assert not html.tags & {"script", "link", "img", "i", "b"}
  text = " ".join(html.text)
  assert "Tuning the LayerNorms alone" in text and "not supported" in text
  assert "t<i>" in text and "a<b>" in text


def test_markdown_has_the_same_findings(workdir):
  section = page.gather(workdir)
  text = page.markdown([section], {})
  found = page.findings([section])
  assert found
  for *_, finding in found:
    assert finding.measured.replace("|", r"\|").replace("<", r"\<") in text
  assert r"## a\<b>" in text and "Table 3" in text
  assert not re.search(r"(?<!\\)<", text)  # no name is HTML
  for written in text, page.page([section]):
    assert written.count("learning rates tried") == 1


def test_lines_stand_in_the_order_of_the_experiment(workdir):
  """Whatever was run first."""
  work = WorkDir(workdir)
  work.write_row(row("ttc_map", "t<i>", 0, 9.0, finished="2020"))
  table, = page.gather(workdir).shown["table3"][1]
  assert [line[0] for line in table.lines] == ["linear", "layernorm", "ttc_map"]


def test_a_directory_without_experiments_is_refused(tmp_path):
  with pytest.raises(UserError, match="no work directory"):
    page.gather(str(tmp_path / "none"))
  work = WorkDir(tmp_path / "plain")
  work.write_row(row("a", "t", 0, 50))
  with pytest.raises(UserError, match="no finished run of an experiment"):
    page.gather(str(work))


def table4(counted, added, merged="0"):
  return Grid("Table 4: parameters and FLOPs", [""] * 8, [
      ["ttc", "LK^2", "1,234", counted, "N K^2", "10.00", added, merged]],
      ["Of a ViT."])


@pytest.mark.parametrize("cells, expected", [
    (("1,234", "10.40"), claims.SUPPORTED),
    (("1,235 !", "10.40"), claims.NOT_SUPPORTED),
    (("1,234", "21.00"), claims.NOT_SUPPORTED),
    (("1,234", "1,021.00"), claims.NOT_SUPPORTED),
    (("1,234", "10.40", "cannot merge"), claims.NOT_SUPPORTED)])
def test_table_4_is_on_the_page_without_any_run(cells, expected, tmp_path):
  work = WorkDir(tmp_path)
  work.write_plan({}, {}, "table4")
  with pytest.raises(UserError, match="no finished run"):
    page.gather(str(work))
  experiments.write("table4", [table4(*cells)], work)
  section = page.gather(str(work))
  text = page.markdown([section], {})
  assert "Of a ViT." in text and "### Table 4" in text
  assert "No finished run" not in text + page.page([section])
  (*_, finding), = page.findings([section])
  assert finding.verdict == expected and "1,234" in finding.measured


@pytest.mark.parametrize("lines", [
    [], [["ssf", *"1234567"]], [["ttc", *"1234567"]] * 2,
    [["ttc", *"abc", "d", "e", "f", "g"]]])
def test_a_table_4_of_other_cells_gives_no_finding(lines, tmp_path):
  work = WorkDir(tmp_path)
  experiments.write("table4", [table4("", "")._replace(lines=lines)], work)
  assert claims._costs(results([], tmp_path)) is None


@pytest.mark.parametrize("change", [
    {"lines": None}, {"lines": [["ttc", 3]]}, {"lines": [["ttc"]]},
    {"lines": [None]}, {"title": 1}, {"header": "ab"}, {"notes": {}}])
def test_a_table_that_was_written_is_read_again_or_is_none(change):
  table = table4("1,234", "10.40")
  fields = json.loads(grid.as_json(table))
  assert grid.from_fields(fields) == table
  assert grid.from_fields(fields | change) is None
  assert grid.from_fields({}) is None


def test_an_experiment_shows_no_empty_table(tmp_path):
  work = WorkDir(tmp_path)
  for r in rows((3.0, 2.9), ("layernorm", "linear")):
    work.write_row(r)
  work.write_plan({"t": {}}, {}, "scores")
  assert "scores" not in page.gather(str(work)).shown


def test_a_claim_of_the_paper_without_a_run_stands_on_the_page_too(workdir):
  section = page.gather(workdir)
  lines = page.lines_of([section])
  # One work directory: every claim stands once, measured or not.
  assert {line[1] for line in lines} >= {
      c.text for c in claims.CLAIMS if not c.ours}
  assert len({line[1] for line in lines}) == len(lines)
  unmeasured = [line for line in lines if line[2] == "-"]
  assert all(line[4] == claims.OPEN and line[3] for line in unmeasured)
  assert "VPT's prompts are tokens" in page.markdown([section], {})
  assert "s tasks were not run" in page.page([section])


def test_claims_about_groups_and_swins_are_of_their_rows(tmp_path):
  found = [r | dict(group=group, backbone=backbone)
           for group, backbone, tasks in (("Natural", "vit_b16", "tuv"),
                                          ("Structured", "swin_b", "wxy"))
           for r in rows((1.0, 1.2, 1.1), ("ttc", "full"), tasks)]
  whole = Results("t", found, [*"tuvwxy"], WorkDir(tmp_path))
  by_text = {claim.text: claim.judge(whole) for claim in claims.CLAIMS
             if "full tuning" in claim.text}
  over = {text: found.gain.found.tasks for text, found in by_text.items()
          if found}
  assert over == {"TTC is above full tuning.": 6,
                  "TTC is above full tuning on Natural tasks.": 3,
                  "TTC is above full tuning on Structured tasks.": 3,
                  "On a Swin TTC is above full tuning.": 3}


@pytest.mark.parametrize("gains, tasks, verdict", [
    ([1.0] * 18 + [-1.0], 19, claims.SUPPORTED),
    ([1.0] * 17 + [-1.0, 0.0], 19, claims.NOT_SUPPORTED),
    ([1.0] * 18, 18, claims.OPEN)])
def test_wins_are_counted_on_all_of_vtab(gains, tasks, verdict, tmp_path):
  names = [*vtab.ROWS][:tasks]
  found = [row(v, task, 0, 50 + (gain if v == "ttc" else 0))
           for task, gain in zip(names, gains, strict=True)
           for v in ("ttc", "full")]
  judge = claims.wins("ttc", "full", 18)
  finding = judge(Results("t", found, names, WorkDir(tmp_path)))
  assert finding.verdict == verdict
  assert f"on {gains.count(1.0)} of {tasks} tasks" in finding.measured
  assert judge(results(rows((1.0,), ("ttc", "full")), tmp_path)) is None


@pytest.mark.parametrize("experiment, measure", [
    ("table8", ("neighbours", {"before": {"1": 1}})),
    ("fig7", ("norms", {"gamma": [1.0]})),
    ("fig2", ("separation", {"silhouette": 3})),
    ("fig3", ("channels", {"sites": {"mlp": {"0": [1]}}})),
    ("scores", ("scores", {"taylor": {}})),
    ("scores", ("removal", {}))])
def test_a_measure_of_another_shape_is_one_sentence(
    experiment, measure, tmp_path):
  work = WorkDir(tmp_path)
  found = [row(v, t, s, 50) for v in ("layernorm", "layernorm_2x", "ttc")
           for t in "tuv" for s in (0, 1)]
  for r in found:
    work.write_row(r)
    work.write_measure(r["run"], *measure)
  work.write_plan({t: {} for t in "tuv"}, {}, experiment)
  with pytest.raises(UserError, match="has not the form"):
    page.gather(str(work))


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", 200_000 * b"["])
def test_a_damaged_row_is_left_out(content, tmp_path, caplog):
  work = WorkDir(tmp_path)
  work.write_row(row("a", "t", 0, 50))
  work.store.write("runs/other/row.json", content)
  assert [r["run"] for r in work.rows()] == ["t-a-0"]
  assert "damaged" in caplog.text
  (tmp_path / "results.jsonl").write_bytes(
      content + b"\n" + json.dumps(row("a", "t", 0, 50)).encode() + b"\n")
  caplog.clear()
  assert [r["run"] for r in rows_lib.read(str(tmp_path / "results.jsonl"))] == [
      "t-a-0"]
  assert "damaged" in caplog.text


@pytest.mark.parametrize("damaged", [
    {"tasks": []}, {"tasks": {"t": None}}, {"tasks": {"t": {"ttc": {}}}},
    {"tasks": {"t": {"ttc": {"seed": 1}}}}, {"missing": 1}, []])
def test_a_damaged_plan_is_left_out(damaged, workdir, caplog):
  work = WorkDir(workdir)
  work.store.write("plan-fig7.json", json.dumps(damaged).encode())
  assert set(page.gather(workdir).shown) == {"table3"}
  assert work.plan()["tasks"].keys() == {"t<i>", "u|v"}
  assert "damaged" in caplog.text


def test_two_directories_of_one_name_are_refused(workdir, tmp_path):
  section = page.gather(workdir)
  with pytest.raises(UserError, match="two work directories are called 'a<b>'"):
    page.write([section, section], str(tmp_path / "out"))


def test_rows_of_another_setting_are_on_no_page(workdir):
  WorkDir(workdir).write_row(row("layernorm", "t<i>", 0, 99.0, lr=0.5,
                                 run="late", finished="2027"))
  shown = page.gather(workdir).results.final("layernorm", "t<i>")
  assert [r["run"] for r in shown] == ["late"]


def domain(variant, seed, own, *others):
  tests = {f"d{i}": {"top1": x} for i, x in enumerate((own, *others))}
  return [row(variant, task, seed, own, tests=tests) for task in "tuv"]


def test_domains_have_claims_of_their_own(tmp_path):
  work = WorkDir(tmp_path)
  for seed in (0, 1):
    for r in [*domain("ttc", seed, 50.0, 40.0, 30.0 + 0.1 * seed),
              *domain("lora", seed, 60.0, 30.0, 20.0),
              *domain("layernorm", seed, 40.0, 35.0, 25.0)]:
      work.write_row(r)
  work.write_plan({t: {} for t in "tuv"}, {}, "table6")
  found = {claim: finding for _, claim, _, finding in page.findings(
      [page.gather(str(work))])}
  # Nothing of the test sets of the own domain: those are Table 3's.
  assert [*found] == ["On other domains TTC is above LoRA.",
                      "On other domains stage 2 adds to stage 1."]
  gain = found["On other domains TTC is above LoRA."].gain
  assert gain.name == "ttc - lora, other domains"
  # 35 and 35.05 against 25.
  assert gain.found.mean == pytest.approx(10.025)


def test_table_6_has_published_numbers_beside_imagenet_alone(tmp_path):
  from ttc_jax.experiments import table6
  def drawn(task, names):
    tests = {n: {"top1": 1.0} for n in names}
    found = [row("ttc", task, 0, 1.0, tests=tests)]
    return table6.draw(Results("t", found, [task], WorkDir(tmp_path)))[0]
  table = drawn("imagenet", ("test", "sketch", "mine"))
  lines = {line[0]: line[1:] for line in table.lines}
  assert lines["noah (published)"] == ["71.5", "24.8", "-", "-"]
  assert any("PACE" in note for note in table.notes)
  pacs = drawn("pacs", ("test", "sketch", "v2", "a", "r"))
  assert "published" not in str(pacs)


def test_energy_predicts_if_the_order_is_that_of_accuracy(tmp_path):
  """Rank correlations of 1: their mean of 3 is above 1.96 / sqrt(9)."""
  work, found = WorkDir(tmp_path), []
  for t in "tuv":
    linear = row("linear", t, 0, 50)
    work.write_measure(linear["run"], "scores", {
        score: {"energy": {"24": float(i)}}
        for i, score in enumerate(selection.SCORES)})
    found += [linear, *(row(f"frozen_{s}_k24", t, 0, 60 + i)
                        for i, s in enumerate(selection.SCORES))]
  # The other way round, and with half of the scores in the wrong order.
  for order, verdict in (((3, 2, 1, 0), claims.NOT_SUPPORTED),
                         ((1, 0, 3, 2), claims.OPEN)):
    top1 = {f"frozen_{s}_k24": 60 + i
            for s, i in zip(selection.SCORES, order, strict=True)}
    other = [r | {"test_top1": top1.get(r["variant"], 50)} for r in found]
    assert claims._energy(results(other, tmp_path)).verdict == verdict
  finding = claims._energy(results(found, tmp_path))
  assert finding.verdict == claims.SUPPORTED
  assert "3 pairs of task and K: 1.00" in finding.measured
  assert "± 0.65" in finding.measured
  two = claims._energy(Results("t", found, ["t", "u"], work))
  assert two.verdict == claims.OPEN
  # Four equal accuracies have no order.
  equal = [r | {"test_top1": 50} if r["task"] == "v" else r for r in found]
  assert "2 pairs of task and K: 1.00" in claims._energy(
      results(equal, tmp_path)).measured


@pytest.mark.parametrize("value, tasks, expected", [
    (0.8, 3, claims.SUPPORTED), (0.8, 2, claims.OPEN), (0.6, 3, claims.OPEN),
    (0.4, 3, claims.NOT_SUPPORTED)])
def test_numbers_are_judged_by_two_thresholds(value, tasks, expected):
  assert claims.graded(value, 0.5, 0.75, tasks) == expected


def test_a_table_says_what_each_variant_tried(tmp_path):
  found = [*rows((1.0,)), row("a", "t", 0, None, protocol="val", lr=0.1),
           row("a", "t", 0, None, protocol="val", lr=0.2, stage2_lr=0.01),
           row("a", "u", 0, None, protocol="val", lr=0.1)]
  table = experiments.accuracy(results(found, tmp_path))
  assert table.header[-1] == "tried" and table.header[4] == "mean of 3"
  assert {line[0]: line[-1] for line in table.lines} == {
      "a": "0 to 2", "b": "0"}
  # What was never run on a task has tried nothing there, and no seeds.
  one = experiments.accuracy(results([r for r in found if (
      r["variant"], r["task"]) not in (("a", "u"), ("a", "v"))], tmp_path))
  assert {line[0]: line[-1] for line in one.lines} == {"a": "2", "b": "0"}
  setting = results(found, tmp_path).setting
  assert "on val: 0.1, 0.2; factors of stage 2: 0.01, 1." in setting


def test_a_table_says_how_many_seeds_a_variant_has(tmp_path):
  found = [*rows((1.0, 2.0, 3.0)), *rows((1.0, 2.0), tasks="w")]
  table = experiments.accuracy(results(found, tmp_path))
  column = table.header.index("seeds")
  assert {line[column] for line in table.lines} == {"2 to 3"}


def test_what_failed_is_named_and_decides_nothing(tmp_path):
  """The survivors tell nothing of a method that diverges."""
  work = WorkDir(tmp_path)
  found = [r for r in rows((2.0, 2.2, 1.8)) if r["variant"] == "b"
           or r["task"] == "t" or (r["task"], r["seed"]) == ("u", 0)]
  for r in found:
    work.write_row(r)
  for run, task, variant in (
      ("t-a-final-s2-0a", "t", "a"),   # a later run has made it good
      ("u-a-final-s10-0a", "u", "a"), ("u-a-final-s2-0b", "u", "a"),
      ("u-a-val-s0-0a", "u", "a"),     # of one setting: others were better
      ("v-a-val-s0-0a", "v", "a"), ("v-a-val-s0-0b", "v", "a"),
      ("t-c-final-s0-0a", "t", "c"),   # of which nothing else is known
      ("of another program", "t", "a"), ("t-a-final-s9-0a", "t", None)):
    work.write_failure(run, task, variant, "the loss is NaN")
  failed = experiments.failures(work)
  said = ("a on u (seed 2, 10), a on v (all settings)")
  assert experiments.lost(failed) == f"{said}, c on t (seed 0)"
  whole = Results("t", found, ["t", "u", "v"], work, failed)
  judged = claims.better("a", "b", 1.0)(whole)
  assert judged.verdict == claims.OPEN
  assert judged.measured.endswith(f"; failed: {said}")
  assert whole.setting.endswith(f"{said}, c on t (seed 0).")
  more = [*found, *rows((1.0, 1.1), ("b", "d"))]
  other = claims.better("b", "d", 1.0)(whole._replace(rows=more))
  assert other.verdict == claims.SUPPORTED


def test_a_page_names_what_failed_once_with_its_setting(workdir):
  WorkDir(workdir).write_failure("x-final-s7-0a", "t<i>", "ttc_map", "NaN")
  text = page.markdown([page.gather(workdir)], {})
  assert text.count("Failed, so in no number: ttc_map on t\\<i> (seed 7).") == 1
  # Tables of experiments without that variant do not.
  assert text.count("ttc_map") == 1


@pytest.mark.parametrize("devices, named", [
    (("1 x NVIDIA H200", "1 x cpu (AMD)"), True),
    (("1 x cpu (Intel)", "1 x cpu (AMD)"), True),
    (("1 x cpu", "1 x cpu (AMD)"), False), ((None, "1 x cpu"), False),
    (("1 x cpu (AMD)", "1 x cpu (AMD)"), False)])
def test_devices_that_differ_are_named(devices, named, tmp_path):
  found = [r | dict(device=devices[r["variant"] == "b"]) if r["task"] == "u"
           else r for r in rows((1.0, 2.0))]
  measured = claims.better("a", "b")(results(found, tmp_path)).measured
  assert measured.endswith("; on several kinds of device: u") == named


def test_settings_of_an_earlier_grid_are_not_counted(workdir):
  """Rows of val of other images or epochs say nothing of the search."""
  work = WorkDir(workdir)
  for i, (epochs, digest) in enumerate(((5, "a"), (20, "b"), (20, "a"))):
    work.write_row(row(
        "layernorm", "t<i>", 0, None, protocol="val", val_top1=50.0, lr=0.1 * i,
        run=f"val{i}", epochs=epochs, data_digest=digest, finished=f"202{i}"))
  table, = page.gather(workdir).shown["table3"][1]
  assert {line[0]: line[-1] for line in table.lines}["layernorm"] == "0 to 1"


def test_the_mean_of_shifted_sets_is_that_of_the_claims(tmp_path):
  """Of tasks, however many test sets they have."""
  from ttc_jax.experiments import table6
  found = [row("ttc", task, 0, 1.0, tests={
      f"d{i}": {"top1": x} for i, x in enumerate(values)})
           for task, values in (("t", (90.0, 10.0, 20.0, 30.0)),
                                ("u", (90.0, 80.0)))]
  line, = table6.draw(results(found, tmp_path))[0].lines
  assert line[-1] == "50.0" == f"{np.mean([*map(claims._others, found)]):.1f}"


@pytest.mark.parametrize("tasks, seeds, lines", [
    ("t", 1, []), ("tu", 1, ["two tasks"]), ("t", 2, ["two seeds of a task"]),
    ("tu", 2, ["two tasks", "two seeds of a task"])])
def test_figure_3_shows_the_pairs_that_there_are(
    tasks, seeds, lines, tmp_path):
  work = WorkDir(tmp_path)
  found = [row("ttc", t, s, 50) for t in tasks for s in range(seeds)]
  for r in found:  # the last blocks of a Swin, of two widths
    work.write_measure(r["run"], "channels", {
        "sites": {"mlp": {"8": [1, 2], "9": [3, 4]}},
        "widths": {"mlp": {"8": 8, "9": 16}}})
  from ttc_jax.experiments import fig3
  table = fig3._overlaps(Results("t", found, [*tasks], work))
  assert [line[0].removeprefix("ttc: ") for line in table.lines] == lines
  assert table.header[2:] == ["8", "9"]
  assert ("by chance 0.19" in table.notes[0]) == bool(lines)


def test_figures_are_of_seeds_that_all_their_lines_have(tmp_path):
  """Also where the first run that finished is of another seed."""
  work, found = WorkDir(tmp_path), []
  for i, (variant, seed) in enumerate((
      ("layernorm", 1), ("ttc", 0), ("layernorm", 0))):
    found.append(row(variant, "t", seed, 50, finished=f"202{i}"))
    work.write_measure(found[-1]["run"], "norms", {
        "norms": ["norm"], "gamma": [float(seed)], "beta": [0.0]})
    points = {when: [[seed, seed]] for when in ("before", "after")}
    work.write_measure(found[-1]["run"], "separation", {
        "silhouette": {"before": 0.0, "after": 0.0},
        "centroid": {"before": 0.0, "after": 0.0}, "points": points,
        "labels": [0]})
  from ttc_jax.experiments import fig2, fig7
  _, scatter = fig2.draw(Results("t", found, ["t"], work))
  assert {line[2] for line in scatter.numbers.lines} == {"0"}
  moved, = fig7.draw(Results("t", found, ["t"], work))
  assert {line[4] for line in moved.numbers.lines} == {"0"}


def test_the_bars_of_figure_4_are_of_the_same_seeds(tmp_path):
  work, found = WorkDir(tmp_path), []
  for variant, seed in (("layernorm", 1), ("layernorm", 0), ("ssf", 0)):
    found.append(row(variant, "t", seed, 50))
    work.write_measure(found[-1]["run"], "divergence", {"js": 0.1 + seed})
  from ttc_jax.experiments import fig4
  table, bars = fig4.draw(Results("t", found, ["t"], work))
  assert dict(table.lines)["layernorm"] == dict(table.lines)["ssf"] == "10.0"
  assert bars.numbers.lines == table.lines


def test_the_picture_of_figure_3_is_of_one_seed_where_there_is_one(tmp_path):
  from ttc_jax.experiments import fig3
  work, found = WorkDir(tmp_path), []
  for task, seed in (("t", 0), ("t", 1), ("u", 1)):
    found.append(row("ttc", task, seed, 50))
    work.write_measure(found[-1]["run"], "channels", {
        "sites": {"mlp": {"0": [seed]}}, "widths": {"mlp": {"0": 8}}})
  shown = fig3._picture(Results("t", found, ["t", "u"], work)).numbers
  assert {line[1] for line in shown.lines} == {"1"}
  assert shown.notes == ["The channels that `ttc` chose; seed 1."]
  apart = fig3._picture(Results("t", [found[0], found[2]], ["t", "u"], work))
  assert "each task with its lowest seed" in apart.numbers.notes[0]


def test_a_table_says_that_it_is_of_few_images(tmp_path):
  found = [r | dict(limit=1064, few_shot=16) for r in rows((1.0,))]
  setting = results(found, tmp_path).setting
  assert ("; only the first 1,064 images of each split; only 16 training "
          "images a class; ") in setting
  crops = [r | dict(flip=True, smallest_crop=0.08, augment=dict(
      mixup=0.8, erasing=0.0)) for r in rows((1.0,))]
  assert ("; trained with flips, crops of 0.08 of the area and more, mixup "
          "0.8; ") in results(crops, tmp_path).setting


@pytest.mark.parametrize("chosen, said", [
    (0.1, "0 to 3; an end on 1"), (0.2, "0 to 3"),
    (0.4, "0 to 3; an end on 1")])
def test_a_table_says_where_the_best_rate_is_an_edge(chosen, said, tmp_path):
  found = [r | dict(lr=chosen) for r in rows((1.0,))]
  found += [row("a", "t", 0, None, protocol="val", lr=lr)
            for lr in (0.1, 0.2, 0.4)]
  table = experiments.accuracy(results(found, tmp_path))
  assert {line[0]: line[-1] for line in table.lines} == {"a": said, "b": "0"}


def test_every_claim_is_a_sentence_of_its_own():
  texts = [c.text for c in claims.CLAIMS]
  assert len(set(texts)) == len(texts)
  assert all(t.endswith(".") and t[0].isupper() for t in texts)
  assert Grid("t", [], []).notes == ()


def test_claims_of_the_selection_compare_what_they_name(tmp_path):
  found = [row(variant, task, seed, 50 + seed) for variant in selection.VARIANTS
           for task in "tuv" for seed in range(3)]
  for norms in ("frozen", "tuned"):
    for k in selection.K:
      for score in ("Taylor", "block"):
        claim, = (c for c in claims.CLAIMS if c.text == (
            f"With the norms {norms} and K = {k}, {score} is above random "
            "channels."))
        assert claim.judge(results(found, tmp_path)).measured.startswith(
            f"{norms}_{score.lower()}_k{k} - {norms}_random_k{k}: ")


def gained(tasks, tmp_path):
  found = [*rows((9.0, 9.1, 9.2), ("layernorm", "linear"), tasks),
           *rows((0.5, 0.4, 0.6), ("ttc", "layernorm_2x"), tasks),
           *(row("ttc_block", t, s, 70 + s) for t in tasks for s in range(3))]
  return page.Section("small", Results(
      "t", found, list(tasks), WorkDir(tmp_path)), {})


def test_the_picture_and_the_summary_have_what_three_tasks_tell(tmp_path):
  section = gained("tuv", tmp_path)
  numbers = forest.draw(page.findings([section]), ["small"]).numbers
  by_gain = {line[1]: line for line in numbers.lines}
  assert by_gain["layernorm - linear"][2:4] == ["small", "9.10"]
  assert by_gain["layernorm - linear"][5] == "20.7"
  lines = {line[0]: line[1:] for line in page.summary([section]).lines}
  key, = (text for text in lines if "above linear probing" in text
          and "LayerNorms" in text)
  assert lines[key] == ["+20.7", "+9.1 ± 0.1, supported"]
  # The paper's claims and their controls; what goes beyond is in the picture.
  assert any("trains for as long as both" in text for text in lines)
  claimed, asked = page.apart(page.findings([section]))
  assert "ttc_block - ttc" in {f.gain.name for *_, f in asked}
  assert "ttc_block - ttc" not in {f.gain.name for *_, f in claimed}
  assert not any("Our block score" in text for text in lines)
  both = page.summary([section, section._replace(name="other")])
  assert both.header == ["", "the paper", "small", "other"]
  two = gained("tu", tmp_path / "two")._replace(name="two tasks")
  assert page.summary([two, section]).header == ["", "the paper", "small"]


def test_fewer_tasks_are_not_in_the_picture(tmp_path):
  section = gained("tu", tmp_path)
  assert forest.draw(page.findings([section]), ["small"]) is None
  assert page.summary([section]).lines == []
