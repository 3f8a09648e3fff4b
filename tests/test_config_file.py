"""Configuration files and --config.KEY=VALUE: right, or one sentence."""
import pytest

from tests.command import run_command
from ttc_jax import config_file
from ttc_jax.config import check, default
from ttc_jax.errors import UserError

HEAD = """from ttc_jax.config import default, parse_arg
def get_config(arg=None):
  c = default()
  arg = parse_arg(arg, task=("digits",), data="")
  c.tasks, c.data = arg.task, arg.data
"""


def write(folder, *lines, name="own.py"):
  file = folder / name
  file.parent.mkdir(exist_ok=True)
  file.write_text(HEAD + "".join(f"  {line}\n" for line in lines)
                  + "  return c\n")
  return str(file)


def load(argument):
  return config_file.load(*config_file.split(argument))


# --- Files --------------------------------------------------------------------

@pytest.mark.parametrize("name", ["own.py", "run:2/own.py", "a b,c=d/own.py",
                                  "run:task=x/own.py"])
def test_a_file_s_path_may_hold_anything(tmp_path, name):
  file = write(tmp_path, name=name)
  assert load(file).tasks == ("digits",)
  assert load(f"{file}:task=a,b,data=/c:d").to_dict() == {
      **load(file).to_dict(), "tasks": ("a", "b"), "data": "/c:d"}


def test_the_longest_file_wins(tmp_path):
  write(tmp_path, "c.lr = 0.5", name="own.py")
  file = write(tmp_path, "c.lr = 0.25", name="own.py:task=a")
  assert load(file).lr == 0.25
  assert load(f"{tmp_path}/own.py:task=b").lr == 0.5


@pytest.mark.parametrize("lines,message", [
    (["c.learning_rate = 1"], 'line 6: .*Key "learning_rate" does not exist'),
    (["c.grid.lrs = (1,)"], 'line 6: .*Did you mean "lr"'),
    (["c.lr = 'fast'"], "line 6: TypeError: Could not override field 'lr'"),
    (["", "import big_vision.nothing"], "line 7: .*No module named"),
    (["x = c['a']"], "line 6: KeyError"),
    (["raise SystemExit(3)"], "line 6: SystemExit: 3"),
    (["x = (1"], "line 6: SyntaxError: "),
    (["return 3"], "get_config returned int; return the ConfigDict"),
    (["import ml_collections as m", "return m.ConfigDict({'lr': 1.})"],
     "has no key '.*': start from ttc_jax.config.default"),
    (["return {**c, 'lrs': 1}"], "returned dict"),
    (["c.unlock()", "c.lrs = 1"], "unknown key of configuration .*'lrs'"),
])
def test_a_mistake_names_the_file_and_the_line(tmp_path, lines, message):
  file = write(tmp_path, *lines)
  with pytest.raises(UserError, match=message) as caught:
    load(file)
  assert file in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content,message", [
    (b"config = {}\n", "has no function get_config"),
    (b"\xff\xfe", "SyntaxError"), (b"a\0", "SyntaxError|null bytes"),
    (b"def get_config(a, b): pass", "TypeError: get_config")])
def test_a_file_that_is_no_configuration(tmp_path, content, message):
  (tmp_path / "x.py").write_bytes(content)
  with pytest.raises(UserError, match=message):
    load(f"{tmp_path}/x.py")


@pytest.mark.parametrize("argument", ["none.py", "none.py:task=a", "", ":",
                                      "."])
def test_a_file_that_is_missing(argument):
  with pytest.raises(UserError, match="does not exist; give --config=FILE"):
    load(argument)


# --- Values -------------------------------------------------------------------

@pytest.mark.parametrize("path,text,value", [
    ("lr", "1e-3", 1e-3), ("lr", "1", 1.0), ("label_smoothing", ".1", 0.1),
    ("epochs", "3", 3), ("flip", "true", True), ("flip", "0", False),
    ("flip", "False", False), ("warmup_epochs", "None", None),
    ("warmup_epochs", "1", 1.0), ("adapter.scale", "None", None),
    ("adapter.scale", "2", 2.0), ("tasks", "a", ("a",)),
    ("tasks", "a b,c/d", ("a b", "c/d")), ("tasks", "1e3,2", ("1e3", "2")),
    ("seeds", "0,", (0,)), ("seeds", "(0,1)", (0, 1)), ("seeds", "[2]", (2,)),
    ("grid.lr", "[1e-3,1]", (1e-3, 1)), ("grid.lr", "", ()),
    ("grid.lr", "()", ()), ("lora.sites", "q", ("q",)),
    ("lora.sites", "('q', 'v')", ("q", "v")),
    ("data", "/a,b: c=d", "/a,b: c=d"),
    ("weights", "", ""), ("weights", "None", "None")])
