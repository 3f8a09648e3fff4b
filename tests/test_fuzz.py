"""Hostile files: every loader ends with a result or one sentence.

Hypothesis damages a small valid file of each format, in its bytes and in what
its container declares. Nothing may escape but UserError, no memory may be taken
that the file does not hold, and nothing of it may be executed.

FUZZ_CASES=1400 python -m pytest tests/test_fuzz.py -s   # cases for each format

Memory is what the process resides in: tracemalloc would not see native
libraries, and may crash when it stops beside their threads (CPython gh-128679).
"""
import contextlib
import functools
import importlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import safetensors.numpy

from tests import made_bundles
from tests import test_weights as files
from tests.random_trees import random_tree
from ttc_jax import backbones, bundles, predict, trees, weights
from ttc_jax.backbones import swin, vit
from ttc_jax.errors import UserError
from ttc_jax.weights import formats

CASES = int(os.environ.get("FUZZ_CASES", "20"))
MEMORY = 2 ** 24  # bytes that a file may cost beyond eight times its own
SPRUNG = "sprung"  # what an executed file leaves behind


class Trap:
  """Unpickled, it makes a file in the working directory."""

  def __reduce__(self):
    return open, (SPRUNG, "w")


# --- Damage -------------------------------------------------------------------

def of_bytes(data, draw):
  """Some damage anywhere."""
  data = bytearray(data)
  for _ in range(draw(st.integers(1, 4))):
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    length = draw(st.integers(0, 64))
    kind = draw(st.sampled_from(
        ["flip", "truncate", "remove", "repeat", "fill", "insert"]))
    if kind == "flip" and data:
      data[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == "truncate":
      del data[at:]
    elif kind == "remove":
      del data[at:at + length]
    elif kind == "repeat":
      data[at:at] = data[at:at + length]
    elif kind == "fill":
      data[at:at + length] = bytes([draw(st.integers(0, 255))]) * length
    elif kind == "insert":
      data[at:at] = draw(st.binary(max_size=16))
  return bytes(data)


SIZES = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2 ** 31 - 1, 2 ** 31, 2 ** 40, 2 ** 62, 2 ** 63, 2 ** 70]))
ODD = st.recursive(
    st.one_of(st.none(), st.booleans(), SIZES, st.floats(), st.text(max_size=9),
              st.sampled_from(["../../../etc/passwd", "/etc/passwd", "..", "",
                               "a/b", "\x00", "C:\\x", "-"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
        st.text(max_size=5), inner, max_size=3)), max_leaves=5)


def of_json(value, draw):
  """One value of it replaced, removed, or renamed."""
  if isinstance(value, (dict, list)) and value and draw(st.integers(0, 5)):
    value = value.copy()
    keys = sorted(value) if isinstance(value, dict) else range(len(value))
    key = draw(st.sampled_from(keys))
    kind = draw(st.sampled_from(["within", "within", "remove", "rename"]))
    if kind == "within":
      value[key] = of_json(value[key], draw)
    else:
      inner = value.pop(key)
      if kind == "rename" and isinstance(value, dict):
        value[draw(st.text(max_size=12))] = inner
    return value
  return draw(ODD)


DTYPES = ("F16", "BF16", "F32", "F64", "I8", "U8", "I16", "I32", "I64", "BOOL",
          "F8_E4M3", "F8_E5M2", "F4", "C64", "X")


def of_safetensors(data, draw):
  """A header that lies."""
  length, = struct.unpack("<Q", data[:8])
  header, rest = json.loads(data[8:8 + length]), data[8 + length:]
  name = draw(st.sampled_from(sorted(header)))
  entry, kind = header[name], draw(st.sampled_from(
      ["dtype", "shape", "offsets", "json", "length", "metadata"]))
  if kind == "metadata":
    header["__metadata__"] = {
        k: json.dumps(of_json(json.loads(v), draw)) if v.startswith("{")
        else draw(st.text(max_size=9))
        for k, v in header.get("__metadata__", {"ttc_jax": "{}"}).items()}
  elif kind == "json" or name == "__metadata__":
    header = of_json(header, draw)
  elif kind == "dtype":
    entry["dtype"] = draw(st.sampled_from(DTYPES))
  elif kind == "shape":
    entry["shape"] = draw(st.lists(SIZES, max_size=5))
  elif kind == "offsets":
    entry["data_offsets"] = draw(st.lists(SIZES, min_size=2, max_size=2))
  text = json.dumps(header).encode()
  declared = draw(SIZES) % 2 ** 64 if kind == "length" else len(text)
  return struct.pack("<Q", declared) + text + rest


def npy(draw):
  """An array file that lies, carries a pickle, or is a bomb."""
  kind = draw(st.sampled_from(["header", "objects", "bomb", "bytes"]))
  if kind == "bytes":
    return draw(st.binary(max_size=64))
  if kind == "objects":
    file = io.BytesIO()
    np.save(file, np.array([Trap()], object), allow_pickle=True)
    return file.getvalue()
  shape = tuple(draw(st.lists(SIZES, max_size=4)))
  descr = draw(st.sampled_from(
      ["<f4", "<f2", "<f8", ">f4", "|V2", "|O", "<U9999999", "|V99999999",
       "<c16", "<i8", "|b1", "no type"]))
  end = bytes(2 * MEMORY) if kind == "bomb" else draw(st.binary(max_size=64))
  return files.npy_header(shape, descr) + end


def of_zip(data, draw):
  """A member replaced, added, or renamed."""
  out = io.BytesIO()
  packed = draw(st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED]))
  with (zipfile.ZipFile(io.BytesIO(data)) as archive,
        zipfile.ZipFile(out, "w", packed) as broken):
    names = archive.namelist()
    victim = draw(st.sampled_from(names))
    kind = draw(st.sampled_from(["replace", "remove", "rename", "damage"]))
    for name in names:
      content = archive.read(name)
      if name == victim and kind == "remove":
        continue
      if name == victim and kind == "rename":
        name = draw(st.sampled_from(["../../out.npy", "/out.npy", "x.npy",
                                     "out", names[0]]))
        if name in broken.namelist():
          continue
      elif name == victim and kind == "damage":
        content = of_bytes(content, draw)
      elif name == victim:
        content = pickle.dumps(Trap()) if name.endswith(".pkl") else npy(draw)
      broken.writestr(name, content)
  return out.getvalue()


