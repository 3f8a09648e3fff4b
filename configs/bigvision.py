"""Big Vision's transfer recipe beside the methods here, on the same images.

  python -m ttc_jax.main --workdir=DIR --config=configs/bigvision.py:\
task=resisc45,data=DIR,weights=howto-i21k-B/16,size=384

method= takes names; without it, the three of Big Vision and every method:

  bv_full, bv_linear   full fine-tuning and linear probing by its recipe. Any
                       name of ttc_jax/experiments may follow "bv_", as bv_ttc
  fewshot_lsr          its closed-form probe; l2 is chosen on val200
  full, linear, ttc    and so on: with the epochs of configs/paper.py, AdamW and
                       a grid of their own that both stages share, uncropped

epochs= are those of one stage of the last kind. Other arguments: task, data,
backbone, weights, size, normalisation.

The recipe is that of google-research/big_vision, configs/transfer.py: SGD with
momentum 0.9, gradients clipped to a norm of 1, no weight decay, a head that
starts at zero, a warm-up and a cosine to 0, pixels in [-1, 1], and crop=

  resmall_crop    the short side resized to 448, random crops of 384, flips
  inception_crop  random crops of 5 % of the area and more, flips
  none            the whole image squashed to the square, no flip: for tasks
                  about places, orientations or digits, which the others spoil

At other sizes 448 is size * 448 / 384. Test images have the short side resized
and their centre cropped; with crop=none they are squashed.

Its steps are those for data of this size, Oxford Flowers with 918 images: 500
of 512 images, 100 of them warm-up. Of 1,000 images 512 are drawn anew in every
epoch, which so is one step; on 800 images it is the same. With another batch=,
steps= are those on 1,000 images. Methods of two stages have half of the steps
for each. Its learning rates are those that its authors try on tasks of this
size (Dosovitskiy et al., 2021, Table 4, Pets and Flowers); transfer.py names
0.003 to 0.03 as the best ones. Every grid goes on where its edge is best.

What differs from Big Vision's code is on the page docs/big-vision.md.
"""
import os

import ml_collections

from ttc_jax import experiments
from ttc_jax.config import default, parse_arg, variants
from ttc_jax.errors import UserError, check_known
from ttc_jax.methods import fewshot_lsr
from ttc_jax.vtab import facts

WEIGHTS = os.path.join(os.path.dirname(__file__), os.pardir, "checkpoints",
                       "vit_ti16_64.safetensors")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
RESIZED, CROPPED = 448, 384  # pixels a side, in training
SMALLEST = 0.05              # share of the area, of an inception crop
METHODS = ("full", "linear", "bias", "layernorm_2x", "adapter", "lora",
           "vpt_shallow", "vpt_deep", "ssf", "sct", "noah", "ttc")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = parse_arg(
      arg, task=("all",), data="", backbone="",
      weights=os.path.normpath(WEIGHTS), size=64, normalisation="", method=(),
      crop="resmall_crop", steps=500, warmup=100, batch=512, epochs=20)
  large = round(arg.size * RESIZED / CROPPED)
  crops = {"resmall_crop": dict(flip=True, crop_from=large),
           "inception_crop": dict(flip=True, crop_from=large,
                                  smallest_crop=SMALLEST, crop_aspect=4 / 3),
           "none": {}}
  check_known("crop", arg.crop, crops)
  config = default()
  config.tasks, config.data = arg.task, arg.data
  config.backbone, config.weights = arg.backbone, arg.weights
  config.image_size, config.normalisation = arg.size, arg.normalisation
  config.resample = "bilinear" if arg.crop == "none" else f"bilinear/{large}"
  config.protocol, config.seeds = "select", (0, 1, 2)
  config.grid.lr, config.grid_steps = (2e-3, 6e-3, 2e-2), 3
  config.epochs = arg.epochs
  ours = experiments.settled(experiments.VARIANTS, config.get_ref("epochs"))
  ours["full"]["grid"] = dict(lr=(2e-4, 6e-4, 2e-3))
  theirs = {f"bv_{name}": _by_recipe(arg, values) | crops[arg.crop]
            for name, values in experiments.VARIANTS.items()}
  lsr = dict(method="fewshot_lsr", grid=dict(lr=(), l2=fewshot_lsr.GRID))
  known = {**theirs, "fewshot_lsr": lsr, **ours}
  config.variants = variants(**experiments.some(
      known, arg.method or ("bv_full", "bv_linear", "fewshot_lsr", *METHODS)))
  return config


def _by_recipe(arg, values):
  """A method's values, trained by Big Vision's recipe."""
  images = facts.COUNTS["trainval"]
  if not 0 < arg.batch <= images:
    raise UserError(f"config argument 'batch={arg.batch}': give 1 to {images}")
  a_step = 1 / (images // arg.batch)  # of an epoch
  share = 1 if "epochs" in values else 1 / 2  # of the steps, for a stage
  epochs = max(1, round(share * arg.steps * a_step))
  warmup = min(arg.warmup, arg.steps / 5)  # as 100 of 500
  return {**values, "optimiser": "sgd", "weight_decay": 0.0, "clip_norm": 1.0,
          "head_init": "zeros", "batch_size": arg.batch, "epochs": epochs,
          "warmup_epochs": min(share * warmup * a_step, epochs / 2),
          "eval_every": epochs, "grid": dict(lr=RATES)}
