"""Taps: where a method may act on a backbone, without knowing its class.

A backbone calls `tap(site, block, y, x)` after the operation that turned x
into y, and goes on with what comes back. Site names, the same in every block:

  q k v proj fc1 fc2    the linear layers (also what a mask scales)
  norm1 norm2           the norms of a block
  attention block       the residual stream, after MHSA and after the MLP
  embedding tokens norm patches, the sequence that enters, the final norm;
                        these count as block 0

A handler is `handler(p, y, x) -> y`: what a method does at a site, with `p`
its parameters there.
"""
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ttc_jax.backbones.layers import Tap

Handler = Callable[[dict[str, jax.Array], jax.Array, jax.Array], jax.Array]


def bind(handlers: Mapping[str, Handler], adapter: Mapping[str, Any],
         selection: Mapping[str, Any], depth: int) -> Tap:
  """Returns the tap that calls each site's handler with its parameters.

  Args:
    handlers: {site: handler}.
    adapter: {site: {name: (l, ...)}}, trained; the l last blocks have one.
    selection: likewise, not trained: channel indices and other inputs.
    depth: number of blocks of the backbone.
  """
  def tap(site, block, y, x):
    params = {**adapter.get(site, {}), **selection.get(site, {})}
    if not params:
      return y
    stacked = len(next(iter(params.values())))
    i = block - (depth - stacked)
    if i < 0:
      return y
    return handlers[site]({k: v[i] for k, v in params.items()}, y, x)
  return tap


def chain(*taps: Tap) -> Tap:
  """The tap that applies each in turn."""
  def tap(site, block, y, x):
    for one in taps:
      y = one(site, block, y, x)
    return y
  return tap


def record(sites: tuple[str, ...], into: dict) -> Tap:
  """A tap that leaves y alone and keeps it: `into[site, block] = y`.

  `into` must be local to the traced function, like any side effect in JAX.
  """
  def tap(site, block, y, x):
    del x
    if site in sites:
      into[site, block] = y
    return y
  return tap
