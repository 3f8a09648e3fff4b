"""Bundles: what one keeps of a task, beside the base weights.

A run writes a folder, through orbax. `pack` makes one file of it, safetensors
with the metadata as JSON in its header; both open through `load`. Both hold a
digest of arrays and metadata, so that a flipped bit is noticed.

A bundle is data: what it names is never fetched, and it holds no passwords.

  python -m ttc_jax.bundles inspect BUNDLE...
  python -m ttc_jax.bundles pack BUNDLE --out=pets.safetensors
  python -m ttc_jax.bundles unpack pets.safetensors --out=DIR
"""
import functools
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from typing import Any, NamedTuple

from absl import flags
import jax
import numpy as np
import safetensors

from ttc_jax import checkpoint, cli, files, normalisation, stores
from ttc_jax.checkpoint import Flat, explain_disk_errors
from ttc_jax.config import FROZEN_DTYPES
from ttc_jax.errors import UserError, printable
from ttc_jax.tasks import images
from ttc_jax.weights import containers, formats, sources

FORMAT = "1"  # of the file
_KEY = "ttc_jax_bundle"  # of its header
_SPARE, _RATIO = 2 ** 26, 8  # bytes of arrays beyond those of their files
_DIGEST = "sha256"  # of arrays and metadata; in the metadata on disk alone


class Bundle(NamedTuple):
  """What is needed beside the base weights to use a tuned model.

  Attributes:
    tuned: {"backbone/...": array}, every leaf that some stage tuned.
    buffers: {"fc2/channels": array}.
    meta: JSON: method, options, backbone, hash of the base, classes, ...
  """
  tuned: Flat
  buffers: Flat
  meta: dict[str, Any]


def _is_sha(value):
  return value == "random" or bool(re.fullmatch("[0-9a-f]{64}", value))


def _is_normalisation(value):
  try:
    return bool(normalisation.mean_and_std(value))
  except UserError:
    return False


def _is_resample(value):
  try:
    return bool(images.resampling(value))
  except UserError:
    return False


# What a bundle cannot be used without: a type, and what else must hold.
_NEEDED: dict[str, tuple[Any, Any]] = {
    "task": (str, bool), "method": (str, bool), "options": (dict, None),
    # A word: a model card puts it into lines of code.
    "backbone": (str, re.compile(r"\w+", re.ASCII).fullmatch),
    "fields": (dict, None),
    "image_size": (int, lambda n: 0 < n < 10_000),
    "normalisation": (str, _is_normalisation),
    "resample": (str, _is_resample),
    "dtype": (str, lambda v: v in ("float32", "bfloat16")),
    "weights_sha256": (str, _is_sha), "weights_source": (str, bool),
    "classes": (list, lambda v: v and all(type(c) is str for c in v)),
}
# Keys that may be missing or null; `inspect` and the model card show them.
_TEXT = (str, None)
_COUNT = (int, lambda n: 0 <= n < 2 ** 63)
_NUMBER = ((int, float), lambda x: abs(x) < 2 ** 63)  # NaN is not
_PERCENT = ((int, float), lambda x: 0 <= x <= 100)
_OPTIONAL: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(("variant", "group", "protocol", "optimiser", "weights",
                     "data_digest", "device"), _TEXT),
    **dict.fromkeys(("k", "seed", "train_count", "test_count", "batch_size",
                     "epochs", "module_params", "norm_params", "head_params"),
                    _COUNT),
    **dict.fromkeys(("lr", "weight_decay", "warmup_epochs", "drop_path",
                     "label_smoothing"), _NUMBER),
    "test_top1": _PERCENT, "val_top1": _PERCENT,
    "stages": (list, lambda v: all(type(x) is str for x in v)),
    "versions": (dict, lambda v: all(type(x) is str for x in v.values())),
    "frozen_dtype": (str, lambda v: v in FROZEN_DTYPES),
    "matmul_precision": (str, lambda v: v in ("default", "high", "highest"))}


def temporary(path: str) -> str:
  """Returns the folder in which `save` writes a bundle before it is renamed.

  The name is always the same, so that the next `save` overwrites what a killed
  process left.
  """
  folder, name = os.path.split(os.path.abspath(path))
  return os.path.join(folder, f".{name}.ttc_jax.tmp")


