"""Big Vision's recipe: its values, its pieces by hand, and a whole session."""
import jax
import numpy as np
import optax
from PIL import Image
import pytest

from tests.command import run_command
from tests.test_train import make_hyper, make_job
from ttc_jax import (
  augment,
  checkpoint,
  config_file,
  methods,
  optim,
  parallel,
  step,
  stores,
  train,
  trees,
)
from ttc_jax import config as config_lib
from ttc_jax.backbones import vit as vit_lib
from ttc_jax.errors import UserError
from ttc_jax.runs import plan as jobs
from ttc_jax.runs.job import make_job as job_of
from ttc_jax.runs.session import Session
from ttc_jax.runs.workdir import WorkDir
from ttc_jax.tasks import Split


def load(arg=None):
  return config_file.load("configs/bigvision.py", arg)


def of(variant, arg="size=384"):
  return jobs.variants(load(f"{arg},method={variant}"))[variant]


# --- The configuration --------------------------------------------------------

def test_the_recipe_is_that_of_transfer_py():
  """google-research/big_vision, configs/transfer.py, oxford_flowers102."""
  c = of("bv_full")
  assert (c.optimiser, optim.MOMENTUM, c.weight_decay) == ("sgd", 0.9, 0.0)
  assert (c.clip_norm, c.head_init, c.label_smoothing) == (1.0, "zeros", 0.0)
  assert (c.batch_size, c.flip, c.smallest_crop) == (512, True, 1.0)
  assert (c.crop_from, c.image_size, c.resample) == (448, 384, "bilinear/448")
  assert not any(c.augment.values())
  for images in (800, 1000):  # 500 steps, 100 of them warm-up
    hyper = step.make_hyper(c, images // c.batch_size, 10)
    assert (hyper.steps, hyper.warmup) == (500, 100)
  assert (c.warmup_lr, c.min_lr) == (0.0, 0.0)
  assert set(c.grid.lr) >= {0.003, 0.01, 0.03}
  assert of("bv_full", "size=64").crop_from == 75
  assert of("bv_full", "size=224").resample == "bilinear/261"


def test_other_crops():
  c = of("bv_linear", "size=384,crop=inception_crop")
  assert (c.smallest_crop, c.crop_from, c.flip) == (0.05, 448, True)
  assert c.crop_aspect == 4 / 3
  c = of("bv_linear", "size=384,crop=none")
  assert (c.smallest_crop, c.crop_from, c.flip) == (1.0, 0, False)
  assert c.resample == "bilinear"
  with pytest.raises(UserError, match="unknown crop 'random': "):
    load("crop=random")
  with pytest.raises(UserError, match="'batch=1001': give 1 to 1000"):
    load("batch=1001")


def test_steps_of_another_batch_are_those_on_1000_images():
  c = of("bv_full", "batch=64,steps=300,warmup=30")
  hyper = step.make_hyper(c, 1000 // 64, 10)
  assert (hyper.steps, hyper.warmup) == (300, 30)


def test_methods_of_two_stages_have_half_of_the_steps_for_each():
  c = of("bv_ttc")
  assert (c.method, c.epochs, c.warmup_epochs) == ("ttc", 250, 50)
  assert of("bv_layernorm_2x").epochs == 500


def test_every_method_stands_beside_it_on_the_same_pixels():
  config = load()
  found = jobs.variants(config)
  assert {c.method for c in found.values()} == set(methods.names())
  assert len({(c.image_size, c.resample) for c in found.values()}) == 1
  for name, c in found.items():
    assert (c.optimiser == "sgd") == name.startswith("bv_"), name
    assert jobs.settings(c), name
  lsr = jobs.settings(found["fewshot_lsr"])
  assert {"l2": 2.0 ** 10} in lsr and all(set(s) == {"l2"} for s in lsr)
  with pytest.raises(UserError, match="unknown method 'bv_tcc'.*bv_ttc"):
    load("method=bv_tcc")


# --- Its pieces ---------------------------------------------------------------

def test_gradients_are_clipped_over_all_tuned_leaves_then_enter_the_momentum():
  """By hand; the frozen leaf has a gradient too, which does not count."""
  rng = np.random.default_rng(0)
  shapes = {"a": (2, 3), "b": (4,), "frozen": (5, 5)}
  labels = {name: "freeze" if name == "frozen" else "tune" for name in shapes}
  params = {n: rng.normal(size=s).astype(np.float32)
            for n, s in shapes.items()}
  tx = optim.make_tx(labels, lambda _: 0.1, 0.0, optimiser="sgd", clip_norm=1.0)
  state, p = tx.init(params), dict(params)
  v = {"a": 0.0, "b": 0.0}
  for size in (3.0, 0.01, 1.0):
    grads = {n: size * rng.normal(size=s).astype(np.float32)
             for n, s in shapes.items()}
    updates, state = tx.update(grads, state, p)
    norm = np.sqrt(sum(np.square(grads[n]).sum() for n in v))
    for n in v:
      v[n] = 0.9 * v[n] + grads[n] / max(1.0, norm)
      np.testing.assert_allclose(updates[n], -0.1 * v[n], rtol=1e-5, atol=1e-8)
    assert not updates["frozen"].any()
    p = optax.apply_updates(p, updates)


def test_clipping_is_part_of_the_compiled_step(config, model, params, split):
  """The first update of SGD has the norm lr * clip_norm."""
  config.update(dict(optimiser="sgd", clip_norm=1e-3, batch_size=16,
                     weight_decay=0.0))
  plan = step.make_plan(config)
  rules = (optim.HEAD, optim.FREEZE)
  tuned, frozen = trees.split(params, trees.label(params, rules), "tune")
  state = step.make_init_fn(rules, "sgd", plan.clip_norm)(
      parallel.replicate(tuned), parallel.replicate(frozen))
  learner, _ = parallel.pmap(step.make_update_fn(model, rules, plan))(
      step.Learner(parallel.replicate(tuned), state),
      parallel.replicate(step.Fixed(frozen, {}, make_hyper(
          lr=np.float32(0.5), weight_decay=np.float32(0)))),
      parallel.shard((split.images[:16], split.labels[:16])),
      jax.numpy.stack([jax.random.key(0)] * 2))
  moved = jax.tree.map(lambda a, b: a - b, parallel.unreplicate(learner.tuned),
                       tuned)
  norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(moved)))
  np.testing.assert_allclose(norm, 0.5e-3, rtol=1e-2)


