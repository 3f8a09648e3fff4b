"""What the documentation says, held against the code.

Code marked with `<!-- run -->` is executed; commands, flags, configuration
keys, files, links and quoted messages exist.
"""
import ast
import contextlib
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from tests.command import ROOT
from tests.conftest import features, random_adapter
from tests.test_train import make_job, run
import ttc_jax
from ttc_jax import (
  backbones,
  config_file,
  methods,
  parallel,
  tasks,
  trees,
  weights,
)
from ttc_jax import config as config_lib
from ttc_jax.backbones import vit as vit_lib
from ttc_jax.evidence import claims

sys.path.append(str(ROOT / "tools"))
import docs_pages  # noqa: E402

DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md",
                      *sorted(DOCS.glob("*.md")))}
# A page with what is read off the code, as a reader sees it.
SHOWN = {name: docs_pages.fill(text) for name, text in PAGES.items()}
every_page = pytest.mark.parametrize("name", PAGES)


def code(text):
  """The contents of all fenced blocks and of all inline code."""
  fenced = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
  rest = fenced.sub("\n", text)
  return [*fenced.findall(text),
          *(" ".join(x.split()) for x in re.findall(r"`([^`]+)`", rest))]


# --- Examples run -------------------------------------------------------------

RUN = re.compile(r"<!-- run(?:: (\S+))? -->\n```python\n(.*?)^```",
                 re.DOTALL | re.MULTILINE)
RUNNABLE = [name for name, text in PAGES.items() if RUN.search(text)]


