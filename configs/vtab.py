"""VTAB-1K tasks: train on 1000 images, report the test set at the last epoch.

  python -m ttc_jax.main --workdir=DIR --config=configs/vtab.py:\
task=caltech101,method=ttc,backbone=vit_b16,data=DIR,weights=FILE
"""
from ttc_jax.config import default, parse_arg, run_locally


def get_config(arg=None):
  arg = parse_arg(arg, task=("all",), method="ttc", backbone="vit_b16",
                  data="", weights="", size=224, runlocal=False)
  config = default()
  config.tasks, config.data = arg.task, arg.data
  config.method = arg.method
  config.backbone, config.weights = arg.backbone, arg.weights
  config.image_size = arg.size
  if arg.runlocal:
    run_locally(config)
  return config
