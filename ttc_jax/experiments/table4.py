"""Table 4: parameters and FLOPs, from formulas and from the program.

Nothing is trained. D width, L blocks, K channels, T_l the tokens that block l's
MLP computes (one in the last block, which is read at [CLS] alone), r the
bottleneck or rank, n prompts. The FLOPs are those added to an image at
inference before merging: a formula's products against what XLA counts, with
its sums, gathers and scatters. TTC's merge is exact and adds none.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ttc_jax import cost, methods, optim, parallel, trees
from ttc_jax.experiments import Grid, Results
from ttc_jax.model import Model, init_head
from ttc_jax.runs import inputs, plan

VARIANTS = ("layernorm", "bias", "adapter", "lora", "vpt_deep", "ssf", "ttc",
            "ttc_rows")
TRAINS = False  # draws without any run


class Formula(NamedTuple):
  """Of a variant: tuned parameters without the head, and added FLOPs.

  Attributes:
    parameters, flops: as printed; "" where there is no formula.
    size, work: the same as functions of (backbone, options).
  """
  parameters: str
  size: Callable[[Any, Any], int]
  flops: str = ""
  work: Callable[[Any, Any], int] | None = None


FORMULAS = {
    "layernorm": Formula("2D(2L + 1)", lambda b, o: 2 * b.width * (
        2 * b.depth + 1), "0", lambda b, o: 0),
    "bias": Formula("D(11L + 2)", lambda b, o: b.width * (11 * b.depth + 2),
                    "0", lambda b, o: 0),
    "adapter": Formula(
        "L(2Dr + r + D)", lambda b, o: b.depth * (
            (2 * b.width + 1) * o["adapter"]["width"] + b.width),
        "sum_l 4 T_l D r", lambda b, o: sum(
            4 * t * b.width * o["adapter"]["width"] for t in b.work.outputs)),
    "lora": Formula("4LDr", lambda b, o: (
        4 * b.depth * b.width * o["lora"]["rank"])),
    "vpt_deep": Formula("LnD", lambda b, o: (
        b.depth * o["vpt"]["prompts"] * b.width)),
    "ssf": Formula("2D(11L + 2)", lambda b, o: 2 * b.width * (
        11 * b.depth + 2)),
    "ttc": Formula(
        "LK^2 + 2D(2L + 1)", lambda b, o: (
            b.depth * o["k"] ** 2 + 2 * b.width * (2 * b.depth + 1)),
        "sum_l 2 T_l K^2", lambda b, o: sum(
            2 * t * o["k"] ** 2 for t in b.work.outputs)),
    "ttc_rows": Formula(
        "LDK + 2D(2L + 1)", lambda b, o: b.width * (
            b.depth * o["k"] + 2 * (2 * b.depth + 1)),
        "sum_l 2 T_l D K", lambda b, o: sum(
            2 * t * b.width * o["k"] for t in b.work.outputs)),
}


def draw(results: Results) -> list[Grid]:
  """Returns the table; a formula that disagrees has "!" behind it."""
  if results.session is None:
    return []
  (config, base), lines = results.session, []
  for label, values in plan.variants(config).items():
    method = inputs.load_method(inputs.resolved(values, base), base)
    counted, added = program(method, base)
    formula = FORMULAS[label]
    expected = formula.size(base.backbone, method.options)
    work = formula.work and formula.work(base.backbone, method.options)
    lines.append([
        label, formula.parameters, f"{expected:,}",
        f"{counted:,}{'' if counted == expected else ' !'}",
        formula.flops or "-",
        "-" if work is None else f"{work / 1e6:,.2f}", f"{added / 1e6:,.2f}",
        "0" if not method.cannot_merge else "cannot merge"])
  return [Grid(
      results.title, ["", "parameters", "formula", "counted",
                      "added FLOPs", "formula (M)", "XLA (M)", "merged"],
      lines, [
          f"{base.name} at {config.image_size} px; tuned "
          "parameters without the head; FLOPs an image. XLA counts sums, "
          "gathers and scatters beside the products.",
          "The paper prints L K^2 for TTC (0.11M for ViT-B/16 with K = 96), "
          "leaving its LayerNorms out, and 2 D (2 L + 1) as 0.03M."])]


def program(method: methods.Method, base: inputs.Base) -> tuple[int, float]:
  """Returns (tuned parameters without the head, FLOPs added to an image)."""
  backbone = base.backbone
  model = Model(backbone, "half")
  params = {"backbone": base.params, "adapter": {},
            "head": parallel.replicate(init_head(backbone.width, 2, 0))}
  buffers: trees.Tree = {}
  images = np.zeros((2, backbone.image_size, backbone.image_size, 3), np.uint8)
  images[1] = 255
  for stage in method.stages:
    if stage.prepare:
      adapter, buffers = stage.prepare(methods.Context(
          model, params, buffers, images, np.arange(2), 0))
      params = params | {"adapter": adapter}
  params = params | {"backbone": _shapes(base.params),
                     "head": _shapes(params["head"])}
  labels = trees.label(params, methods.tuned_rules(method))
  tuned, _ = trees.split(params, labels, "tune")
  count = sum(n for part, n in optim.counts(tuned).items() if part != "head")
  adapted = model._replace(handlers=method.handlers if params["adapter"]
                           else ())
  bare = cost.flops(model, params | {"adapter": {}}, {})
  return count, cost.flops(adapted, params, buffers) - bare


def _shapes(tree):
  """Shapes on one device of a tree that is on all of them."""
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)
