"""Laws of the drawn tasks; labels are read back from the pixels."""
import numpy as np
import pytest

from ttc_jax import tasks
from ttc_jax.tasks import rendered

pytestmark = pytest.mark.filterwarnings("error")

NAMES = sorted(rendered.SCENES)
ROWS = range(48)


def bright(name, row):
  """Grey levels above the dark ground, and the pixel centres."""
  grey = rendered.render(name, "test", row).mean(-1)
  grey = np.maximum(0, grey - 0.5 * (grey.max() + np.median(grey)))
  y, x = np.mgrid[:64, :64] + 0.5
  return grey, x, y


def solid_pixels(name, row):
  """Where colours are strong: the solids, not the grey ground and shadows."""
  pixels = rendered.render(name, "test", row).astype(int)
  return pixels.max(-1) - pixels.min(-1) > 62


def components(mask):
  """Number of 4-connected regions with more than 3 pixels, by flooding."""
  mask, count = mask.copy(), 0
  for start in zip(*np.nonzero(mask), strict=True):
    todo, area = [start], 0
    while todo:
      y, x = todo.pop()
      if 0 <= y < 64 and 0 <= x < 64 and mask[y, x]:
        mask[y, x] = False
        area += 1
        todo += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    count += area > 3
  return count


@pytest.mark.parametrize("name", NAMES)
def test_an_image_depends_on_task_split_and_row_alone(name):
  first = rendered.render(name, "val", 7)
  rendered.render(name, "val", 8)
  np.testing.assert_array_equal(first, rendered.render(name, "val", 7))
  assert first.shape == (64, 64, 3) and first.dtype == np.uint8
  for split, row in (("val", 23), ("train", 7), ("test", 7)):
    assert (first != rendered.render(name, split, row)).any()


def test_splits_share_no_seed():
  first = {rendered.factors(n, s, r)[1].bytes(16) for n in NAMES
           for s in ("train", "val", "test") for r in range(50)}
  assert len(first) == len(NAMES) * 3 * 50


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_balanced_and_whole(name):
  task = tasks.load(name, size=8)
  sizes = {"train": 800, "val": 200, "trainval": 1000,
           "test": 2000}
  assert task.group == "Structured"
  for split, n in sizes.items():
    counts = np.bincount(task.labels[split], minlength=len(task.classes))
    assert counts.sum() == n and len(counts) == len(task.classes)
    assert np.ptp(counts) <= (2 if split == "trainval" else 1)


def test_split_is_the_rendered_images_in_order(monkeypatch, tmp_path):
  monkeypatch.setitem(rendered._COUNTS, "val", 5)
  task = tasks.load("scene_count", size=64, cache=str(tmp_path))
  split = task.split("val")
  for row in range(5):  # at native size, resizing is the identity
    np.testing.assert_array_equal(
        split.images[row], rendered.render("scene_count", "val", row))
  assert split.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["scene_count", "scene_distance"])
def test_every_scene_finds_room(name):
  for row in range(0, 2000, 5):
    solids, _ = rendered.factors(name, "test", row)
    assert all(1 <= s.x - s.radius and s.x + s.radius <= 63 for s in solids)


def test_the_centre_of_mass_gives_the_location():
  for row in ROWS:
    weight, x, _ = bright("sprites_location", row)
    centre = (weight * x).sum() / weight.sum()
    low = 12 + 2.5 * rendered.label("sprites_location", row)
    assert low - 0.5 < centre < low + 3, row


@pytest.mark.parametrize("shape", rendered._TURNED)
def test_a_quarter_turn_turns_the_picture(shape):
  sprite = rendered.Sprite(shape, 32, 32, 20, 0.4)
  turned = rendered.coverage(sprite._replace(angle=0.4 + np.pi / 2))
  plain = rendered.coverage(sprite)
  np.testing.assert_allclose(turned, np.rot90(plain), atol=0.25)
  assert np.abs(turned - np.rot90(plain)).mean() < 1e-3
  for angle in np.arange(1, 16) * np.pi / 8:  # each label looks different
    other = rendered.coverage(sprite._replace(angle=0.4 + angle))
    assert np.abs(other - plain).sum() > 0.15 * plain.sum()


def test_the_farthest_point_of_a_triangle_gives_the_orientation():
  seen = set()
  for row in range(200):
    sprite, _ = rendered.factors("sprites_orientation", "test", row)
    if sprite.shape != "triangle":
      continue
    weight, x, y = bright("sprites_orientation", row)
    cx, cy = ((weight * c).sum() / weight.sum() for c in (x, y))
    far = np.where(weight > 0, np.hypot(x - cx, y - cy), 0)
    tip = np.unravel_index(far.argmax(), far.shape)
    # angle 0 points up, and angles grow anticlockwise
    angle = np.arctan2(cx - x[tip], cy - y[tip])
    label = rendered.label("sprites_orientation", row)
    off = (angle / (2 * np.pi) * 16 - label - 0.5 + 8) % 16 - 8
    assert abs(off) < 0.8, row
    seen.add(label)
  assert len(seen) > 8


def test_the_number_of_regions_gives_the_count():
  right = [components(solid_pixels("scene_count", row))
           == 3 + rendered.label("scene_count", row) for row in ROWS]
  assert np.mean(right) > 0.8  # a thin bridge or a dim side now and then


def test_the_lowest_solid_pixel_gives_the_distance():
  right = []
  for row in ROWS:
    bottom = np.nonzero(solid_pixels("scene_distance", row))[0].max() + 1
    depth = rendered.DROP / (bottom - rendered.HORIZON)
    bin_ = (depth - rendered.NEAR) / (rendered.FAR - rendered.NEAR) * 6
    right.append(abs(bin_ - rendered.label("scene_distance", row) - 0.5) < 0.9)
  assert np.mean(right) > 0.85
