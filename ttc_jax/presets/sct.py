"""SCT (Zhao et al., 2023, arXiv 2309.08513), by showlab/SCT at 384cecb:
run_model_sct.sh, configs/model_sct/vtab/*.yaml, train_model_sct.py, vtab.py.

Learning rate, weight decay, scale and label smoothing differ from task to
task. `scale` is TTC's too, so TTC is trained with the values of SCT. On Swin
the last half of stage 3 (of Swin-B 9 blocks) and stage 4 are adapted.

Not reproduced:
- Their released ViT ignores `scale` and `scaleonx` of the yaml files; here both
  are used, as in the paper and in their Swin. A variant (config.variants) with
  scale=1.0 and sct=dict(scale_on_x=False) computes what their ViT computes.
- RandAugment (rand-m9-mstd0.5-inc1) and colour jitter 0.4 on all tasks but
  cifar100, caltech101, oxford_flowers102, sun397, dsprites_* and smallnorb_*;
  here nothing is augmented.
- The module starts at random there, at 0 here.
- smallnorb_ele has a head of 18 classes there, by a slip of the yaml; here 9.

Their optimiser is AdamW(parameters, lr, wd) in one group: biases decay too.

A task that is not of VTAB-1K has this package's default learning rate, weight
decay and scale; none is published.
"""
from typing import Any

METHOD = "sct"

# lr, weight decay, scale, whether the channels are scaled too (scaleonx),
# label smoothing
TASKS = {
    "cifar100": (0.013, 1.0, 0.4, False, 0.1),
    "caltech101": (0.006, 0.35, 1.0, False, 0.1),
    "dtd": (0.0032, 0.04, 0.25, False, 0.1),
    "oxford_flowers102": (0.05, 0.11, 0.15, False, 0.1),
    "oxford_iiit_pet": (0.0007, 0.8, 0.2, False, 0.1),
    "svhn": (0.075, 0.03, 0.15, False, 0.1),
    "sun397": (0.0017, 0.01, 0.15, False, 0.1),
    "patch_camelyon": (0.0072, 0.002, 0.17, False, 0.1),
    "eurosat": (0.06, 0.001, 0.1, False, 0.1),
    "resisc45": (0.01, 0.01, 0.4, False, 0.1),
    "diabetic_retinopathy": (0.004, 0.0003, 0.75, False, 0.1),
    "clevr_count": (0.0033, 0.01, 0.52, True, 0.0),
    "clevr_dist": (0.0018, 0.005, 0.1, True, 0.0),
    "dmlab": (0.009, 0.1, 0.3, False, 0.0),
    "kitti": (0.0072, 0.0001, 0.5, False, 0.1),
    "dsprites_loc": (0.003, 0.001, 0.3, True, 0.0),
    "dsprites_ori": (0.01, 0.05, 0.5, True, 0.0),
    "smallnorb_azi": (0.0062, 0.005, 1.0, True, 0.0),
    "smallnorb_ele": (0.0011, 0.0005, 0.65, True, 0.0),
}


def _row(lr, weight_decay, scale, scale_on_x, label_smoothing):
  return dict(lr=lr, weight_decay=weight_decay, scale=scale,
              label_smoothing=label_smoothing, sct=dict(scale_on_x=scale_on_x))


def settings(method: str) -> dict[str, Any]:
  """Returns the settings, the same for every method."""
  del method
  return dict(
      protocol="final", seeds=(42,), resample="bicubic",
      normalisation="imagenet", drop_path=0.1, optimiser="adamw",
      decay_all=True, batch_size=64, epochs=100, warmup_epochs=10.0,
      warmup_lr=1e-6, min_lr=1e-5, label_smoothing=0.1,
      k=0,       # width / 8: their 96 of ViT-B's 768
      blocks=0,  # all of a ViT; of a Swin see above
      sct=dict(position="attention", score="class_l2", scale_on_x=False),
      per_task={task: _row(*values) for task, values in TASKS.items()})
