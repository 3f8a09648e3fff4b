"""Structured tasks that are drawn, in the spirit of VTAB's: no data needed.

Where a sprite stands, how it is turned, how many solids lie on a ground, how
far the nearest one is. Every image depends on (task, split, row) alone, so it
can be drawn on its own; labels are balanced; splits share no seed.
"""
from collections.abc import Callable
import functools
import hashlib
import pathlib
from typing import Any, NamedTuple
import zlib

import numpy as np
from PIL import Image

from ttc_jax.tasks import Task, images

SIZE = 64    # native side in pixels; then resized like any image
_SUPER = 3   # samples per pixel and axis, against jagged edges
# Keys the cache: another version of this file may draw other images.
_SOURCE = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()
_COUNTS = {"train": 800, "val": 200, "test": 2000}


# Sprites. Plane shapes, as tests of points (u right, v up).

def _heart(u, v):
  lobes = ((np.abs(u) - 0.5)**2 + (v - 0.5)**2 <= 0.5) & (v >= np.abs(u) - 1)
  return (np.abs(u) + np.abs(v) <= 1) | lobes


SHAPES: dict[str, Callable] = {
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 1,
    "ellipse": lambda u, v: u**2 + (v / 0.6)**2 <= 1,
    "heart": _heart,
    "triangle": lambda u, v: (v >= -1) & (np.abs(u) <= 0.35 * (1 - v)),
    "arrow": lambda u, v: np.where(
        v >= 0, np.abs(u) <= 0.8 * (1 - v), (np.abs(u) <= 0.25) & (v >= -1)),
    "ell": lambda u, v: (
        (np.abs(u) <= 0.6) & (np.abs(v) <= 1) & ((u <= -0.1) | (v <= -0.5))),
}
_MOVED = ("square", "ellipse", "heart")
_TURNED = ("heart", "triangle", "arrow", "ell")  # no rotational symmetry


class Sprite(NamedTuple):
  """A plane shape: centroid and radius in pixels, angle anticlockwise."""
  shape: str
  x: float
  y: float
  radius: float
  angle: float


@functools.cache
def _extent(shape: str) -> tuple[float, float, float]:
  """Centroid (u, v) of a shape and the distance of its farthest point."""
  axis = np.linspace(-1.5, 1.5, 601)
  v, u = (c[SHAPES[shape](axis[None], axis[:, None])]
          for c in np.meshgrid(axis, axis, indexing="ij"))
  return u.mean(), v.mean(), np.hypot(u - u.mean(), v - v.mean()).max()


def coverage(sprite: Sprite) -> np.ndarray:
  """How much of every pixel the sprite covers, float (SIZE, SIZE) in [0, 1]."""
  axis = (np.arange(SIZE * _SUPER, dtype=np.float32) + 0.5) / _SUPER
  right, up = axis[None] - sprite.x, sprite.y - axis[:, None]
  u0, v0, extent = _extent(sprite.shape)
  scale = extent / sprite.radius
  cos, sin = scale * np.cos(sprite.angle), scale * np.sin(sprite.angle)
  inside = SHAPES[sprite.shape](u0 + right * cos + up * sin,
                                v0 + up * cos - right * sin)
  return _shrink(inside.astype(np.float32))


def sprite_at(rng: np.random.Generator, label: int) -> Sprite:
  """A sprite whose x is in bin `label` of the 16 in which it can move."""
  return Sprite(shape=str(rng.choice(_MOVED)),
                x=12 + 2.5 * (label + rng.uniform()), y=rng.uniform(12, 52),
                radius=rng.uniform(6, 11), angle=rng.uniform(0, 2 * np.pi))


def sprite_turned(rng: np.random.Generator, label: int) -> Sprite:
  """A sprite whose angle is in bin `label` of the 16 of a full turn."""
  radius = rng.uniform(14, 24)
  x, y = rng.uniform(radius, SIZE - radius, 2)
  angle = 2 * np.pi / 16 * (label + rng.uniform())
  return Sprite(str(rng.choice(_TURNED)), x, y, radius, angle)


def draw_sprite(rng: np.random.Generator, sprite: Sprite) -> np.ndarray:
  """A whitish sprite on a dark coloured gradient, (SIZE, SIZE, 3) in [0, 1]."""
  axis = np.linspace(0, 1, SIZE)
  turn = rng.uniform(0, 2 * np.pi)
  slope = 0.5 + 0.5 * (np.cos(turn) * (axis[None] - 0.5)
                       + np.sin(turn) * (axis[:, None] - 0.5))
  dark, light = rng.uniform(0.0, 0.25, 3), rng.uniform(0.2, 0.5, 3)
  ground = dark + (light - dark) * slope[..., None]
  alpha = coverage(sprite)[..., None]
  return ground + alpha * (rng.uniform(0.8, 1.0, 3) - ground)


