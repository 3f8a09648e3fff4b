"""A serialised program of `jax.export`, for processes that have only JAX."""
import os

import jax
import jax.export

from ttc_jax import export, files, trees
from ttc_jax.errors import UserError
from ttc_jax.predict import LoadedModel

PLATFORMS = ("cpu", "cuda", "tpu")
_CODE = """
import jax.export, numpy as np, pathlib
program = jax.export.deserialize(
    pathlib.Path("{folder}/model.jax_export").read_bytes())
pixels = np.asarray(image.resize(({size}, {size}), Image.Resampling.{resample}))
logits = program.call(pixels[None])
"""
_LARGEST = 2 ** 31 - 1  # bytes of a flatbuffer


def write(model: LoadedModel, folder: str) -> None:
  """model.jax_export: uint8 images (B, S, S, 3), of any B, -> logits (B, C).

  The program contains weights and normalisation.
  """
  if 4 * trees.count(model.params) > _LARGEST:
    raise UserError("--to=stablehlo holds weights up to 2 GiB, these have "
                    f"{4 * trees.count(model.params) / 2 ** 30:.1f}; "
                    "--to=tf-saved-model holds more")
  logits = export.computation(model)
  program = jax.export.export(
      jax.jit(lambda images: logits(model.params, images)),
      platforms=PLATFORMS)(export.symbolic_images(model))
  with files.replacing(os.path.join(folder, "model.jax_export")) as file:
    file.write(program.serialize())


TARGET = export.Target("stablehlo", write, _CODE, merged=False)
