"""A TensorFlow SavedModel, for TF Serving and whoever reads one."""
import os

from ttc_jax import export

NAME, MERGED, EXTRA = "tf-saved-model", False, ("tf", ("tensorflow",))
PLATFORMS = ("cpu", "cuda", "tpu")
LOAD = """
import numpy as np, tensorflow as tf
model = tf.saved_model.load("{folder}")
pixels = np.asarray(image.resize(({size}, {size}), Image.Resampling.{resample}))
logits = model(pixels[None])
"""


def write(model: export.Export, folder: str) -> None:
  """uint8 images (B, S, S, 3), of any B, -> logits (B, C).

  By call and as the signature "serving_default", {"images": ...} to
  {"logits": ...}. The program is XLA's, so it runs where TensorFlow has XLA.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  import tensorflow as tf
  from jax.experimental import jax2tf

  images = export.symbolic_images(model)
  program = jax2tf.convert(
      export.computation(model), with_gradient=False,
      polymorphic_shapes=(None, f"(batch, {', '.join(map(str, images.shape[1:]))})"),
      native_serialization_platforms=PLATFORMS)
  module = tf.Module()
  # Variables, since a graph holds no more than 2 GiB.
  module.params = tf.nest.map_structure(
      lambda x: tf.Variable(x, trainable=False), model.params)
  spec = tf.TensorSpec((None, *images.shape[1:]), tf.uint8, "images")
  module.__call__ = tf.function(
      lambda images: program(module.params, images),
      autograph=False, input_signature=[spec])
  signature = tf.function(
      lambda images: {"logits": module.__call__(images)},
      autograph=False, input_signature=[spec])
  tf.saved_model.save(module, folder, signatures=signature)