# Scenes. Solids on a ground plane, as (inside, brightness) of points (u, v)
# in units of the radius; they touch the ground at v = -1.

def _sphere(u, v):
  depth = np.sqrt(np.maximum(0, 1 - u**2 - v**2))
  lit = np.maximum(0, -0.45 * u + 0.6 * v + 0.66 * depth)
  return u**2 + v**2 <= 1, 0.35 + 0.6 * lit + 0.5 * lit**20


def _cube(u, v):
  front = (np.abs(u + 0.2) <= 0.6) & (v >= -1) & (v <= 0.2)
  top = (v > 0.2) & (v <= 0.6) & (np.abs(u - (v - 0.2) + 0.2) <= 0.6)
  side = (u > 0.4) & (u <= 0.8) & (v - u >= -1.4) & (v - u <= -0.2)
  return front | top | side, np.where(top, 1.1, np.where(front, 0.8, 0.5))


def _cylinder(u, v):
  across = np.sqrt(np.maximum(0, 1 - (u / 0.7)**2))
  body = (np.abs(u) <= 0.7) & (v <= 0.65) & (v >= -0.8 - 0.2 * across)
  top = np.abs(v - 0.65) <= 0.2 * across
  lit = 0.4 + 0.5 * np.maximum(0, 0.85 * across - 0.5 * u / 0.7)
  return body | top, np.where(top, 1.1, lit)


_SOLIDS = (_sphere, _cube, _cylinder)
_COLOURS = np.array([
    (0.85, 0.15, 0.15), (0.15, 0.35, 0.9), (0.15, 0.65, 0.2),
    (0.9, 0.75, 0.1), (0.6, 0.2, 0.75), (0.1, 0.7, 0.75), (0.95, 0.5, 0.1)])
HORIZON, DROP = 16.0, 42.0  # the ground at depth d is seen at HORIZON + DROP/d
NEAR, FAR = 1.0, 3.0        # depths of the nearest solid, in 6 bins


class Solid(NamedTuple):
  """A solid on the ground: depth, and as seen: x and radius in pixels."""
  depth: float
  x: float
  radius: float

  @property
  def y(self) -> float:
    return HORIZON + DROP / self.depth - self.radius


def scene_counted(rng: np.random.Generator, label: int) -> list[Solid]:
  """`label` + 3 solids, spread evenly over the visible ground."""
  return _place(rng, (4.5, 6.5),
                lambda: 1 / rng.uniform(1 / 2.2, 1, label + 3))


def scene_distant(rng: np.random.Generator, label: int) -> list[Solid]:
  """1 to 4 solids; the depth of the nearest one is in bin `label` of 6."""
  nearest = NEAR + (FAR - NEAR) / 6 * (label + rng.uniform())
  others = rng.integers(4)
  return _place(rng, (6, 9), lambda: np.append(
      1 / rng.uniform(1 / (FAR + 0.3), 1 / nearest, others), nearest))


def _place(rng, sizes, make_depths: Callable[[], np.ndarray]) -> list[Solid]:
  """Solids that are apart as seen, far ones first.

  Depths that leave no room are drawn anew, large solids are placed first: so
  a few rounds do, for 10 solids too.
  """
  while True:
    solids: list[Solid] = []
    for depth in sorted(make_depths()):
      solid = _fit(rng, depth, rng.uniform(*sizes) / depth, solids)
      if solid is None:
        break
      solids.append(solid)
    else:
      return solids[::-1]


def _fit(rng, depth: float, radius: float, solids: list[Solid]
         ) -> Solid | None:
  """A solid beside the others, or None if chance finds no place for it."""
  for x in rng.uniform(radius + 1, SIZE - radius - 1, 20):
    solid = Solid(depth, x, radius)
    if all(_apart(solid, other) for other in solids):
      return solid
  return None


def _apart(a: Solid, b: Solid) -> bool:
  return (a.x - b.x)**2 + (a.y - b.y)**2 >= (a.radius + b.radius + 1)**2


