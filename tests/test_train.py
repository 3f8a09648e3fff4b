"""A run of stages: what moves, what does not, and to which bits."""
import itertools
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from tests.conftest import CLASSES, DEPTH, WIDTH, numpy_tree
from ttc_jax import (
  checkpoint,
  methods,
  optim,
  parallel,
  step,
  stores,
  train,
  trees,
)
from ttc_jax import model as model_lib
from ttc_jax.errors import RunError
from ttc_jax.tasks import Split

PLAN = step.Plan(batch_size=16, label_smoothing=0.0, flip=False,
                  smallest_crop=1.0, decay_all=False, optimiser="adamw")
SETTINGS = dict(batch_size=16, epochs=2, warmup_epochs=1.0, lr=1e-2,
                weight_decay=0.1, eval_every=1, save_seconds=1e9)


class Killed(Exception):
  pass


def ignore(*_):
  pass


def make_hyper(**changes):
  """Numbers of a stage without a warm-up."""
  hyper = step.Hyper(
      lr=np.float32(1e-2), weight_decay=np.float32(0.1), warmup=np.int32(0),
      steps=np.int32(10), classes=np.int32(CLASSES),
      warmup_lr=np.float32(0), min_lr=np.float32(0),
      adapter_lr=np.float32(1))
  return hyper._replace(**changes)


def make_job(config, model, split, name="ttc", settings=None, **changes):
  """A job; `settings` are values of the configuration."""
  config = config.copy_and_resolve_references()
  config.update(SETTINGS | (settings or {}))
  method = methods.load(name, config, model.backbone)
  job = train.Job(
      identity={"test": name}, config=config, model=model, method=method,
      train=split, val=split, holdout=(split, split), classes=CLASSES, seed=0,
      report=ignore)
  return job._replace(**changes)


def kill_after(stage, epoch, job, params, directory):
  """Runs a job until that epoch of that stage has been reported."""
  def report(name, done, epochs, record):
    if (name, done) == (stage, epoch):
      raise Killed
  with pytest.raises(Killed):
    run(job._replace(report=report), params, directory)


def run(job, params, directory):
  outcome = train.run(job, parallel.replicate(params["backbone"]),
                      checkpoint.Stages(stores.open_store(directory)))
  params = dict(outcome.state.params)
  params["head"] = model_lib.trim_head(params["head"], job.classes)
  return outcome, trees.flatten(parallel.unreplicate(params))


@pytest.mark.sweep(keep=3)
@pytest.mark.parametrize("name,moved", [
    ("linear", r"head/.*"),
    ("layernorm", r"head/.*|backbone/.*Norm.*|backbone/.*_norm/.*"),
    ("ttc", r"head/.*|adapter/.*|backbone/.*Norm.*|backbone/.*_norm/.*"),
    ("full", r".*"),
    ("bias", r"head/.*|.*/bias"),
    *((name, r"head/.*|adapter/.*") for name in (
        "adapter", "lora", "vpt_shallow", "vpt_deep", "ssf", "sct", "noah")),
])
def test_frozen_leaves_keep_their_bits_and_tuned_ones_move(
    config, model, params, split, tmp_path, name, moved):
  config.noah.update(population=4, generations=2, parents=2, mutations=1,
                     crossovers=1)
  _, flat = run(make_job(config, model, split, name), params, tmp_path)
  before = {**trees.flatten(params), **{
      f"head/{k}": np.asarray(v)
      for k, v in model_lib.init_head(WIDTH, CLASSES, 0).items()}}
  labels = trees.flatten(trees.label(
      trees.unflatten(flat), [(moved, "tune"), (".*", "freeze")]))
  for leaf, value in flat.items():
    if leaf.startswith("adapter/"):
      assert np.abs(value).max() > 0, leaf
    elif labels[leaf] == "freeze":
      assert (value == before[leaf]).all(), leaf
    elif not leaf.endswith("key/bias"):  # softmax does not feel a key's bias
      assert (value != before[leaf]).any(), leaf


def test_the_same_seed_gives_the_same_bits(
    config, model, params, split, tmp_path):
  job = make_job(config, model, split)
  _, one = run(job, params, tmp_path / "a")
  _, two = run(job, params, tmp_path / "b")
  _, other = run(job._replace(seed=1), params, tmp_path / "c")
  assert all((one[k] == two[k]).all() for k in one)
  assert any((one[k] != other[k]).any() for k in one)


