"""An .npz as Big Vision keeps a ViT, with its head."""
import os
from typing import Any

import numpy as np

from ttc_jax import export, files, weights
from ttc_jax.backbones.vit import ViT
from ttc_jax.predict import LoadedModel
from ttc_jax.weights import formats

NAME = "bigvision"
_CODE = """
import numpy as np, ttc_jax
from ttc_jax.tasks import images
module, params = ttc_jax.backbones.load(
    "{backbone}", "{folder}/model.npz", {size})
pixels = images.resize(image, {size}, "{resized}")
x = ((pixels[None] / 255 - {mean}) / {std}).astype(np.float32)
head = np.load("{folder}/model.npz")
logits = (module.apply({{"params": params}}, x)
          @ head["head/kernel"] + head["head/bias"])
"""


def write(model: LoadedModel, folder: str) -> None:
  """model.npz: the backbone by Big Vision's names, head/kernel, head/bias."""
  backbone: Any = model.model.backbone
  export.of_family(model, NAME, {ViT: None})
  export.check_fields(model, NAME, {
      "pool": ("cls", "gap", "map"), "gelu": "tanh", "epsilon": 1e-6,
      "final_norm": True, "layer_scale": False, "registers": 0,
      "rope": 0.0, "pre_norm": False, "pool_norm": False})
  tensors = weights.to_tensors(
      model.params["backbone"], formats.BIGVISION, backbone)
  with files.replacing(os.path.join(folder, "model.npz")) as file:
    np.savez(file, allow_pickle=False, **tensors, **{
        f"head/{n}": np.asarray(x) for n, x in model.params["head"].items()})


TARGET = export.Target(NAME, write, _CODE, merged=True, crops=True)
