"""Taps: where a method may act on a backbone, without knowing its class.

A backbone calls `tap(site, block, y, x)` after the operation that turned x
into y, and goes on with what comes back. Site names, the same in every block:

  input                 the residual stream that enters a block (y is x)
  q k v proj fc1 fc2    the linear layers (also what a mask scales)
  norm1 norm2           the norms of a block
  scores                of attention, (B, H, queries, keys), before softmax
  mlp                   the MLP from its normalised input to its output
  attention block       the residual stream, after MHSA and after the MLP
  embedding tokens norm patches, the sequence that enters, the final norm;
                        these count as block 0, as do the norms that some
                        backbones have: pre_norm pool_norm map_norm
                        embedding_norm

A handler is `handler(p, y, x) -> y`: what a method does at a site, with `p`
its parameters there. In training `p["key"]` is a random key of the site, block
and step.
"""
from collections.abc import Callable, Mapping
from typing import Any
import zlib

import jax

from ttc_jax.backbones.layers import Tap

Handler = Callable[[dict[str, jax.Array], jax.Array, jax.Array], jax.Array]


def bind(handlers: Mapping[str, Handler], adapter: Mapping[str, Any],
         buffers: Mapping[str, Any], key: jax.Array | None = None) -> Tap:
  """Returns the tap that calls each site's handler with its parameters.

  Where neither tree has a parameter, y flows on.

  Args:
    handlers: {site: handler}.
    adapter: {site: {block: {name: array}}}, trained; a block is "0", "1", ...
    buffers: likewise, not trained: channel indices and other inputs.
    key: of the step, in training.
  """
  def tap(site, block, y, x):
    params = {**_at(adapter, site, block), **_at(buffers, site, block)}
    if not params:
      return y
    if key is not None:
      params["key"] = jax.random.fold_in(
          key, zlib.crc32(f"{site}/{block}".encode()))
    return handlers[site](params, y, x)
  return tap


def _at(tree, site, block):
  return tree.get(site, {}).get(str(block), {})


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
