"""PyTorch's own models, with which ours are compared."""
import importlib

import pytest

_KEPT = []  # operators vanish with the library object that defined them


def import_timm():
  """Returns timm; skips the test where it is not installed.

  timm imports torchvision. PyPI's torchvision is built for CUDA: beside a CPU
  build of PyTorch its operators do not load, and its import fails when it
  describes them. No model here calls them, so it is enough to give them names.
  """
  torch = pytest.importorskip("torch")
  try:
    importlib.import_module("torchvision")
  except ImportError:
    pytest.skip("timm is not installed")
  except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    _KEPT.append(library)
    for name in ("nms", "qnms"):
      library.define(f"{name}(Tensor dets, Tensor scores, "
                     "float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
  return pytest.importorskip("timm")