def test_values_as_people_write_them(path, text, value):
  c = default()
  config_file.override(c, path, text)
  for key in path.split("."):
    c = c[key]
  assert c == value and type(c) is type(value)


@pytest.mark.parametrize("path,text,message", [
    ("lrs", "1", "unknown key of config 'lrs': did you mean lr"),
    ("grid.lrs", "1", "unknown key of config.grid 'lrs'"),
    ("lr.x", "1", "config.lr has no keys of its own"),
    ("epochs", "1e1", "config.epochs=1e1: give an integer"),
    ("epochs", "None", "config.epochs=None: give an integer"),
    ("epochs", "", "config.epochs=: give an integer"),
    ("lr", "1e-3,1e-2", "config.lr=1e-3,1e-2: give one number"),
    ("lr", "nan", "give a finite number"), ("lr", "-inf", "a finite number"),
    ("lr", "None", "config.lr=None: give one number"),
    ("lr", "1e-3f", "give one number"), ("flip", "maybe", "give true or false"),
    ("grid", "{}", "config.grid is a section"), ("seeds", "(0,", "with commas"),
    ("per_task", "{}", "config.per_task is a section"),
    ("per_task.dtd", "1", "key of config.per_task 'dtd'|config.per_task"),
    ("per_task.dtd.lrs", "1", "key of config.per_task.dtd 'lrs'"),
    ("variants.x.lr", "1", "unknown variant 'x'"),
])
def test_a_value_that_cannot_be_is_refused(path, text, message):
  with pytest.raises(UserError, match=message):
    config_file.override(default(), path, text)


@pytest.mark.parametrize("path,text", [
    ("seeds", "0 1"), ("seeds", "0..2"), ("grid.lr", "1e-3 1e-2"),
    ("grid.lr", "nan,1"), ("lr", "-1"), ("noah.prompts", "1,inf")])
def test_what_its_type_lets_through_check_refuses(path, text):
  c = default()
  config_file.override(c, path, text)
  with pytest.raises(UserError, match=f"config.{path} is"):
    check(c)


@pytest.mark.parametrize("prefix", ["", "variants.ttc."])
def test_one_key_for_one_task(prefix):
  c = default()
  c.variants = {"ttc": {"method": "ttc"}}
  c.lock()
  for path, text in (("lr", "1"), ("warmup_epochs", "None"),
                     ("sct.scale_on_x", "true"), ("grid.lr", "1e-3,1e-2"),
                     ("lr", "2")):
    config_file.override(c, f"{prefix}per_task.b/c.{path}", text)
  holder = c.variants.ttc if prefix else c
  assert holder.per_task["b/c"].to_dict() == {
      "lr": 2.0, "warmup_epochs": None, "sct": {"scale_on_x": True},
      "grid": {"lr": (1e-3, 1e-2)}}
  assert c.lr == default().lr and c.is_locked
  check(c)


def test_a_variant_s_key_may_be_new_to_it():
  c = default()
  c.variants = {"a": {"method": "ttc"}}
  config_file.override(c, "variants.a.k", "7")
  assert c.variants.a.to_dict() == {"method": "ttc", "k": 7}


# --- The command --------------------------------------------------------------

@pytest.mark.parametrize("args,message", [
    ([], "error: --config is missing: give a file, or one of bigvision"),
    (["--config=demo", "--workdir=README.md"], "it is a file; give another"),
    (["--config", "none.py"], "configuration 'none.py' does not exist"),
    (["--config=configs/vtab.py: task=digits"], "config argument ' task'"),
    (["--config=configs/vtab.py", "--config.lr"], "--config.lr has no value"),
    (["--config=configs/vtab.py", "--noconfig.lr"], "only a key that is true"),
    (["--config=configs/vtab.py:task=digits", "--config.lr", "-1"],
     "config.lr is -1.0"),
    (["--config=configs/vtab.py:task=digits", "--config.lr=inf"], "finite"),
    (["--config=configs/vtab.py:task=digits", "--config.per_task.digits.lrs=1"],
     "did you mean lr"),
    (["--config.epochs=3", "--config=configs/vtab.py", "--wordir=x"],
     "Unknown command line flag 'wordir'. Did you mean: workdir"),
])
def test_a_mistake_is_one_sentence_and_exit_code_2(args, message):
  done = run_command("main", *args)
  assert (done.returncode, done.stdout) == (2, "")
  assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("flag", ["-h", "--help", "--helpshort", "-help"])
@pytest.mark.parametrize("module", ["main", "report"])
def test_help_is_no_error_and_lists_the_flags(module, flag):
  done = run_command(module, flag)
  assert (done.returncode, done.stderr) == (0, "")
  flags = {"main": ("--config:", "--workdir:", "--config.KEY=VALUE"),
           "report": ("--format:", "--[no]watch:")}
  assert all(f in done.stdout for f in flags[module]), done.stdout
