"""A bundle on the parameters of its base: every array is checked first."""
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ttc_jax import bundles, checkpoint, methods, quantisation, taps, trees
from ttc_jax.backbones.layers import SCALE
from ttc_jax.errors import UserError
from ttc_jax.model import Model


class LoadedModel(NamedTuple):
  """A bundle on its base weights, on the host.

  Attributes:
    meta: the bundle's metadata.
    cannot_merge: why the adapter cannot be merged into the weights; empty if
      it can.
  """
  model: Model
  params: trees.Tree
  buffers: trees.Tree
  meta: dict[str, Any]
  cannot_merge: str


def attach(bundle: str, saved: bundles.Bundle, module: Any,
           params: trees.Tree, merge: bool) -> LoadedModel:
  """Puts a bundle on its base's parameters.

  Args:
    bundle: its path, for messages.
    module, params: the base, as `base.load` returns it.
    merge: folds the adapter into the backbone where that is exact. Kernels
      that it changes become float32, see `quantisation`.

  Raises:
    UserError: the bundle's arrays are not those of its method there.
  """
  meta = saved.meta
  method = _method(bundle, meta, module)
  bare = {"backbone": params, "adapter": {}, "head": {}}
  _check_backbone(bundle, saved, method, bare)
  params = checkpoint.overlay(bare, saved.tuned)
  buffers = trees.unflatten(saved.buffers)
  model = Model(module, meta["normalisation"], method.handlers)
  _check_fit(bundle, saved, model, params, buffers)
  if merge and method.merge:
    backbone = quantisation.merge(method.merge, params, buffers, module)
    params = params | {"backbone": backbone, "adapter": {}}
    model, buffers = model._replace(handlers=()), {}
  return LoadedModel(model, params, buffers, meta, method.cannot_merge)


def _method(bundle, meta, module):
  options = ml_collections.ConfigDict(meta["options"])
  try:
    return methods.load(meta["method"], options, module)
  except (UserError, AttributeError, KeyError, TypeError, ValueError) as e:
    reason = " ".join(str(e).split())[:200]
    if isinstance(e, KeyError):  # whose text is the key alone
      reason = f"without {reason}"
    raise UserError(f"bundle '{bundle}': its options are not those of "
                    f"{meta['method']} ({reason})") from e


def _check_backbone(bundle, saved, method, bare):
  """Raises UserError unless the bundle's leaves of the backbone are those that
  the method tunes, with the base's shapes."""
  meta = saved.meta
  tuned, _ = trees.split(
      bare, trees.label(bare, methods.tuned_rules(method)), "tune")
  want = {name: np.shape(x) for name, x in trees.flatten(tuned).items()
          if not name.endswith(f"/{SCALE}")}  # of int8, which is never tuned
  have = {name: x.shape for name, x in saved.tuned.items()
          if not name.startswith(("adapter/", "head/"))}
  for name in sorted(want.keys() | have.keys()):
    if have.get(name) != want.get(name):
      raise UserError(
          f"bundle '{bundle}': {name!r} has the shape "
          f"{have.get(name, 'none')}, but {meta['method']} on "
          f"{meta['backbone']} at {meta['image_size']} px tunes "
          f"{want.get(name, 'none')}")


def _check_fit(bundle, saved, model, params, buffers):
  """Raises UserError unless every array has a place and the right shape."""
  meta = saved.meta
  found, widths = _trace(bundle, meta, model, params, buffers)
  if found != (1, len(meta["classes"])):
    raise UserError(f"bundle '{bundle}': it gives logits of shape {found} for "
                    f"an image and {len(meta['classes'])} classes")
  adapted = {name.removeprefix("adapter/"): x for name, x in saved.tuned.items()
             if name.startswith("adapter/")}
  for name, x in [*adapted.items(), *saved.buffers.items()]:
    width = widths.get("/".join(name.split("/")[:2]))
    if width is None:
      raise UserError(f"bundle '{bundle}': {meta['method']} on "
                      f"{meta['backbone']} has no place for {name!r}")
    if name.endswith("/channels") and not ((0 <= x) & (x < width)).all():
      raise UserError(f"bundle '{bundle}': {name!r} has channels beyond the "
                      f"{width} that there are")


def _trace(bundle: str, meta: Mapping[str, Any], model: Model,
           params: trees.Tree, buffers: trees.Tree):
  """-> (shape of an image's logits, {"site/block": width}) of the method's
  sites; nothing is computed."""
  size = meta["image_size"]
  seen: dict[tuple[str, int], jax.Array] = {}
  record = taps.record(tuple(site for site, _ in model.handlers), into=seen)
  try:
    logits = jax.eval_shape(
        lambda *args: model.logits(*args, extra_tap=record), params,
        jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8), buffers)
  except Exception as e:  # a wrong shape or a missing leaf raises any type
    raise UserError(
        f"bundle '{bundle}': its arrays do not fit {meta['method']} on "
        f"{meta['backbone']} ({' '.join(str(e).split())[:200]})") from e
  return logits.shape, {
      f"{site}/{block}": y.shape[-1] for (site, block), y in seen.items()}
