"""What a weights file is; the same weights in another format; two compared.

  python -m ttc_jax.weights inspect FILE... [--json]
  python -m ttc_jax.weights convert FILE --out=FILE [--to=FORMAT] [--dtype=TYPE]
      [--patch=PIXELS] [--gelu=NAME]
  python -m ttc_jax.weights diff FILE FILE

A FILE is whatever `weights=` takes: a path, a URL, hf://owner/name. `convert`
writes the backbone without a head, by default in our own format; `--to=timm`
and `--to=hf` write safetensors and `--to=bigvision` an .npz. `--patch` resizes
the patch embedding, so that a file of vit_b16 serves vit_b14. `diff` compares
tensors by our names, so files of different formats too, and exits with 1 where
they differ.
"""
import json
import math
import os
import re
from typing import Any

from absl import flags
import flax.linen as nn
import ml_dtypes
import numpy as np

from ttc_jax import cli, files, trees
from ttc_jax import weights as weights_lib
from ttc_jax.errors import UserError, check_known
from ttc_jax.weights import containers, formats

Loaded = tuple[nn.Module, trees.Tree]

# Which of a family's formats holds a variant is tried in this order.
TARGETS = {
    "ttc_jax": (formats.OURS,),
    "bigvision": (formats.BIGVISION,),
    "timm": (formats.TIMM, formats.TIMM_DINOV3, formats.SWIN_TIMM),
    "hf": (formats.HF_VIT, formats.HF_DINOV2, formats.HF_DINOV3,
           formats.HF_CLIP, formats.HF_SIGLIP, formats.SWIN_HF),
}
_LARGEST_PATCH = 64
DTYPES = ("float32", "float16", "bfloat16")


def describe(source: str) -> dict[str, Any]:
  """What a file is, as JSON; "backbone" is None where none here has its size.

  Raises:
    UserError: no file of weights that we know.
  """
  path = weights_lib.locate(source)
  read = weights_lib.read(path)
  try:
    backbone = weights_lib.identify(read)
  except UserError:
    backbone = None
  ignored = [n for n in read.tensors if re.fullmatch(read.format.ignored, n)]
  used = [t for n, t in read.tensors.items() if n not in ignored]
  return {
      "file": source, "format": read.format.name, "backbone": backbone,
      "fields": read.fields, "image_size": weights_lib.native_size(read),
      "parameters": sum(math.prod(t.shape) for t in used),
      "dtypes": sorted({t.dtype for t in used}),
      "sha256": weights_lib.sha256(path),
      "ignored": sorted([*ignored, *read.outside])}


def load(read: weights_lib.Weights, gelu: str = "", patch: int = 0) -> Loaded:
  """The backbone that a file is of, on its native grid, and its parameters.

  Args:
    gelu: where the file is in doubt.
    patch: another than the file's; 0: that.
  """
  name, size = weights_lib.identify(read), weights_lib.native_size(read)
  if patch:
    size_name, own = re.fullmatch(r"(.*?)(\d*)", name).groups()
    if not own or not 1 <= patch <= _LARGEST_PATCH:
      raise UserError(f"--patch={patch} is nothing for {name}: give the pixels "
                      f"of a ViT's patch, up to {_LARGEST_PATCH}")
    side = size // int(own) if size else 14  # rotary positions fit any
    name, size = f"{size_name}{patch}", side * patch
  return weights_lib.load_opened(read, name, size or 224, resample_patch=bool(patch),
                       **({"gelu": gelu} if gelu else {}))


def convert(source: str, out: str, to: str = "ttc_jax", dtype: str = "float32",
            gelu: str = "", patch: int = 0) -> tuple[str, dict[str, Any]]:
  """Writes a file's backbone in another format.

  Returns:
    The format's name, and the fields that its readers have to be told.

  Raises:
    UserError: `out` exists; the format cannot hold it, or not in that type.
  """
  check_known("--to", to, TARGETS)
  check_known("--dtype", dtype, DTYPES)
  out = files.new(out)
  module, params = load(
      weights_lib.read(weights_lib.locate(source)), gelu, patch)
  os.makedirs(os.path.dirname(out), exist_ok=True)
  if to == "ttc_jax":
    weights_lib.write(out, params, module.fields, dtype)
    return to, {}
  format_, tensors = _first_that_holds(TARGETS[to], module, params)
  tensors = weights_lib.cast(tensors, dtype, f"weights file '{out}'")
  if format_.torch:
    containers.write_safetensors(out, tensors, {"format": "pt"})
  else:  # numpy has no bfloat16; this is how Big Vision's files keep it
    with files.replacing(out) as file:
      np.savez(file, **{n: x.view("V2") if x.dtype == ml_dtypes.bfloat16
                        else x for n, x in tensors.items()})
  assumed = formats.recognise(tensors, {}, {}, out)[1]
  return format_.name, {k: v for k, v in module.fields.items()
                        if assumed.get(k) != v}


