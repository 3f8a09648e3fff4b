"""A TensorFlow SavedModel, for TensorFlow Serving."""
import os

import jax
import jax.export
from jax.extend.mlir import ir, passmanager
from jax.extend.mlir.dialects import stablehlo
import numpy as np

from ttc_jax import cost, export
from ttc_jax.errors import UserError
from ttc_jax.predict import LoadedModel

NAME = "tf-saved-model"
PLATFORMS = ("cpu", "cuda", "tpu")
_CODE = """
import numpy as np, tensorflow as tf
model = tf.saved_model.load("{folder}")
pixels = np.asarray(image.resize(({size}, {size}), Image.Resampling.{resample}))
logits = model(pixels[None])
"""
# Version of StableHLO; later versions read it. TensorFlow's is years older than
# JAX's, and what jax2tf writes TensorFlow 2.21 cannot read.
_VERSION = "1.0.0"


def write(model: LoadedModel, folder: str) -> None:
  """uint8 images (B, S, S, 3), of any B, -> logits (B, C).

  The module can be called, and has the signature "serving_default" from
  {"images": ...} to {"logits": ...}. It needs XLA, which TensorFlow Lite and
  TensorFlow.js do not have.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  import tensorflow as tf
  from tensorflow.compiler.tf2xla.python import xla

  images = export.symbolic_images(model)
  program = jax.export.export(
      jax.jit(export.computation(model)), platforms=PLATFORMS)(
          cost.shapes(model.params), images)
  version = program.calling_convention_version
  if version > xla.call_module_maximum_supported_version():
    raise UserError(f"--to={NAME}: TensorFlow {tf.__version__} is too old for "
                    f"the programs of JAX {jax.__version__}: upgrade it")
  artifact = _readable(program.mlir_module_serialized)
  module = tf.Module()
  # Weights are variables, because a graph is limited to 2 GiB.
  module.variables_ = [tf.Variable(np.asarray(x), trainable=False)
                       for x in jax.tree.leaves(model.params)]

  def call(images):
    args = [*module.variables_, images]
    y, = xla.call_module(
        [args[i] for i in program.module_kept_var_idx], version=version,
        module=artifact, Tout=(tf.float32,),
        Sout=((None, len(model.params["head"]["bias"])),),
        platforms=tuple(p.upper() for p in PLATFORMS))
    return y

  spec = tf.TensorSpec((None, *images.shape[1:]), tf.uint8, "images")
  module.__call__ = tf.function(
      call, autograph=False, input_signature=[spec])
  served = tf.function(lambda images: {"logits": module.__call__(images)},
                       autograph=False, input_signature=[spec])
  tf.saved_model.save(module, folder, signatures=served)


def _readable(artifact: bytes) -> bytes:
  """Converts the program to an old StableHLO without composites, in which
  TensorFlow cannot infer shapes that depend on a symbolic batch."""
  stablehlo.register_stablehlo_passes()
  with ir.Context() as context:
    module = stablehlo.deserialize_portable_artifact(context, artifact)
    passmanager.PassManager.parse(
        "builtin.module(func.func(stablehlo-legalize-composite-to-call))").run(
            module.operation)
    return stablehlo.serialize_portable_artifact(module, _VERSION)


TARGET = export.Target(
    NAME, write, _CODE, merged=False, extra="tf", libraries=("tensorflow",))