def test_a_window_is_a_piece_of_the_image_and_every_place_occurs():
  images = np.arange(40 * 6 * 6 * 3).reshape(40, 6, 6, 3).astype(np.uint8)
  found = np.asarray(augment.random_window(images, jax.random.key(0), 4))
  places = set()
  for image, window in zip(images, found, strict=True):
    here = [(y, x) for y in range(3) for x in range(3)
            if (image[y:y + 4, x:x + 4] == window).all()]
    places.update(here)
    assert here
  assert places == {(y, x) for y in range(3) for x in range(3)}
  np.testing.assert_array_equal(
      augment.random_window(images, jax.random.key(1), 6), images)
  np.testing.assert_array_equal(augment.centre(images, 4),
                                images[:, 1:5, 1:5])


def test_the_loss_sees_crops_of_the_models_size(config, model, params, split):
  """Images whose every crop is the same give the loss of that crop."""
  flat = np.repeat(split.images[:8, :1, :1], 11, 1).repeat(11, 2)
  config.update(dict(crop_from=11, image_size=8, batch_size=8))
  plan = step.make_plan(config)
  assert plan.augments and plan.crop_to == 8
  fixed = step.Fixed({}, {}, make_hyper())
  key = jax.random.key(3)
  labels = split.labels[:8]

  def loss(config, images):
    fn = jax.jit(step.make_loss_fn(model, step.make_plan(config)))
    return fn(params, fixed, (images, labels), key)
  want = loss(config_lib.default(), flat[:, :8, :8])
  np.testing.assert_allclose(loss(config, flat), want, atol=1e-6)
  config.smallest_crop = 0.05
  np.testing.assert_allclose(loss(config, flat), want, atol=1e-4)


def test_what_selects_channels_sees_the_centres(
    config, model, params, split, tmp_path):
  large = np.pad(split.images, ((0, 0), (2, 2), (2, 2), (0, 0)))
  settings = dict(crop_from=12, image_size=8)
  job = make_job(config, model, Split(large, split.labels), "ttc", settings)
  with checkpoint.Stages(stores.open_store(tmp_path)).open("a") as store:
    run = train.StageRun(job, 1, store)
    context = run._context(train.State(params, {}))
  np.testing.assert_array_equal(context.images, split.images)


