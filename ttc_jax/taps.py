"""Taps: a method acts on a backbone without knowing its class.

A backbone calls `tap(site, block, y, x)` after the operation that turned x
into y, and continues with the result. Site names, the same in every block:

  input                 the residual stream that enters a block (y is x)
  q k v proj fc1 fc2    the linear layers (also what a mask scales)
  norm1 norm2           the norms of a block
  scores                of attention, (B, H, queries, keys), before softmax
  mlp                   the MLP from its normalised input to its output
  attention block       the residual stream, after MHSA and after the MLP
  embedding tokens norm the patches, the sequence that enters block 0, the
                        final norm; these count as block 0, and so do the norms
                        that only some backbones have: pre_norm pool_norm
                        map_norm embedding_norm

A handler is `handler(p, y, x) -> y`: what a method computes at a site, where
`p` has the method's parameters and buffers of that site and block. In training
`p["key"]` is a random key of the site, block and step. `Shared(site, handler)`
gives a handler those of another site, so that several sites share parameters.
"""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
import zlib

import jax

from ttc_jax.backbones.layers import Tap

Handler = Callable[[dict[str, jax.Array], jax.Array, jax.Array], jax.Array]


class Shared(NamedTuple):
  """A handler with the parameters, buffers and random key of another site.

  Attributes:
    site: the other site, which a backbone has in the same blocks.
    handler: what acts at this site.
  """
  site: str
  handler: Handler


def bind(handlers: Mapping[str, Handler | Shared], adapter: Mapping[str, Any],
         buffers: Mapping[str, Any], key: jax.Array | None = None) -> Tap:
  """Returns the tap that calls each site's handler with its parameters.

  At a site and block that neither tree has, y is returned unchanged.

  Args:
    handlers: {site: handler}.
    adapter: {site: {block: {name: array}}}, trained; a block is "0", "1", ...
    buffers: likewise, not trained: channel indices, scales, rates, sizes.
    key: of the training step; None at inference.
  """
  def tap(site, block, y, x):
    handler = handlers.get(site)
    if isinstance(handler, Shared):
      site, handler = handler
    params = {**_at(adapter, site, block), **_at(buffers, site, block)}
    if not params:
      return y
    if handler is None:
      raise ValueError(f"parameters at site {site!r}, which has no handler")
    if key is not None:
      params["key"] = jax.random.fold_in(
          key, zlib.crc32(f"{site}/{block}".encode()))
    return handler(params, y, x)
  return tap


def _at(tree, site, block):
  return tree.get(site, {}).get(str(block), {})


def chain(*taps: Tap) -> Tap:
  """Returns the tap that applies several taps in order."""
  def tap(site, block, y, x):
    for one in taps:
      y = one(site, block, y, x)
    return y
  return tap


def record(sites: tuple[str, ...],
           into: dict[tuple[str, int], jax.Array]) -> Tap:
  """Returns a tap that stores y of some sites: `into[site, block] = y`.

  `into` must be local to the traced function, like any side effect in JAX.
  """
  def tap(site, block, y, x):
    del x
    if site in sites:
      into[site, block] = y
    return y
  return tap