def damage(path, draw):
  """Damages a file by what it is, or as mere bytes."""
  with open(path, "rb") as f:
    data = f.read()
  if draw(st.integers(0, 2)) == 0:
    data = of_bytes(data, draw)
  elif path.endswith(".json"):
    data = json.dumps(of_json(json.loads(data), draw)).encode()
  elif data.startswith(b"PK"):
    data = of_zip(data, draw)
  elif path.endswith(".safetensors"):
    data = of_safetensors(data, draw)
  else:
    data = of_bytes(data, draw)
  with open(path, "wb") as f:
    f.write(data)


def resident(field):
  """Bytes of this process: "VmRSS", or since `forget_peak` "VmHWM"."""
  with open("/proc/self/status", encoding="utf-8") as f:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", f.read())[1])


def forget_peak():
  with open("/proc/self/clear_refs", "w", encoding="utf-8") as f:
    f.write("5")


# --- The loaders --------------------------------------------------------------

def fit(path, **fields):
  module = files.tiny(**fields)
  read = weights.read(path)
  weights.check_fields(read, module, "the tiny ViT")
  return weights.fit(read, _shapes(module), "the tiny ViT")


@functools.cache
def _shapes(module):
  return backbones.shapes(module)


def bigvision(folder):
  path = os.path.join(folder, "bv.npz")
  np.savez(path, **files.flat_params())
  return path, fit


def timm(folder):
  path = os.path.join(folder, "timm.safetensors")
  safetensors.numpy.save_file(files.as_timm(files.flat_params()), path)
  return path, fit


def ours(folder):
  path = os.path.join(folder, "own.safetensors")
  weights.write(path, trees.unflatten(files.flat_params()), files.GOOD)
  return path, fit


def hugging_face(folder):
  path = os.path.join(folder, "model.safetensors")
  safetensors.numpy.save_file(hf_tensors(), path)
  with open(os.path.join(folder, "config.json"), "w") as f:
    json.dump({"model_type": "vit", "hidden_act": "gelu",
               "num_attention_heads": 2,
               "layer_norm_eps": 1e-12}, f)
  return path, fit