def test_a_clock_that_jumps_changes_nothing(
    config, model, params, split, tmp_path, monkeypatch):
  job = make_job(config, model, split, settings=dict(save_seconds=0))
  _, want = run(job, params, tmp_path / "a")
  jumps, true = itertools.cycle((0, -1e9, 1e6)), time.time
  monkeypatch.setattr(time, "time", lambda: true() + next(jumps))
  kill_after("adapt", 1, job, params, tmp_path / "b")
  _, got = run(job, params, tmp_path / "b")
  assert all((got[k] == want[k]).all() for k in want)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_on_two_devices_is_adamw_on_the_whole_batch(
    config, model, params, split, accumulate):
  """Against optax on one device, written without the product's train code."""
  rules = (optim.NORM, optim.HEAD, optim.FREEZE)
  labels = trees.label(params, rules)
  tuned, frozen = trees.split(params, labels, "tune")
  images, y = split.images[:16], split.labels[:16]
  opt_state = step.make_init_fn(rules, "adamw")(
      parallel.replicate(tuned), parallel.replicate(frozen))
  update_fn = parallel.pmap(step.make_update_fn(
      model, rules, PLAN._replace(accumulate=accumulate)))
  learner, loss = update_fn(
      step.Learner(parallel.replicate(tuned), opt_state),
      parallel.replicate(step.Fixed(frozen, {}, make_hyper())),
      parallel.shard((images, y)), jnp.stack([jax.random.key(0)] * 2))
  got = learner.tuned

  def loss_fn(tuned):
    logits = model.logits(trees.join(tuned, frozen), images, {})
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
  want_loss, grads = jax.jit(jax.value_and_grad(loss_fn))(tuned)
  matrices = jax.tree.map(lambda x: x.ndim > 1, tuned)
  tx = optax.adamw(1e-2, weight_decay=0.1, mask=matrices)
  updates, _ = tx.update(grads, tx.init(tuned), tuned)
  want = trees.flatten(optax.apply_updates(tuned, updates))
  np.testing.assert_allclose(loss[0], want_loss, rtol=1e-5)
  flat = trees.flatten(parallel.unreplicate(got))
  assert flat.keys() == want.keys()
  for name, value in flat.items():
    np.testing.assert_allclose(value, want[name], atol=2e-5, err_msg=name)


def test_parts_of_a_batch_give_the_update_of_the_whole(model, params, split):
  """One step of SGD, which is linear in the gradients, in float32."""
  rules = ((r".*", "tune"),)
  params = params | {"head": model_lib.pad_head(params["head"])}
  opt_state = optim.make_tx(trees.label(params, rules), lambda _: 0.0, 0.0,
                            False, "sgd").init(params)
  frozen = jax.tree.map(lambda _: None, params)
  moved = {}
  for parts in (1, 4):
    plan = PLAN._replace(optimiser="sgd", accumulate=parts)
    step_fn = parallel.pmap(step.make_update_fn(model, rules, plan))
    moved[parts] = step_fn(
        parallel.replicate(step.Learner(params, opt_state)),
        parallel.replicate(step.Fixed(frozen, {}, make_hyper())),
        parallel.shard((split.images[:16], split.labels[:16])),
        jnp.stack([jax.random.key(0)] * 2))
  want, want_loss = moved[1]
  for learner, loss in moved.values():
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    for name, x in trees.flatten(learner.tuned).items():
      np.testing.assert_allclose(x, trees.flatten(want.tuned)[name],
                                 atol=1e-6, err_msg=name)


@pytest.mark.parametrize("accumulate, images", [(1, 64), (4, 4)])
def test_a_batch_in_parts_is_scored_in_parts(
    config, model, params, split, tmp_path, accumulate, images):
  def prepare(context):
    assert context.batch_size == images
    raise Killed
  job = make_job(config, model, split, settings=dict(accumulate=accumulate))
  stage = job.method.stages[-1]._replace(prepare=prepare)
  with pytest.raises(Killed):
    run(job._replace(method=job.method._replace(stages=(stage,))), params,
        tmp_path)


def test_schedule_is_optax_warmup_cosine_shifted_by_one_in_the_warmup():
  ours = optim.warmup_cosine(0.5, 20, 4)
  theirs = optax.warmup_cosine_decay_schedule(0, 0.5, 4, 20)
  for i in range(20):
    want = theirs(i + 1) if i < 4 else theirs(i)
    np.testing.assert_allclose(ours(i), want, rtol=1e-5, atol=1e-8)


