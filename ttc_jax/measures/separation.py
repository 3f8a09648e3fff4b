"""Separation of the classes in [CLS] (Fig. 2), of at most 500 test images.

  silhouette  mean silhouette coefficient, -1 to 1, Euclidean (Rousseeuw, 1987)
  centroid    top-1 in percent of the nearest class mean of the training images
  points      (N, 2) by t-SNE, for the eye alone; labels: (N,)

Each is {"before": ..., "after": ...}: of the pretrained and trained model.
"""
import numpy as np
from sklearn import manifold, metrics

from ttc_jax.errors import RunError

IMAGES = 500


def measure(trained):
  """Returns {"silhouette", "centroid", "points": {when: ...}, "labels"}."""
  train, test = trained.train, trained.test(IMAGES)
  found: dict[str, dict] = {"silhouette": {}, "centroid": {}, "points": {}}
  for when, features in (("before", trained.features_before),
                         ("after", trained.features)):
    x = features(test)
    found["silhouette"][when] = silhouette(x, test.labels)
    found["centroid"][when] = centroid_accuracy(
        features(train), train.labels, x, test.labels)
    found["points"][when] = embedded(x, trained.seed).tolist()
  return {**found, "labels": test.labels.tolist()}


def silhouette(features: np.ndarray, labels: np.ndarray) -> float:
  """Returns the mean silhouette of (N, D) features with labels (N,).

  Raises:
    RunError: all have one class, or each a class of its own.
  """
  count = len(np.unique(labels))
  if not 1 < count < len(labels):
    raise RunError("the measure separation needs two classes and more images "
                   f"than classes; the test set has {len(labels)} images of "
                   f"{count} classes: give a larger one, or leave the measure "
                   "out of config.measures")
  return float(metrics.silhouette_score(features, labels))


def centroid_accuracy(train: np.ndarray, train_labels: np.ndarray,
                      test: np.ndarray, test_labels: np.ndarray) -> float:
  """Returns how many test features are nearest to their class's mean, in
  percent.

  Args:
    train, test: (N, D) and (M, D).
    train_labels, test_labels: (N,) and (M,).
  """
  classes = np.unique(train_labels)
  means = np.stack([train[train_labels == c].mean(0) for c in classes])
  squares = (np.square(test).sum(1)[:, None] - 2 * test @ means.T
             + np.square(means).sum(1))
  return 100 * float((classes[squares.argmin(1)] == test_labels).mean())


def embedded(features: np.ndarray, seed: int) -> np.ndarray:
  """Returns (N, 2) by t-SNE, rounded to 0.1."""
  tsne = manifold.TSNE(
      2, init="pca", perplexity=min(30, (len(features) - 1) / 3),
      random_state=seed)
  return np.round(tsne.fit_transform(features).astype(np.float64), 1)
