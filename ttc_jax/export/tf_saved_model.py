"""A TensorFlow SavedModel, for TF Serving and whoever reads one."""
import os

import jax
import jax.export
from jax.extend.mlir import ir, passmanager
from jax.extend.mlir.dialects import stablehlo
import numpy as np

from ttc_jax import cost, export
from ttc_jax.errors import UserError
from ttc_jax.predict import LoadedModel

NAME, MERGED, EXTRA = "tf-saved-model", False, ("tf", ("tensorflow",))
PLATFORMS = ("cpu", "cuda", "tpu")
LOAD = """
import numpy as np, tensorflow as tf
model = tf.saved_model.load("{folder}")
pixels = np.asarray(image.resize(({size}, {size}), Image.Resampling.{resample}))
logits = model(pixels[None])
"""
# Of StableHLO, which every later one reads: TensorFlow's is years behind
# JAX's, and jax2tf asks for what TensorFlow 2.21 cannot read.
_VERSION = "1.0.0"


def write(model: LoadedModel, folder: str) -> None:
  """uint8 images (B, S, S, 3), of any B, -> logits (B, C).

  By call and as the signature "serving_default", {"images": ...} to
  {"logits": ...}. XLA runs it, so TensorFlow Lite and TensorFlow.js do not.
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
  # Variables, since a graph holds no more than 2 GiB.
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
  """The program as an old StableHLO without composites: TensorFlow finds the
  shapes of those' insides only where the batch is a number."""
  stablehlo.register_stablehlo_passes()
  with ir.Context() as context:
    module = stablehlo.deserialize_portable_artifact(context, artifact)
    passmanager.PassManager.parse(
        "builtin.module(func.func(stablehlo-legalize-composite-to-call))").run(
            module.operation)
    return stablehlo.serialize_portable_artifact(module, _VERSION)