def test_schedule_from_its_start_to_its_floor_is_the_formula():
  """With traced ends, so that another schedule compiles nothing."""
  lr, start, floor, warmup, steps = 0.01, 1e-4, 1e-3, 10, 100
  ours = jax.jit(lambda step, *ends: optim.warmup_cosine(*ends)(step))
  for i in range(steps):
    if i < warmup:
      want = start + (lr - start) * (i + 1) / warmup
    else:
      share = (i - warmup) / (steps - warmup)
      want = floor + (lr - floor) * (1 + np.cos(np.pi * share)) / 2
    got = ours(i, lr, steps, warmup, start, floor)
    np.testing.assert_allclose(got, want, rtol=1e-5)
  assert ours._cache_size() == 1


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_the_optimisers_are_those_of_pytorch(optimiser):
  """Five steps of a schedule, with weight decay on the matrix alone."""
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  start = {"kernel": rng.normal(size=(3, 4)).astype(np.float32),
           "bias": rng.normal(size=4).astype(np.float32)}
  grads = [{k: rng.normal(size=v.shape).astype(np.float32)
            for k, v in start.items()} for _ in range(5)]
  rates = [optim.warmup_cosine(0.1, 5, 2, 1e-3, 1e-2)(i) for i in range(5)]

  theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
  groups = [dict(params=[theirs["kernel"]], weight_decay=0.3),
            dict(params=[theirs["bias"]], weight_decay=0.0)]
  opt = (torch.optim.SGD(groups, lr=1.0, momentum=0.9) if optimiser == "sgd"
         else torch.optim.AdamW(groups, lr=1.0))
  params = {"head": start}
  tx = optim.make_tx({"head": dict.fromkeys(start, "tune")},
                     lambda step: jnp.stack(rates)[step], 0.3,
                     optimiser=optimiser)
  state = tx.init(params)
  for grad, rate in zip(grads, rates, strict=True):
    for name, value in grad.items():
      theirs[name].grad = torch.tensor(value)
    for group in opt.param_groups:
      group["lr"] = float(rate)
    opt.step()
    updates, state = tx.update({"head": grad}, state, params)
    params = optax.apply_updates(params, updates)
    for name, value in params["head"].items():
      np.testing.assert_allclose(
          value, theirs[name].detach().numpy(), rtol=2e-5, atol=1e-6)


def test_sgd_s_weight_decay_enters_the_momentum():
  """By hand: v <- 0.9 v + (g + w p), p <- p - lr v."""
  params = {"head": {"kernel": np.full((1, 2), 2.0, np.float32)}}
  tx = optim.make_tx({"head": {"kernel": "tune"}}, lambda _: 0.1, 0.5,
                     optimiser="sgd")
  state, p, v = tx.init(params), 2.0, 0.0
  for g in (1.0, -3.0, 0.5):
    updates, state = tx.update(
        {"head": {"kernel": np.full((1, 2), g, np.float32)}}, state, params)
    params = optax.apply_updates(params, updates)
    v = 0.9 * v + g + 0.5 * p
    p -= 0.1 * v
    np.testing.assert_allclose(params["head"]["kernel"], p, rtol=1e-6)


@pytest.mark.slow
def test_a_run_with_sgd_goes_on_to_the_same_bits_and_differs_from_adamw(
    config, model, params, split, tmp_path):
  def job_of(**changes):
    return make_job(config, model, split, "layernorm", dict(
        epochs=3, save_seconds=0, warmup_lr=1e-3, min_lr=1e-4) | changes)
  job, sgd = job_of(), job_of(optimiser="sgd")
  _, want = run(sgd, params, tmp_path / "a")
  kill_after("align", 2, sgd, params, tmp_path / "b")
  _, got = run(sgd, params, tmp_path / "b")
  assert all((got[k] == want[k]).all() for k in got)
  _, adamw = run(job, params, tmp_path / "c")
  again, lower = run(job_of(min_lr=0.0), params, tmp_path / "d")
  assert again.compile_seconds == 0  # the schedule is data
  for other, than in ((adamw, want), (lower, adamw)):
    assert (other["head/kernel"] != than["head/kernel"]).any()


