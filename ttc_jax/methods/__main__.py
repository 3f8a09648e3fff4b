"""Lists the methods: source, tuned parameters, cost, whether they merge.

  python -m ttc_jax.methods --backbone=vit_b16 --classes=100
"""
import json
import sys
from typing import Any

from absl import flags
import ml_collections
import numpy as np

from ttc_jax import backbones, cli, cost, methods, optim, trees
from ttc_jax import config as config_lib
from ttc_jax.errors import UserError
from ttc_jax.model import Model, init_head


def row(name: str, plain: Model, params: trees.Tree, before: float,
        config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns a method's parameters and cost: a JSON object.

  FLOPs are of one image. NOAH's row is its supernet, the largest network that
  its search may find.

  Args:
    plain: the model without a method.
    params: its parameters, of which the backbone's may be shapes.
    before: its FLOPs.
  """
  method = methods.load(name, config, plain.backbone)
  params = dict(params)
  buffers: trees.Tree = {}
  size = plain.backbone.image_size
  images, labels = np.empty((0, size, size, 3), np.uint8), np.empty(0, np.int32)
  for prepare in [s.prepare for s in method.stages if s.prepare][:1]:
    params["adapter"], buffers = prepare(
        methods.Context(plain, params, {}, images, labels, 0))
  rules = methods.tuned_rules(method)
  counts = optim.counts(
      trees.split(params, trees.label(params, rules), "tune")[0])
  extra = cost.flops(plain._replace(handlers=method.handlers), params,
                     buffers) - before
  mergeable = not method.cannot_merge
  source, what = methods.described(name)
  return {"method": name, "source": source, "what": what,
          **{f"{part}_params": n for part, n in counts.items()},
          "flops": before, "extra_flops": extra,
          "extra_flops_merged": 0.0 if mergeable else extra,
          "mergeable": mergeable, "cannot_merge": method.cannot_merge}


def table(rows: list[dict[str, Any]]) -> str:
  """Returns the rows as aligned text, one line for each method."""
  lines = [("method", "module", "norm", "head", "extra MFLOPs", "merged",
            "source", "")]
  for r in rows:
    lines.append((
        r["method"], *(f"{r[f'{part}_params']:,}"
                       for part in ("module", "norm", "head")),
        f"{r['extra_flops'] / 1e6:.1f}",
        f"{r['extra_flops_merged'] / 1e6:.1f}", r["source"],
        r["what"] if r["mergeable"]
        else f"{r['what']} Cannot be merged, because {r['cannot_merge']}."))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  numbers = range(1, 6)
  return "\n".join(
      "  ".join(c.rjust(w) if i in numbers else c.ljust(w)
                for i, (c, w) in enumerate(zip(line, widths, strict=True))
                ).rstrip()
      for line in lines)


def main(argv: list[str]) -> None:
  """Prints the methods that run on the backbone; the others on stderr."""
  cli.check_no_arguments(argv)
  backbone = backbones.make(_BACKBONE.value, _SIZE.value)
  config = config_lib.default()
  # Any other score needs images; the list needs only the shapes.
  config.score = config.sct.score = "random"
  plain = Model(backbone, "half")
  params = {"backbone": backbones.shapes(backbone), "adapter": {},
            "head": init_head(backbone.width, _CLASSES.value, 0)}
  before = cost.flops(plain, params, {})
  rows, unfit = [], []
  for name in methods.names():
    try:
      rows.append(row(name, plain, params, before, config))
    except UserError as error:
      unfit.append(f"not on {_BACKBONE.value}: {name}: {error}")
  print(json.dumps(rows, indent=2) if _JSON.value else table(rows))
  for line in unfit:
    print(line, file=sys.stderr)
  if not _JSON.value:
    print(f"\n{_BACKBONE.value} at {_SIZE.value} px: "
          f"{rows[0]['flops'] / 1e9:.2f} GFLOPs an image without an adapter; "
          "MFLOPs beside them before and after merging.")


if __name__ == "__main__":
  _BACKBONE = flags.DEFINE_string("backbone", "vit_b16", "name, as vit_s14")
  _SIZE = flags.DEFINE_integer("size", 224, "of the images, pixels a side")
  _CLASSES = flags.DEFINE_integer("classes", 100, "of the head", lower_bound=1)
  _JSON = flags.DEFINE_bool("json", False, "a list of objects, for machines")
  cli.run(main)
