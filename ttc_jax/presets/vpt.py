"""VPT (Jia et al., 2022), by KMnP/vpt at 4410440: tune_vtab.py,
configs/base-*.yaml, src/solver, src/data/datasets/tf_dataset.py.

SGD with a grid of 40 settings, chosen by the last epoch on val200 with ties to
the smaller learning rate, then five seeds on all 1000. Full tuning has AdamW
and a grid of its own. Their learning rates are for 256 images a batch.

Not reproduced:
- The number of prompts is chosen for each task there; see config.vpt.prompts.
- The dropout of prompts is config.vpt.dropout, 0.1. In their configuration it
  is 0.0 unless a command sets it; what the published runs had is not certain.
- Batches of 64 for many prompts, and of 1024 for linear probing, more than
  there are images; here both have 128.
- The runs of the grid have no fixed seed there; here the first of the five.
- TensorFlow's bilinear resize does not smooth when it shrinks; Pillow's does.
- The first epoch has learning rate 0 there.
- Full tuning: where the grid says 0 they use SGD, and AdamW decays by 0.01
  wherever it says anything else, by norms too; here AdamW and 0.01 alone.

Pixels are normalised by ImageNet's mean and deviation, as in the code; the
authors of PETL-ViT say that the published results used no normalisation.
"""
from typing import Any

METHOD = "vpt_deep"

BASE_LR = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0)
WEIGHT_DECAY = (0.0, 0.0001, 0.001, 0.01)
BASE_LR_FULL = (0.0001, 0.0005, 0.001, 0.005)


def _solver(batch_size, base_lr, weight_decay, **more):
  """Their rates are for 256 images a batch."""
  lr = tuple(rate / 256 * batch_size for rate in base_lr)
  return dict(
      batch_size=batch_size, lr=lr[0],
      grid=dict(lr=lr, weight_decay=weight_decay), **more)


def settings(method: str) -> dict[str, Any]:
  """Returns the settings; full tuning has another optimiser and grid."""
  solver = (_solver(384, BASE_LR_FULL, (0.01,), optimiser="adamw",
                    warmup_epochs=5.0) if method == "full" else
            _solver(128, BASE_LR, WEIGHT_DECAY, optimiser="sgd",
                    warmup_epochs=10.0))
  return dict(
      protocol="select", seeds=(42, 44, 82, 100, 800), resample="bilinear",
      normalisation="imagenet", drop_path=0.0, decay_all=False, epochs=100,
      warmup_lr=0.0, min_lr=0.0, label_smoothing=0.0, **solver)