def test_weight_decay_spares_norms_and_biases():
  params = {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones((3, 1))},
            "backbone": {"LayerNorm_0": {"scale": jnp.ones(3)}}}
  labels = jax.tree.map(lambda _: "tune", params)
  zero = jax.tree.map(jnp.zeros_like, params)
  for decay_all, spared in ((False, True), (True, False)):
    tx = optim.make_tx(labels, lambda _: 0.1, 0.5, decay_all)
    updates, _ = tx.update(zero, tx.init(params), params)
    assert (updates["head"]["kernel"] != 0).all()
    for leaf in (updates["head"]["bias"],
                 updates["backbone"]["LayerNorm_0"]["scale"]):
      assert bool((leaf == 0).all()) == spared


@pytest.mark.parametrize("blocks, tune_norm, start", [
    (1, False, DEPTH - 1), (2, False, DEPTH - 2), (0, False, 0), (1, True, 0)])
@pytest.mark.sweep(keep=1)
def test_what_lies_below_all_that_is_tuned_runs_once(
    config, model, params, split, tmp_path, blocks, tune_norm, start):
  """Against a drop-path of almost nothing, which takes the uncached way."""
  config.blocks, config.tune_norm, config.stage1 = blocks, tune_norm, "none"
  job = make_job(config, model, split, settings=dict(epochs=4))
  rules = job.method.stages[-1].rules
  adapter, _ = job.method.stages[-1].prepare(methods.Context(
      model, parallel.replicate(params), {}, split.images, split.labels, 0))
  assert train.frozen_blocks(
      model.backbone, {**params, "adapter": adapter}, rules) == start
  fast, flat = run(job, params, tmp_path / "cached")
  slow_model = model._replace(backbone=model.backbone.clone(drop_path=1e-9))
  slow, want = run(job._replace(model=slow_model), params, tmp_path / "slow")
  for name, value in flat.items():
    np.testing.assert_allclose(value, want[name], rtol=1e-2, atol=1e-4)
  assert fast.history[-1]["val_top1"] == slow.history[-1]["val_top1"]


def test_cached_features_give_the_head_that_the_whole_model_gives(
    config, model, params, split, tmp_path):
  """Linear with a drop-path of almost nothing takes the uncached way."""
  job = make_job(config, model, split, "linear", dict(epochs=4))
  cached, flat = run(job, params, tmp_path / "cached")
  slow_model = model._replace(
      backbone=model.backbone.clone(drop_path=1e-9))
  slow, want = run(job._replace(model=slow_model), params, tmp_path / "slow")
  for name in ("head/kernel", "head/bias"):
    np.testing.assert_allclose(flat[name], want[name], atol=1e-4)
  assert cached.history[-1]["val_top1"] == slow.history[-1]["val_top1"]


@pytest.mark.sweep
@pytest.mark.parametrize("stage,epoch", [
    ("align", 1), ("align", 3), ("adapt", 1), ("adapt", 2)])
def test_a_killed_run_goes_on_to_the_same_bits(
    config, model, params, split, tmp_path, stage, epoch):
  job = make_job(config, model, split,
                 settings=dict(epochs=3, save_seconds=0))
  undisturbed, want = run(job, params, tmp_path / "a")
  kill_after(stage, epoch, job, params, tmp_path / "b")
  seen = []
  resumed, got = run(job._replace(report=lambda *r: seen.append(r[:2])),
                     params, tmp_path / "b")
  assert got.keys() == want.keys()
  assert all((got[k] == want[k]).all() for k in got)
  assert [r["loss"] for r in resumed.history] == [
      r["loss"] for r in undisturbed.history]
  assert seen == [(s, e) for s in ("align", "adapt") for e in (1, 2, 3)]


def test_runs_that_begin_alike_share_their_first_stage(
    config, model, params, split, tmp_path):
  """LayerNorm, then TTC: its stage 1 is there already, to the bit."""
  same = {"test": "shared"}
  alone = make_job(config, model, split, identity=same)
  _, want = run(alone, params, tmp_path / "alone")
  shared = tmp_path / "shared"
  run(make_job(config, model, split, "layernorm", identity=same), params,
      shared)
  before = set(shared.glob("stages/*"))
  _, got = run(alone, params, shared)
  assert len(set(shared.glob("stages/*")) - before) == 1
  assert all((got[k] == want[k]).all() for k in got)


