"""What a run or a benchmark ran on: devices, processor, versions."""
import functools
import os
import platform
from typing import Any

import flax
import jax
import numpy as np
import optax
import PIL

# The kernel's names of what the matrix products of either library may use.
_INSTRUCTIONS = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX", "asimd": "NEON", "sve": "SVE", "bf16": "BF16"}
# Environment variables by which either library is told to use fewer.
_LIMITS = ("XLA_FLAGS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA",
           "MKL_ENABLE_INSTRUCTIONS")


def cores() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def machine(devices: list[jax.Device],
            cpuinfo: str = "/proc/cpuinfo") -> dict[str, Any]:
  """Returns devices and processor, as JSON.

  Args:
    devices: that the benchmark uses, of one kind.
    cpuinfo: the kernel's description of the processor; none is no error.
  """
  told = _told(cpuinfo)
  flags = (told.get("flags") or told.get("Features", "")).split()
  return {"devices": len(devices), "kind": devices[0].device_kind,
          "platform": devices[0].platform, "cores": cores(),
          "processor": told.get("model name") or platform.processor()
                       or platform.machine(),
          "instructions": [name for flag, name in _INSTRUCTIONS.items()
                           if flag in flags],
          "limits": {name: os.environ[name] for name in _LIMITS
                     if os.environ.get(name)}}


def _told(cpuinfo):
  """{name: value} of the first processor."""
  try:
    with open(cpuinfo, encoding="utf-8") as f:
      lines = f.read().partition("\n\n")[0].splitlines()
  except OSError:
    return {}
  pairs = (line.partition(":") for line in lines)
  return {name.strip(): value.strip() for name, _, value in pairs}


@functools.cache
def versions() -> dict[str, str]:
  """Returns the versions that a result depends on."""
  return {"python": platform.python_version(), "jax": jax.__version__,
          "flax": flax.__version__, "optax": optax.__version__,
          "numpy": np.__version__, "pillow": PIL.__version__}