def save(path: str, bundle: Bundle) -> None:
  """Writes a bundle to the folder `path`, replacing one that is there.

  Raises:
    UserError: something else is there; it is left as it was.
  """
  path = files.utf8(path)
  if os.path.lexists(path) and not _is_folder_of_one(path):
    raise UserError(f"'{path}' is there and is no bundle: give a new path")
  written = temporary(path)
  old = f"{written}.old"
  with explain_disk_errors(path):
    shutil.rmtree(written, ignore_errors=True)
    try:
      _write_folder(written, bundle)
      if os.path.exists(path):
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
      os.replace(written, path)
    finally:
      shutil.rmtree(written, ignore_errors=True)
      if os.path.exists(path):
        shutil.rmtree(old, ignore_errors=True)
      elif os.path.exists(old):  # the new one could not take its place
        os.replace(old, path)


def _is_folder_of_one(path):
  """Tells whether a folder is empty or one that `save` wrote."""
  if not os.path.isdir(path) or os.path.islink(path):
    return False
  names = os.listdir(path)
  return not names or "_CHECKPOINT_METADATA" in names


def _write_folder(path, bundle):
  checkpoint.write_folder(
      path, {"tuned": bundle.tuned, "buffers": bundle.buffers},
      _meta_on_disk(bundle))


def put(store: stores.Store, name: str, bundle: Bundle) -> int:
  """Writes a bundle to a store, in place of one; returns its bytes.

  Nobody else may write in its folder, a run's, at the time.

  Args:
    name: of the bundle there: one file if it ends in .safetensors.
  """
  if not store.writes:
    return 0
  if not name.endswith(".safetensors"):
    store.delete(name)
    store.tidy(name.rpartition("/")[0])  # what a killed process left
    with explain_disk_errors(store.place(name)):
      with store.write_folder(name) as folder:
        _write_folder(folder, bundle)
        return files.size(folder)
  with tempfile.TemporaryDirectory() as scratch:
    path = os.path.join(scratch, "bundle.safetensors")
    pack(path, bundle)
    with open(path, "rb") as file:
      store.write(name, file.read())
    return os.path.getsize(path)


def pack(path: str, bundle: Bundle) -> None:
  """Writes a bundle as one safetensors file.

  Example:
    bundles.pack("pets.safetensors", bundles.load("WORKDIR/runs/RUN/bundle"))
  """
  tensors = {f"{part}/{name}": np.asarray(x, order="C") for part, flat in (
      ("tuned", bundle.tuned), ("buffers", bundle.buffers))
             for name, x in flat.items()}
  text = json.dumps({"format": FORMAT, **_meta_on_disk(bundle)})
  with explain_disk_errors(path):
    containers.write_safetensors(path, tensors, {_KEY: text})


def digest(bundle: Bundle) -> str:
  """Returns the SHA-256, hexadecimal, of a bundle's arrays and metadata."""
  arrays = checkpoint.digest_parts(
      {"tuned": bundle.tuned, "buffers": bundle.buffers})
  # As it will be read again: tuples are lists, numbers as keys are strings.
  meta = json.dumps(json.loads(json.dumps(bundle.meta)), sort_keys=True)
  return hashlib.sha256(f"{arrays}\n{meta}".encode()).hexdigest()


def _meta_on_disk(bundle):
  """The metadata without secrets, and with the digest."""
  bundle = bundle._replace(meta=without_secrets(bundle.meta))
  return bundle.meta | {_DIGEST: digest(bundle)}


def without_secrets(meta: dict[str, Any]) -> dict[str, Any]:
  """Returns metadata whose sources have no user, password and query."""
  source = meta.get("weights_source")
  if not isinstance(source, str) or "://" not in source:
    return meta
  clean = public(source)
  named = {"weights": clean.rsplit("/", 1)[-1]}
  return meta | {"weights_source": clean} | (named if "weights" in meta else {})


def published(meta: dict[str, Any]) -> dict[str, Any]:
  """Returns metadata for others: also without folders of this machine."""
  meta = without_secrets(dict(meta))
  source = meta.get("weights_source")
  if isinstance(source, str) and "://" not in source:
    meta["weights_source"] = os.path.basename(source)
  return meta


