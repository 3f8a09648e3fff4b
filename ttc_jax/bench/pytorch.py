"""What `bench --against=torch` times: PyTorch doing the stage-2 step, eager and
by torch.compile, and PyTorch's matrix products.

A plain ViT as timm writes it: fused q, k, v, scaled_dot_product_attention,
nn.GELU, nn.LayerNorm; for a Swin, timm's own model. As in TTC, training tunes
the norms, a K x K map on selected channels after the MLP of the adapted blocks,
and the head.
"""
from collections.abc import Callable
import time
from typing import Any, NamedTuple

import numpy as np

from ttc_jax import hardware
from ttc_jax.backbones.swin import Swin
from ttc_jax.errors import UserError


def reason(error: Exception) -> str:
  """Returns an error as one line, its first 200 characters."""
  return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


try:
  import torch
  from torch import nn
  from torch.nn import functional as F
except Exception as e:  # ImportError, or what a broken installation raises
  raise UserError("--against=torch needs PyTorch, which cannot be imported "
                  f"({reason(e)}): pip install torch") from e


class Block(nn.Module):
  """A pre-LN block with TTC's map on the output of the MLP."""

  def __init__(self, width, heads, hidden, gelu, channels):
    super().__init__()
    self.heads = heads
    self.norm1 = nn.LayerNorm(width, eps=1e-6)
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)
    self.norm2 = nn.LayerNorm(width, eps=1e-6)
    self.fc1 = nn.Linear(width, hidden)
    self.act = nn.GELU("tanh" if gelu == "tanh" else "none")
    self.fc2 = nn.Linear(hidden, width)
    self.adapter = nn.Parameter(torch.zeros(len(channels), len(channels)))
    self.register_buffer("channels", channels)

  def forward(self, x):
    B, N, D = x.shape
    qkv = self.qkv(self.norm1(x)).reshape(B, N, 3, self.heads, D // self.heads)
    y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
    x = x + self.proj(y.transpose(1, 2).reshape(B, N, D))
    y = self.fc2(self.act(self.fc1(self.norm2(x))))
    change = y.index_select(-1, self.channels) @ self.adapter.to(y.dtype)
    return x + y.index_add(-1, self.channels, change)


class ViT(nn.Module):
  """(B, 3, S, S) -> logits (B, classes); `vit` is the Linen module."""

  def __init__(self, vit, k, classes):
    super().__init__()
    D, n = vit.width, (vit.image_size // vit.patch) ** 2
    self.pool = vit.pool
    self.embed = nn.Conv2d(3, D, vit.patch, vit.patch)
    self.cls = nn.Parameter(torch.zeros(1, 1, D))
    self.position = nn.Parameter(0.02 * torch.randn(1, n, D))
    self.blocks = nn.Sequential(*(
        Block(D, vit.heads, vit.hidden, vit.gelu,
              torch.randperm(D)[:k].sort().values) for _ in range(vit.depth)))
    self.norm = nn.LayerNorm(D, eps=1e-6)
    self.head = nn.Linear(D, classes)

  def forward(self, images):
    x = self.embed(images).flatten(2).transpose(1, 2) + self.position
    if self.pool == "cls":
      x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
    x = self.norm(self.blocks(x))
    return self.head(x[:, 0] if self.pool == "cls" else x.mean(1))


def timm_swin(swin: Any, k: int, classes: int) -> nn.Module:
  """Returns timm's Swin with TTC's maps on the MLPs of the adapted blocks.

  Raises:
    UserError: timm is not installed, or cannot be imported.
  """
  try:
    from timm.models.swin_transformer import SwinTransformer
  except Exception as e:  # beside another torchvision: RuntimeError
    raise UserError(
        "--against=torch needs timm for a Swin, and it cannot be imported "
        f"({reason(e)}): pip install timm, and a torchvision that fits "
        "PyTorch") from e
  model = SwinTransformer(
      img_size=swin.image_size, patch_size=swin.patch, embed_dim=swin.embed,
      depths=swin.depths, window_size=swin.window, num_classes=classes,
      num_heads=tuple(swin.heads * 2 ** s for s in range(len(swin.depths))),
      drop_path_rate=0.0)
  stages: Any = model.layers
  mlps = [block.mlp for stage in stages for block in stage.blocks]
  for mlp in mlps:
    mlp.act = nn.GELU("tanh" if swin.gelu == "tanh" else "none")
  for mlp in mlps[-swin.default_blocks:]:
    fc2 = mlp.fc2
    fc2.adapter = nn.Parameter(torch.zeros(k, k))
    fc2.register_buffer(
        "channels", torch.randperm(fc2.out_features)[:k].sort().values)
    fc2.register_forward_hook(_adapt)
  return model


def _adapt(fc2, inputs, y):
  change = y.index_select(-1, fc2.channels) @ fc2.adapter.to(y.dtype)
  return y.index_add(-1, fc2.channels, change)


def make_model(backbone: Any, k: int, classes: int) -> nn.Module:
  """Returns the model with all parameters frozen that TTC's stage 2 does not
  tune."""
  make = timm_swin if isinstance(backbone, Swin) else ViT
  model = make(backbone, k, classes)
  for name, parameter in model.named_parameters():
    parameter.requires_grad_(
        "norm" in name or "adapter" in name or name.startswith("head"))
  return model


class Way(NamedTuple):
  """A way to take a training step.

  Attributes:
    step: takes one and waits for its end.
    compile_seconds: of the first step; None if nothing is compiled.
    peak_bytes: of a step on the device; None on CPU, which does not say.
  """
  step: Callable[[], None]
  compile_seconds: float | None
  peak_bytes: int | None


def make_ways(backbone: Any, config: Any,
              classes: int) -> tuple[dict[str, Way], str]:
  """Returns ({"torch": way, "torch.compile": way}, reason).

  The reason says why torch.compile is left out, e.g. for want of a C++
  compiler; "" if it is not.
  """
  eager = make_step(backbone, config, classes)
  ways = {"torch": Way(eager, None, _peak(eager))}
  begin = time.perf_counter()
  try:
    step = make_step(backbone, config, classes, compiles=True)
    step()
  except Exception as e:  # the compiler's, the linker's, the system's
    return ways, reason(e)
  seconds = time.perf_counter() - begin
  return ways | {"torch.compile": Way(step, seconds, _peak(step))}, ""


def _peak(step):
  if not torch.cuda.is_available():
    return None
  step()  # makes the optimiser's state
  torch.cuda.reset_peak_memory_stats()
  step()
  return torch.cuda.max_memory_allocated()


def _device():
  """The device; sets the threads to the cores that this process may use."""
  torch.set_num_threads(hardware.cores())
  torch.set_float32_matmul_precision("high")  # TF32 on CUDA, as XLA's default
  return "cuda" if torch.cuda.is_available() else "cpu"


def make_step(backbone: Any, config: Any, classes: int,
              compiles: bool = False) -> Callable[[], None]:
  """Returns a function that takes one step and waits for it.

  bfloat16 is autocast, as PyTorch users do it: parameters stay float32.
  """
  torch.manual_seed(0)
  device = _device()
  model = make_model(backbone, config.k, classes).to(device)
  tx = torch.optim.AdamW(
      [p for p in model.parameters() if p.requires_grad], 1e-3)
  rng = np.random.default_rng(0)
  shape = (config.batch_size, 3, config.image_size, config.image_size)
  images = torch.from_numpy(
      rng.integers(0, 256, shape, dtype=np.uint8)).to(device)
  labels = torch.from_numpy(
      rng.integers(0, classes, config.batch_size)).to(device)
  dtype = getattr(torch, config.dtype)

  def loss_of(images, labels):
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
      logits = model((images.float() - 127.5) / 127.5)
    return F.cross_entropy(logits.float(), labels)
  loss_fn = torch.compile(loss_of) if compiles else loss_of

  def step():
    loss = loss_fn(images, labels)
    tx.zero_grad()
    loss.backward()
    tx.step()
    _wait(device)
  return step


def make_product(size: int, dtype: str) -> Callable[[], None]:
  """Returns a function that multiplies two square matrices and waits."""
  device = _device()
  x, y = torch.randn(2, size, size, dtype=getattr(torch, dtype), device=device)
  into = torch.empty_like(x)

  def product():
    torch.matmul(x, y, out=into)
    _wait(device)
  return product


def _wait(device):
  if device == "cuda":
    torch.cuda.synchronize()
