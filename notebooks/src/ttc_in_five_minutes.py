# %% [markdown]
# # TTC-Tuning in five minutes
#
# This notebook adapts a small vision transformer to handwritten digits with
# **TTC-Tuning**, a method that trains 0.3 % of its parameters:
#
# 1. **Align.** Tune the LayerNorms and a new head.
# 2. **Select.** Score every channel by its gradient and keep the best ones.
# 3. **Adapt.** Tune a small linear map on the selected channels.
#
# Everything is included: the backbone and the digits need no download. It takes
# a few minutes on a free T4 or on 2 CPU cores.

# %% [markdown]
# ## Load
#
# The embedded backbone is a ViT-Ti/16 for images of 64 x 64 pixels. It is small
# and weak on purpose. With the weights of a ViT-B/16 the same code gives much
# better features.

# %%
import os
import tempfile

from matplotlib import pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

OUT = tempfile.mkdtemp(prefix="ttc_jax_")
# JAX keeps compiled programs here, so that later calls of fit start faster.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR",
                      os.path.join(OUT, "programs"))

import ttc_jax

SHORT = bool(os.environ.get("TTC_JAX_SHORT"))  # a quick test of this notebook
EPOCHS = 1 if SHORT else 4    # of each stage
IMAGES = 128 if SHORT else 0  # of each split; 0: all
SIZE = 64
WEIGHTS = os.path.join(os.path.dirname(ttc_jax.__file__), "checkpoints",
                       "vit_ti16_64.safetensors")

task = ttc_jax.tasks.load("digits", size=SIZE)
train = task.split("trainval").first(IMAGES)
test = task.split("test").first(IMAGES)
print(f"{len(train.labels)} training images, {len(test.labels)} test images")

# %%
figure, axes = plt.subplots(2, 8, figsize=(9, 2.8))
for ax, image, label in zip(
    axes.flat, train.images, train.labels, strict=False):
  ax.imshow(image)
  ax.set_title(task.classes[label], fontsize=9)
  ax.axis("off")
plt.show()

# %% [markdown]
# ## Align
#
# Stage 1 alone is the method `layernorm`. `ttc_jax.fit` takes images and
# labels, and returns the tuned model. For comparison, the method `linear`
# trains the head alone.

# %%
def tune(method, epochs=EPOCHS, lr=6e-3):
  return ttc_jax.fit(
      train.images, train.labels, weights=WEIGHTS, image_size=SIZE,
      classes=task.classes, method=method, epochs=epochs, lr=lr,
      progress=False)

results = {
    "linear": tune("linear", epochs=5 * EPOCHS, lr=1e-2),
    "layernorm": tune("layernorm"),
}
for name, result in results.items():
  print(f"{name}: {result.accuracy(*test):.1f} %")

# %% [markdown]
# ## Adapt
#
# The method `ttc` runs all steps: it aligns (its first stage is the very one
# above, so it is taken from there), scores the channels, and adapts.

# %%
result = results["ttc"] = tune("ttc")
result

# %% [markdown]
# ## Look at the scores
#
# A score says how the loss changes, to first order, when a channel is scaled.
# Each line is a block of the transformer, each column one of its 192 channels.
# Red is positive, blue is negative; in each line the largest magnitude is 1 or
# -1.

# %%
result.scores.plot()

# %% [markdown]
# The channels with the highest scores are selected. These are adapted:

# %%
result.channels.plot()

# %% [markdown]
# The loss of both stages:

# %%
losses = [record["loss"] for record in result.history]
figure, ax = plt.subplots(figsize=(6, 3))
ax.plot(range(1, len(losses) + 1), losses, marker="o")
ax.axvline(len(losses) / 2 + 0.5, color="0.5", linestyle="--")
for x, stage in ((0.25, "align"), (0.75, "adapt")):
  ax.text(x, 0.9, stage, transform=ax.transAxes, ha="center")
ax.set_xlabel("epoch")
ax.set_ylabel("training loss")
ax.xaxis.get_major_locator().set_params(integer=True)
plt.show()

# %% [markdown]
# ## Compare
#
# TTC trains for two stages. A fair comparison gives LayerNorm tuning as many
# epochs as both stages together: `layernorm, twice`. Much of the difference
# between stage 1 and TTC can be more training; one seed cannot tell them apart.

# %%
results["layernorm, twice"] = tune("layernorm", epochs=2 * EPOCHS)

accuracy = {name: found.accuracy(*test) for name, found in results.items()}
for name, found in results.items():
  meta = found.meta
  print(f"{name:<17}{accuracy[name]:5.1f} %   tuned parameters:"
        f"{meta['module_params']:6,} module,{meta['norm_params']:6,} norm,"
        f"{meta['head_params']:6,} head")

figure, ax = plt.subplots(figsize=(6, 2.5))
bars = ax.barh(list(accuracy), list(accuracy.values()))
ax.bar_label(bars, fmt="%.1f", padding=3)
ax.set_xlim(0, 108)
ax.set_xlabel("test accuracy (%)")
ax.invert_yaxis()
plt.show()

# %% [markdown]
# ## Save
#
# A saved model holds only what was tuned: its file is small beside that of the
# backbone. `ttc_jax.predict.load` puts it back on the backbone.

# %%
path = result.save(os.path.join(OUT, "digits.safetensors"))
print(f"{os.path.getsize(path) / 2**10:.0f} KiB; the backbone has "
      f"{os.path.getsize(WEIGHTS) / 2**10:.0f} KiB")

tuned = ttc_jax.predict.load(path, weights=WEIGHTS)
difference = np.abs(tuned.predict(test.images) - result.predict(test.images))
print(f"largest difference of a probability: {difference.max():.1e}")

# %% [markdown]
# ## Predict your own image
#
# Set `OWN` to the path of a picture of one white digit on black, as high as the
# picture. Without it, the next cell draws one and reduces it to 8 x 8 pixels,
# as the digits of the data set were.

# %%
OWN = ""  # for example "/content/seven.png"

def drawn():
  """A seven, drawn with a thick pen."""
  picture = Image.new("L", (128, 128))
  ImageDraw.Draw(picture).line(
      [(24, 10), (96, 10), (48, 124)], fill=255, width=18, joint="curve")
  blurred = picture.filter(ImageFilter.GaussianBlur(4))
  return blurred.resize((8, 8), Image.Resampling.BOX).convert("RGB")

own = Image.open(OWN).convert("RGB") if OWN else drawn()
probabilities = tuned.predict([own])[0]
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8))
left.imshow(own)
left.axis("off")
right.bar(task.classes, probabilities)
right.set_xlabel("class")
right.set_ylabel("probability")
right.set_ylim(0, 1)
plt.show()

# %% [markdown]
# ## Serve several tasks
#
# Many tuned models can share one backbone in memory. A batch may ask a
# different one for each image.

# %%
aligned = results["layernorm"].save(os.path.join(OUT, "aligned.safetensors"))
model = ttc_jax.serve.load(WEIGHTS)
model.add("ttc", path)
model.add("aligned", aligned)
asked = ["ttc", "aligned"]
print(f"true class: {task.classes[test.labels[0]]}")
for name, row in zip(
    asked, model.predict(test.images[[0, 0]], task=asked), strict=True):
  print(f"{name}: {task.classes[row.argmax()]}, {row.max():.2f}")

# %% [markdown]
# Next: `your_own_pictures` tunes on a folder of pictures, and
# `compare_methods` compares TTC with other methods.
