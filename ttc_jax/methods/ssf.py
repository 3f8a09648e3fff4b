"""SSF (Lian et al., 2022, Eq. 3): y = scale * x + shift after every operation.

After the patch embedding, every norm, and every linear layer.
"""
import functools

import flax.linen as nn
import jax
import ml_collections
import numpy as np

from ttc_jax import trees
from ttc_jax.errors import UserError
from ttc_jax.methods import TUNE_ADAPTER, Context, Method, Stage, options

OPTIONS = ("ssf",)


def scale_and_shift(p: dict[str, jax.Array], y: jax.Array,
                    x: jax.Array) -> jax.Array:
  """Returns y * scale + shift, channel by channel."""
  del x
  return y * p["scale"].astype(y.dtype) + p["shift"].astype(y.dtype)


def widths(backbone: nn.Module, params: trees.Tree) -> dict[str, list[int]]:
  """Returns {site: [D_out of each block]} of all linear layers and norms."""
  flat = trees.flatten(params["backbone"])
  linear = {site: [layer.width for layer in layers]
            for site, layers in backbone.sites.items()}
  norms = {site: [flat[f"{path}/scale"].shape[-1] for path in paths]
           for site, paths in backbone.norms.items() if paths}
  return linear | norms


def prepare(context: Context, *,
            spread: float) -> tuple[trees.Tree, trees.Tree]:
  """Draws scales around 1 and shifts around 0, of deviation `spread`."""
  rng = np.random.default_rng(context.seed)

  def near(mean, width):
    return (mean + spread * rng.standard_normal(width)).astype(np.float32)
  return {site: {str(i): {"scale": near(1, width), "shift": near(0, width)}
                 for i, width in enumerate(blocks)}
          for site, blocks in widths(
              context.model.backbone, context.params).items()}, {}


def merge(params: trees.Tree, buffers: trees.Tree,
          backbone: nn.Module) -> trees.Tree:
  """Folds scale and shift into linear layers and norms, exactly (Eq. 4).

  W' = diag(scale) W, b' = scale * b + shift, and the same of a norm's scale
  and bias.
  """
  del buffers
  flat = dict(trees.flatten(params["backbone"]))
  for site, blocks in params["adapter"].items():
    for block, p in blocks.items():
      i = int(block)
      if site in backbone.sites:
        path = backbone.sites[site][i].path
        factor, leaf = f"{path}/kernel", f"{path}/bias"
      else:
        path = backbone.norms[site][i]
        factor, leaf = f"{path}/scale", f"{path}/bias"
      scale, shift = (np.asarray(p[k], np.float64) for k in ("scale", "shift"))
      for name, add in ((factor, 0), (leaf, shift)):
        value = np.asarray(flat[name], np.float64)
        rows = value.reshape(-1, len(scale)) * scale + add
        flat[name] = rows.reshape(value.shape).astype(np.float32)
  return trees.unflatten(flat)


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Reads `config.ssf`."""
  spread = config.ssf.spread
  if not spread >= 0:
    raise UserError(f"config.ssf.spread is {spread}; give 0 or more")
  sites = (*backbone.sites, *backbone.norms)
  return Method(
      (Stage("ssf", TUNE_ADAPTER, functools.partial(prepare, spread=spread)),),
      options=options(config, OPTIONS),
      handlers=tuple((site, scale_and_shift) for site in sites), merge=merge)
