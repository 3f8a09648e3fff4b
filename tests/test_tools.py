"""The tools of the repository."""
import os
import runpy

import numpy as np

from tests.command import ROOT, fresh_flags
from ttc_jax import bundles, checkpoint
from ttc_jax.runs.workdir import WorkDir


def test_the_kills_aim_at_states_and_bundles(tmp_path, monkeypatch):
  """What fault_test waits for is there while they are written, only then."""
  with fresh_flags():
    writing = runpy.run_path(str(ROOT / "tools" / "fault_test.py"))["writing"]
  workdir, seen = WorkDir(tmp_path), []

  def watched(move):
    def moved(*args, **kwargs):
      seen.append(bool(writing(str(workdir))))
      return move(*args, **kwargs)
    return moved
  monkeypatch.setattr(os, "rename", watched(os.rename))
  monkeypatch.setattr(os, "replace", watched(os.replace))
  arrays = {"head/bias": np.ones(2, np.float32)}

  with checkpoint.Stages(workdir.store).open("a") as store:
    store.save(checkpoint.Saved(1, {"tuned": arrays}, {}))
  assert any(seen) and not writing(str(workdir))
  seen.clear()
  bundles.put(workdir.store, workdir.bundle_name("run"),
              bundles.Bundle(arrays, {}, {}))
  assert any(seen) and not writing(str(workdir))
