"""Trains the small ViT of `checkpoints/`, or a Swin, by distillation.

The student learns every output token of a pretrained ViT teacher on random
crops of the 50,000 training images of CIFAR-10, and the labels. Teacher and
student see the same crop, each at its own size; where the student's grid of
tokens is coarser, as a Swin's, it learns the means of the teacher's tokens,
and its own mean stands for [CLS]. The state is saved every `--save_every`
steps; the same command resumes from it.

  python tools/pretrain.py --images=cifar10_train.tar.xz \
      --teacher=vit_s14.safetensors --out=checkpoints/vit_ti16_64.safetensors
  ... --student=swin_mu --window=4 --out=checkpoints/swin_mu_64.safetensors
"""
import functools
import io
import os
import tarfile
import time

from absl import app, flags
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from ttc_jax import augment, backbones, files, weights
from ttc_jax.normalisation import apply as normalise

_IMAGES = flags.DEFINE_string(
    "images", None, "tar of train/<class>/<number>.jpg", required=True)
_TEACHER = flags.DEFINE_string(
    "teacher", None, "the teacher's weights", required=True)
_OUT = flags.DEFINE_string(
    "out", None, "safetensors file to write", required=True)
_STUDENT = flags.DEFINE_string("student", "vit_ti16", "a backbone, at 64 px")
_WINDOW = flags.DEFINE_integer("window", 0, "of a Swin, tokens a side")
_DTYPE = flags.DEFINE_string("dtype", "float32", "of the teacher's computation")
_STEPS = flags.DEFINE_integer("steps", 1500, "updates in all")
_BATCH = flags.DEFINE_integer("batch", 128, "images an update")
_LR = flags.DEFINE_float("lr", 1e-3, "peak learning rate")
_SAVE_EVERY = flags.DEFINE_integer("save_every", 50, "updates between saves")
_HELD_OUT = flags.DEFINE_integer("held_out", 2000, "images kept for the k-NN")
_NEIGHBOURS = 20


def read_images(path):
  """Returns (images uint8 (N, 32, 32, 3), labels (N,)), in the tar's order."""
  images, names = [], []
  with tarfile.open(path) as tar:
    for member in tar:
      if member.name.endswith(".jpg"):
        data = tar.extractfile(member).read()
        images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        names.append(member.name.split("/")[-2])
  order = np.random.default_rng(0).permutation(len(images))
  labels = np.unique(names, return_inverse=True)[1]
  return np.stack(images)[order], labels[order].astype(np.int32)


def crop(images, key, size, smallest=0.35):
  """Random square crops, mirrored half of the time, resized to `size`."""
  area, flip = jax.random.split(key)
  return augment.random_flip(
      augment.random_crop(images, area, size, smallest), flip)


def tokens(module, params, images):
  """All output tokens (B, N, D), after the final norm."""
  seen = []
  if hasattr(module, "every_token"):  # a ViT norms [CLS] alone
    module = module.clone(every_token=True)

  def tap(site, block, y, x):
    del block, x
    if site == "norm":
      seen.append(y)
    return y
  module.apply({"params": params}, images, tap=tap)
  return seen[0]


def coarser(patches, count):
  """Means of a square grid (B, N, D) over cells: (B, count, D)."""
  B, N, D = patches.shape
  n, cell = round(count ** 0.5), round((N / count) ** 0.5)
  return patches.reshape(B, n, cell, n, cell, D).mean((2, 4)).reshape(B, -1, D)


def loss_fn(params, student, target, images, labels):
  """Squared error of the standardised teacher tokens, plus cross-entropy."""
  out = tokens(student, params["backbone"], images)
  patches = out[:, student.prefix:]
  whole = out[:, :1] if student.prefix else patches.mean(1, keepdims=True)
  logits = whole[:, 0] @ params["to_label"]
  cls_loss = jnp.square(whole @ params["to_cls"] - target[:, :1]).mean()
  patch_loss = jnp.square(patches @ params["to_patches"] - coarser(
      target[:, 1:], patches.shape[1])).mean()
  label_loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, labels).mean()
  return cls_loss + patch_loss + 0.5 * label_loss, (
      cls_loss, patch_loss, label_loss)


