"""SSF (Lian et al., 2022), by dongzelian/SSF at e94e0e7:
train_scripts/vit/vtab/*/train_ssf.sh, train.py.

Learning rate, weight decay and drop-path differ from task to task.

Not reproduced:
- Two GPUs with 32 images each are one batch of 64 here.
- Mixed float16 precision (--amp): see config.dtype.
- Ten more epochs at the floor of the cosine (timm's cool-down).
- The weights are timm's vit_base_patch16_224_in21k; give them as weights=.

Pixels are normalised by 0.5 and 0.5, as timm's entry of that model says; the
authors of PETL-ViT say that the published results used no normalisation.

A task that is not of VTAB-1K has the values that most tasks have; none is
published.
"""
from typing import Any

METHOD = "ssf"

# lr, weight decay, drop-path
USUAL = (0.005, 5e-5, 0.0)
TASKS = {
    "cifar100": USUAL,
    "caltech101": (0.001, 0.05, 0.1),
    "dtd": USUAL,
    "oxford_flowers102": USUAL,
    "oxford_iiit_pet": USUAL,
    "svhn": (0.01, 5e-5, 0.0),
    "sun397": USUAL,
    "patch_camelyon": USUAL,
    "eurosat": (0.003, 0.05, 0.2),
    "resisc45": (0.002, 5e-5, 0.1),
    "diabetic_retinopathy": (0.005, 5e-5, 0.2),
    "clevr_count": (0.002, 0.05, 0.1),
    "clevr_dist": (0.05, 0.05, 0.1),
    "dmlab": (0.005, 5e-5, 0.1),
    "kitti": (0.01, 5e-5, 0.0),
    "dsprites_loc": (0.01, 5e-5, 0.0),
    "dsprites_ori": (0.005, 5e-5, 0.2),
    "smallnorb_azi": (0.02, 5e-5, 0.1),
    "smallnorb_ele": (0.005, 0.05, 0.2),
}


def _row(lr, weight_decay, drop_path):
  return dict(lr=lr, weight_decay=weight_decay, drop_path=drop_path)


def settings(method: str) -> dict[str, Any]:
  """Returns the settings, the same for every method."""
  del method
  return dict(
      protocol="final", seeds=(42,), resample="bicubic", normalisation="half",
      optimiser="adamw", decay_all=False, batch_size=64, epochs=100,
      warmup_epochs=10.0, warmup_lr=1e-7, min_lr=1e-8, label_smoothing=0.0,
      **_row(*USUAL),
      per_task={task: _row(*values) for task, values in TASKS.items()})
