"""Labels of VTAB that are computed, and pixels of 0 and 1, for Big Vision.

Copy this file to big_vision/pp/ops_vtab.py. The rules are those of
google-research/task_adaptation, as ttc_jax/vtab/rows.py has them.
"""
from big_vision.pp.registry import Registry
import tensorflow as tf

FAR = 1000.0  # metres, where KITTI shows no vehicle


def _interval(value, thresholds):
  """The largest i with thresholds[i] < value."""
  return tf.reduce_sum(tf.cast(tf.constant(thresholds) < value, tf.int64)) - 1


def _clevr_count(data):
  return tf.shape(data["objects"]["color"])[0] - 3


def _clevr_dist(data):
  away = data["objects"]["pixel_coords"][:, 2]
  return _interval(tf.reduce_min(away), (0., 8., 8.5, 9., 9.5, 10., 100.))


def _kitti(data):
  vehicle = data["objects"]["type"] < 3  # cars, vans, trucks
  away = tf.where(vehicle, data["objects"]["location"][:, 2], FAR)
  nearest = tf.reduce_min(tf.concat([away, [FAR]], 0))
  return _interval(nearest, (-100., 8., 20., 999.))


def _bin(key, wide):
  return lambda data: tf.cast(
      tf.math.floor(tf.cast(data[key], tf.float32) / wide), tf.int64)


LABELS = {
    "clevr_count": _clevr_count, "clevr_dist": _clevr_dist, "kitti": _kitti,
    "dsprites_loc": _bin("label_x_position", 2.0),
    "dsprites_ori": _bin("label_orientation", 2.5)}


@Registry.register("preprocess_ops.vtab_label")
def get_vtab_label(task):
  """Adds data["label"] of a task."""
  return lambda data: {**data, "label": LABELS[task](data)}


@Registry.register("preprocess_ops.vtab_binary")
def get_vtab_binary():
  """Turns pixels of 0 and 1 into 0 and 255, before they are resized."""
  return lambda data: {**data, "image": data["image"] * 255}