@pytest.mark.parametrize("changes,message", [
    (dict(crop_from=100), "config.crop_from is 100, below"),
    (dict(crop_from=300, resample="bilinear/256"), "above the short side"),
    (dict(crop_from=-1), "config.crop_from is -1"),
    (dict(clip_norm=-1.0), "config.clip_norm is -1"),
    (dict(head_init="zero"), "unknown head_init 'zero': did you mean zeros"),
    (dict(l2=-1.0), "config.l2 is -1"),
])
def test_values_that_cannot_be_are_refused(config, changes, message):
  config.update(changes)
  with pytest.raises(UserError, match=message):
    config_lib.check(config)


# --- A session ----------------------------------------------------------------

@pytest.fixture
def small(monkeypatch):
  monkeypatch.setitem(vit_lib.SIZES, "ti", (32, 2, 2, 64))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Pictures of two colours, wider than high."""
  folder = tmp_path_factory.mktemp("data") / "colours"
  rng = np.random.default_rng(0)
  for i in range(120):
    pixels = rng.integers(0, 90, (30, 40, 3), dtype=np.uint8)
    pixels[..., i % 2] += 150
    path = folder / ("red", "green")[i % 2] / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
  return folder


def session_of(data, workdir, methods_):
  """A session with small values, not started."""
  c = load(f"task=colours,data={data},weights=random,size=16,backbone=vit_ti16,"
           f"method={methods_},batch=16,steps=70,warmup=5,epochs=1")
  c.normalisation, c.seeds, c.grid_steps = "half", (0,), 0
  c.batch_size, c.cache, c.grid.lr = 16, str(workdir / "cache"), (2e-3,)
  for name, values in c.variants.items():
    if name.startswith("bv_"):
      values.update(dict(epochs=4, warmup_epochs=1.0, grid=dict(lr=(3e-2,))))
    if "l2" in values.get("grid", {}):
      values.grid.l2 = (1.0, 1024.0)
  return Session(c, str(workdir / "work"))


def finals(session, workdir):
  session.run_all()
  assert not session.failed
  rows = WorkDir(workdir / "work").rows()
  return rows, {r["variant"]: r for r in rows if r["protocol"] == "final"}


def test_a_session_chooses_l2_on_val200(data, tmp_path, small):
  session = session_of(data, tmp_path, "fewshot_lsr")
  rows, final = finals(session, tmp_path)
  row = final["fewshot_lsr"]
  tried = {r["l2"]: r["val_top1"] for r in rows if r["protocol"] == "val"}
  assert set(tried) == {1.0, 1024.0} and row["test_top1"] > 90
  assert tried[row["l2"]] == max(tried.values())
  assert (row["module_params"], row["head_params"]) == (0, 2 * (32 + 1))
  assert (row["epochs"], row["stages"]) == (1, ["lsr"])


@pytest.mark.slow
def test_a_session_of_the_recipe_and_a_method_beside_it(data, tmp_path, small):
  session = session_of(data, tmp_path, "bv_full,bv_linear,linear")
  _, final = finals(session, tmp_path)
  assert list(final) == ["bv_full", "bv_linear", "linear"]
  for name in ("bv_full", "bv_linear"):
    assert (final[name]["crop_from"], final[name]["head_init"]) == (19, "zeros")
  assert final["linear"]["head_init"] == "normal"
  assert len({r["data_digest"] for r in final.values()}) == 1


def test_training_images_are_larger_and_the_others_are_not(
    data, tmp_path, small):
  c = load(f"task=colours,data={data},weights=random,size=16,backbone=vit_ti16,"
           "method=bv_linear,batch=16")
  c.normalisation, c.cache = "half", str(tmp_path / "cache")
  session = Session(c, str(tmp_path / "work"))
  variant = jobs.variants(c, "colours")["bv_linear"]
  run = session.make_run("colours", "bv_linear", variant, "val", 0)
  job = job_of(run, session.base, session.inputs.task("colours", variant),
               lambda *_: None, session.inputs.training("colours", variant))
  assert job.train.images.shape[1:] == (19, 19, 3)
  assert job.val.images.shape[1:] == (16, 16, 3)


def test_without_a_task_it_asks_for_data(tmp_path):
  done = run_command("main", "--config=configs/bigvision.py",
                     f"--workdir={tmp_path / 'work'}")
  assert done.returncode == 2
  assert "task=all needs a folder of tasks: add data=DIR" in done.stderr
