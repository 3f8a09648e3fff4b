"""Rates: does stage 2 want a learning rate of its own?

Beyond the paper, which does not say. `ttc_one_rate` has one rate for both
stages, chosen for both together; stage 2 of `ttc` has a rate of its own, and
the map's may be higher still in `ttc_fast`. `layernorm_2x` has the rate of
`layernorm`, `layernorm_2x_rate` one that is searched for as many epochs.
"""
from ttc_jax.experiments import ABLATION, Grid, Results, accuracy
from ttc_jax.experiments import VARIANTS as KNOWN

VARIANTS = {
    **{label: KNOWN[label] for label in (
        "layernorm", "layernorm_2x", "ttc_one_rate", "ttc")},
    "layernorm_2x_rate": KNOWN["layernorm_2x"],
    "ttc_fast": ABLATION | dict(
        grid=dict(adapter_lr=(1.0, 10.0, 100.0)))}


def draw(results: Results) -> list[Grid]:
  """Returns the table."""
  return [accuracy(results)]
