"""Nearest neighbours of [CLS] (Table 8): is the backbone itself aligned?

Top-1 in percent of the k nearest training images, by cosine similarity, over
the first test set: {"before": {"1": ..., "5": ..., "20": ...}, "after": {...}},
of the pretrained and of the trained model. No head is involved.
"""
import numpy as np
from sklearn.neighbors import KNeighborsClassifier

K = (1, 5, 20)


def measure(trained):
  """Returns {"before": {k: top-1}, "after": {k: top-1}}."""
  train, test = trained.train, trained.test()
  found = {}
  for when, features in (("before", trained.features_before),
                         ("after", trained.features)):
    known, asked = features(train), features(test)
    found[when] = {str(k): accuracy(known, train.labels, asked, test.labels, k)
                   for k in K}
  return found


def accuracy(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray,
             test_labels: np.ndarray, k: int) -> float:
  """Returns the top-1 of a vote among the k nearest, in percent.

  Args:
    train, test: features (N, D) and (M, D).
    train_labels, test_labels: (N,) and (M,).
  """
  voter = KNeighborsClassifier(min(k, len(train)), metric="cosine")
  voter.fit(train, train_labels)
  return 100 * float(voter.score(test, test_labels))
