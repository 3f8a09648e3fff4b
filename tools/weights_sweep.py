"""Every small vision transformer of timm and every vision model class of
Hugging Face's transformers, with random weights: our features equal the
library's, or one sentence refuses the file.

  python tools/weights_sweep.py [--library=timm] [--out=sweep.md] [NAME...]

timm's models are cut to two blocks where their classes allow it, and the
others run if they are small; Hugging Face's are made of a small configuration.
Each file is tried alone and with its config.json. Prints a line for each fault
and a table, and exits with 1 if any file loads silently wrong or fails without
a sentence.
"""
import collections
import json
import os
import re
import sys
import tempfile
import types
from typing import Any, NamedTuple
import warnings

from absl import app, flags
import jax
import numpy as np

from ttc_jax import backbones, weights
from ttc_jax.backbones import swin, vit
from ttc_jax.errors import UserError
from ttc_jax.weights import identity

_FAMILIES = (
    "vit_", "deit", "flexivit", "test_vit", "swin_", "swinv2", "eva", "beit",
    "naflex", "aimv2", "samvit", "cait", "volo", "hiera", "tiny_vit", "convit",
    "crossvit", "pit_", "levit", "xcit", "mvitv2")
_CLOSE = 1e-3  # of the features' deviation

# Sizes of Hugging Face's configurations; one takes those that it has.
_SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "mlp_ratio": 2, "image_size": 32,
    "patch_size": 8, "num_channels": 3, "embed_dim": 32, "depths": [1, 1],
    "num_heads": [2, 4], "window_size": 4, "projection_dim": 32,
    "num_register_tokens": 2, "vision_use_head": True,
    "mask_ratio": 0.0}  # ViTMAE otherwise hides patches at random
_SMALL_SWIN = {"patch_size": 4, "mlp_ratio": 4.0}
# Sizes that some classes do not take: they count stages, or bind sizes.
_ODD_SIZES = ((), ("image_size",), ("depths", "num_heads"),
              ("hidden_size", "num_attention_heads", "depths", "num_heads",
               "patch_size", "mlp_ratio"), tuple(_SMALL))
# GELU of a library -> ours, as a user names it who knows the model.
_GELU = {"quick_gelu": "quick", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh",
         "gelu_fast": "tanh", "gelu_tanh": "tanh"}


class Row(NamedTuple):
  """One file: "equal", "refused", "wrong" or "odd", and why or how far."""
  library: str
  name: str
  config: bool
  result: str
  detail: str


def load(path: str, size: int, heads: int | None, gelu: str
         ) -> tuple[Any, Any]:
  """The module that a file is of, whatever its size, and its parameters.

  Args:
    heads, gelu: the library's, for files that do not say them.
  """
  read = weights.read(path)
  found = identity.family_of(identity.shapes_of(read))
  if found is None:
    raise UserError(str(weights.identify(read)))
  family, one = found
  given = {} if read.fields.get("gelu", "") else {"gelu": gelu}
  sizes, fields = one.sizes, weights.settled(read, given)
  if family is vit:
    module = vit.ViT(
        sizes["width"], sizes["depth"], sizes["heads"] or heads or 1,
        sizes["hidden"], sizes["patch"], size, **fields)
  else:
    module = swin.Swin(sizes["width"], sizes["depths"], sizes["heads"], size,
                       **fields)
  return module, weights.fit(read._replace(fields=fields),
                             backbones.shapes(module), "this model")


def judge(library: str, name: str, config: bool, path: str, images: np.ndarray,
          expected: np.ndarray, heads: int | None, gelu: str) -> Row:
  """Compares the features of a file with the library's."""
  def row(result, detail):
    return Row(library, name, config, result, " ".join(str(detail).split()))
  try:
    module, params = load(path, images.shape[1], heads, gelu)
    found = np.asarray(jax.jit(module.apply)({"params": params}, images))
  except UserError as error:
    return row("refused", str(error).replace(path, "FILE").replace(
        os.path.dirname(path), "FOLDER"))
  except Exception as error:  # each one is a fault of ours
    return row("odd", f"{type(error).__name__}: {error}"[:200])
  if found.shape != expected.shape:
    return row("wrong", f"shape {found.shape}, expected {expected.shape}")
  far = float(np.abs(found - expected).max() / expected.std())
  return row("equal" if far < _CLOSE else "wrong", f"{far:.1e}")


def shake(model: Any) -> Any:
  """No parameter at a special value."""
  import torch
  torch.manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.02 * torch.randn_like(p))
  return model.eval()


def fits(model: Any) -> bool:
  return sum(p.numel() for p in model.parameters()) <= 1e6 * _LARGEST.value


def images_of(size: int) -> np.ndarray:
  return np.random.default_rng(0).normal(
      size=(2, size, size, 3)).astype(np.float32)


def torch_images(size: int) -> Any:
  import torch
  return torch.from_numpy(images_of(size).transpose(0, 3, 1, 2).copy())


# --- timm ---------------------------------------------------------------------