def test_the_rate_of_stage_2_is_its_own_and_leaves_stage_1_shared(
    config, model, params, split, tmp_path):
  """TTC with a tenth of the rate in stage 2, beside a lone stage 2 at it."""
  def job(identity, **settings):
    return make_job(config, model, split, identity={"test": identity},
                    settings={"stage1": "none", **settings})
  _, tenth = run(job("tenth", stage2_lr=0.1, warmup_lr=1e-3, min_lr=1e-3),
                 params, tmp_path)
  _, want = run(job("want", lr=1e-3, warmup_lr=1e-4, min_lr=1e-4), params,
                tmp_path)
  assert all(np.allclose(tenth[k], want[k], rtol=1e-6) for k in want)
  run(job("both", stage1="norm"), params, tmp_path)
  before = set(tmp_path.glob("stages/*"))
  run(job("both", stage1="norm", stage2_lr=0.1), params, tmp_path)
  assert len(set(tmp_path.glob("stages/*")) - before) == 1


def test_stages_at_other_rates_are_other_stages(config, model, split):
  """Also those of a method without options, whose stages prepare nothing."""
  def keys(lr):
    job = make_job(config, model, split, "layernorm")
    stages = tuple(s._replace(lr=lr) for s in job.method.stages)
    return train.stage_keys(job._replace(
        method=job.method._replace(stages=stages)))
  assert keys(1.0) == train.stage_keys(
      make_job(config, model, split, "layernorm"))
  assert not set(keys(1.0)) & set(keys(0.1))


def test_an_option_of_a_later_version_renames_no_run(config, model):
  for name in methods.names():
    options = methods.load(name, config, model.backbone).options
    assert not methods.ADDED.keys() & options.keys()
  nothing = ml_collections.ConfigDict({"other": None, "stage2_lr": 1.0})
  assert methods.options(nothing, ("other", "stage2_lr")) == {"other": None}
  config = config.copy_and_resolve_references()
  config.stage2_lr = 0.1
  assert methods.load("ttc", config, model.backbone).options["stage2_lr"] == 0.1


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(
    config, model, params, split, tmp_path):
  def job_of(**changes):
    return make_job(config, model, split, "layernorm",
                    dict(epochs=3, save_seconds=0) | changes)
  job = job_of()

  def kill(name, done, epochs, record):
    if done == 2:
      raise Killed
  with pytest.raises(Killed):  # a good epoch to come back to
    run(job._replace(report=kill), params, tmp_path)
  job = job_of(lr=3e38)
  with pytest.raises(RunError, match="lower config.lr") as error:
    run(job, params, tmp_path)
  kept, = (tmp_path / "stages").iterdir()
  with checkpoint.Stages(stores.open_store(tmp_path)).open(
      kept.name) as store:
    saved = store.load()
  assert f"the state after epoch {saved.epoch} is kept in" in str(error.value)
  assert all(np.isfinite(x).all() for x in saved.arrays["tuned"].values())


