"""The channels that a run selected (Fig. 3).

{"sites": {site: {block: [channel, ...]}}, "widths": {site: {block: D}}}; empty
for methods that select none.
"""
import numpy as np

from ttc_jax import parallel, trees


def measure(trained):
  """Returns {"sites": ..., "widths": ...}."""
  flat = trees.flatten(parallel.unreplicate(trained.buffers))
  found: dict[str, dict] = {"sites": {}, "widths": {}}
  sites = trained.bare.backbone.sites
  for name, x in flat.items():
    site, block, leaf = name.split("/")
    if leaf == "channels":
      layers = sites.get(site, sites["fc2"])  # the stream is as wide as fc2
      found["sites"].setdefault(site, {})[block] = np.asarray(x).tolist()
      found["widths"].setdefault(site, {})[block] = layers[int(block)].width
  return found
