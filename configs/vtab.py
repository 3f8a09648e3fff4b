"""VTAB-1K tasks: train on 1000 images, report the test set at the last epoch.

  python -m ttc_jax.main --workdir=DIR --config=configs/vtab.py:\
task=caltech101,method=ttc,backbone=vit_b16,data=DIR,weights=FILE

task=vtab runs all 19 tasks, task=fgvc the five of FGVC, and without task=
those that the data holds run. data= is a folder of tasks in lists, of pictures
(CLASS/NAME.jpg) or of VTAB's data sets, a zip file, hf:NAME or tfds:NAME.
few_shot=N trains on N images of each class. size= is the side of the images in
pixels, 224 by default. runlocal is for a quick try of the machinery: a small
model of random weights, 32 px, two epochs on 64 images. protocol is

  val, final, select     what is trained on and reported (config.protocol);
                         select has the grid of OSU-MLB/ViT_PEFT_Vision
  sct, ssf, vpt, noah    a neighbour's training, as published: a file of
                         ttc_jax/presets/, which says what is not reproduced.
                         Without method=, the neighbour's own method

A preset sets config.per_task.TASK.KEY for single tasks; for those tasks
config.KEY has no effect.
"""
import ml_collections

from ttc_jax import presets
from ttc_jax.config import PROTOCOLS, default, parse_arg, run_locally
from ttc_jax.errors import check_known
from ttc_jax.methods import fewshot_lsr


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = parse_arg(arg, task=("all",), method="", protocol="final",
                  backbone="", data="", weights="", size=0, few_shot=0,
                  runlocal=False)
  config = default()
  check_known("protocol", arg.protocol, (*PROTOCOLS, *presets.names()))
  if arg.protocol in PROTOCOLS:
    config.protocol, config.method = arg.protocol, arg.method or "ttc"
    if arg.protocol == "select":
      config.grid.lr, config.grid.weight_decay = (1e-3, 1e-2), (1e-4, 1e-3)
      config.grid.l2 = fewshot_lsr.GRID  # which this method alone has
  else:
    presets.apply(config, arg.protocol, arg.method)
  config.tasks, config.data = arg.task, arg.data
  config.few_shot = arg.few_shot
  if arg.runlocal:
    run_locally(config)
  # What is given counts, runlocal or not; a file of weights says its backbone.
  config.weights = arg.weights or config.weights
  if arg.backbone or config.weights != "random":
    config.backbone = arg.backbone
  config.image_size = arg.size or config.image_size
  return config
