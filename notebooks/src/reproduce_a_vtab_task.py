# %% [markdown]
# # Reproduce a VTAB-1K task
#
# VTAB-1K has 19 tasks with 1000 training images each. This notebook runs one of
# them from its TFDS data set, as in Table 1 of the paper: the learning rate is
# chosen on 200 validation images, then the model trains on all 1000 and is
# tested once. It runs on a TPU or a GPU.
#
# Without data it shows the same steps on a small data set, which it prepares in
# TFDS's format, with the small embedded backbone. That takes a few minutes on 2
# CPU cores, and its result is **not** one of VTAB-1K.

# %%
import glob
import json
import os
import subprocess
import sys
import tempfile

from matplotlib import pyplot as plt
import numpy as np

SHORT = bool(os.environ.get("TTC_JAX_SHORT"))  # a quick test of this notebook
# A TFDS directory, for example "/content/tensorflow_datasets". Empty: a small
# data set is made.
DATA = os.environ.get("DATA", "")
TASK = "caltech101"
PREPARE = False  # True: TFDS downloads the task's data set into DATA
# The ViT-B/16 of the paper, trained on ImageNet-21K; used where DATA is set.
WEIGHTS = ("https://storage.googleapis.com/vit_models/imagenet21k/"
           "ViT-B_16.npz")
OUT = tempfile.mkdtemp(prefix="ttc_jax_")
WORKDIR = os.path.join(OUT, "run")  # on Colab, a folder of your Drive is kept

def command(*words):
  """Runs `python -m ttc_jax ...` and shows its output; stops on an error."""
  with subprocess.Popen(
      [sys.executable, "-m", "ttc_jax", *words], text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
    for line in process.stdout:
      print(line, end="", flush=True)
  assert process.returncode == 0, "the command failed: see above"

# %% [markdown]
# ## Data
#
# To run a true task, set `DATA`. `PREPARE = True` builds the data set there
# first, which needs TensorFlow and a download (Caltech101: 132 MB). TFDS cannot
# download `resisc45` and `diabetic_retinopathy`; the command says which file
# belongs where. To read weights from the web:
# `%pip install "fsspec[http]>=2026.6"`.

# %%
if DATA and PREPARE:
  command("tasks", "prepare", TASK, f"--data={DATA}")
if DATA:
  command("tasks", "check", TASK, f"--data={DATA}")

# %% [markdown]
# Without `DATA`, TFDS writes the data set `sprites`: 1000 training and some
# test pictures of the built-in task `sprites_location` (in which of 16 columns
# is the sprite?). The first 800 are for training and the last 200 for
# validation, as in VTAB-1K.

# %%
import ttc_jax


def prepare_sprites(folder, counts):
  """Writes the data set folder/sprites/1.0.0; counts are {split: images}."""
  from PIL import Image
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()
  task = ttc_jax.tasks.load("sprites_location", size=64)

  class Sprites(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
          builder=self, features=tfds.features.FeaturesDict({
              "image": tfds.features.Image(shape=(64, 64, 3)),
              "label": tfds.features.ClassLabel(names=list(task.classes))}))

    def _split_generators(self, manager):
      parts = {"train": "trainval", "test": "test"}
      return {name: self._generate_examples(name, task.split(part))
              for name, part in parts.items()}

    def _generate_examples(self, name, split):
      for i in range(counts[name]):
        path = os.path.join(folder, f"{name}{i}.png")
        Image.fromarray(split.images[i]).save(path)
        yield i, {"image": path, "label": int(split.labels[i])}

  Sprites(data_dir=folder, file_format="array_record").download_and_prepare()

if DATA:
  data, name = DATA, TASK
  arguments = f"task={TASK},data={DATA},weights={WEIGHTS},backbone=vit_b16"
else:
  prepare_sprites(OUT, {"train": 1000, "test": 400})
  data = (f"tfds:sprites?dir={OUT}&train=train[:800]&val=train[800:]"
          "&test=test")
  name, = ttc_jax.tasks.in_data(data)
  weights = os.path.join(os.path.dirname(ttc_jax.__file__), "checkpoints",
                         "vit_ti16_64.safetensors")
  arguments = f"task={name},data='{data}',weights={weights},size=64"
  print("No DATA: a small data set that is not in VTAB-1K, and a small "
        "backbone.")

# %%
task = ttc_jax.tasks.load(name, size=224 if DATA else 64, data=data)
figure, axes = plt.subplots(2, 6, figsize=(10, 3.8))
for ax, image, label in zip(
    axes.flat, task.split("train").images, task.labels["train"],
    strict=False):
  ax.imshow(image)
  ax.set_title(task.classes[label], fontsize=9)
  ax.axis("off")
plt.show()

# %% [markdown]
# ## Run
#
# `protocol=select` tries two learning rates and two weight decays, 50 epochs in
# each of the two stages. A stopped command goes on where it was when you run
# the cell again. `bfloat16` is faster on TPUs and recent GPUs.

# %%
settings = ["--config.dtype=bfloat16"] if DATA else [
    "--config.epochs=3", "--config.grid.lr=2e-3,1e-2",
    "--config.grid.weight_decay=1e-4,"]
if SHORT:
  settings = ["--config.epochs=1", "--config.limit=64",
              "--config.grid.lr=1e-2,", "--config.grid.weight_decay=1e-4,"]
command("train", f"--workdir={WORKDIR}",
        f"--config=vtab:method=ttc,protocol=select,{arguments}", *settings)

# %% [markdown]
# ## Result
#
# `--published` adds what papers report for VTAB-1K with a ViT-B/16. Of a data
# set that is not in VTAB-1K there are no such numbers.

# %%
command("report", WORKDIR, "--published")

# %% [markdown]
# The loss of every run:

# %%
figure, ax = plt.subplots(figsize=(6, 3.2))
for path in sorted(glob.glob(os.path.join(WORKDIR, "runs", "*", "row.json"))):
  with open(path) as file:
    row = json.load(file)
  with open(path.replace("row.json", "metrics.jsonl")) as file:
    losses = [json.loads(line)["loss"] for line in file]
  ax.plot(np.arange(1, len(losses) + 1), losses, marker=".",
          label=f"{row['protocol']}: lr {row['lr']:g}, weight decay "
          f"{row['weight_decay']:g}")
ax.set_xlabel("epoch, both stages")
ax.set_ylabel("training loss")
ax.xaxis.get_major_locator().set_params(integer=True)
ax.legend(fontsize=8)
plt.show()
