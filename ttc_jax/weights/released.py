"""Short names of weights that Big Vision released -> where they are.

  howto-i21k-B/16      an AugReg ViT of ImageNet-21k
  SigLIP2 B/16 224     the image tower of a file with two towers, "FILE.npz:img"

The names and places are those of google-research/big_vision: `VANITY_NAMES` in
models/vit.py, models/proj/flexi/vit.py and
models/proj/image_text/two_towers.py; the files of SigLIP 2 are also in
configs/proj/image_text/SigLIP2_demo.ipynb.
"""
from collections.abc import Iterator
import difflib
import os

from ttc_jax.errors import UserError

_TOWER = ":img"  # Big Vision's mark of a part of a file, here the image tower


def _augreg() -> Iterator[tuple[str, str]]:
  """Steiner et al., 2021, arXiv 2106.10270."""
  for model, setting in (
      ("Ti/16", "aug_none-wd_0.03"), ("S/32", "aug_none-wd_0.1"),
      ("S/16", "aug_light1-wd_0.03"), ("B/32", "aug_light1-wd_0.1"),
      ("B/16", "aug_medium1-wd_0.1"), ("B/8", "aug_medium2-wd_0.1"),
      ("L/16", "aug_strong1-wd_0.1")):
    yield f"howto-i21k-{model}", (
        f"gs://vit_models/augreg/{model.replace('/', '_')}-i21k-300ep-lr_0.001-"
        f"{setting}-do_0.0-sd_0.0.npz")


def _deit3() -> Iterator[tuple[str, str]]:
  """Touvron et al., 2022; their first layer takes pixels in [-1, 1]."""
  for short, long in (("S", "small"), ("B", "base"), ("L", "large")):
    for rest in ("224_1k", "224_21k", "384_1k", "384_21k"):
      yield f"deit3_{short}_{rest}", (
          f"gs://big_vision/zoo/deit3/bv_deit_3_{long}_{rest}.npz")


def _flexivit() -> Iterator[tuple[str, str]]:
  """Beyer et al., 2023, arXiv 2212.08013, and the plain ViTs beside them."""
  for name, file in (
      ("FlexiViT-L i1k", "flexivit_l_i1k"),
      ("FlexiViT-B i1k", "flexivit_b_i1k"),
      ("FlexiViT-S i1k", "flexivit_s_i1k"),
      ("FlexiViT-B i21k 90ep", "flexivit_b_i21k_90ep"),
      ("FlexiViT-B i21k 300ep", "flexivit_b_i21k_300ep"),
      ("FlexiViT-B i21k 1000ep", "flexivit_b_i21k_1000ep"),
      ("ViT-B/16 i21k", "vit_b16_i21k_300ep"),
      ("ViT-B/30 i21k", "vit_b30_i21k_300ep")):
    yield name, f"gs://big_vision/flexivit/{file}.npz"


def _siglip() -> Iterator[tuple[str, str]]:
  """Zhai et al., 2023, arXiv 2303.15343."""
  for name, file in (
      ("B/16 224", "en_b16_224_63724782"), ("B/16 256", "en_b16_256_60500360"),
      ("B/16 384", "en_b16_384_68578854"), ("B/16 512", "en_b16_512_68580893"),
      ("L/16 256", "en_l16_256_60552751"), ("L/16 384", "en_l16_384_63634585"),
      ("So400m/14 224", "en_so400m_224_57633886"),
      ("So400m/14 384", "en_so400m_384_58765454"),
      ("B/16-i18n 256", "i18n_b16_256_66117334")):
    yield f"SigLIP {name}", f"gs://big_vision/siglip/webli_{file}.npz{_TOWER}"


def _siglip2() -> Iterator[tuple[str, str]]:
  """Tschannen et al., 2025, arXiv 2502.14786."""
  for model, sizes in (
      ("B/16", (224, 256, 384, 512)), ("B/32", (256,)),
      ("L/16", (256, 384, 512)), ("So400m/14", (224, 384)),
      ("So400m/16", (256, 384, 512)), ("g-opt/16", (256, 384))):
    for size in sizes:
      yield f"SigLIP2 {model} {size}", (
          "gs://big_vision/siglip2/siglip2_"
          f"{model.lower().replace('/', '')}_{size}.npz{_TOWER}")


ADDRESSES = dict([*_augreg(), *_deit3(), *_flexivit(), *_siglip(), *_siglip2()])

_PLAIN = ("its positions are computed, not stored, and a layer with tanh "
          "stands before its head")
_NAFLEX = "it takes patches of any aspect and has a model of its own"
# Released too, but of an architecture that no backbone here has.
REFUSED = {"i1k-s16-90ep": _PLAIN, "i1k-s16-150ep": _PLAIN,
           "i1k-s16-300ep": _PLAIN, "SigLIP2 B/16 NaFlex": _NAFLEX,
           "SigLIP2 So400m/16 NaFlex": _NAFLEX}


def resolve(source: str) -> str:
  """Returns the address of a short name; any other source as it is.

  A path that exists is a path, whatever its name. "#sha256=HEX" stays.

  Raises:
    UserError: released weights that no backbone here can hold.
  """
  name, mark, wanted = source.partition("#sha256=")
  if os.path.exists(os.path.expanduser(name)):
    return source
  if name in REFUSED:
    raise UserError(f"the released weights '{name}' are not supported: "
                    f"{REFUSED[name]}; choose others, as howto-i21k-B/16")
  return ADDRESSES.get(name, name) + mark + wanted


def near(name: str) -> str:
  """Returns the end of a sentence: which short names may have been meant.

  It is empty for a name with a suffix, which is a file's.
  """
  _, suffix = os.path.splitext(name)
  found = [] if suffix else difflib.get_close_matches(
      name, [*ADDRESSES, *REFUSED], n=3, cutoff=0.6)
  return ("; of the weights that Big Vision released, did you mean "
          f"{' or '.join(map(repr, found))}?" if found else "")
