"""Domain generalisation (Table 6): trained on one domain, tested on others.

  python -m ttc_jax.main --workdir=DIR --config=configs/domain.py:\
task=pacs/from_photo,data=DIR,backbone=vit_b16,weights=FILE

A task has a test set of its own domain and further ones: a folder with lists
DOMAIN_train.txt and DOMAIN_test.txt (pacs/from_photo, pacs/except_photo), the
drawn scene_count_shifted, any folder with test_NAME.txt; or ImageNet with
V2, Sketch, A and R, prepared by TFDS, on 16 images a class:

  task=imagenet,few_shot=16,data=DIR,backbone=vit_b16,weights=FILE,size=224

Augmentation as NOAH's: random resized crop, flip, RandAugment m9, erasing 0.25,
mixup 0.8, CutMix 1.0, label smoothing 0.1. RandAugment takes the place of the
colour jitter, as in timm. NOAH trains 100 epochs with AdamW and a learning rate
of 5e-4 on 16 images a class; here methods search the same rates on validation
images of the training domain, and variants take what was chosen for the method
(`SETTINGS` of ttc_jax/experiments). Images are resized to a short side of
8/7 of `size` and cropped at the centre (256 and 224), in training too: random
crops are areas of 8 % and more of that square, not of the whole photograph.
`augment=false` for tasks whose labels flips and crops change: places, angles,
counts. Without `task` it is the drawn scene_count_shifted, not augmented.
"""
import os

import ml_collections

from ttc_jax import experiments
from ttc_jax.config import default, parse_arg, variants
from ttc_jax.errors import UserError
from ttc_jax.tasks import shifted

WEIGHTS = os.path.join(os.path.dirname(__file__), os.pardir, "checkpoints",
                       "vit_ti16_64.safetensors")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = parse_arg(
      arg, task=(), data="", backbone="",
      weights=os.path.normpath(WEIGHTS), size=64, normalisation="",
      epochs=50, method=(), augment=True, few_shot=0)
  drawn = [task for task in arg.task if task in shifted.names(None)]
  if drawn and arg.augment:
    raise UserError(f"flips and crops change the labels of {drawn[0]}, which "
                    "are places, angles or counts: add augment=false")
  config = default()
  config.experiment = "table6"
  config.tasks, config.data = arg.task or ("scene_count_shifted",), arg.data
  config.few_shot = arg.few_shot
  config.backbone, config.weights = arg.backbone, arg.weights
  config.image_size, config.normalisation = arg.size, arg.normalisation
  # 256 for 224: the centre crop that ImageNet's test sets are compared with.
  config.resample = f"bicubic/{round(arg.size * 256 / 224)}"
  config.protocol, config.seeds = "select", (0, 1, 2)
  config.grid.lr, config.grid_steps = (6e-3, 2e-2, 6.7e-2), 3
  config.epochs = arg.epochs
  if arg.augment and arg.task:
    config.flip, config.smallest_crop, config.label_smoothing = True, 0.08, 0.1
    config.crop_aspect = 4 / 3
    config.augment.update(dict(randaugment=9.0, erasing=0.25, mixup=0.8,
                               cutmix=1.0))
  chosen = experiments.variants("table6", config.get_ref("epochs"))
  config.variants = variants(**experiments.some(chosen, arg.method))
  return config
