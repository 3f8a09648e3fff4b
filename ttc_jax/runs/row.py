"""A trained run -> its test accuracy, its row and its bundle."""
from collections.abc import Sequence
import datetime
import time
from typing import Any

import jax

from ttc_jax import (
  bundles,
  cost,
  evaluate,
  hardware,
  methods,
  optim,
  parallel,
  tasks,
  train,
  trees,
)
from ttc_jax.model import trim_head
from ttc_jax.runs import job as job_lib
from ttc_jax.runs.inputs import Base
from ttc_jax.runs.plan import Run
from ttc_jax.runs.workdir import Row

# Values of a row that are the run's configuration: with the method's options
# all that decide its result (`plan.common_keys`).
_OF_CONFIG = ("backbone", "gelu", "window", "image_size", "normalisation",
              "resample", "dtype", "frozen_dtype", "optimiser", "warmup_lr",
              "min_lr", "decay_all", "drop_path", "label_smoothing",
              "clip_norm", "head_init", "crop_from", "flip", "smallest_crop",
              "crop_aspect", "lr", "weight_decay", "epochs", "warmup_epochs",
              "batch_size", "accumulate", "remat", "limit", "few_shot",
              "masked_tests")


def finish(run: Run, job: train.Job, base: Base, task: tasks.Task,
           outcome: train.Outcome) -> tuple[Row, bundles.Bundle]:
  """Tests a trained run; returns its row and its bundle."""
  params = outcome.state.params
  params = params | {"head": trim_head(params["head"], job.classes)}
  row = (_facts(run, base, task, job) | _accuracy(run, job, task, outcome)
         | _costs(job, outcome, params))
  made = make_bundle(job, base, task.classes, outcome, row)
  row |= {key: made.meta[key] for key in _COUNTS}
  return row | {"finished": _now()}, made


_COUNTS = ("module_params", "norm_params", "head_params")


def make_bundle(job: train.Job, base: Base, classes: Sequence[str],
                outcome: train.Outcome, facts: dict[str, Any]
                ) -> bundles.Bundle:
  """Returns the bundle of a trained job.

  Args:
    classes: their names.
    facts: further metadata: task, what was measured, ...
  """
  c, params = job.config, outcome.state.params
  params = params | {"head": trim_head(params["head"], job.classes)}
  tuned = tuned_leaves(job.method, params)
  meta = facts | {
      "method": job.method.name, "options": job.method.options,
      "classes": list(classes), "backbone": c.backbone,
      "fields": base.backbone.fields, "image_size": c.image_size,
      "normalisation": c.normalisation, "resample": c.resample,
      "dtype": c.dtype, "frozen_dtype": c.frozen_dtype,
      "matmul_precision": c.matmul_precision or "default",
      "weights_sha256": base.source.sha256,
      "weights_source": base.source.address, "seed": job.seed,
      "stages": [s.name for s in job.method.stages],
      "versions": hardware.versions(),
      **{f"{part}_params": n for part, n in optim.counts(tuned).items()}}
  return bundles.Bundle(
      trees.flatten(tuned),
      trees.flatten(parallel.unreplicate(outcome.state.buffers)), meta)


def tuned_leaves(method: methods.Method, params: trees.Tree) -> trees.Tree:
  """Returns the leaves that any stage tunes, as numpy; None fills the gaps."""
  labels = trees.label(params, methods.tuned_rules(method))
  tuned, _ = trees.split(params, labels, "tune")
  return parallel.unreplicate(tuned)


def _facts(run, base, task, job):
  """What the run was, before its numbers."""
  c, options = run.config, run.method.options
  known = methods.options_of(run.method.name)
  return {
      "task": run.task, "group": task.group, "method": run.method.name,
      "variant": run.variant, "protocol": run.protocol, "seed": run.seed,
      "weights": base.source.name, "weights_sha256": base.source.sha256,
      "weights_reading": base.reading,
      "matmul_precision": c.matmul_precision or "default",
      "data_digest": run.data, "options": options,
      **{key: (methods.ADDED | options).get(key) if key in known else None
         for key in ("k", "position", "score", "scale", "adapter_lr",
                     "stage2_lr", "l2")},
      **{key: c[key] for key in _OF_CONFIG}, "augment": dict(c.augment),
      "stages": [s.name for s in run.method.stages],
      "splits": [*job_lib.split_names(run.protocol, run.method)],
      "train_count": len(job.train.labels),
      "device": _device(),
      "versions": hardware.versions(), "run": run.name}


def _device():
  """How many of which kind. Two kinds of CPU round differently, so its name and
  the widest of its instructions are told."""
  found = hardware.machine(parallel.devices())
  kind = found["kind"]
  if found["platform"] == "cpu":
    kind += f" ({', '.join([found['processor'], *found['instructions'][-1:]])})"
  return f"{found['devices']} x {kind}"


def _accuracy(run, job, task, outcome):
  """Accuracies in percent; of every test set, the first one is `test_top1`."""
  if job.val:
    return {"val_top1": outcome.history[-1]["val_top1"], "test_top1": None,
            "test_count": 0, "tests": {}, "seconds_test": None,
            "test_images_per_second": None}
  tests, seconds = {}, {}
  for name in task.tests:
    split = task.split(name).first(run.config.limit)
    tests[name], seconds[name] = _test(
        split, outcome, run.config.masked_tests)
  first = tests[task.tests[0]]
  seconds_test = seconds[task.tests[0]]
  return {"val_top1": None, "test_top1": first["top1"],
          "test_count": first["count"], "tests": tests,
          "seconds_test": seconds_test,
          "test_images_per_second": first["count"] / seconds_test}


def _test(split, outcome, masked):
  """({"top1": percent, "count": images}, seconds)."""
  arguments = (outcome.model, outcome.state.params, outcome.state.buffers)
  evaluate.compile_for(*arguments, split.images)
  begin = time.perf_counter()
  top1 = evaluate.top1(*arguments, split.images, split.labels, masked=masked)
  return ({"top1": top1, "count": len(split.labels)},
          time.perf_counter() - begin)


def _costs(job, outcome, params):
  return {"seconds_train": outcome.seconds,
          "images_per_second": outcome.images_per_second,
          "step_memory_bytes": outcome.memory_bytes or None,
          "compile_seconds": outcome.compile_seconds,
          **_flops(job, outcome.model, params, outcome.state.buffers)}


def _flops(job, model, params, buffers):
  """Of one image at inference, with the adapter and, if it can be, merged."""
  params, buffers = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (params, buffers))
  tuned = cost.flops(model, params, buffers)
  merged = tuned if job.method.cannot_merge else cost.flops(
      job.model, params | {"adapter": {}}, {})
  return {"flops": tuned, "flops_merged": merged}


def _now() -> str:
  """The time in UTC, ISO 8601: sorts as text."""
  now = datetime.datetime.now(datetime.UTC)
  return now.isoformat(timespec="microseconds")