def timm_model(name: str) -> Any:
  """The model without a head, of two blocks if it can be; None if large."""
  import timm
  import torch
  for cut in ({"depth": 2}, {}):
    try:
      with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **cut)
    except Exception:
      continue  # it has no depth, or needs a library
    if fits(model):
      torch.manual_seed(0)
      return shake(timm.create_model(name, num_classes=0, **cut))
  return None


def sweep_timm(names: list[str]):
  from safetensors.torch import save_file
  import timm
  import torch
  seen = set()
  for name in names or [n for n in timm.list_models()
                        if n.startswith(_FAMILIES)]:
    model = timm_model(name)
    if model is None:
      continue
    size = model.pretrained_cfg.get("input_size", (3, 224, 224))[-1]
    state = model.state_dict()
    key = (type(model).__name__, getattr(model, "global_pool", ""), size,
           *sorted(f"{n} {tuple(t.shape)}" for n, t in state.items()))
    if key in seen:
      continue
    seen.add(key)
    try:
      with torch.no_grad():
        expected = model(torch_images(size)).numpy()
    except Exception as error:
      print(f"timm itself does not run {name}: {error}"[:200])
      continue
    heads = next((m.num_heads for m in model.modules()
                  if hasattr(m, "num_heads")), None)
    config = {
        "architecture": name, "num_classes": 0,
        "num_features": model.num_features,
        "global_pool": getattr(model, "global_pool", None),
        "pretrained_cfg": {
            k: v for k, v in model.pretrained_cfg.items() if isinstance(
                v, (str, int, float, list, tuple, bool))}}
    def write(folder, state=state, config=config):
      save_file({n: t.clone().contiguous() for n, t in state.items()},
                os.path.join(folder, "model.safetensors"))
      with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file)
    yield from both("timm", name, write, size, expected, heads,
                    timm_gelu(model))


def timm_gelu(model: Any) -> str:
  for module in model.modules():
    kind = type(module).__name__
    if kind == "QuickGELU":
      return "quick"
    if kind == "GELUTanh" or getattr(module, "approximate", "") == "tanh":
      return "tanh"
  return "exact"


def both(library, name, write, size, expected, heads, gelu):
  """The rows of a file without and with its configuration.

  Args:
    write: takes a folder, writes model.safetensors and config.json.
  """
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "model.safetensors")
    config, away = (os.path.join(folder, n) for n in ("config.json", "away"))
    write(folder)
    os.rename(config, away)
    for with_config in (False, True):
      if with_config:
        os.rename(away, config)
      yield judge(library, name, with_config, path, images_of(size), expected,
                  heads, gelu)


# --- Hugging Face -------------------------------------------------------------

def small_config(kind: Any, leave: tuple[str, ...] = ()) -> Any:
  """A small configuration of a class, as far as it has our sizes.

  Args:
    leave: sizes of ours that the class does not take.
  """
  def sizes(config):
    own = _SMALL | (_SMALL_SWIN if hasattr(config, "depths") else {})
    taken = {k: v for k, v in own.items()
             if hasattr(config, k) and k not in leave}
    # Swin calls num_heads, a list, num_attention_heads too.
    return {k: v for k, v in taken.items() if isinstance(v, list) or k in (
        "image_size", "patch_size") or not isinstance(
            getattr(config, k), (list, tuple))}
  config = kind()
  inner = {name: getattr(config, name, None)
           for name in ("vision_config", "text_config")}
  if inner["vision_config"] is None:
    return kind(**sizes(config))
  inner = {name: {**c.to_dict(), **sizes(c)} for name, c in inner.items() if c}
  if "vocab_size" in inner.get("text_config", {}):
    inner["text_config"]["vocab_size"] = 99
  return kind(**inner)


def features_of(model: Any, size: int) -> np.ndarray:
  """What a linear head of the class reads, or its pooled output."""
  import torch
  tower = getattr(model, "vision_model", model)
  with torch.no_grad():
    out = tower(pixel_values=torch_images(size))
  pooled = getattr(out, "pooler_output", None)
  kind = model.config.model_type
  if pooled is not None and ("clip" in kind or "siglip" in kind
                             or "swin" in kind):
    return pooled.numpy()
  tokens = out.last_hidden_state
  has_cls = any(n.endswith(("cls_token", "class_embedding"))
                for n, _ in model.named_parameters())
  return (tokens[:, 0] if has_cls else tokens.mean(1)).numpy()


def hf_model(name: str) -> Any:
  """A small model of a model type, None if none can be made."""
  import torch
  import transformers
  from transformers.models.auto import modeling_auto
  classes = modeling_auto.MODEL_MAPPING_NAMES.get(name)
  if classes is None:
    return None
  class_ = classes if isinstance(classes, str) else classes[0]
  for leave in _ODD_SIZES:
    try:
      model_class = getattr(transformers, class_)
      config = small_config(model_class.config_class, leave)
      with torch.device("meta"):  # llama4's has 10^11 parameters
        model = model_class(config)
      if not fits(model):
        print(f"not made: {name}: its small configuration is large")
        return None
      return shake(model_class(config))
    except Exception as error:  # a library that is missing, or odd sizes
      why = " ".join(f"{type(error).__name__}: {error}".split())
  print(f"not made: {name}: {why}"[:160])
  return None


