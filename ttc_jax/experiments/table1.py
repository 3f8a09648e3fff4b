"""Table 1: all methods, test accuracy by task.

The paper's methods, with equal training and the same grid of learning rates,
except full tuning, which has smaller ones, and TTC, which starts from the stage
1 of `layernorm` and tries rates of stage 2; and its missing controls: LayerNorm
of equal compute, TTC with random channels and with our block score.
"""
from ttc_jax.experiments import Grid, Results, accuracy

VARIANTS = ("full", "linear", "bias", "adapter", "lora", "vpt_shallow",
            "vpt_deep", "ssf", "layernorm", "layernorm_2x", "ttc", "ttc_random",
            "ttc_block")
PAPER = {"full": 65.6, "linear": 52.9, "bias": 62.1, "adapter": 71.4,
         "vpt_shallow": 64.9, "vpt_deep": 69.4, "ssf": 73.1, "layernorm": 73.6,
         "ttc": 74.8}


_NOTES = {
    "adapter": "adapter is AdaptFormer's, beside the MLP; the paper's stands "
               "after the MLP, as its number of parameters suggests.",
    "vpt_deep": "vpt_deep and vpt_shallow have 10 prompts on every task; VPT, "
                "whose number the paper prints, chose how many."}


def draw(results: Results) -> list[Grid]:
  """Returns the table."""
  return [accuracy(results, PAPER, notes=[
      note for variant, note in _NOTES.items()
      if variant in results.variants])]
