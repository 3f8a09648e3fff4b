import jax
import numpy as np
from PIL import Image, ImageEnhance
from scipy import stats

from ttc_jax import augment, step
from ttc_jax import model as model_lib
from ttc_jax.config import resolved


def images(n=6, size=8):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (n, size, size, 3)).astype(np.float32)


def test_a_crop_of_the_whole_area_at_the_same_size_is_the_image():
  x = images()
  got = augment.random_crop(x, jax.random.key(0), 8, smallest=1.0)
  np.testing.assert_allclose(got, x, atol=1e-2)


def test_a_crop_comes_from_inside_the_image():
  """On a ramp along x, a crop's values grow and stay within the ramp."""
  ramp = np.broadcast_to(
      np.arange(8, dtype=np.float32)[None, None, :, None] * 10, (20, 8, 8, 3))
  got = np.asarray(
      augment.random_crop(ramp, jax.random.key(0), 8, smallest=0.1))
  assert (np.diff(got, axis=2) > -1e-3).all()
  assert got.min() >= 0 and got.max() <= 72
  spans = got[:, 0, -1, 0] - got[:, 0, 0, 0]
  assert spans.min() < 40 < spans.max()  # small areas and large ones


def test_the_shape_of_a_crop_is_timm_s():
  """Its area and the logarithm of its ratio are uniform where it fits."""
  sides = np.asarray(augment._crop_sides(
      jax.random.key(0), 20_000, 0.08, 4 / 3))
  rng, want = np.random.default_rng(0), []
  while len(want) < 20_000:  # timm's get_params, of an image of side 1
    for _ in range(10):
      area = rng.uniform(0.08, 1.0)
      ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
      w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
      if w <= 1 and h <= 1:
        want.append((h, w))
        break
    else:
      want.append((1.0, 1.0))
  for fn in (lambda x: x.prod(-1), lambda x: np.log(x[:, 0] / x[:, 1])):
    assert stats.ks_2samp(fn(sides), fn(np.array(want))).pvalue > 0.01
  assert sides.max() <= 1
  assert np.ptp(sides[:, 0] / sides[:, 1]) > 0.5


def test_a_crop_of_another_shape_is_stretched_to_a_square():
  """Ramps of both axes: what each axis spans are the crop's sides."""
  ramp = np.arange(32, dtype=np.float32)
  x = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 0.0), -1)
  got = np.asarray(augment.random_crop(
      np.stack([x] * 50), jax.random.key(1), 16, 0.3, 4 / 3))
  area, _ = jax.random.split(jax.random.key(1))
  sides = 32 * np.asarray(augment._crop_sides(area, 50, 0.3, 4 / 3))
  step = got[:, 9, 9, :2] - got[:, 6, 6, :2]  # of three pixels, within
  np.testing.assert_allclose(step, 3 * sides / 16, rtol=0.02)


def test_a_flip_mirrors_some_and_leaves_the_others():
  x = images(40)
  got = np.asarray(augment.random_flip(x, jax.random.key(0)))
  same = (got == x).all((1, 2, 3))
  mirrored = (got == x[:, :, ::-1]).all((1, 2, 3))
  assert (same ^ mirrored).all() and 8 < same.sum() < 32


def test_jitter_is_one_of_the_orders_of_pillow_s_enhancements():
  """Of one image: brightness, contrast and saturation in some order."""
  x = images(1)
  got = np.asarray(augment.color_jitter(x, jax.random.key(3), 0.4))
  key = jax.random.split(jax.random.key(3), 1)[0]
  order_key, factor_key = jax.random.split(key)
  factors = jax.random.uniform(factor_key, (3,), minval=0.6, maxval=1.4)
  makers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  picture = Image.fromarray(x[0].astype(np.uint8))
  for i in np.asarray(jax.random.permutation(order_key, 3)):
    picture = makers[i](picture).enhance(float(factors[i]))
  np.testing.assert_allclose(got[0], np.asarray(picture), atol=4)  # rounding


