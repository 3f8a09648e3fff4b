"""Lists the methods: source, tuned parameters, cost, whether they merge.

  python -m ttc_jax.methods --backbone=vit_b16 --classes=100
"""
import json
import sys
from typing import Any

from absl import flags

from ttc_jax import backbones, cli, config as config_lib, cost, methods
from ttc_jax import optim, trees
from ttc_jax.errors import UserError
from ttc_jax.model import Model, init_head


def row(name: str, backbone: Any, config: Any, classes: int) -> dict[str, Any]:
  """A method with its published defaults; extra FLOPs are of one image.

  NOAH's is the supernet: the largest of what its search may find.
  """
  method = methods.load(name, config, backbone)
  params = {"backbone": backbones.shapes(backbone), "adapter": {},
            "head": init_head(backbone.width, classes, 0)}
  plain, buffers = Model(backbone, "half"), {}
  for prepare in [s.prepare for s in method.stages if s.prepare][:1]:
    params["adapter"], buffers = prepare(
        methods.Context(plain, params, {}, None, None, 0))
  rules = methods.tuned_rules(method)
  counts = optim.counts(
      trees.split(params, trees.label(params, rules), "tune")[0])
  before = cost.flops(plain, params | {"adapter": {}}, {})
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
  """The list as text, a method a line."""
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
  widths = [max(map(len, column)) for column in zip(*lines)]
  numbers = range(1, 6)
  return "\n".join(
      "  ".join(c.rjust(w) if i in numbers else c.ljust(w)
                for i, (c, w) in enumerate(zip(line, widths))).rstrip()
      for line in lines)


def main(argv: list[str]) -> None:
  del argv
  backbone = backbones.make(_BACKBONE.value, _SIZE.value)
  config = config_lib.default()
  config.k = backbone.default_k
  # The scores need images, the list only their shapes.
  config.score = config.sct.score = "random"
  rows, unfit = [], []
  for name in methods.names():
    try:
      rows.append(row(name, backbone, config, _CLASSES.value))
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
