# %% [markdown]
# # Compare methods: accuracy against parameters
#
# This notebook runs TTC-Tuning and other methods on one task, all with the same
# number of epochs and the same choice of learning rates, and draws their test
# accuracy against the number of parameters that they tune. It takes a few
# minutes on a free T4, and five to ten on 2 CPU cores.

# %%
import os
import subprocess
import sys
import tempfile

from matplotlib import pyplot as plt

SHORT = bool(os.environ.get("TTC_JAX_SHORT"))  # a quick test of this notebook
METHODS = "linear,layernorm,ssf,lora,ttc,ttc_random"
TASK = "sprites_location"
WORKDIR = os.path.join(tempfile.mkdtemp(prefix="ttc_jax_"), "compare")
SETTINGS = ["--config.grid.lr=2e-2,6e-2", "--config.seeds=0,"]
EPOCHS = 2  # of each stage; methods of one stage train twice as long
if SHORT:
  METHODS, EPOCHS = "linear,ttc", 1
  SETTINGS = ["--config.grid.lr=2e-2,", "--config.seeds=0,",
              "--config.limit=64", "--config.variants.linear.epochs=4"]

def command(*words):
  """Runs `python -m ttc_jax ...` and shows its output; stops on an error."""
  with subprocess.Popen(
      [sys.executable, "-m", "ttc_jax", *words], text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
    for line in process.stdout:
      print(line, end="", flush=True)
  assert process.returncode == 0, "the command failed: see above"

# %% [markdown]
# ## The task
#
# `sprites_location` is drawn by the package: in which of 16 columns is the
# centre of the sprite? Put another name or your own data into the command
# below: `task=digits`, or `data=/content/pets.zip`.

# %%
import ttc_jax

task = ttc_jax.tasks.load(TASK, size=64)
train = task.split("train")
figure, axes = plt.subplots(1, 8, figsize=(10, 1.6))
for ax, image, label in zip(
    axes.flat, train.images, train.labels, strict=False):
  ax.imshow(image)
  ax.set_title(task.classes[label], fontsize=9)
  ax.axis("off")
plt.show()

# %% [markdown]
# ## The methods
#
# What each method tunes in the embedded ViT-Ti/16:

# %%
if not SHORT:
  command("methods", "--backbone=vit_ti16", "--size=64",
          f"--classes={len(task.classes)}")

# %% [markdown]
# ## Run
#
# Every method tries each learning rate on the validation images (it trains on
# 800 and reports 200). The best rate trains on all 1000 and is tested once. The
# rates are large because the epochs are few.
# `ttc_random` is a control: TTC with random channels in place of the best ones.
# Linear probing trains for 100 epochs on features that are computed once.
#
# A stopped command goes on where it was when you run the cell again.

# %%
command("train", f"--workdir={WORKDIR}",
        f"--config=compare:task={TASK},epochs={EPOCHS},method={METHODS}",
        *SETTINGS)

# %% [markdown]
# ## Accuracy against parameters
#
# One seed and few epochs: differences of a few points mean little, and more
# epochs can change the order. Set `--config.seeds=0,1,2` for error bars.

# %%
from ttc_jax import plots, report

rows = report.collect([WORKDIR])
final = [row for row in rows if row["protocol"] == "final"]
plots.accuracy_against_parameters(final)

# %%
for row in sorted(final, key=lambda row: -row["test_top1"]):
  count = row["module_params"] + row["norm_params"]
  print(f"{row['variant']:<12}{row['test_top1']:5.1f} %"
        f"{count:8,} parameters beside the head, lr {row['lr']:g}")

# %% [markdown]
# The same table for a paper:

# %%
command("report", WORKDIR, "--format=latex")