def public(source: str) -> str:
  """Returns a source without passwords, `sources.public`, also of chains."""
  return sources.public("::".join(map(sources.public, source.split("::"))))


def load(path: str) -> Bundle:
  """Reads a bundle: a folder, a packed file, gs://BUCKET/FILE or
  hf://owner/name[@revision].

  Raises:
    UserError: no bundle there, not a whole one, or its digest differs.
  """
  if not isinstance(path, (str, os.PathLike)):
    raise UserError(f"a bundle is {path!r}; expected its path or address")
  path = os.fspath(path)
  if path.startswith("gs://") and path.endswith("/bundle"):
    path += ".safetensors"  # as a work directory has it in a bucket
  if path.startswith(("hf://", "gs://")):
    path = sources.locate(path, fresh=True)  # it may have been tuned again
  path = files.utf8(path)
  if not os.path.exists(path):
    raise UserError(f"bundle '{path}' does not exist; give the folder "
                    "'bundle' of a finished run, or a packed file")
  bundle = (_load_folder if os.path.isdir(path) else _load_file)(path)
  bundle = _check_digest(path, bundle)
  _check(path, bundle)
  return bundle


def _check_digest(path, bundle):
  """-> the bundle without its digest."""
  if not isinstance(bundle.meta, dict):
    raise UserError(f"'{path}' is not a whole bundle: its metadata is no JSON "
                    "object")
  meta = dict(bundle.meta)
  written = meta.pop(_DIGEST, None)
  bundle = bundle._replace(meta=meta)
  if written is None:
    raise UserError(
        f"bundle '{path}' has no digest of its contents ({_DIGEST!r}): an "
        "older version wrote it, or it is damaged; write it again by starting "
        "the training command in a new --workdir")
  if written != digest(bundle):
    raise UserError(
        f"bundle '{path}' is damaged: its arrays and metadata are not those "
        f"that were written ({_DIGEST} differs); copy it again, or write it "
        "again by starting the training command in a new --workdir")
  return bundle


def _load_folder(path):
  if not os.path.isdir(os.path.join(path, "arrays")):
    raise UserError(f"the folder '{path}' holds no bundle: give the folder "
                    "'bundle' of a finished run, WORKDIR/runs/RUN/bundle, or a "
                    "packed file")
  try:
    arrays, meta = checkpoint.read_folder(
        path, functools.partial(_check_declared, path))
    return Bundle(arrays["tuned"], arrays["buffers"], meta)
  except UserError:
    raise
  except Exception as e:  # orbax and tensorstore raise many kinds
    raise UserError(f"'{path}' is not a whole bundle ({type(e).__name__})"
                    ) from e


def _check_declared(path, declared):
  """Refuses arrays that are far larger than the folder before they are read:
  a few KB of compressed zeros can be terabytes."""
  count = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize
              for x in jax.tree.leaves(declared))
  if count > _SPARE + _RATIO * files.size(path):
    raise UserError(f"bundle '{path}' declares {count:,} bytes of arrays in "
                    f"{files.size(path):,} bytes of files: it is damaged or "
                    "not meant to be used")


def _load_file(path):
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      text = (file.metadata() or {}).get(_KEY)
      if text is None:
        raise UserError(f"'{path}' is no packed bundle: its header has no "
                        f"{_KEY!r}; weights go to --weights")
      meta = files.from_json(text)
      # safetensors has compared the sizes that it declares with the file's.
      tensors = {name: file.get_tensor(name) for name in file.keys()}
    version = meta.pop("format", None)
  except (OSError, ValueError, TypeError, AttributeError,
          safetensors.SafetensorError) as e:
    reason = " ".join(str(e).split())[:200]
    raise UserError(f"'{path}' is not a whole bundle ({reason})") from e
  if version != FORMAT:
    raise UserError(f"'{path}' is a bundle of format {str(version)[:20]!r}; "
                    f"this version reads {FORMAT!r}")
  parts: dict[str, Flat] = {"tuned": {}, "buffers": {}}
  for name, x in tensors.items():
    part, _, rest = name.partition("/")
    if part not in parts or not rest:
      raise UserError(f"'{path}' is no whole bundle: its tensor {name!r} "
                      "belongs to no part")
    parts[part][rest] = x
  return Bundle(**parts, meta=meta)


