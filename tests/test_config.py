import pytest

from ttc_jax import config as config_lib
from ttc_jax import jobs
from ttc_jax.errors import UserError

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


@pytest.mark.parametrize("text,message", [
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
    ("drop_path", 1.0, "config.drop_path"),
    ("smallest_crop", 0.0, "config.smallest_crop"),
    ("dtype", "float16", "unknown dtype"),
    ("warmup_epochs", 50.0, "config.warmup_epochs is 50.0"),
    ("label_smoothing", 1.0, "config.label_smoothing"),
    ("seeds", (-1,), "at least one integer"),
    ("seeds", (), "at least one integer"),
    ("seeds", ("a",), "at least one integer"),
    ("protocol", "select", "config.grid is empty"),
])
def test_values_that_cannot_be_are_refused(key, value, message):
  c = config_lib.default()
  c[key] = value
  with pytest.raises(UserError, match=message):
    config_lib.check(c)


def test_variants_cannot_set_what_all_share():
  c = config_lib.default()
  c.variants = config_lib.variants(ttc=dict(drop_path=0.1))
  with pytest.raises(UserError, match="sets drop_path, which all"):
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
