"""Table 2: all methods on a Swin.

The insertion points are the paper's: the last half of stage 3, and stage 4. It
states no accuracy, only leads over VPT (Natural 6.2, Specialized 2.2,
Structured 7.6 points); VPT is not among the methods, for the Swin here takes no
prompts.
"""
from ttc_jax.experiments import Grid, Results, accuracy

WEIGHTS = "swin_mu_64.safetensors"
VARIANTS = ("full", "linear", "bias", "adapter", "lora", "ssf", "layernorm",
            "layernorm_2x", "ttc", "ttc_random", "ttc_block")


def draw(results: Results) -> list[Grid]:
  """Returns the table."""
  return [accuracy(results)]
