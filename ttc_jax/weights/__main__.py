"""Describes files of weights, converts one, or compares two.

  python -m ttc_jax.weights inspect FILE... [--json]
  python -m ttc_jax.weights convert FILE --out=FILE [--to=FORMAT] [--dtype=TYPE]
      [--patch=PIXELS] [--gelu=NAME]
  python -m ttc_jax.weights diff FILE FILE

A FILE is anything that `weights=` takes: a path, a URL, hf://owner/name.
`convert` writes the backbone without a head, by default in our own format;
`--to=timm` and `--to=hf` write safetensors and `--to=bigvision` an .npz.
`--patch` resizes the patch embedding, so that a file of vit_b16 serves vit_b14.
`diff` compares tensors by our names, so that the formats may differ, and exits
with 1 where the files differ.
"""
import json
import math

from absl import flags

from ttc_jax import cli
from ttc_jax.errors import UserError, check_known, printable
from ttc_jax.weights import convert


def _inspect(sources):
  found = [convert.describe(source) for source in sources]
  if _JSON.value:
    print(json.dumps(found, indent=2))
    return
  for one in found:
    fields = one.pop("fields")
    print(printable(one.pop("file")))
    for key, value in (one | fields).items():
      if isinstance(value, list):
        value = ", ".join(value[:6]) + (
            f", ... ({len(value)})" if len(value) > 6 else "")
      if value is None:
        value = "in doubt" if key in fields else "none here"
      print(f"  {key:<15}{printable(str(value))}")


def _diff(one, two):
  notes, differences = convert.compare(one, two)
  for note in notes:
    print(printable(note))
  differing = {n: d for n, d in differences.items() if d}
  for name, difference in sorted(differing.items(), key=lambda x: -x[1]):
    far = f"{difference:.3e}" if math.isfinite(difference) else "shape    "
    print(f"{far}  {printable(name)}")
  print(f"{len(differing)} of {len(differences)} tensors differ")
  return int(bool(notes or differing))


def main(argv: list[str]) -> int | None:
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
    _inspect(sources)
    return None
  if command == "diff":
    return _diff(*sources)
  if not _OUT.value:
    raise UserError("give --out=FILE")
  name, untold = convert.convert(
      sources[0], _OUT.value, _TO.value, _DTYPE.value, _GELU.value,
      _PATCH.value)
  told = ", ".join(f"{k}={v}" for k, v in untold.items())
  print(f"{_OUT.value}: {name}" + (
      f"; tell its readers {told}: the format has no place for that"
      if told else ""))
  return None


if __name__ == "__main__":
  _JSON = flags.DEFINE_bool("json", False, "inspect: for machines")
  _OUT = flags.DEFINE_string("out", "", "convert: the file to write")
  _TO = flags.DEFINE_string(
      "to", "ttc_jax", f"convert: {', '.join(convert.TARGETS)}")
  _DTYPE = flags.DEFINE_string("dtype", "float32", ", ".join(convert.DTYPES))
  _GELU = flags.DEFINE_string("gelu", "", "convert: where the file is in doubt")
  _PATCH = flags.DEFINE_integer("patch", 0, "convert: of another patch size")
  cli.run(main)
