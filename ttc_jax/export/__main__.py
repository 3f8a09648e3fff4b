"""Writes a tuned model as other libraries load it, with a model card.

  python -m ttc_jax.export --bundle=WORKDIR/runs/RUN/bundle --to=timm
"""
import os

from absl import flags

from ttc_jax import cli, export, files
from ttc_jax.errors import UserError, check_known


def main(argv: list[str]) -> None:
  targets = export.targets()
  if len(argv) > 1 or not _BUNDLE.value or not _TO.value:
    raise UserError("give --bundle=DIR, the folder 'bundle' of a finished run, "
                    f"and --to={'|'.join(targets)}")
  target = targets[check_known("target", _TO.value, targets)]
  bundle, beside = _BUNDLE.value, ""
  if "://" not in bundle:
    bundle = os.path.abspath(files.expand(bundle))
    beside = os.path.dirname(bundle)
  out = files.new(_OUT.value or os.path.join(beside, f"export-{target.name}"))
  export.check_libraries(target)  # before the weights are read
  model = export.load(bundle, _WEIGHTS.value)
  export.write(model, target, out)
  if model.cannot_merge:
    print(f"exported unmerged, because {model.cannot_merge}")
  print(out)


if __name__ == "__main__":
  _BUNDLE = flags.DEFINE_string(
      "bundle", None, "folder of a finished run, a packed bundle, "
      "hf://owner/name or gs://BUCKET/FILE")
  _TO = flags.DEFINE_string("to", None, "format: " + ", ".join(
      export.targets()))
  _OUT = flags.DEFINE_string(
      "out", None, "new folder; by default export-FORMAT beside the bundle, of "
      "one that is fetched in the current folder")
  _WEIGHTS = flags.DEFINE_string(
      "weights", None, "the base weights, if they moved since")
  cli.run(main)
