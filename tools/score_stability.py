"""Measures how far scores of channels depend on the images.

For the finished LayerNorm runs of a work directory: computes each score over
two random halves of the training set, and prints their rank correlation and
the share of the top K channels that both halves have (by chance: K / D).

  python tools/score_stability.py --workdir=DIR --task=digits [--data=DIR]
"""
import json

from absl import app, flags
import numpy as np
from scipy.stats import spearmanr

from ttc_jax import importance, predict, tasks
from ttc_jax.runs.workdir import WorkDir

_WORKDIR = flags.DEFINE_string("workdir", None, "work directory", required=True)
_TASK = flags.DEFINE_string("task", None, "one of its tasks", required=True)
_DATA = flags.DEFINE_string("data", None, "folder of tasks")


def halves(score, tuned, split, seed=0):
  """Returns the scores (L, D) at "fc2" over two disjoint halves of a split."""
  order = np.random.default_rng(seed).permutation(len(split.labels))
  return [importance.score(
      score, tuned.model, tuned.params, tuned.buffers,
      np.asarray(split.images[:])[rows], split.labels[rows], ("fc2",))["fc2"]
      for rows in np.array_split(order, 2)]


def main(argv):
  del argv
  workdir = WorkDir(_WORKDIR.value)
  for row in workdir.rows():
    if (row["task"], row["variant"], row["protocol"]) != (
        _TASK.value, "layernorm", "final"):
      continue
    tuned = predict.load(workdir.bundle(row["run"]))
    split = tasks.load(_TASK.value, size=row["image_size"],
                       data=_DATA.value).split("trainval")
    D = tuned.model.backbone.width
    K = D // 8
    for score in ("taylor", "taylor_abs", "taylor_square", "l2"):
      one, two = halves(score, tuned, split)
      common = [np.intersect1d(importance.top_k(a, K),
                               importance.top_k(b, K)).size / K
                for a, b in zip(one, two, strict=True)]
      print(json.dumps({
          "task": row["task"], "seed": row["seed"], "score": score,
          "rank_correlation": round(float(np.mean(
              [spearmanr(a, b)[0]
               for a, b in zip(one, two, strict=True)])), 2),
          "common_top_k": round(float(np.mean(common)), 2),
          "chance": K / D,
          "negative": round(float(np.mean(np.less(one, 0))), 2)}), flush=True)


if __name__ == "__main__":
  app.run(main)
