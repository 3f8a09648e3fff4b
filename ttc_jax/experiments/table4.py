"""Table 4: parameters and FLOPs, from formulas and from the program.

Nothing is trained. D width, L blocks, K channels, P patches, N tokens, T_l of
them computed by block l's MLP (one in the last block, which is read at [CLS]
alone), F the hidden width of the MLP, r the bottleneck or rank, n prompts, W
the multiply-adds of all matrix products. The FLOPs are those added to an image
at inference before merging: a formula's products against what XLA counts, with
its sums, gathers and scatters. TTC's merge is exact and adds none. The formulas
are the paper's, of one width: on a Swin both are counted alone.
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
    parameters, flops: as printed.
    size, work: the same as functions of (backbone, options).
  """
  parameters: str
  size: Callable[[Any, Any], int]
  flops: str
  work: Callable[[Any, Any], int]


def _tokens(b):
  """(P, N): patches, and tokens with those that stand before them."""
  patches = (b.image_size // b.patch) ** 2
  return patches, patches + b.prefix


def _lora(b, o):
  N = _tokens(b)[1]
  return sum(4 * (t + N) * b.width * o["lora"]["rank"] for t in b.work.outputs)


def _prompts(b, o):
  """As `vit.ViT.work`, of n tokens more in all blocks; the last one computes
  no token more."""
  D, F, L, N, n = b.width, b.hidden, b.depth, _tokens(b)[1], o["vpt"]["prompts"]
  T = sum(b.work.outputs)
  more = (L - 1) * n
  return 2 * (L * n * 2 * D * D + more * (2 * D * D + 2 * D * F)
              + 2 * D * ((T + more) * (N + n) - T * N))


def _scales(b, o):
  """A product and a sum for each output: of norm1, k and v at N tokens, of q,
  proj, norm2, fc1 (F) and fc2 at T_l, of the embedding and the last norm."""
  del o
  (P, N), D, F = _tokens(b), b.width, b.hidden
  return 2 * (D * (P + b.work.outputs[-1])
              + sum(3 * N * D + (4 * D + F) * t for t in b.work.outputs))


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
        4 * b.depth * b.width * o["lora"]["rank"]),
        "sum_l 4 (T_l + N) D r", _lora),
    "vpt_deep": Formula("LnD", lambda b, o: (
        b.depth * o["vpt"]["prompts"] * b.width),
        "2 W(N + n) - 2 W(N)", _prompts),
    "ssf": Formula("2D(11L + 2)", lambda b, o: 2 * b.width * (
        11 * b.depth + 2),
        "2D(P + T_L) + 2 sum_l (3ND + (4D + F) T_l)", _scales),
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
  """Returns the table; a formula that disagrees has "!" behind it.

  Without methods that the backbone cannot have: prompts on a Swin.
  """
  if results.session is None:
    return []
  config, base = results.session
  lines = [_line(label, inputs.load_method(
      inputs.resolved(values, base), base), base)
           for label, values in plan.variants(config).items()
           if base.backbone.takes_prompts or not label.startswith("vpt")]
  return [Grid(
      results.title, ["", "parameters", "formula", "counted",
                      "added FLOPs", "formula (M)", "XLA (M)", "merged"],
      lines, [
          f"{base.name} at {config.image_size} px; tuned "
          "parameters without the head; FLOPs an image. XLA counts sums, "
          "gathers and scatters beside the products.",
          "The paper prints L K^2 for TTC (0.11M for ViT-B/16 with K = 96), "
          "leaving its LayerNorms out, and 2 D (2 L + 1) as 0.03M."])]


def _line(label, method, base):
  counted, added = program(method, base)
  formula, backbone = FORMULAS[label], base.backbone
  merged = "cannot merge" if method.cannot_merge else "0"
  if len({site.width for site in backbone.sites["fc2"]}) > 1:
    return [label, "-", "-", f"{counted:,}", "-", "-", f"{added / 1e6:,.2f}",
            merged]
  size = formula.size(backbone, method.options)
  work = formula.work(backbone, method.options)
  return [label, formula.parameters, f"{size:,}",
          f"{counted:,}{'' if size == counted else ' !'}", formula.flops,
          f"{work / 1e6:,.2f}", f"{added / 1e6:,.2f}", merged]


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
