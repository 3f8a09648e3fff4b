# %% [markdown]
# # Tune on your own pictures
#
# You need a folder, or a zip file of it, with one folder of pictures for each
# class:
#
# ```
# pets/cat/1.jpg
# pets/cat/2.jpg
# pets/dog/1.jpg
# ```
#
# Folders `train`, `val` and `test` above the classes are understood too.
# Without them, the pictures are divided: a fifth of each class for the test
# and a fifth of the rest for validation.
#
# This notebook divides the pictures, trains, shows the confusion matrix, and
# shows the worst mistakes. It takes a few minutes on a free T4 or on 2 CPU
# cores.

# %%
import os
import tempfile
import zipfile

from matplotlib import pyplot as plt
import numpy as np
from PIL import Image

import ttc_jax
from ttc_jax.tasks import summary

SHORT = bool(os.environ.get("TTC_JAX_SHORT"))  # a quick test of this notebook
EPOCHS = 1 if SHORT else 5  # of each stage
SIZE = 64                   # pixels a side; 224 for most larger backbones
WEIGHTS = os.path.join(os.path.dirname(ttc_jax.__file__), "checkpoints",
                       "vit_ti16_64.safetensors")
OUT = tempfile.mkdtemp(prefix="ttc_jax_")

# A folder or a .zip. On Colab, upload it with the panel on the left.
DATA = ""  # for example "/content/pets.zip"

# %% [markdown]
# ## Pictures
#
# If `DATA` is empty, the next cell puts scikit-learn's handwritten digits into
# a zip file of pictures, one folder for each digit.

# %%
def digits(path, count):
  """Writes a zip file with up to `count` pictures."""
  task = ttc_jax.tasks.load("digits", size=64)
  with zipfile.ZipFile(path, "w") as archive:
    for part in ("trainval", "test"):
      for i, (image, label) in enumerate(
          zip(*task.split(part).first(count // 2), strict=True)):
        with archive.open(
            f"digits/{task.classes[label]}/{part}{i}.png", "w") as file:
          Image.fromarray(image).save(file, format="png")
  return path

data = DATA or digits(
    os.path.join(OUT, "digits.zip"), 200 if SHORT else 2000)

# %% [markdown]
# ## Division
#
# The division depends on the names of the files and is the same on every
# machine.

# %%
name, *others = ttc_jax.tasks.in_data(data)
task = ttc_jax.tasks.load(name, size=SIZE, data=data)
print("\n".join(summary.lines(task)))
if others:
  print(f"Not used here: {', '.join(others)}")

# %%
train, val, test = map(task.split, ("train", "val", "test"))
picks = np.random.default_rng(1).permutation(len(train.labels))[:16]
figure, axes = plt.subplots(2, 8, figsize=(10, 3), squeeze=False)
for ax in axes.flat:
  ax.axis("off")
for ax, i in zip(axes.flat, picks, strict=False):
  ax.imshow(train.images[i])
  ax.set_title(task.classes[train.labels[i]], fontsize=9)
plt.show()

# %% [markdown]
# ## Training
#
# The validation pictures give the learning curve. They are never trained on.
# (`ttc_jax.fit(data, weights=...)` is shorter: it trains on the training and
# validation pictures together, and its `tests` has the test accuracy.)

# %%
result = ttc_jax.fit(
    train.images, train.labels, val=(val.images, val.labels),
    classes=task.classes, weights=WEIGHTS, image_size=SIZE, epochs=EPOCHS,
    lr=6e-3, eval_every=1, progress=False)
result

# %%
epochs = range(1, len(result.history) + 1)
figure, ax = plt.subplots(figsize=(6, 3))
ax.plot(epochs, [r["val_top1"] for r in result.history], marker="o")
ax.axvline(len(epochs) / 2 + 0.5, color="0.5", linestyle="--")
for x, stage in ((0.25, "align"), (0.75, "adapt")):
  ax.text(x, 0.05, stage, transform=ax.transAxes, ha="center")
ax.set_xlabel("epoch")
ax.set_ylabel("validation accuracy (%)")
ax.xaxis.get_major_locator().set_params(integer=True)
plt.show()

# %% [markdown]
# ## Confusion matrix
#
# On the test pictures. A row is a true class, a column a predicted one.

# %%
probabilities = result.predict(test.images)
predicted = probabilities.argmax(1)
print(f"test accuracy: {100 * np.mean(predicted == test.labels):.1f} %")

count = len(task.classes)
matrix = np.zeros((count, count), int)
np.add.at(matrix, (test.labels, predicted), 1)

side = max(3.5, 0.45 * count)
figure, ax = plt.subplots(figsize=(side + 1, side))
ax.imshow(matrix, cmap="Blues")
ax.set_xticks(range(count), task.classes, rotation=45, ha="right")
ax.set_yticks(range(count), task.classes)
ax.set_xlabel("predicted class")
ax.set_ylabel("true class")
if count <= 20:
  for row in range(count):
    for column in range(count):
      ax.text(column, row, matrix[row, column], ha="center", va="center",
              color="white" if matrix[row, column] > matrix.max() / 2
              else "black")
plt.show()

# %% [markdown]
# ## The worst mistakes
#
# The test pictures whose true class has the lowest probability.

# %%
truth = probabilities[np.arange(len(test.labels)), test.labels]
worst = [i for i in np.argsort(truth) if predicted[i] != test.labels[i]][:12]
if not worst:
  print("No mistake. These are the least certain answers.")
  worst = np.argsort(truth)[:12]

figure, axes = plt.subplots(2, 6, figsize=(10, 4.2))
for ax in axes.flat:
  ax.axis("off")
for ax, i in zip(axes.flat, worst, strict=False):
  ax.imshow(test.images[i])
  ax.set_title(f"{task.classes[test.labels[i]]}\nlooks like "
               f"{task.classes[predicted[i]]} ({probabilities[i].max():.2f})",
               fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Keep it
#
# The saved file holds what was tuned. `export` writes the whole model for
# another library, for example `timm`.

# %%
path = result.save(os.path.join(OUT, "pictures.safetensors"))
again = ttc_jax.predict.load(path, weights=WEIGHTS)
answer = again.predict(test.images[:1])[0]
print(f"{path}\n{task.classes[answer.argmax()]}: {answer.max():.2f}")
print(os.listdir(result.export("timm", os.path.join(OUT, "pictures-timm"))))
