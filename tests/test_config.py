import ml_collections
import pytest

from ttc_jax import config as config_lib
from ttc_jax import methods
from ttc_jax.errors import UserError
from ttc_jax.runs import plan as jobs

KNOWN = dict(task=("all",), lr=0.1, size=224, method="ttc", runlocal=False)


def parse(text):
  return config_lib.parse_arg(text, **KNOWN).to_dict()


def test_defaults_and_types():
  assert parse(None) == KNOWN
  assert parse("lr=1e-3,size=64,method=full") == {
      **KNOWN, "lr": 1e-3, "size": 64, "method": "full"}


def test_a_bare_key_is_true():
  assert parse("runlocal")["runlocal"] is True
  assert parse("runlocal=False")["runlocal"] is False


def test_a_list_goes_on_until_the_next_key():
  got = parse("task=a,b,c/d,method=linear,runlocal")
  assert got["task"] == ("a", "b", "c/d")
  assert got["method"] == "linear" and got["runlocal"]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_quoted_value_may_hold_commas_blanks_colons_and_equals_signs(quote):
  odd = "/data/cats, dogs: x=1"
  got = parse(f"method={quote}{odd}{quote},task=a,{quote}{odd}{quote},size=3")
  assert (got["method"], got["task"], got["size"]) == (odd, ("a", odd), 3)


@pytest.mark.parametrize("value", ["/it's here", 'a"b', "a: b", "a=b", "'", ""])
def test_a_value_without_a_comma_needs_no_quotes(value):
  assert parse(f"method={value},size=3") == KNOWN | {"method": value, "size": 3}


@pytest.mark.parametrize("text,message", [
    ("lr=inf", "'lr=inf': expected float"), ("lr=nan", "expected float"),
    ("method='a,b", "unknown config argument 'b'"), ("method='a,b'c", "b'c"),
    ("methd=ttc", "unknown config argument 'methd': did you mean method"),
    ("method=ttc,oops", "unknown config argument 'oops'"),
    ("size=big", "'size=big': expected int"),
    ("runlocal=maybe", "expected bool"),
])
def test_mistakes_name_the_fix(text, message):
  with pytest.raises(UserError, match=message):
    parse(text)


def test_variants_keep_their_order_and_override():
  c = config_lib.default()
  c.variants = config_lib.variants(z=dict(method="linear"),
                                   a=dict(method="ttc", epochs=3))
  got = jobs.variants(c)
  assert list(got) == ["z", "a"]
  assert (got["a"].epochs, got["z"].epochs) == (3, c.epochs)
  assert (got["a"].method, got["z"].method) == ("ttc", "linear")


def test_settings_are_the_grid_smallest_first():
  c = config_lib.default()
  c.grid.lr, c.grid.weight_decay = (0.1, 0.01), (0.0, 1.0)
  assert jobs.settings(c) == [
      {"lr": 0.01, "weight_decay": 0.0}, {"lr": 0.01, "weight_decay": 1.0},
      {"lr": 0.1, "weight_decay": 0.0}, {"lr": 0.1, "weight_decay": 1.0}]


