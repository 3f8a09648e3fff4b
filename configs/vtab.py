"""VTAB-1K tasks: train on 1000 images, report the test set at the last epoch.

  python -m ttc_jax.main --workdir=DIR --config=configs/vtab.py:\
task=caltech101,method=ttc,backbone=vit_b16,data=DIR,weights=FILE

task=vtab means all 19, task=all those that the folder has. protocol is

  val, final, select     what is trained on and reported: config.protocol;
                         select has the grid of OSU-MLB/ViT_PEFT_Vision
  sct, ssf, vpt, noah    how a neighbour trained, as published: a file of
                         ttc_jax/presets/, which says what is not reproduced.
                         Without method=, the neighbour's own method

A preset's values for single tasks are config.per_task.TASK.KEY; where it has
them, config.KEY does nothing.
"""
from ttc_jax import presets
from ttc_jax.config import PROTOCOLS, default, parse_arg, run_locally
from ttc_jax.errors import check_known


def get_config(arg=None):
  arg = parse_arg(arg, task=("all",), method="", protocol="final",
                  backbone="vit_b16", data="", weights="", size=224,
                  runlocal=False)
  config = default()
  check_known("protocol", arg.protocol, (*PROTOCOLS, *presets.names()))
  if arg.protocol in PROTOCOLS:
    config.protocol, config.method = arg.protocol, arg.method or "ttc"
    if arg.protocol == "select":
      config.grid.lr, config.grid.weight_decay = (1e-3, 1e-2), (1e-4, 1e-3)
  else:
    presets.apply(config, arg.protocol, arg.method)
  config.tasks, config.data = arg.task, arg.data
  config.backbone, config.weights = arg.backbone, arg.weights
  config.image_size = arg.size
  if arg.runlocal:
    run_locally(config)
  return config
