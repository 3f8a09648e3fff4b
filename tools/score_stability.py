"""How far a score of channels depends on the images that it is taken over.

For finished LayerNorm runs of a work directory: each score on two random
halves of the training set, their rank correlation, and how many of the top K
channels the halves have in common (by chance: K / D).

  python tools/score_stability.py --workdir=DIR --task=digits [--data=DIR]
"""
import json
import os

from absl import app, flags
import numpy as np
from scipy.stats import spearmanr

from ttc_jax import importance, predict, report, tasks

_WORKDIR = flags.DEFINE_string("workdir", None, "of runs", required=True)
_TASK = flags.DEFINE_string("task", None, "one of its tasks", required=True)
_DATA = flags.DEFINE_string("data", None, "folder of tasks")


def halves(score, tuned, split, seed=0):
  """The scores (L, D) at "fc2" over two disjoint halves of a split."""
  order = np.random.default_rng(seed).permutation(len(split.labels))
  return [importance.score(
      score, tuned.model, tuned.params, tuned.buffers,
      np.asarray(split.images[:])[rows], split.labels[rows], ("fc2",))["fc2"]
      for rows in np.array_split(order, 2)]


def main(argv):
  del argv
  rows = report.read(os.path.join(_WORKDIR.value, "results.jsonl"))
  for row in rows:
    if (row["task"], row["variant"], row["protocol"]) != (
        _TASK.value, "layernorm", "final"):
      continue
    tuned = predict.load(
        os.path.join(_WORKDIR.value, "runs", row["run"], "bundle"))
    split = tasks.load(_TASK.value, size=row["image_size"],
                       data=_DATA.value).split("trainval")
    D = tuned.model.backbone.width
    K = D // 8
    for score in ("taylor", "taylor_abs", "taylor_square", "l2"):
      one, two = halves(score, tuned, split)
      common = [np.intersect1d(importance.top_k(a, K),
                               importance.top_k(b, K)).size / K
                for a, b in zip(one, two)]
      print(json.dumps({
          "task": row["task"], "seed": row["seed"], "score": score,
          "rank_correlation": round(float(np.mean(
              [spearmanr(a, b)[0] for a, b in zip(one, two)])), 2),
          "common_top_k": round(float(np.mean(common)), 2),
          "chance": K / D,
          "negative": round(float(np.mean(np.less(one, 0))), 2)}), flush=True)


if __name__ == "__main__":
  app.run(main)