@pytest.mark.parametrize("key,value,message", [
    ("protocol", "test", "unknown protocol 'test'"),
    ("epochs", 0, "config.epochs is 0"),
    ("lr", -1.0, "config.lr is -1.0"),
    ("lr", float("nan"), "config.lr is nan"),
    ("lr", float("inf"), "config.lr is inf"), ("lr", None, "config.lr is None"),
    ("scale", float("-inf"), "config.scale is -inf; give a finite number"),
    ("save_seconds", float("inf"), "config.save_seconds is inf"),
    ("grid", dict(lr=(1.0, float("inf"))), "config.grid.lr is"),
    ("grid", dict(lr=("a", "b")), "config.grid.lr is"),
    ("grid", dict(lr=(-1.0,)), "config.grid.lr is"),
    ("grid", dict(stage2_lr=(-1.0,)), "config.grid.stage2_lr is"),
    ("stage2_lr", -1.0, "config.stage2_lr is -1.0"),
    ("epochs", None, "config.epochs is None; give a value, as 50"),
    ("drop_path", 1.0, "config.drop_path"),
    ("smallest_crop", 0.0, "config.smallest_crop"),
    ("crop_aspect", 0.75, "config.crop_aspect"),
    ("dtype", "float16", "unknown dtype"),
    ("warmup_epochs", 50.0, "config.warmup_epochs is 50.0"),
    ("optimiser", "adam", "unknown optimiser 'adam': did you mean adamw"),
    ("label_smoothing", 1.0, "config.label_smoothing"),
    ("seeds", (-1,), "at least one integer"),
    ("seeds", (), "at least one integer"),
    ("seeds", (1, 0, 1), "each seed once"),
    ("matmul_precision", "low", "known: nothing, high, highest"),
    ("seeds", ("a",), "at least one integer"),
    ("protocol", "select", "config.grid is empty"),
])
def test_values_that_cannot_be_are_refused(key, value, message):
  c = config_lib.default()
  c[key] = value
  with pytest.raises(UserError, match=message):
    config_lib.check(c)


def test_a_default_cannot_be_misspelt():
  for holder in (config_lib.default(), config_lib.default().grid):
    with pytest.raises(AttributeError, match="lrs"):
      holder.lrs = 1.0


def test_variants_cannot_set_what_all_share():
  c = config_lib.default()
  c.variants = config_lib.variants(ttc=dict(cache="elsewhere"))
  with pytest.raises(UserError, match="sets cache, which all"):
    config_lib.check(c)


def test_the_compute_matched_control_follows_the_epochs():
  import importlib.util
  spec = importlib.util.spec_from_file_location(
      "controls", "configs/controls.py")
  controls = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(controls)
  c = controls.get_config("epochs=5")
  c.epochs = 9
  got = jobs.variants(c)
  assert got["layernorm_2x"].epochs == 18 == 2 * got["ttc"].epochs


def test_an_unknown_key_of_a_variant_is_refused():
  c = config_lib.default()
  c.variants = config_lib.variants(ttc=dict(scor="l2"))
  with pytest.raises(UserError, match="did you mean score"):
    config_lib.check(c)


def test_settings_of_a_task_are_those_of_that_task_alone():
  c = config_lib.default()
  c.per_task = {"dtd": dict(lr=0.5, scale=0.4, sct=dict(scale_on_x=True)),
                "svhn": dict(grid=dict(lr=(0.1, 0.2)))}
  c.lock()
  jobs.check_config(c)
  got = jobs.variants(c, "dtd")["ttc"]
  assert (got.lr, got.scale, got.sct.scale_on_x) == (0.5, 0.4, True)
  assert got.sct.position == c.sct.position
  assert jobs.variants(c, "svhn")["ttc"].grid.lr == (0.1, 0.2)
  assert jobs.variants(c, "svhn")["ttc"].lr == c.lr
  assert jobs.variants(c, "other")["ttc"].grid.lr == ()


def test_a_variant_s_settings_win_over_a_task_s_and_its_own_over_both():
  c = config_lib.default()
  c.per_task = {"dtd": dict(lr=0.5, epochs=7, weight_decay=0.1)}
  c.variants = config_lib.variants(
      a=dict(epochs=8, weight_decay=0.2, per_task={
          "dtd": dict(weight_decay=0.3), "svhn": dict(lr=0.6)}), b={})
  c.lock()
  jobs.check_config(c)

  def values(task, label):
    got = jobs.variants(c, task)[label]
    return got.lr, got.epochs, got.weight_decay
  assert values("dtd", "a") == (0.5, 8, 0.3)
  assert values("dtd", "b") == (0.5, 7, 0.1)
  assert values("svhn", "a") == (0.6, 8, 0.2)
  assert values("svhn", "b") == (c.lr, c.epochs, c.weight_decay)


