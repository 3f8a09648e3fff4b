"""An ONNX file, for ONNX Runtime."""
import logging
import os

from ttc_jax import export
from ttc_jax.predict import LoadedModel

_CODE = """
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("{folder}/model.onnx")
pixels = np.asarray(image.resize(({size}, {size}), Image.Resampling.{resample}))
logits, = session.run(["logits"], {{"images": pixels[None]}})
"""


def write(model: LoadedModel, folder: str) -> None:
  """model.onnx: uint8 images (B, S, S, 3), of any B, -> logits (B, C).

  The program contains weights and normalisation; weights that are larger than
  a protocol buffer lie in files beside it.
  """
  import jax
  import jax2onnx

  logits = export.computation(model)
  # It warns about the shape of every constant.
  logging.getLogger("onnx_ir").setLevel(logging.ERROR)
  with jax.disable_jit():  # jax2onnx does not know every call of a program
    jax2onnx.to_onnx(
        lambda images: logits(model.params, images),
        [export.symbolic_images(model)], model_name="ttc_jax",
        input_names=["images"], output_names=["logits"],
        return_mode="file", output_path=os.path.join(folder, "model.onnx"))


TARGET = export.Target(
    "onnx", write, _CODE, merged=False, extra="onnx",
    libraries=("jax2onnx", "onnx"))
