"""Rematerialised blocks: the same gradients, fewer activations kept."""
import jax
import numpy as np
import pytest

from tests.conftest import CLASSES
from tests.random_trees import random_tree
from ttc_jax import backbones, importance, methods, parallel, step, trees
from ttc_jax.backbones.swin import Swin
from ttc_jax.backbones.vit import ViT
from ttc_jax.config import resolved
from ttc_jax.model import Model, init_head, pad_head

BATCH = 16


def loss_and_gradient(backbone, config, method="layernorm"):
  """(loss function, arguments) of a training step."""
  rng = np.random.default_rng(0)
  shapes = {"backbone": backbones.shapes(backbone),
            "head": jax.eval_shape(
                lambda: init_head(backbone.width, CLASSES, 0))}
  params = random_tree(shapes, np.random.default_rng(1)) | {"adapter": {}}
  params["head"] = pad_head(params["head"])
  size = backbone.image_size
  batch = (rng.integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8),
           rng.integers(0, CLASSES, BATCH))
  made = methods.load(method, config, backbone)
  model = Model(backbone, "half", made.handlers)
  buffers = {}
  if made.stages[-1].prepare:
    adapter, buffers = made.stages[-1].prepare(methods.Context(
        Model(backbone, "half"), parallel.replicate(params), {}, *batch, 0))
    params["adapter"] = random_tree(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), adapter),
        np.random.default_rng(2))
  fixed = step.Fixed({}, buffers,
                     step.make_hyper(resolved(config), 1, CLASSES))
  loss = step.make_loss_fn(model, step.make_plan(config))

  def of_norms(norms, rest, key):
    return loss(trees.join(norms, rest), fixed, batch, key)
  labels = trees.label(params, made.stages[-1].rules)
  def both(*args):
    return of_norms(*args), jax.grad(of_norms)(*args)
  return both, (
      *trees.split(params, labels, "tune"), jax.random.key(0))


VIT = ViT(width=32, depth=6, heads=2, hidden=64, patch=4, image_size=32)
SWIN = Swin(embed=16, depths=(2, 2), heads=2, image_size=32, window=4)


@pytest.mark.parametrize("backbone", [VIT, SWIN], ids=["vit", "swin"])
@pytest.mark.parametrize("method", ["layernorm", "lora", "ttc"])
@pytest.mark.sweep(keep=2)
def test_losses_and_gradients_are_the_same(config, backbone, method):
  config.drop_path = 0.2
  plain, again = (backbone.clone(drop_path=0.2, remat=r)
                  for r in (False, True))
  fn, args = loss_and_gradient(plain, config, method)
  want, want_grads = jax.jit(fn)(*args)
  fn, args = loss_and_gradient(again, config, method)
  got, got_grads = jax.jit(fn)(*args)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  names, values = trees.flatten(want_grads), trees.flatten(got_grads)
  assert names.keys() == values.keys() and names
  for name, value in names.items():
    np.testing.assert_allclose(values[name], value, rtol=1e-4, atol=1e-6,
                               err_msg=name)


def test_less_is_kept_for_the_backward_pass(config):
  """Of the residuals of `jax.vjp`; what XLA makes of it differs by version."""
  kept = {}
  for remat in (False, True):
    fn, (norms, *rest) = loss_and_gradient(VIT.clone(remat=remat), config)
    residuals = jax.eval_shape(lambda x, fn=fn, rest=rest: jax.vjp(
        lambda y: fn(y, *rest)[0], x)[1], norms)
    kept[remat] = sum(x.size * x.dtype.itemsize
                      for x in jax.tree.leaves(residuals))
  assert kept[True] < 0.3 * kept[False]


@pytest.mark.parametrize("score", ["taylor", "block"])
def test_scores_are_the_same(score):
  """With a gradient at all sites of a ViT that drops paths in training."""
  rng = np.random.default_rng(0)
  params = random_tree(
      {"backbone": backbones.shapes(VIT), "head": jax.eval_shape(
          lambda: init_head(VIT.width, CLASSES, 0))},
      np.random.default_rng(1)) | {"adapter": {}}
  images = rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)
  labels = rng.integers(0, CLASSES, BATCH)
  plain, again = (importance.score(
      score, Model(VIT.clone(drop_path=0.2, remat=remat), "half"),
      parallel.replicate(params), {}, images, labels, ("fc2",))["fc2"]
      for remat in (False, True))
  for one, other in zip(plain, again, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