def test_erasing_fills_one_rectangle_of_the_right_area_with_noise():
  flat = np.full((200, 20, 20, 3), 77.0, np.float32)
  got = np.asarray(augment.random_erasing(flat, jax.random.key(0), 0.5, "half"))
  changed = (got != 77).all(-1)
  areas = changed.mean((1, 2))
  assert 70 < (areas > 0).sum() < 130
  for mask in changed[areas > 0]:
    rows, columns = mask.any(1), mask.any(0)
    np.testing.assert_array_equal(mask, np.outer(rows, columns))
    for line in (rows, columns):  # one piece
      assert np.abs(np.diff(np.r_[0, line, 0])).sum() == 2
  # 0.02 to 1/3, to the rounding of the sides.
  assert 0.01 < areas[areas > 0].min() and areas.max() < 0.37
  noise = (got[changed] - 127.5) / 127.5
  assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def one_hot(n=6):
  return np.eye(n, dtype=np.float32)


def test_mixup_mixes_images_and_targets_by_the_same_share():
  x, recipe = images(), augment.Recipe(mixup=0.8)
  shares = set()
  for seed in range(8):
    mixed, targets = map(np.asarray, augment.mix(
        x, one_hot(), jax.random.key(seed), recipe))
    share = targets[0, 0]
    np.testing.assert_allclose(mixed, share * x + (1 - share) * x[::-1],
                               atol=1e-3)
    np.testing.assert_allclose(targets, share * one_hot() +
                               (1 - share) * one_hot()[::-1], atol=1e-6)
    shares.add(round(float(share), 3))
  assert len(shares) == 8


def test_cutmix_replaces_a_box_and_counts_its_area():
  x, recipe = images(6, 16), augment.Recipe(cutmix=1.0)
  sizes = set()
  for seed in range(8):
    mixed, targets = map(np.asarray, augment.mix(
        x, one_hot(), jax.random.key(seed), recipe))
    kept = (mixed == x).all(-1)[0]
    other = (mixed == x[::-1]).all(-1)[0]
    assert (kept | other).all()
    box = ~kept
    np.testing.assert_array_equal(box, np.outer(box.any(1), box.any(0)))
    assert np.isclose(targets[0, 0], kept.mean(), atol=1e-6)
    sizes.add(int(box.sum()))
  assert len(sizes) > 4


def test_both_take_turns():
  x, recipe = images(6, 16), augment.Recipe(mixup=0.8, cutmix=1.0)
  whole = []
  for seed in range(20):
    mixed, _ = augment.mix(x, one_hot(), jax.random.key(seed), recipe)
    whole.append(bool(((mixed == x) | (mixed == x[::-1])).all()))
  assert 4 < sum(whole) < 16


def test_an_empty_recipe_changes_nothing():
  x = images()
  key, recipe = jax.random.key(0), augment.Recipe()
  assert augment.change(x, key, recipe, "half") is x
  assert augment.mix(x, x, key, recipe)[0] is x


def test_augmented_losses_have_gradients_of_the_task_s_classes_alone(
    config, model, params, split):
  """All of it at once, in the compiled step."""
  config.augment.update(dict(randaugment=9.0, erasing=0.25, mixup=0.8,
                             cutmix=1.0))
  config.label_smoothing, config.batch_size = 0.1, 16
  plan = step.make_plan(config)
  assert plan.augments
  loss = jax.jit(step.make_loss_fn(model, plan))
  padded = params | {"head": model_lib.pad_head(params["head"])}
  hyper = step.make_hyper(resolved(config), 2, len(params["head"]["bias"]))
  value, grads = jax.value_and_grad(loss)(
      padded, step.Fixed({}, {}, hyper),
      (split.images[:16], split.labels[:16]), jax.random.key(0))
  assert np.isfinite(value)
  grad = np.asarray(grads["head"]["bias"])
  assert np.abs(grad[:4]).max() > 0 and not grad[4:].any()