def draw_scene(rng: np.random.Generator, solids: list[Solid]) -> np.ndarray:
  """Coloured solids on a grey ground under a sky, (SIZE, SIZE, 3)."""
  row = (np.arange(SIZE * _SUPER) + 0.5)[:, None] / _SUPER
  sky, ground = rng.uniform(0.7, 0.95), rng.uniform(0.4, 0.65)
  grey = np.where(row < HORIZON, sky, ground + 0.003 * (row - HORIZON))
  canvas = np.empty((SIZE * _SUPER, SIZE * _SUPER, 3), np.float32)
  canvas[:] = (grey + rng.uniform(-0.04, 0.04, 3))[:, None]
  for solid in solids:
    _draw_solid(rng, canvas, solid)
  return _shrink(canvas)


def _draw_solid(rng, canvas: np.ndarray, solid: Solid) -> None:
  """Paints a solid and its shadow into the supersampled canvas, in place."""
  reach = 1.5 * solid.radius  # nothing is painted farther from the centre
  x0, x1, y0, y1 = (int(np.clip(c * _SUPER, 0, len(canvas))) for c in (
      solid.x - reach, solid.x + reach, solid.y - reach, solid.y + reach))
  patch = canvas[y0:y1, x0:x1]
  u = ((np.arange(x0, x1) + 0.5) / _SUPER - solid.x)[None] / solid.radius
  v = (solid.y - (np.arange(y0, y1) + 0.5) / _SUPER)[:, None] / solid.radius
  patch[(u - 0.3)**2 + ((v + 0.9) / 0.25)**2 <= 1] *= 0.65
  inside, light = _SOLIDS[rng.integers(len(_SOLIDS))](u, v)
  inside, light = np.broadcast_arrays(inside, light)
  colour = rng.choice(_COLOURS) + rng.uniform(-0.06, 0.06, 3)
  patch[inside] = light[inside, None] * colour


def _shrink(canvas: np.ndarray) -> np.ndarray:
  """Averages the samples of each pixel."""
  parts = [canvas[i::_SUPER, j::_SUPER]
           for i in range(_SUPER) for j in range(_SUPER)]
  return sum(parts, np.zeros((), canvas.dtype)) / _SUPER**2


# Tasks.

class Scene(NamedTuple):
  """What a task draws: random factors for a label, then their picture."""
  factors: Callable[[np.random.Generator, int], Any]
  draw: Callable[[np.random.Generator, Any], np.ndarray]
  classes: tuple[str, ...]


def _bins(what: str, n: int) -> tuple[str, ...]:
  return tuple(f"{what} bin {i}" for i in range(n))


SCENES = {
    "sprites_location": Scene(sprite_at, draw_sprite, _bins("x", 16)),
    "sprites_orientation": Scene(
        sprite_turned, draw_sprite, _bins("angle", 16)),
    "scene_count": Scene(
        scene_counted, draw_scene, tuple(map(str, range(3, 11)))),
    "scene_distance": Scene(scene_distant, draw_scene, _bins("depth", 6)),
}


def names(data: str | None) -> tuple[str, ...]:
  """The drawn tasks, whatever `data` is."""
  del data
  return tuple(SCENES)


def load(name: str, data: str | None) -> Task:
  """A drawn task with 800/200/2000 images; see `tasks.find`."""
  del data
  rows = {s: [(s, i) for i in range(n)] for s, n in _COUNTS.items()}
  rows["trainval"] = rows["train"] + rows["val"]
  return Task(
      name, "Structured", SCENES[name].classes,
      labels={s: np.array([label(name, i) for _, i in r], np.int32)
              for s, r in rows.items()},
      sources={s: _source(name, s, r) for s, r in rows.items()},
      digest=_SOURCE[:16])


def _source(name, split, rows) -> images.Source:
  return images.Source(
      len(rows), lambda i: Image.fromarray(render(name, *rows[i])),
      key=lambda: (_SOURCE, name, split))


def label(name: str, row: int) -> int:
  """Labels take turns, so that they are balanced in every stretch of rows."""
  return row % len(SCENES[name].classes)


def factors(name: str, split: str, row: int
            ) -> tuple[Any, np.random.Generator]:
  """The factors of an image, and the generator, in the state to draw it."""
  seed = [zlib.crc32(name.encode()), sorted(_COUNTS).index(split), row]
  rng = np.random.default_rng(seed)
  return SCENES[name].factors(rng, label(name, row)), rng


def render(name: str, split: str, row: int) -> np.ndarray:
  """One image, uint8 (SIZE, SIZE, 3); split: train, val or test."""
  what, rng = factors(name, split, row)
  picture = SCENES[name].draw(rng, what)
  picture = picture + rng.normal(0, 0.02, picture.shape)
  return np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8)
