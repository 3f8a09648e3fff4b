"""Normalisation of pixels: uint8 images -> what a backbone was trained with.

A normalisation is a string: a name of `NAMES`, or "mean/deviation" of pixels in
[0, 1], each three numbers for red, green and blue:

  0.48,0.46,0.41/0.27,0.26,0.28
"""
from collections.abc import Sequence
import re
from typing import Any

import numpy as np

from ttc_jax.errors import UserError, check_known

_Triple = tuple[float, float, float]

# {name: (mean, deviation)} of pixels in [0, 1]. "half" maps to [-1, 1]: the
# ImageNet-21K ViTs, Big Vision, SigLIP.
NAMES: dict[str, tuple[_Triple, _Triple]] = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073),
             (0.26862954, 0.26130258, 0.27577711)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_NUMBER = r"\d{1,3}(?:\.\d{1,12})?"
_NUMBERS = rf"{_NUMBER}(?:,{_NUMBER}){{2}}"
_TEXT = re.compile(f"{_NUMBERS}/{_NUMBERS}")


def apply(images: Any, how: str) -> Any:
  """Normalises uint8 (..., 3), of numpy or jax; returns float32.

  Raises:
    UserError: an unknown normalisation.
  """
  x = images.astype("float32")
  if how == "half":  # exact at both ends
    return (x - 127.5) / 127.5
  mean, std = (np.array(v, np.float32) for v in mean_and_std(how))
  return x / 255 if how == "none" else (x / 255 - mean) / std


def mean_and_std(how: str) -> tuple[_Triple, _Triple]:
  """Returns (mean, deviation) of pixels in [0, 1].

  Raises:
    UserError: an unknown name, or numbers that are none.
  """
  if how in NAMES:
    return NAMES[how]
  if _TEXT.fullmatch(how):
    mean, std = ([float(x) for x in part.split(",")]
                 for part in how.split("/"))
    if all(std):
      return _triple(mean), _triple(std)
  if "/" in how or "," in how:
    raise UserError(
        f"normalisation {how!r}: give a name ({', '.join(NAMES)}) or six "
        "numbers of pixels in [0, 1], as 0.5,0.5,0.5/0.25,0.25,0.25")
  return NAMES[check_known("normalisation", how, NAMES)]


def name(mean: Sequence[float], std: Sequence[float]) -> str:
  """Returns the string of a normalisation: a name where there is one."""
  for known, values in NAMES.items():
    if np.allclose(values, (mean, std), rtol=0, atol=1e-6):
      return known
  return "/".join(",".join(f"{x:.8f}".rstrip("0").rstrip(".") for x in part)
                  for part in (mean, std))


def _triple(values: Sequence[float]) -> _Triple:
  red, green, blue = values
  return red, green, blue