def test_an_epoch_visits_each_image_at_most_once_and_differs(
    config, vit, split):
  """With features of one-hot rows the head's gradient tells who was there."""
  n = len(split.labels)
  data = Split(np.eye(n, dtype=np.float32), np.zeros(n, np.int32))
  rules = (optim.HEAD, optim.FREEZE)
  params = {"head": {
      "kernel": np.zeros((n, 2), np.float32),
      "bias": np.zeros(2, np.float32)}}
  labels = trees.label(params, rules)
  tuned, frozen = trees.split(params, labels, "tune")
  fn = step.make_epoch_fn(model_lib.Model(None, "none"), rules, PLAN)
  hyper = make_hyper(weight_decay=np.float32(0), classes=np.int32(2))
  visited = []
  for epoch in range(2):
    start, fixed, images = parallel.replicate(
        (tuned, step.Fixed(frozen, {}, hyper), tuple(data)))
    opt_state = step.make_init_fn(rules, "adamw")(start, fixed.frozen)
    learner, losses = fn(
        step.Learner(start, opt_state), fixed, images,
        parallel.replicate(jax.random.key_data(jax.random.key(3))),
        parallel.replicate(np.int32(epoch)))
    out = parallel.unreplicate(learner.tuned)
    moved = np.abs(out["head"]["kernel"]).sum(1) > 0
    assert losses.shape == (2, n // 16)
    assert moved.sum() == n // 16 * 16  # 32 of 37, none twice
    visited.append(moved)
  assert (visited[0] != visited[1]).any()


def test_a_program_has_the_precision_that_holds():
  fn = parallel.pmap(lambda x: x @ x)
  arguments = (lambda *_: fn, None, (), PLAN,
               (parallel.replicate(np.eye(4, dtype=np.float32)),))

  def made():
    return step.compiled(*arguments)
  usual, _ = made()
  with jax.default_matmul_precision("highest"):
    exact, _ = made()
  assert exact is not usual
  assert made() == (usual, 0.0)


def test_joined_hosts_compile_by_the_first_call(monkeypatch):
  fn = parallel.pmap(lambda x: x)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert step.compiled(lambda *_: fn, None, (), PLAN, (
      jax.ShapeDtypeStruct((2, 5), np.float32),)) == (fn, 0.0)


def test_any_of_joined_hosts_writes_its_arrays(tmp_path, monkeypatch):
  arrays = {"tuned": {"a/b": np.arange(5, dtype=np.float32)}, "buffers": {}}
  monkeypatch.setattr(jax, "process_index", lambda backend=None: 1)
  checkpoint.write_folder(str(tmp_path / "state"), arrays, {"epoch": 1})
  found, meta = checkpoint.read_folder(str(tmp_path / "state"))
  np.testing.assert_array_equal(found["tuned"]["a/b"], arrays["tuned"]["a/b"])
  assert meta == {"epoch": 1}


def test_the_first_device_s_copy_is_taken_to_the_bit():
  leaf = np.array([-0.0, np.nan, 1e-45, 1.5], np.float32)
  found = parallel.unreplicate(parallel.replicate({"a": leaf, "b": leaf[0]}))
  assert found["a"].tobytes() == leaf.tobytes()
  assert found["b"].tobytes() == leaf[0].tobytes()


def test_label_smoothing_is_optax_on_smoothed_targets(
    model, params, split):
  plan = PLAN._replace(label_smoothing=0.2)
  padded = params | {"head": model_lib.pad_head(params["head"])}
  got = step.make_loss_fn(model, plan)(
      padded, step.Fixed(None, {}, make_hyper()), tuple(split),
      jax.random.key(0))
  log_p = jax.nn.log_softmax(model.logits(params, split.images, {}))
  target = np.full((len(split.labels), CLASSES), 0.2 / CLASSES)
  target[np.arange(len(target)), split.labels] += 0.8
  np.testing.assert_allclose(got, -(target * log_p).sum(-1).mean(), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.sweep(keep=1)
def test_a_padded_head_trains_as_the_task_s_own(
    model, params, split, smoothing):
  """Loss, gradients and AdamW with decay of everything, against no padding."""
  plan = PLAN._replace(label_smoothing=smoothing, decay_all=True)
  rules = ((r".*", "tune"),)
  one, key = split.images[:16], jax.random.key(0)

  def three_steps(head):
    tuned = params | {"head": head}
    frozen = jax.tree.map(lambda _: None, tuned)
    opt_state = optim.make_tx(
        trees.label(tuned, rules), lambda _: 0.0, 0.0).init(tuned)
    step_fn = parallel.pmap(step.make_update_fn(model, rules, plan))
    learner = parallel.replicate(step.Learner(tuned, opt_state))
    fixed = step.Fixed(frozen, *parallel.replicate(({}, make_hyper())))
    for _ in range(3):
      learner, loss = step_fn(
          learner, fixed, parallel.shard((one, split.labels[:16])),
          jnp.stack([key] * 2))
    return parallel.unreplicate(learner.tuned), loss
  want, want_loss = three_steps(params["head"])
  got, loss = three_steps(model_lib.pad_head(params["head"]))
  np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
  assert (got["head"]["kernel"][:, CLASSES:] == 0).all()
  assert (got["head"]["bias"][CLASSES:] < -1e8).all()
  got["head"] = model_lib.trim_head(got["head"], CLASSES)
  flat = trees.flatten(got)
  for name, value in trees.flatten(want).items():
    if not name.endswith("key/bias"):  # Adam magnifies a gradient of 0
      np.testing.assert_allclose(value, flat[name], atol=1e-5, err_msg=name)


def test_the_adapter_s_rate_scales_its_updates_alone(
    config, model, params, split):
  """One step of SGD: -lr g for the head, -f lr g for the map."""
  method = methods.load("ttc", config, model.backbone)
  model = model._replace(handlers=method.handlers)
  rules = method.stages[-1].rules
  maps = {"fc2": {"1": {"kernel": np.zeros((3, 3), np.float32)}}}
  params = params | {"adapter": maps,
                     "head": model_lib.pad_head(params["head"])}
  buffers = {"fc2": {"1": {"channels": np.array([1, 4, 9], np.int32),
                           "scale": np.float32(1)}}}
  labels = trees.label(params, rules)
  tuned, frozen = trees.split(params, labels, "tune")
  opt_state = optim.make_tx(labels, lambda _: 0.0, 0.0, False, "sgd").init(
      params)
  step_fn = parallel.pmap(step.make_update_fn(
      model, rules, PLAN._replace(optimiser="sgd")))
  moved = {}
  for factor in (1, 4):
    hyper = make_hyper(weight_decay=np.float32(0),
                       adapter_lr=np.float32(factor))
    learner, _ = step_fn(
        parallel.replicate(step.Learner(tuned, opt_state)),
        parallel.replicate(step.Fixed(frozen, buffers, hyper)),
        parallel.shard((split.images[:16], split.labels[:16])),
        jnp.stack([jax.random.key(0)] * 2))
    after = parallel.unreplicate(learner.tuned)
    moved[factor] = {
        name: np.asarray(after_) - before for (name, before), after_ in zip(
            trees.flatten(tuned).items(), trees.flatten(after).values(),
            strict=True)}
  for name, change in moved[1].items():
    factor = 4 if name.startswith("adapter/") else 1
    np.testing.assert_allclose(moved[4][name], factor * change, rtol=1e-4,
                               atol=1e-7, err_msg=name)
  assert np.abs(moved[1]["adapter/fc2/1/kernel"]).max() > 0


def test_decay_leaves_the_padding_where_it_is(model, params, split):
  """SGD with L2 on everything, lr wd = 0.5: no gradient holds the padding."""
  plan = PLAN._replace(decay_all=True, optimiser="sgd")
  hyper = make_hyper(lr=np.float32(0.5), weight_decay=np.float32(1),
                     steps=np.int32(100))
  rules = (optim.HEAD, optim.FREEZE)
  padded = params | {"head": model_lib.pad_head(params["head"])}
  tuned, frozen = trees.split(padded, trees.label(padded, rules), "tune")
  opt_state = optim.make_tx(trees.label(padded, rules), lambda _: 0.0, 0.0,
                            True, "sgd").init(padded)
  step_fn = parallel.pmap(step.make_update_fn(model, rules, plan))
  learner = parallel.replicate(step.Learner(tuned, opt_state))
  fixed = parallel.replicate(step.Fixed(frozen, {}, hyper))
  for _ in range(40):  # 0.5^40: without care, a probability of one over 512
    learner, loss = step_fn(
        learner, fixed, parallel.shard((split.images[:16], split.labels[:16])),
        jnp.stack([jax.random.key(0)] * 2))
  bias = parallel.unreplicate(learner.tuned)["head"]["bias"]
  assert (bias[CLASSES:] == -1e9).all()
  assert loss[0] < 1.1 * np.log(CLASSES)  # not log(512)


@pytest.mark.slow
def test_tasks_of_any_number_of_classes_share_every_compilation(
    config, model, params, split, tmp_path):
  seen = []

  def listen(event, seconds, fun_name="", **_):
    if event.endswith("backend_compile_duration"):
      seen.append(fun_name)
  jax.monitoring.register_event_duration_secs_listener(listen)
  for classes in (4, 7):
    seen.clear()
    job = make_job(config, model, split, identity={"classes": classes},
                   classes=classes, settings=dict(batch_size=12))
    train.run(job, parallel.replicate(params["backbone"]),
              checkpoint.Stages(stores.open_store(tmp_path)))
    pmapped = [name for name in seen if "_fun" in name]
    if classes == 4:
      assert len(pmapped) >= 2
    else:
      assert not pmapped and len(seen) < 8  # to draw a head, in milliseconds
  jax.monitoring.unregister_event_duration_listener(listen)


def test_norm_parameters_are_float32_numpy_after_the_run(
    config, model, params, split, tmp_path):
  outcome, flat = run(make_job(config, model, split), params, tmp_path)
  assert {str(v.dtype) for v in flat.values()} == {"float32"}
  channels = numpy_tree(parallel.unreplicate(outcome.state.buffers))
  assert channels["fc2"]["0"]["channels"].dtype == np.int32