@pytest.fixture(scope="module", autouse=True)
def examples():
  """The files of docs/examples, as if copied to where the pages say."""
  with pytest.MonkeyPatch.context() as patch:
    for package in (methods, backbones, tasks):
      folder = EXAMPLES / package.__name__.rpartition(".")[2]
      patch.setattr(package, "__path__", [*package.__path__, str(folder)])
    patch.setitem(vit_lib.SIZES, "ti", (32, 3, 2, 64))
    patch.setitem(vit_lib.SIZES, "b", (32, 3, 2, 64))
    importlib.invalidate_caches()
    tasks._families.cache_clear()
    yield
    tasks._families.cache_clear()
    for name in ("methods.gain", "backbones.toy", "tasks.stripes"):
      sys.modules.pop(f"ttc_jax.{name}", None)
      package, _, module = name.partition(".")
      vars(getattr(ttc_jax, package)).pop(module, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with tiny weights under the names that the pages use."""
  path = tmp_path_factory.mktemp("docs")
  (path / "checkpoints").mkdir()
  for name, size, file, to in (
      ("vit_ti16", 64, "checkpoints/vit_ti16_64.safetensors", "ttc_jax"),
      ("vit_b16", 224, "ViT-B_16.npz", "bigvision")):
    module = backbones.make(name, size)
    own = str(path / f"{name}.safetensors")
    weights.write(own, backbones.init(module),
                  {"gelu": "tanh", "epsilon": 1e-6}, normalisation="half")
    if to == "ttc_jax":
      os.rename(own, path / file)
    else:
      weights.convert.convert(own, str(path / file), to)
  pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
  Image.fromarray(pixels).save(path / "cat.jpg")
  (path / "results.jsonl").write_text(json.dumps({
      "task": "digits", "variant": "ttc", "seed": 0, "test_top1": 92.1,
      "module_params": 6912, "norm_params": 9600, "lr": 6e-3}) + "\n")
  return path


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", RUNNABLE)
def test_marked_code_runs(name, folder):
  """All marked blocks of a page, in order, in one namespace."""
  space: dict = {}
  with contextlib.chdir(folder):
    for number, (_, block) in enumerate(RUN.findall(PAGES[name]), 1):
      exec(compile(block, f"{name}, block {number}", "exec"), space)


@pytest.mark.slow
def test_readme_s_python_runs(folder):
  block, = re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.DOTALL)
  space = {"ttc_jax": ttc_jax, "paths": ["cat.jpg"] * 4,
           "labels": ["cat", "dog"] * 2, "other_paths": ["cat.jpg"],
           "other_labels": ["cat"]}
  with contextlib.chdir(folder):
    exec(compile(block.replace("epochs=20", "epochs=1"), "README.md", "exec"),
         space)
    assert os.path.getsize("pets.safetensors")


@every_page
def test_python_of_a_page_is_run_or_a_fragment(name):
  """No page has unmarked code; README's is run by its own test."""
  assert name == "README.md" or (
      PAGES[name].count("```python\n") == len(RUN.findall(PAGES[name])))


def test_the_example_of_a_method_keeps_the_laws(
    config, model, params, split, tmp_path):
  assert methods.described("gain")[0] == "an example, 2026"
  job = make_job(config, model, split, "gain")
  outcome, flat = run(job, params, tmp_path / "run")
  before = trees.flatten(params)
  for name, leaf in flat.items():
    if name.startswith("backbone/"):
      np.testing.assert_array_equal(leaf, before[name])
    if name.startswith("adapter/"):
      assert (leaf != 1).any(), name
  tapped = model._replace(handlers=job.method.handlers)
  start = methods.Context(model, params, {}, *split, seed=0)
  adapter, buffers = job.method.stages[0].prepare(start)
  images = split.images[:4]
  want = features(model, params, images, {})
  np.testing.assert_array_equal(
      features(tapped, params | {"adapter": adapter}, images, buffers), want)
  params = params | {"adapter": random_adapter(adapter)}
  merged = job.method.merge(params, buffers, model.backbone)
  want = features(tapped, params, images, buffers)
  found = features(model, params | {"backbone": merged, "adapter": {}},
                   images, buffers)
  np.testing.assert_allclose(found, want, atol=1e-5)
  assert len(parallel.devices()) == 2 and outcome.history


def test_the_example_of_a_task_is_a_task():
  assert tasks.family_of("stripes", None) == "stripes"
  task = tasks.load("stripes", size=32)
  assert task.damaged() == []
  assert [len(task.labels[s]) for s in task.splits] == [800, 200, 1000, 400]
  (images, labels), test = task.split("val"), task.split("test")
  np.testing.assert_array_equal(task.split("trainval").images[800:], images)
  # Horizontal stripes change from row to row, vertical ones do not.
  rows = images[..., 0].astype(float).mean(2).std(1)
  columns = images[..., 0].astype(float).mean(1).std(1)
  np.testing.assert_array_equal(labels == 0, rows > columns)
  assert not (images[:, None] == test.images[None, :50]).all(
      (2, 3, 4)).any(), "an image stands in two splits"


# --- What is named exists -----------------------------------------------------

FLAGS = {c.module: {*c.flags, "help"} for c in docs_pages.commands()}
NAMES = {c.name: c.module for c in docs_pages.commands()}
MODULES = {*FLAGS, "serve"}


def command_lines(text):
  """(module, arguments) of the commands in a page."""
  for block in code(text):
    for line in re.sub(r"\\\n\s*(?=--|[A-Z])", " ", block).replace(
        "\\\n", "").splitlines():
      match = re.search(r"python -m ttc_jax(?:\.(\w+))?(?![.\w])(.*)", line)
      entry = re.search(r"(?<![\w.-])ttc-jax (\w+)(.*)", line)
      name = match and match[1] or entry and entry[1]
      if not name or name in ("completion", "COMMAND"):
        continue
      yield (name, match[2]) if match else (NAMES[name], entry[2])


@every_page
def test_commands_and_flags_exist(name):
  for module, rest in command_lines(SHOWN[name]):
    assert module in MODULES, (name, module)
    known = FLAGS.get(module, set())
    for flag in re.findall(r"(?<![\w-])--(\w+)(?=[=\]\s`]|$)", rest):
      assert flag in known or flag.startswith("config"), (name, module, flag)


@every_page
def test_configurations_of_commands_load(name):
  """Arguments after FILE: and --config.KEY=VALUE are those of the file."""
  for module, rest in command_lines(SHOWN[name]):
    if module != "main" or "..." in rest or "|" in rest or "FILE[" in rest:
      continue
    words = shlex.split(rest, comments=True)
    given = [w.removeprefix("--config=") for w in words
             if w.startswith("--config=")]
    if not given or given[0].startswith(("FILE", "pets.py")):
      continue
    file, arg = config_file.split(given[0])
    with contextlib.chdir(ROOT):
      config = config_file.load(file, arg)
    for word in words:
      if match := re.fullmatch(r"--config\.([\w.]+)=(.*)", word):
        if match[1] != "KEY" and "TASK" not in match[1]:
          config_file.override(config, match[1], match[2])


def keys(config, above=""):
  for key, value in config.items():
    yield above + key
    if hasattr(value, "items"):
      yield from keys(value, f"{above}{key}.")


KEYS = set(keys(config_lib.default()))


@every_page
def test_configuration_keys_exist(name):
  for text in code(SHOWN[name]):
    for key in re.findall(r"(?<![\w/.])(?:--(?:no)?)?config\.([a-z][\w.]*)",
                          text):
      key = re.sub(r"\.(json|py|default|items|get_ref|update).*", "", key)
      if key in ("json", "py", "default", "get_ref"):
        continue
      top = key.split(".")[0]
      assert key.rstrip(".") in KEYS or top in ("variants", "per_task"), (
          name, key)


def test_every_key_is_on_its_page_with_a_meaning():
  shown = [key for _, group in docs_pages.config_groups() for key in group]
  assert {key.name for key in shown} == KEYS
  flat = config_lib.default().to_dict()
  for key in shown:
    assert key.meaning, f"{key.name} has no comment in config.py"
    value = functools.reduce(lambda d, k: d[k], key.name.split("."), flat)
    assert key.section or key.default == value, key.name
    assert key.name in re.findall(r"^\| `([\w.]+)` \|", SHOWN["docs/config.md"],
                                  re.MULTILINE)


def test_the_page_of_evidence_has_its_introduction():
  page = (ROOT / "docs" / "evidence.md").read_text()
  assert (ROOT / "docs" / "evidence" / "introduction.md").read_text() in page


def test_the_claims_of_readme_and_the_page_are_those_that_are_judged():
  """The slow test below compares every number too."""
  texts = {claim.text for claim in claims.CLAIMS}
  readme = PAGES["README.md"]
  table = readme[readme.index("<!-- claims -->"):
                 readme.index("<!-- /claims -->")].splitlines()
  told = [line.split("|")[1].strip() for line in table if line[:2] == "| "][1:]
  page = (ROOT / "docs" / "evidence.md").read_text()
  told += re.findall(r"^\| (?:Table|Fig|Eq|beyond)[^|]* \| ([^|]+) \| [^|]+ \| "
                     r"[^|]+ \| [^|]+ \|$", page, re.MULTILINE)
  assert len(told) > 50 and set(told) <= texts


@pytest.mark.slow
def test_the_page_of_evidence_and_readme_s_claims_are_made_of_the_rows(
    tmp_path):
  pages = ("README.md", "docs/evidence.md")
  shutil.copytree(ROOT / "docs" / "evidence", tmp_path / "docs" / "evidence")
  (tmp_path / "tools").mkdir()
  shutil.copy(ROOT / "tools" / "evidence.py", tmp_path / "tools")
  text = PAGES["README.md"]
  table = text[text.index("<!-- claims -->"):text.index("<!-- /claims -->")]
  (tmp_path / "README.md").write_text(text.replace(table, "<!-- claims -->\n"))
  subprocess.run([sys.executable, "tools/evidence.py", "page"], check=True,
                 cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
  for name in pages:
    assert (tmp_path / name).read_text() == PAGES[name], (
        f"{name}: run python tools/evidence.py page")


FILE = re.compile(
    r"(?:ttc_jax|docs|tests|tools|configs|checkpoints|methods|backbones|tasks|"
    r"presets|measures|experiments|export|runs|weights)/[\w./-]*\w(?:\.\w+|/)")
MADE = ("runs/", "docs/evidence", "tasks/stripes", "methods/gain",
        "backbones/toy", "checkpoints/runs")


@every_page
def test_files_exist(name):
  for text in code(SHOWN[name]):
    for path in FILE.findall(text):
      inner = path.removeprefix("ttc_jax/")
      if inner.startswith(MADE) and inner != "runs/workdir.py":
        continue
      if "NAME" in path or re.search(r"[A-Z]{4}", path):
        continue
      before = text[:text.index(path)]
      if before.endswith(("/", ":", "build/")):
        continue  # the end of another path
      assert (ROOT / path).exists() or (ROOT / "ttc_jax" / path).exists(), (
          name, path)
    for test in re.findall(r"\btest_\w+\.py\b", text):
      assert (ROOT / "tests" / test).exists(), (name, test)


def anchors(text):
  """GitHub's and Sphinx's names of a page's headings."""
  text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
          for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@every_page
def test_links_lead_somewhere(name):
  for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
    if target.startswith("http"):
      continue
    path, _, anchor = target.partition("#")
    there = (ROOT / name).parent / path if path else ROOT / name
    assert there.exists(), (name, target)
    if anchor:
      assert anchor in anchors(there.read_text(encoding="utf-8")), (
          name, target)


def test_every_page_is_in_the_table_of_contents():
  listed = set(re.findall(r"^([\w-]+)$", PAGES["docs/index.md"], re.MULTILINE))
  pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
  assert pages <= listed and listed - pages <= {"evidence"}


def test_readme_s_listing_is_the_folder():
  block = PAGES["README.md"].partition("<!-- listing -->")[2].partition(
      "<!-- /listing -->")[0]
  named = set(re.findall(r"[\w]+\.py|\w+(?=/)", block))
  for path in (ROOT / "ttc_jax").iterdir():
    if path.name.startswith("_") or path.is_symlink() or not (
        path.suffix == ".py" or path.is_dir()):
      continue
    assert path.name in named, f"{path.name} is not in README's listing"
  folders = re.findall(r"^  (\w+)/ ", block, re.MULTILINE)
  assert all((ROOT / "ttc_jax" / name).is_dir() for name in folders)


# --- Messages -----------------------------------------------------------------

def texts():
  """All texts of the package; what is filled in is "\\0"."""
  def of(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      return node.value
    if isinstance(node, ast.JoinedStr):
      return "".join(of(part) for part in node.values)
    return "\0"
  for path in (ROOT / "ttc_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.JoinedStr) or (
          isinstance(node, ast.Constant) and isinstance(node.value, str)):
        yield of(node)


QUOTED = re.findall(r"^### `(.*)`$", PAGES["docs/troubleshooting.md"],
                    re.MULTILINE)


@functools.cache
def all_texts():
  return list(texts())


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_messages_are_the_program_s(message):
  """`...` stands for what is filled in."""
  pattern = re.compile(".*?".join(map(re.escape, message.split("..."))),
                       re.DOTALL)
  assert any(pattern.search(text) for text in all_texts()), message


# --- The build ----------------------------------------------------------------

@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path):
  for library in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(library)
  done = subprocess.run(
      [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going",
       "--quiet", "docs", tmp_path / "out"], cwd=ROOT, capture_output=True,
      text=True)
  assert done.returncode == 0, done.stderr
  page = (tmp_path / "out" / "config.html").read_text(encoding="utf-8")
  assert "noah.mutation_rate" in page and "generated:" not in page
  assert "ttc_jax.fitting.fit" in (tmp_path / "out" / "api.html").read_text(
      encoding="utf-8")
