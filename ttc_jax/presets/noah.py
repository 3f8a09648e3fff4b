"""NOAH (Zhang et al., 2022, arXiv 2206.04673), by ZhangYuanhan-AI/NOAH at
e9c55f3: configs/*, supernet_train_prompt.py, lib/datasets.py.

One learning rate and weight decay for all tasks: how they trained the LoRA,
the adapters and the prompts that they compare NOAH with, and NOAH's winner.

Not reproduced:
- NOAH's supernet has 500 epochs at 5e-4 there; here both stages have the same
  epochs and learning rate.
- Their images went through JPEG once more (PIL's default quality) on their
  way from TFDS to files; give data= such a folder to have that too.
- Dropout of 0.1 in adapters and LoRA; here prompts alone have it.

Pixels are normalised by ImageNet's mean and deviation, but for VPT, whose
script alone asks for 0.5 and 0.5.
"""
METHOD = "noah"


def settings(method: str) -> dict:
  inception = method.startswith("vpt")
  return dict(
      protocol="final", seeds=(0,), resample="bicubic",
      normalisation="half" if inception else "imagenet", drop_path=0.1,
      optimiser="adamw", decay_all=False, batch_size=64, epochs=100,
      warmup_epochs=10.0, lr=1e-3, warmup_lr=1e-6, min_lr=1e-5,
      weight_decay=1e-4, label_smoothing=0.0)