def test_a_run_is_named_by_its_values_not_by_where_they_came_from(vit):
  def name(lr, per_task):
    c = config_lib.default()
    c.lr, c.per_task, c.k = lr, per_task, 4
    c = jobs.variants(c, "dtd")["ttc"]
    return jobs.Run("dtd", "ttc", c, methods.load("ttc", c, vit), "final", 0,
                    "digest", "sha").name
  plain = name(0.5, {})
  assert plain == name(0.1, {"dtd": dict(lr=0.5), "svhn": dict(lr=0.7)})
  assert plain != name(0.5, {"dtd": dict(scale=0.5)})


def test_accumulate_is_part_of_a_run_only_where_it_is_not_1():
  c = config_lib.default()
  assert "accumulate" not in jobs.common_keys(c)
  c.accumulate = 4
  assert jobs.common_keys(c)["accumulate"] == 4
  c.accumulate = 0
  with pytest.raises(UserError, match="config.accumulate is 0; give 1 or more"):
    config_lib.check(c)


def test_few_shot_decides_a_run_and_none_is_no_key():
  c = config_lib.default()
  assert "few_shot" not in jobs.common_keys(c)
  c.few_shot = 4
  assert jobs.common_keys(c)["few_shot"] == 4
  c.few_shot = -1
  with pytest.raises(UserError, match="config.few_shot is -1"):
    config_lib.check(c)
  c = config_lib.default()
  c.variants = config_lib.variants(a=dict(few_shot=2))
  with pytest.raises(UserError, match="set config.few_shot"):
    config_lib.check(c)


@pytest.mark.parametrize("table,message", [
    (dict(scal=1.0), "unknown key of config.per_task.dtd 'scal': did you mean"),
    (dict(sct=dict(scale_onx=True)), "key of config.per_task.dtd.sct"),
    (dict(image_size=96), "per_task.dtd sets image_size, which all runs share"),
    (dict(backbone="vit_s16"), "set config.backbone"),
    (dict(method="sct"), "set config.method"),
    (dict(few_shot=2), "set config.few_shot"),
    (dict(epochs=0), "of task 'dtd': config.epochs is 0"),
    (dict(normalisation="imagnet"), "of task 'dtd': unknown normalisation"),
    (dict(epochs="x"), "config.per_task.dtd: Could not override"),
    (dict(sct=3), "config.per_task.dtd.sct is 3; give"),
    (0.1, "config.per_task.dtd is 0.1; give"),
])
@pytest.mark.parametrize("of_variant", [False, True])
def test_mistakes_in_a_task_s_settings_are_refused(table, message, of_variant):
  c = config_lib.default()
  if of_variant:
    c.variants = config_lib.variants(ttc=dict(per_task={"dtd": table}))
    message = message.replace("config.per_task", "config.variants.ttc.per_task")
  else:
    c.per_task = {"dtd": table}
  c.lock()
  with pytest.raises(UserError, match=message):
    jobs.check_config(c)


def test_the_grid_of_a_task_is_enough_to_select():
  c = config_lib.default()
  c.protocol = "select"
  c.per_task = {"dtd": dict(grid=dict(lr=(0.1,)))}
  jobs.check_config(c)


@pytest.mark.parametrize("source, message", [
    ("tcc", "unknown config.variants.two.settings_of 'tcc'.*"),
    ("two", "config.variants.two.settings_of leads back to itself: two -> two"),
    ("three", "leads back to itself: two -> three -> two"),
])
def test_settings_are_taken_from_a_variant_that_has_a_search(source, message):
  c = config_lib.default()
  c.protocol, c.grid.lr = "select", (0.1, 0.2)
  c.variants = config_lib.variants(
      one=dict(method="layernorm"), two=dict(settings_of=source),
      three=dict(settings_of="two"))
  with pytest.raises(UserError, match=message):
    jobs.check_config(c)
  c.variants.two.settings_of = "one"
  jobs.check_config(c)
  alone = config_lib.default()
  alone.settings_of, alone.variants = "one", c.variants
  with pytest.raises(UserError, match="config.settings_of is of a variant"):
    jobs.check_config(alone)


