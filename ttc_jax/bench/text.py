"""A measurement as lines of text."""
from typing import Any

_COLUMNS = (  # title, key, unit, decimals
    ("images/s", "images_per_second", 1, 1),
    ("median ms", "median_seconds", 1e-3, 1),
    ("min ms", "min_seconds", 1e-3, 1),
    ("compile s", "compile_seconds", 1, 1),
    ("temp MiB", "temp_bytes", 2 ** 20, 1),
    ("args MiB", "argument_bytes", 2 ** 20, 1),
    ("GFLOP compiled", "flops_compiled", 1e9, 2),
    ("GFLOP needed", "flops_needed", 1e9, 2),
    ("% of ceiling", "share_of_ceiling", 1e-2, 1),
)


def table(result: dict[str, Any]) -> str:
  """Returns the text that is printed of `timing.measure`'s result."""
  def cell(row, key, unit, decimals):
    value = row[key]
    return "n/a" if value is None else f"{value / unit:.{decimals}f}"
  cells = [["", *(title for title, *_ in _COLUMNS)]]
  cells += [[row["name"], *(cell(row, *column) for _, *column in _COLUMNS)]
            for row in result["rows"]]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = ["  ".join([line[0].ljust(widths[0]), *(
      c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
           for line in cells]
  return "\n".join([*_heading(result), "", *lines, *_verdict(result)])


def _heading(result):
  s, m, turns = (result[k] for k in ("settings", "machine", "ceiling_by_turn"))
  return [
      f"{s['backbone']} at {s['image_size']} px, batch {s['batch_size']}, "
      f"{s['dtype']}, kernels in {s['frozen_dtype']}, {s['gelu']} GELU, "
      f"K = {s['k']}; {m['devices']} x {m['kind']}, {m['cores']} cores",
      f"ceiling: {result['ceiling'] / 1e9:.1f} GFLOP/s, the best matrix "
      f"product; {min(turns) / 1e9:.1f} to {max(turns) / 1e9:.1f} from turn to "
      "turn"]


def _verdict(result):
  if not result["faster"]:
    return []
  turns = result["times_as_fast_by_turn"]
  lines = ["", f"stage 2 is {result['times_as_fast']:.2f} times as fast as "
           f"{result['faster'].removeprefix('stage 2, ')}, PyTorch "
           f"{result['versions']['torch']}; {min(turns):.2f} to "
           f"{max(turns):.2f} from turn to turn"]
  if result["left_out"]:
    lines.append(f"without torch.compile: {result['left_out']}")
  return lines
