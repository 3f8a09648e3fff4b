"""Prints classes and probabilities of images.

  python -m ttc_jax.predict --bundle=WORKDIR/runs/RUN/bundle IMAGE...
"""
from absl import flags
import numpy as np

from ttc_jax import cli, predict
from ttc_jax.errors import UserError
from ttc_jax.tasks import images as images_lib


def main(argv: list[str]) -> None:
  paths = argv[1:]
  if not _BUNDLE.value or not paths:
    raise UserError("give --bundle=DIR and at least one image")
  tuned = predict.load(_BUNDLE.value, _WEIGHTS.value)
  meta = tuned.meta
  images = np.stack([images_lib.prepare(
      path, meta["image_size"], meta["resample"]) for path in paths])
  for path, probabilities in zip(paths, tuned.predict(images), strict=True):
    for i in np.argsort(-probabilities, kind="stable")[:_TOP.value]:
      print(f"{path}\t{meta['classes'][i]}\t{probabilities[i]:.4f}")


if __name__ == "__main__":
  _BUNDLE = flags.DEFINE_string(
      "bundle", None, "folder of a finished run, or a packed bundle")
  _WEIGHTS = flags.DEFINE_string(
      "weights", None, "the base weights, if they moved since")
  _TOP = flags.DEFINE_integer("top", 1, "classes an image", lower_bound=1)
  cli.run(main)