def _first_that_holds(candidates, module, params):
  errors = []
  for format_ in candidates:
    try:
      return format_, weights_lib.to_tensors(params, format_, module)
    except UserError as error:
      errors.append(error)
  raise UserError("; ".join(map(str, errors)))


def compare(one: str, two: str) -> tuple[list[str], dict[str, float]]:
  """-> (what of the architectures differs, {tensor: largest difference})."""
  reads = [weights_lib.read(weights_lib.locate(s)) for s in (one, two)]
  # A GELU in doubt is no tensor: any serves to read the others.
  (a, params_a), (b, params_b) = (
      load(r, "exact" if r.fields["gelu"] is None else "") for r in reads)
  fields = [{"backbone": weights_lib.identify(r), **m.fields,
             "gelu": r.fields["gelu"]} for r, m in zip(reads, (a, b))]
  notes = [f"{k}: {fields[0].get(k)}, {fields[1].get(k)}"
           for k in dict.fromkeys((*fields[0], *fields[1]))
           if fields[0].get(k) != fields[1].get(k)]
  flats = [trees.flatten(params_a), trees.flatten(params_b)]
  differences = {}
  for name in dict.fromkeys((*flats[0], *flats[1])):
    x, y = (flat.get(name) for flat in flats)
    same = x is not None and y is not None and x.shape == y.shape
    differences[name] = float(np.abs(x - y).max()) if same else math.inf
  return notes, differences


def _inspect(sources):
  found = [describe(source) for source in sources]
  if _JSON.value:
    print(json.dumps(found, indent=2))
    return
  for one in found:
    fields, file = one.pop("fields"), one.pop("file")
    print(file)
    for key, value in (one | fields).items():
      if isinstance(value, list):
        value = ", ".join(value[:6]) + (
            f", ... ({len(value)})" if len(value) > 6 else "")
      if value is None:
        value = "in doubt" if key in fields else "none here"
      print(f"  {key:<12}{value}")


def _diff(one, two):
  notes, differences = compare(one, two)
  for note in notes:
    print(note)
  differing = {n: d for n, d in differences.items() if d}
  for name, difference in sorted(differing.items(), key=lambda x: -x[1]):
    print(f"{difference:.3e}  {name}" if math.isfinite(difference) else
          f"shape      {name}")
  print(f"{len(differing)} of {len(differences)} tensors differ")
  return int(bool(notes or differing))


def main(argv) -> int | None:
  command, *sources = argv[1:] or [""]
  check_known("command", command, ("inspect", "convert", "diff"))
  wanted = {"inspect": len(sources) or 1, "convert": 1, "diff": 2}[command]
  if len(sources) != wanted:
    raise UserError(f"{command} takes {wanted} FILE{'s' * (wanted > 1)}, got "
                    f"{len(sources)}")
  for flag in (_OUT, _TO, _DTYPE, _GELU, _PATCH):
    if flag.present and command != "convert":
      raise UserError(f"--{flag.name} belongs to convert")
  if command == "inspect":
    return _inspect(sources)
  if command == "diff":
    return _diff(*sources)
  if not _OUT.value:
    raise UserError("give --out=FILE")
  name, untold = convert(sources[0], _OUT.value, _TO.value, _DTYPE.value,
                         _GELU.value, _PATCH.value)
  told = ", ".join(f"{k}={v}" for k, v in untold.items())
  print(f"{_OUT.value}: {name}" + (
      f"; tell its readers {told}: the format has no place for that"
      if told else ""))


if __name__ == "__main__":
  _JSON = flags.DEFINE_bool("json", False, "inspect: for machines")
  _OUT = flags.DEFINE_string("out", "", "convert: the file to write")
  _TO = flags.DEFINE_string("to", "ttc_jax", f"convert: {', '.join(TARGETS)}")
  _DTYPE = flags.DEFINE_string("dtype", "float32", ", ".join(DTYPES))
  _GELU = flags.DEFINE_string("gelu", "", "convert: where the file is in doubt")
  _PATCH = flags.DEFINE_integer("patch", 0, "convert: of another patch size")
  cli.run(main)