def sweep_hf(names: list[str]):
  import transformers
  from transformers.models.auto import modeling_auto
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  vision = set(modeling_auto.MODEL_FOR_IMAGE_MAPPING_NAMES) | set(
      modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES) | {
          "clip_vision_model", "siglip_vision_model"}
  size = _SMALL["image_size"]
  for name in names or sorted(vision):
    model = hf_model(name)
    if model is None:
      continue
    try:
      expected = features_of(model, size)
    except Exception:  # its file is to be refused, whatever it computes
      expected = np.zeros((2, 0), np.float32)
    # A file's tensors are not called as the module's parameters are.
    yield from both("Hugging Face", name, model.save_pretrained, size,
                    expected, 4, _GELU.get(hidden_act(model.config), "exact"))


def hidden_act(config: Any) -> Any:
  inner = getattr(config, "vision_config", config)
  return getattr(inner, "hidden_act", None)


# --- The table ----------------------------------------------------------------

def table(rows: list[Row]) -> str:
  """Markdown: the counts; then for each library the models that are equal, and
  each sentence that refuses a file."""
  lines = ["| | equal | refused | silently wrong | no sentence |",
           "|---|---:|---:|---:|---:|"]
  files = collections.defaultdict(list)
  for r in rows:
    files[r.library, r.config].append(r)
  for (library, config), of in files.items():
    counts = collections.Counter(r.result for r in of)
    cells = (str(counts[x]) for x in ("equal", "refused", "wrong", "odd"))
    lines.append(f"| {beside(library, config)} | {' | '.join(cells)} |")
  for (library, config), of in files.items():
    found = collections.defaultdict(list)
    for r in of:
      found["equal" if r.result == "equal" else
            sentence(r.detail)].append(r.name)
    lines += ["", f"| {beside(library, config)} | files | models |",
              "|---|---:|---|"]
    lines += [f"| {what} | {len(names)} | {families(names)} |"
              for what, names in sorted(found.items(), key=lambda x: (
                  x[0] != "equal", -len(x[1]), x[0]))]
  return "\n".join(lines) + "\n"


def beside(library: str, config: bool) -> str:
  return f"{library}, config.json {'beside' if config else 'missing'}"


def sentence(detail: str) -> str:
  """What a refusal says, without the file and its names and numbers."""
  text = re.sub(r"^weights file 'FILE':? ?|\([^()]*\)", "", detail)
  text = re.sub(r"(, )?which is not supported.*", "", text)
  text = re.sub(r": (use a plain|its first|tensors of|if it|leave|add).*", "",
                text)
  text = re.sub(r"(?<!\w)'[^']*'|(?<![\w-])\d[\d., x]*", "... ", text)
  return re.sub(r"\s+([\s,.:;]|$)", r"\1", text).replace("|", "/")[:160]


def families(names: list[str]) -> str:
  """Names of models, without sizes and repetitions."""
  sizes = (r"(?<=_)(x?x?tiny|x?small|medium|little|base|x?large|huge|giant|"
           r"gigantic|betwixt|mediumd|wee|pwee|dwee|d|dpwee|dlittle|xs|so\d+m2?|"
           r"[tsmlbgh])(?=_|$)|(?<=patch)\d+|(?<=window)\d+|(?<=_)\d{2,4}(?=_|$)")
  short = (re.sub(r"(_\*)+", "_*", re.sub(sizes, "*", n)) for n in names)
  return ", ".join(f"`{n}`" for n in sorted(set(short)))


def main(argv: list[str]) -> None:
  warnings.filterwarnings("ignore")
  # torchvision may be of another version than torch; timm needs none of it.
  sys.modules.setdefault("torchvision._meta_registrations",
                         types.ModuleType("absent"))
  sweeps = {"timm": sweep_timm, "hf": sweep_hf}
  rows: list[Row] = []
  for library in [_LIBRARY.value] if _LIBRARY.value else sweeps:
    for row in sweeps[library](argv[1:]):
      rows.append(row)
      if row.result in ("wrong", "odd") or _LIST.value:
        print(f"{row.result:8}{row.library} {row.name}"
              f"{' + config' if row.config else ''}: {row.detail}", flush=True)
  text = table(rows)
  print(text)
  if _OUT.value:
    with open(_OUT.value, "w", encoding="utf-8") as file:
      file.write(text)
  sys.exit(any(row.result in ("wrong", "odd") for row in rows))


if __name__ == "__main__":
  _LIBRARY = flags.DEFINE_enum("library", None, ("timm", "hf"), "one alone")
  _LARGEST = flags.DEFINE_integer(
      "largest", 60, "millions of parameters of a model, after it was cut")
  _OUT = flags.DEFINE_string("out", "", "Markdown file to write")
  _LIST = flags.DEFINE_bool("list", False, "a line for each file")
  app.run(main)
