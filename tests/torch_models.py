"""PyTorch's own models, which ours are compared with."""
import pytest

_KEPT = []  # a library's operators vanish with it


def import_timm():
  """timm; where it is not installed the test is skipped.

  timm imports torchvision, and torchvision as PyPI has it is built for CUDA:
  beside a CPU build of PyTorch its operators do not load, and it fails to
  describe them. No model here calls any, so that they have names is enough.
  """
  torch = pytest.importorskip("torch")
  try:
    import torchvision
  except ImportError:
    pytest.skip("timm is not installed")
  except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    _KEPT.append(library)
    for name in ("nms", "qnms"):
      library.define(f"{name}(Tensor dets, Tensor scores, "
                     "float iou_threshold) -> Tensor")
    import torchvision
  return pytest.importorskip("timm")
