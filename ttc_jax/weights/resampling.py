"""Embeddings of positions and patches for another grid or patch size."""
import math

import jax
import numpy as np


def resize_positions(position: np.ndarray, tokens: int) -> np.ndarray:
  """(1, N, D) -> (1, tokens, D) by antialiased bicubic resampling, as timm.

  N and `tokens` are squares. vision_transformer interpolates linearly; this
  is closer to what the embedding was trained as.
  """
  if position.shape[1] == tokens:
    return position
  old, new = math.isqrt(position.shape[1]), math.isqrt(tokens)
  grid = np.asarray(position, np.float32).reshape(1, old, old, -1)
  shape = (1, new, new, grid.shape[-1])
  grid = jax.image.resize(grid, shape, "cubic", antialias=True)
  return np.asarray(grid).reshape(1, tokens, -1)


def resize_patch(kernel: np.ndarray, patch: int) -> np.ndarray:
  """(p, p, C, D) -> (patch, patch, C, D): the kernel that sees in a patch, when
  it is resized, what the old one saw.

  FlexiViT's PI-resize (Beyer et al., 2023, Eq. 3): with B the linear map that
  resizes a patch bilinearly, the pseudo-inverse of B^T times the kernel.
  """
  old = len(kernel)
  if old == patch:
    return kernel
  basis = np.eye(old ** 2, dtype=np.float32).reshape(old ** 2, old, old)
  resized = jax.image.resize(
      basis, (old ** 2, patch, patch), "bilinear", antialias=False)
  B = np.asarray(resized, np.float64).reshape(old ** 2, patch ** 2).T
  new = np.linalg.pinv(B.T) @ kernel.reshape(old ** 2, -1)
  return new.reshape(patch, patch, *kernel.shape[2:]).astype(np.float32)