def _check(path: str, bundle: Bundle) -> None:
  meta = bundle.meta
  given = {key: rule for key, rule in _OPTIONAL.items()
           if meta.get(key) is not None}
  for key, (kind, holds) in (_NEEDED | given).items():
    value = meta.get(key)
    if (not isinstance(value, kind) or isinstance(value, bool)
        or holds and not holds(value)):
      raise UserError(
          f"bundle '{path}': its metadata has no good {key!r} "
          f"({str(value)[:40]!r})")
  formats.check_fields(meta["fields"], f"bundle '{path}'")
  for name, x in (bundle.tuned | bundle.buffers).items():
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fiu":
      raise UserError(f"bundle '{path}': {name!r} is no array of numbers")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
      raise UserError(f"bundle '{path}': {name!r} is not finite")
  classes = len(meta["classes"])
  head = bundle.tuned.get("head/bias")
  if head is None or head.shape != (classes,):
    raise UserError(
        f"bundle '{path}': 'head/bias' is of shape "
        f"{'none' if head is None else head.shape}, expected ({classes},), "
        "a number for each class")


def sizes(bundle: Bundle) -> dict[str, int]:
  """Returns {"bytes", "head_bytes"} of the arrays."""
  arrays = [*bundle.tuned.items(), *bundle.buffers.items()]
  return {"bytes": sum(x.nbytes for _, x in arrays),
          "head_bytes": sum(x.nbytes for name, x in arrays
                            if name.startswith("head/"))}


def describe(bundle: Bundle) -> dict[str, Any]:
  """Returns what `inspect` prints, as JSON."""
  meta = bundle.meta
  adapters = sorted({name.split("/")[1] for name in bundle.tuned
                     if name.startswith("adapter/")})
  keys = ("task", "method", "variant", "k", "backbone", "image_size",
          "normalisation", "resample", "dtype", "frozen_dtype",
          "weights_sha256", "weights_source", "protocol", "seed", "test_top1",
          "val_top1", "module_params", "norm_params", "head_params", "versions")
  return {key: meta[key] for key in keys if meta.get(key) is not None} | {
      "sites": adapters, "classes": meta["classes"], **sizes(bundle)}


def _inspect(paths):
  found = [{"bundle": path} | describe(load(path)) for path in paths]
  if _JSON.value:
    print(json.dumps(found, indent=2))
    return
  for one in found:
    for key, value in one.items():
      if key == "classes":
        more = ", ..." if len(value) > 5 else ""
        value = f"{len(value)}: {', '.join(value[:5])}{more}"
      elif isinstance(value, (list, dict)):
        value = ", ".join(value if isinstance(value, list) else (
            f"{k} {v}" for k, v in value.items())) or "none"
      print(f"{key:15}  {printable(str(value))}")
    print()


def _convert(paths, write):
  if len(paths) != 1 or not _OUT.value:
    raise UserError("give one bundle and --out=PATH")
  bundle, out = load(paths[0]), files.new(_OUT.value)
  os.makedirs(os.path.dirname(out), exist_ok=True)
  write(out, bundle)
  written = files.size(out) if os.path.isdir(out) else os.path.getsize(out)
  print(f"{out}: {written:,} bytes, of which the head "
        f"{sizes(bundle)['head_bytes']:,}")


def main(argv: list[str]) -> None:
  commands = {"inspect": _inspect,
              "pack": lambda paths: _convert(paths, pack),
              "unpack": lambda paths: _convert(paths, save)}
  if len(argv) < 3 or argv[1] not in commands:
    raise UserError(
        "say inspect BUNDLE..., pack BUNDLE --out=FILE or unpack FILE "
        "--out=DIR")
  commands[argv[1]](argv[2:])


if __name__ == "__main__":  # no flags for those who import `load`
  _OUT = flags.DEFINE_string("out", None, "file or folder to write")
  _JSON = flags.DEFINE_bool("json", False, "for machines")
  cli.run(main)