def test_what_takes_settings_keeps_of_the_grid_what_it_sets_itself():
  c = config_lib.default()
  c.protocol, c.grid.lr, c.grid.weight_decay = "select", (0.1, 0.2), (0.0,)
  c.per_task = {"dtd": dict(grid=dict(lr=(0.3,)))}
  c.variants = config_lib.variants(
      one=dict(method="layernorm"),
      two=dict(method="ttc", settings_of="one",
               grid=dict(stage2_lr=(0.1, 1.0))),
      three=dict(method="ttc", settings_of="two"))
  found = jobs.variants(c, "dtd")
  assert jobs.settings(found["one"]) == [dict(lr=0.3, weight_decay=0.0)]
  assert jobs.settings(found["two"]) == [
      dict(stage2_lr=0.1), dict(stage2_lr=1.0)]
  assert [jobs.takes_all(found[v]) for v in found] == [False, False, True]
  assert jobs.searched(found, "three") == {"lr", "weight_decay", "stage2_lr"}
  assert [jobs.expected(found[v]).runs for v in found] == [2, 3, 1]


def test_what_the_other_variant_cannot_try_is_tried_here():
  """LayerNorm has no scale: it is searched by `two`, and taken by `three`."""
  c = config_lib.default()
  c.protocol, c.grid.lr, c.grid.scale = "select", (0.1, 0.2), (1.0, 2.0)
  c.variants = config_lib.variants(
      one=dict(method="layernorm"),
      two=dict(method="ttc", settings_of="one"),
      three=dict(method="ttc", settings_of="two"),
      four=dict(method="ttc", settings_of="one", grid=dict(scale=())))
  found = jobs.variants(c)
  assert jobs.settings(found["two"]) == [dict(scale=1.0), dict(scale=2.0)]
  assert jobs.searched(found, "one") == {"lr"}
  assert jobs.takes_all(found["three"]) and jobs.takes_all(found["four"])


def test_a_schedule_is_checked_where_the_rate_is_searched():
  c = config_lib.default()
  c.protocol, c.grid.lr, c.min_lr = "select", (0.1, 0.2), 0.01
  c.variants = config_lib.variants(
      one=dict(method="layernorm"), two=dict(settings_of="one"))
  jobs.check_config(c)  # config.lr, which no run has, is below min_lr
  c.min_lr = 0.15
  with pytest.raises(UserError, match="config.min_lr is 0.15"):
    jobs.check_config(c)


def test_settings_are_those_of_a_variant_for_all_tasks():
  c = config_lib.default()
  c.grid.lr, c.protocol = (0.1, 0.2), "select"
  c.variants = config_lib.variants(
      one=dict(method="layernorm"),
      two=dict(per_task=dict(dtd=dict(settings_of="one"))))
  with pytest.raises(UserError, match="one for all tasks"):
    jobs.check_config(c)


def test_scale_is_tried_with_the_methods_that_have_one():
  c = config_lib.default()
  c.grid.lr, c.grid.scale = (0.2, 0.1), (1.0, 0.5)
  for method in ("ttc", "sct"):
    c.method = method
    assert jobs.settings(c) == [
        dict(lr=lr, scale=s) for lr in (0.1, 0.2) for s in (0.5, 1.0)]
  c.method = "adapter"
  assert jobs.settings(c) == [dict(lr=0.1), dict(lr=0.2)]


def test_a_closed_form_tries_its_own_key_alone():
  c = config_lib.default()
  c.method, c.protocol, c.grid.lr = "fewshot_lsr", "select", (0.1, 0.2)
  with pytest.raises(UserError, match="give it config.grid.l2"):
    jobs.check_config(c)
  c.grid.l2 = (4.0, 1.0)
  jobs.check_config(c)
  assert jobs.settings(c) == [dict(l2=1.0), dict(l2=4.0)]
  assert jobs.further_settings(c, [c], dict(lr=0.2, l2=1.0)) == []


