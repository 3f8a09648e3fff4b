"""Divergence of the tuned model from the original one (Fig. 4, Eq. 5).

P and Q are the softmax over the channels of an image's [CLS] in the original
and in the tuned model; JS(P, Q) = (KL(P, M) + KL(Q, M)) / 2 with
M = (P + Q) / 2, in nats, 0 to log 2. The mean over the first test set, at most
500 images: {"js": ...}.
"""
import numpy as np
from scipy import special

IMAGES = 500


def measure(trained):
  """Returns {"js": mean divergence in nats}."""
  test = trained.test(IMAGES)
  return {"js": float(jensen_shannon(
      trained.features_before(test), trained.features(test)).mean())}


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
  """Returns the divergence, in nats, of the softmax of each row: (N,).

  Args:
    p, q: features (N, D).
  """
  p, q = (special.softmax(np.asarray(x, np.float64), 1) for x in (p, q))
  middle = (p + q) / 2
  return (special.rel_entr(p, middle) + special.rel_entr(q, middle)).sum(1) / 2