def make_tx(steps, lr):
  schedule = optax.warmup_cosine_decay_schedule(0, lr, steps // 20, steps)
  return optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(schedule, b2=0.98, weight_decay=0.05,
                  mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)))


def make_update_fn(student, teacher, teacher_params, moments, tx):
  mean, std = moments

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update_fn(params, opt_state, images, labels, key):
    small = crop(images, key, student.image_size)
    large = crop(images, key, teacher.image_size)
    target = tokens(teacher, teacher_params, normalise(large, "imagenet"))
    target = (target.astype(jnp.float32) - mean) / std
    grads, losses = jax.grad(loss_fn, has_aux=True)(
        params, student, target, normalise(small, "half"), labels)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, losses
  return update_fn


def knn(student, params, images, labels, held_out):
  """Top-1 in percent on the first `held_out` images, cosine k-NN."""
  @jax.jit
  def features(batch):
    batch = crop(batch, jax.random.key(0), student.image_size, smallest=1)
    f = student.apply({"params": params}, normalise(batch, "half"))
    return f / jnp.linalg.norm(f, axis=-1, keepdims=True)
  count = 5 * held_out
  f = np.concatenate([features(images[i:i + 500])
                      for i in range(0, count, 500)])
  near = np.argsort(-f[:held_out] @ f[held_out:].T)[:, :_NEIGHBOURS]
  votes = nn.one_hot(labels[held_out:count][near], labels.max() + 1).sum(1)
  return 100 * float((votes.argmax(-1) == labels[:held_out]).mean())


def main(argv):
  del argv
  images, labels = read_images(_IMAGES.value)
  held_out = _HELD_OUT.value
  teacher, teacher_params = backbones.load(
      "vit_s14", weights=_TEACHER.value, image_size=56)
  fields = dict(window=_WINDOW.value) if _WINDOW.value else {}
  teacher = teacher.clone(dtype=jnp.dtype(_DTYPE.value))
  student = backbones.make(_STUDENT.value, 64, gelu="tanh", **fields)
  sample = crop(images[:500], jax.random.key(0), 56)
  out = tokens(teacher, teacher_params, normalise(sample, "imagenet"))
  out = out.astype(jnp.float32)
  moments = out.mean(0, keepdims=True), out.std(0, keepdims=True)

  D, E = student.width, teacher.width
  params = {"backbone": backbones.init(student),
            "to_cls": jnp.zeros((D, E)), "to_patches": jnp.zeros((D, E)),
            "to_label": jnp.zeros((D, int(labels.max()) + 1))}
  tx = make_tx(_STEPS.value, _LR.value)
  state = {"params": params, "opt_state": tx.init(params), "step": 0}
  state_file = _OUT.value + ".state"
  if os.path.exists(state_file):
    with open(state_file, "rb") as f:
      state = flax.serialization.from_bytes(state, f.read())
  update_fn = make_update_fn(student, teacher, teacher_params, moments, tx)
  params, opt_state = jax.tree.map(
      jnp.asarray, (state["params"], state["opt_state"]))
  start = time.time()
  for step in range(state["step"], _STEPS.value):
    rng = np.random.default_rng((1, step))
    batch = rng.integers(held_out, len(images), _BATCH.value)
    params, opt_state, losses = update_fn(
        params, opt_state, images[batch], labels[batch], jax.random.key(step))
    done = step + 1
    if done % _SAVE_EVERY.value == 0 or done == _STEPS.value:
      with files.replacing(state_file) as f:
        f.write(flax.serialization.to_bytes(
            {"params": params, "opt_state": opt_state, "step": done}))
      speed = (done - state["step"]) / (time.time() - start)
      print(f"step {done}/{_STEPS.value}  cls {losses[0]:.3f}  "
            f"patches {losses[1]:.3f}  label {losses[2]:.3f}  "
            f"{speed * _BATCH.value:.0f} images/s", flush=True)
    if done % (10 * _SAVE_EVERY.value) == 0 or done == _STEPS.value:
      top1 = knn(student, params["backbone"], images, labels, held_out)
      print(f"  k-NN {top1:.1f} %", flush=True)
  weights.write(
      _OUT.value, params["backbone"],
      {"gelu": student.gelu, "epsilon": student.epsilon, **fields},
      dtype="float16", normalisation="half")


if __name__ == "__main__":
  app.run(main)