def hf_tensors():
  return weights.to_tensors(
      trees.unflatten(files.flat_params()), formats.HF_VIT, files.tiny())


def shards(folder):
  tensors, map_ = hf_tensors(), {}
  for i in range(2):
    name = f"model-{i}.safetensors"
    part = dict(sorted(tensors.items())[i::2])
    map_ |= dict.fromkeys(part, name)
    safetensors.numpy.save_file(part, os.path.join(folder, name))
  path = os.path.join(folder, "model.safetensors.index.json")
  with open(path, "w") as f:
    json.dump({"metadata": {}, "weight_map": map_}, f)
  return path, fit


def pth(folder):
  torch = pytest.importorskip("torch")
  path = os.path.join(folder, "timm.pth")
  torch.save({"model": {n: torch.from_numpy(x) for n, x in files.as_timm(
      files.flat_params()).items()}}, path)
  return path, fit


def swin_timm(folder):
  module = swin.Swin(8, (1, 1), 1, 16, window=2)
  tensors = weights.to_tensors(random_tree(
      _shapes(module), np.random.default_rng(0)), formats.SWIN_TIMM, module)
  path = os.path.join(folder, "swin.safetensors")
  safetensors.numpy.save_file(tensors, path)
  return path, lambda path: weights.fit(
      weights.read(path), _shapes(module), "the tiny Swin")


def bundle(write, name):
  """-> (path, load) of a bundle; its base is whole, in another folder."""
  def loader(folder):
    base = os.path.join(os.path.dirname(folder), "base.safetensors")
    made_bundles.save_base(base, "vit_ti8")
    saved = made_bundles.make(base)
    module, params = predict.base.load(
        base, saved.meta, weights.open_source(base))
    path = os.path.join(folder, name)
    write(path, saved)
    return path, lambda path: predict.attach(
        path, bundles.load(path), module, params, True)
  loader.__name__ = name
  return loader


LOADERS = [bigvision, timm, ours, hugging_face, shards, pth, swin_timm,
           bundle(bundles.pack, "packed.safetensors"),
           bundle(bundles.save, "bundle"),
           # Its writer computes the digest anew.
           bundle(bundles.pack, "forged.safetensors"),
           bundle(bundles.save, "forged_bundle")]


@pytest.fixture(scope="module", params=LOADERS, ids=lambda f: f.__name__)
def loader(request, tmp_path_factory):
  """-> (folder of a whole file, its path, load)."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(vit.SIZES, "ti", (32, 2, 2, 64))
    if request.param.__name__.startswith("forged"):
      patch.setattr(bundles, "digest", lambda bundle: "0" * 64)
    folder = tmp_path_factory.mktemp(request.param.__name__) / "whole"
    folder.mkdir()
    path, load = request.param(str(folder))
    load(path)
    yield str(folder), path, load


# What PyTorch and orbax say beside their error; orbax's threads outlive theirs.
@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_files(loader, tmp_path, monkeypatch):
  whole, path, load = loader
  with contextlib.suppress(ImportError):
    importlib.import_module("torch")  # not while memory is measured
  monkeypatch.chdir(tmp_path)
  outcomes = {"loaded": 0, "refused": 0}
  peak = 0

  @settings(max_examples=CASES, deadline=None, database=None,
            derandomize=CASES < 1000, phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck))
  @given(st.data())
  def one(data):
    nonlocal peak
    broken = str(tmp_path / "broken")
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(whole, broken)
    names = sorted(os.path.join(place, name)
                   for place, _, names in os.walk(broken) for name in names)
    damage(data.draw(st.sampled_from(names)), data.draw)
    forget_peak()
    before = resident("VmRSS")
    try:
      load(path.replace(whole, broken, 1))
      outcomes["loaded"] += 1
    except UserError as error:
      assert 0 < len(str(error)) < 2000 and "\n" not in str(error)
      outcomes["refused"] += 1
    taken = resident("VmHWM") - before
    held = sum(os.path.getsize(name) for name in names)
    assert taken < MEMORY + 8 * held
    peak = max(peak, taken - held)
    assert not os.path.exists(SPRUNG)

  one()
  assert outcomes["refused"] > CASES // 8
  print(f"\n{os.path.basename(path)}: {outcomes}, at most "
        f"{peak / 2 ** 20:.1f} MiB")
