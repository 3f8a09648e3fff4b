# %% [markdown]
# # From Big Vision and back
#
# This notebook takes a checkpoint of
# [Big Vision](https://github.com/google-research/big_vision), tunes it, writes
# it back under Big Vision's names, and compares the logits.
#
# Without a checkpoint it makes one from the small embedded backbone. It takes a
# few minutes on a free T4 or on 2 CPU cores.

# %%
import os
import subprocess
import sys
import tempfile

import jax
from matplotlib import pyplot as plt
import numpy as np

import ttc_jax
from ttc_jax import evaluate

SHORT = bool(os.environ.get("TTC_JAX_SHORT"))  # a quick test of this notebook
EPOCHS = 1 if SHORT else 4    # of each stage
IMAGES = 128 if SHORT else 0  # of each split; 0: all
OUT = tempfile.mkdtemp(prefix="ttc_jax_")

# A path, an address or a short name, for example "SigLIP B/16 224" with
# SIZE = 224 (the image tower is read; `%pip install fsspec gcsfs`).
CHECKPOINT = ""
SIZE = 64

def command(*words, codes=(0,), lines=40):
  """Runs `python -m ttc_jax ...`, shows its output, checks its exit code."""
  # On the CPU: this process has taken the memory of the GPU.
  done = subprocess.run(
      [sys.executable, "-m", "ttc_jax", *words], text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"})
  shown = done.stdout.splitlines()
  if len(shown) > lines:
    shown[lines // 2:-lines // 2] = ["..."]
  print("\n".join(shown))
  assert done.returncode in codes, "the command failed: see above"

# %% [markdown]
# ## The checkpoint
#
# `convert` writes weights in another format; `inspect` says what a file holds.

# %%
checkpoint = CHECKPOINT
if not checkpoint:
  embedded = os.path.join(os.path.dirname(ttc_jax.__file__), "checkpoints",
                          "vit_ti16_64.safetensors")
  checkpoint = os.path.join(OUT, "vit_ti16_64.npz")
  command("weights", "convert", embedded, "--to=bigvision",
          f"--out={checkpoint}")
command("weights", "inspect", checkpoint)

# %% [markdown]
# ## Tune
#
# The format is recognised, and with it the backbone and the normalisation of
# pixels. The task `sprites_location` is drawn by the package: in which of 16
# columns is the centre of the sprite?

# %%
task = ttc_jax.tasks.load("sprites_location", size=SIZE)
train = task.split("trainval").first(IMAGES)
test = task.split("test").first(IMAGES or 500)
result = ttc_jax.fit(
    train.images, train.labels, weights=checkpoint, image_size=SIZE,
    classes=task.classes, epochs=EPOCHS, lr=6e-3, progress=False)
print(result)
print(f"test accuracy: {result.accuracy(*test):.1f} %")

# %% [markdown]
# ## Write it back
#
# TTC's maps are folded into the layers before them: the exported file has the
# same arrays as the checkpoint, and the new head.

# %%
folder = result.export("bigvision", os.path.join(OUT, "exported"))
exported = os.path.join(folder, "model.npz")
with np.load(exported) as arrays:
  head = {name: arrays[f"head/{name}"] for name in ("kernel", "bias")}
  for name in sorted(arrays)[:6]:
    print(f"{name:<60}{arrays[name].shape}")
  print(f"... {len(arrays.files)} arrays")

# %% [markdown]
# `diff` lists the tensors that tuning changed, the largest difference first:
# LayerNorms, and the layers that a map was folded into. (Its exit code is 1
# when the files differ.)

# %%
command("weights", "diff", checkpoint, exported, codes=(0, 1),
        lines=12)

# %% [markdown]
# ## Load it again
#
# The exported backbone is loaded as any other checkpoint; the head is a matrix
# and a bias. The images need the normalisation that the exported model's card
# states: (x / 255 - 0.5) / 0.5.

# %%
module, params = ttc_jax.load(result.meta["backbone"], weights=exported,
                              image_size=SIZE)

@jax.jit
def exported_logits(images):
  pixels = (images / 255 - 0.5) / 0.5
  features = module.apply({"params": params}, pixels)
  return features @ head["kernel"] + head["bias"]

tuned = ttc_jax.predict.load(
    result.save(os.path.join(OUT, "sprites.safetensors")), weights=checkpoint,
    merge=False)
ours = evaluate.logits(tuned.model, tuned.params, tuned.buffers, test.images)
theirs = np.asarray(exported_logits(test.images))
difference = np.abs(ours - theirs).max()
print(f"largest difference of a logit: {difference:.1e}; logits are up to "
      f"{np.abs(ours).max():.1f}")
print(f"same class: {100 * np.mean(ours.argmax(1) == theirs.argmax(1)):.1f} %")
# Float32 matrix products are less exact on GPUs and TPUs.
assert difference < (1e-3 if jax.default_backend() == "cpu" else 0.5)

# %%
figure, ax = plt.subplots(figsize=(4, 4))
ax.scatter(ours.ravel(), theirs.ravel(), s=4, alpha=0.4)
ax.axline((0, 0), slope=1, color="0.5", linewidth=0.8)
ax.set_xlabel("logit of the tuned model")
ax.set_ylabel("logit of the exported checkpoint")
ax.set_aspect("equal")
plt.show()

# %%
figure, axes = plt.subplots(2, 6, figsize=(9, 4))
for ax, image, label, row in zip(
    axes.flat, test.images, test.labels, theirs, strict=False):
  ax.imshow(image)
  ax.set_title(f"{task.classes[label]}\npredicted: "
               f"{task.classes[row.argmax()]}", fontsize=8)
  ax.axis("off")
plt.show()

# %% [markdown]
# The folder also holds a model card with the lines that load the file.

# %%
print(os.listdir(folder))
