"""Bundles as a run leaves them, with random tuned leaves: no training."""
import jax
import numpy as np

from tests.random_trees import random_params, random_tree
from ttc_jax import backbones, bundles, methods, trees
from ttc_jax import weights as weights_lib
from ttc_jax.config import default
from ttc_jax.model import Model, init_head

SIZE = 32


def save_base(path, backbone, **fields):
  """Random base weights, at SIZE."""
  module = backbones.make(backbone, SIZE, **fields)
  weights_lib.write(path, random_params(module, 0), module.fields)
  return path


def make(weights, method="ttc", backbone="vit_ti8", size=SIZE, seed=0,
         classes=("red", "green|lime", "blue \u00e9"), normalisation="half",
         config=None, **meta):
  """A bundle on base weights; every leaf that the method tunes is random."""
  rng = np.random.default_rng(seed)
  module, base = backbones.load(backbone, weights, size)
  settings = default()
  settings.k, settings.score = 4, "random"
  settings.sct.score = "random"
  settings.update(config or {})
  made = methods.load(method, settings, module)
  params = {"backbone": base, "adapter": {},
            "head": random_tree(jax.eval_shape(
                lambda: init_head(module.width, len(classes), 0)), rng)}
  buffers = {}
  # NOAH's second stage comes after a search; the supernet serves as well.
  for stage in made.stages[:1 if method == "noah" else None]:
    if stage.prepare:
      params["adapter"], buffers = stage.prepare(methods.Context(
          Model(module, "half"), params, buffers, None, None, seed))
  tuned, _ = trees.split(
      params, trees.label(params, methods.tuned_rules(made)), "tune")
  tuned = {name: x + rng.normal(0, 0.2, x.shape).astype("f4")
           for name, x in trees.flatten(tuned).items()}
  return bundles.Bundle(
      tuned, {n: np.asarray(x) for n, x in trees.flatten(buffers).items()}, {
          "method": method, "options": made.options, "backbone": backbone,
          "image_size": size, "normalisation": normalisation,
          "resample": "bicubic", "dtype": "float32", "task": "colours",
          "group": "Other", "classes": list(classes), "k": settings.k,
          "test_top1": 87.5, "val_top1": None, "test_count": 24,
          "train_count": 48, "protocol": "final", "seed": seed, "lr": 1e-3,
          "module_params": 1, "norm_params": 2, "head_params": 99,
          "weights_source": weights, "weights": "base.safetensors",
          "weights_sha256": weights_lib.sha256(weights),
          "fields": module.fields, "stages": [s.name for s in made.stages],
          "versions": {"jax": jax.__version__}, **meta})
