"""NOAH (Zhang et al., 2022, arXiv 2206.04673), by ZhangYuanhan-AI/NOAH at
e9c55f3: configs/*, experiments/*, supernet_train_prompt.py, model/*,
lib/datasets.py.

One learning rate and weight decay for all tasks: how they trained the LoRA,
the adapters and the prompts that they compare NOAH with, and NOAH's winner.
All have a dropout of 0.1: prompts, the input of LoRA, the hidden units of
adapters.

  adapter   width 8, after the MLP and its drop-path, quick GELU, scale 1
  lora      rank 8 on q, k and v with one down-projection, scale 1
  noah      sizes 5, 10, 50 and 100 of all three; see `noah.released`

Not reproduced:
- NOAH's supernet has 500 epochs at 5e-4 there; here both stages have the same
  epochs and learning rate.
- NOAH's depths: there the last blocks have no prompts (or LoRA, or adapter),
  and 3, 6, 9 or 12 of 12 blocks have some. Here 0 is one more size of a block.
- The limit of parameters is an argument of their search. 640,000, its default
  in evolution.py, is used here. Their count includes 80,640 to 153,600
  parameters of prompts at the input, which block 0 replaces by its own; here
  only prompts that are used exist and count.
- The sizes of the winners in experiments/NOAH/subnet are 1, 5 and 10, not
  those of the supernet's file: it is not certain which space they came from.
- Their search normalises by 0.5 and 0.5 (--inception) what the supernet was
  trained on with ImageNet's values; here both have the latter.
- Their LoRA and adapters start at random (normal, deviation 0.02: timm's
  initialisation of the whole model overwrites theirs), here at 0; prompts are
  uniform within other bounds.
- For method=vpt_* there are files of 1 to 1,000 prompts in experiments/VPT;
  here config.vpt.prompts decides.
- Their images went through JPEG once more (PIL's default quality) on their
  way from TFDS to files; give data= such a folder to have that too.

Pixels are normalised by ImageNet's mean and deviation, except for VPT, whose
script alone asks for 0.5 and 0.5.
"""
from typing import Any

METHOD = "noah"

SIZES = (5, 10, 50, 100)
DROPOUT = 0.1


def settings(method: str) -> dict[str, Any]:
  """Returns the settings; the normalisation depends on the method."""
  inception = method.startswith("vpt")
  sizes = (0, *SIZES)
  return dict(
      adapter=dict(width=8, placement="noah", activation="quick", scale=1.0,
                   dropout=DROPOUT),
      lora=dict(rank=8, alpha=8.0, sites=("q", "k", "v"), shared=True,
                dropout=DROPOUT),
      vpt=dict(dropout=DROPOUT),
      noah=dict(prompts=sizes, rank=sizes, width=sizes, budget=640_000,
                released=True, dropout=DROPOUT, population=50, generations=15,
                parents=10, mutations=25, crossovers=25, mutation_rate=0.2),
      protocol="final", seeds=(0,), resample="bicubic",
      normalisation="half" if inception else "imagenet", drop_path=0.1,
      optimiser="adamw", decay_all=False, batch_size=64, epochs=100,
      warmup_epochs=10.0, lr=1e-3, warmup_lr=1e-6, min_lr=1e-5,
      weight_decay=1e-4, label_smoothing=0.0)