def further(tried, best, steps=2, key="lr", **grid):
  c = config_lib.default()
  c.grid[key], c.grid_steps = (1e-2, 1e-3), steps
  c.grid.update(grid)
  setting = dict(lr=c.lr, stage2_lr=c.stage2_lr, adapter_lr=c.adapter_lr)
  return jobs.further_settings(
      c, [ml_collections.ConfigDict(setting | {key: x}) for x in tried],
      setting | {key: best})


def test_the_grid_grows_where_the_best_rate_is_at_its_edge():
  assert further([1e-3, 1e-2], 1e-2) == [dict(lr=0.1)]
  assert further([1e-3, 1e-2], 1e-3) == [dict(lr=1e-4)]
  assert further([1e-3, 1e-2, 0.1], 0.1) == [dict(lr=1.0)]
  assert further([1e-3, 1e-2], 1e-2, weight_decay=(0.1, 0.2)) == [
      dict(lr=0.1, weight_decay=w) for w in (0.1, 0.2)]


def test_the_grid_does_not_grow_where_the_best_rate_is_within_or_steps_are_out(
    ):
  assert further([1e-3, 1e-2, 0.1], 1e-2) == []
  assert further([1e-3, 1e-2], 1e-2, steps=0) == []
  assert further([1e-3, 1e-2, 0.1, 1.0], 1.0) == []


@pytest.mark.parametrize("tried, best, expected", [
    ([0.0, 0.1, 1.0], 0.0, []), ([0.0, 0.1, 1.0], 0.1, []),
    ([0.0, 0.1, 1.0], 1.0, [{"stage2_lr": 10.0}]), ([0.0, 1.0], 1.0, []),
    ([0.01, 0.0104], 0.0104, [{"stage2_lr": 0.011}]),
    ([0.01, 0.0104], 0.01, [{"stage2_lr": 0.0096}]),
    ([0.01, 0.01004], 0.01, [])])
def test_the_grid_grows_by_new_rates_above_0_alone(tried, best, expected):
  assert further(tried, best, key="stage2_lr", lr=(),
                 stage2_lr=tuple(tried)) == expected


@pytest.mark.parametrize("key", ["stage2_lr", "adapter_lr"])
def test_the_grid_grows_in_another_rate_where_it_has_one_learning_rate(key):
  assert further([1e-3, 1e-2], 1e-3, key=key) == [{key: 1e-4}]
  assert further([1e-3, 1e-2], 1e-2, key=key, lr=(0.3,)) == [
      {"lr": 0.3, key: 0.1}]


def test_the_grid_of_several_rates_grows_in_the_learning_rate_alone():
  rates = dict(lr=(0.01, 0.1, 1.0), stage2_lr=(0.1, 1.0))
  assert further(rates["lr"], 1.0, **rates) == [
      dict(lr=10.0, stage2_lr=x) for x in (0.1, 1.0)]
  assert further(rates["lr"], 0.1, **rates) == []


def test_the_grid_does_not_grow_in_a_rate_that_the_method_lacks():
  c = config_lib.default()
  c.method, c.grid.stage2_lr, c.grid_steps = "layernorm", (0.1, 1.0), 3
  assert jobs.further_settings(c, [c], dict(lr=c.lr, stage2_lr=1.0)) == []


@pytest.mark.parametrize("key", ["warmup_lr", "min_lr"])
def test_the_ends_of_the_schedule_lie_below_every_learning_rate(key):
  c = config_lib.default()
  c[key], c.lr, c.grid.lr = 1e-3, 1e-2, (1e-4, 1e-2)
  with pytest.raises(UserError, match=f"config.{key} is 0.001, above the"):
    config_lib.check(c)


def test_vtab_names_its_19_tasks_once():
  from ttc_jax.vtab import rows as vtab
  c = config_lib.default()
  c.tasks = ("digits", "vtab", "dtd")
  assert jobs.task_names(c) == ("digits", *vtab.ROWS)
  assert len(vtab.ROWS) == 19
