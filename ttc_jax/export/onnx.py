"""An ONNX file, for ONNX Runtime and what it runs on."""
import logging
import os

from ttc_jax import export
from ttc_jax.predict import LoadedModel

NAME, MERGED, EXTRA = "onnx", False, ("onnx", ("jax2onnx", "onnx"))
LOAD = """
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("{folder}/model.onnx")
pixels = np.asarray(image.resize(({size}, {size}), Image.Resampling.{resample}))
logits, = session.run(["logits"], {{"images": pixels[None]}})
"""


def write(model: LoadedModel, folder: str) -> None:
  """model.onnx: uint8 images (B, S, S, 3), of any B, -> logits (B, C).

  Weights and normalisation are within; weights that are larger than the
  format's messages lie in files beside it.
  """
  import jax
  import jax2onnx

  logits = export.computation(model)
  # Of shapes of constants, a line each.
  logging.getLogger("onnx_ir").setLevel(logging.ERROR)
  with jax.disable_jit():  # calls within a program are not all understood
    jax2onnx.to_onnx(
        lambda images: logits(model.params, images),
        [export.symbolic_images(model)], model_name="ttc_jax",
        input_names=["images"], output_names=["logits"],
        return_mode="file", output_path=os.path.join(folder, "model.onnx"))
