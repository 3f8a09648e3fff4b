"""NOAH: a subnet of the supernet is the small network, and the search obeys."""
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from tests.conftest import DEPTH, WIDTH, features, random_adapter
from tests.test_train import kill_after, make_job, run
from ttc_jax import checkpoint, methods, parallel, stores, train, trees
from ttc_jax.errors import UserError
from ttc_jax.methods import adapter as adapter_lib
from ttc_jax.methods import lora, noah, vpt_deep, vpt_shallow
from ttc_jax.tasks import Split

GENOMES = [((2, 1, 3), (0, 2, 0), (3, 0, 1)), ((0, 0, 0),) * 3,
           ((3, 2, 4),) * 3, ((0, 1, 0), (1, 0, 0), (0, 0, 2))]


@pytest.fixture
def config(config):
  config.noah.update(dict(
      prompts=(0, 1, 2, 3), rank=(0, 1, 2), width=(0, 1, 2, 3, 4),
      population=4, generations=3, parents=2, mutations=2, crossovers=1))
  return config


def supernet(config, model, params, released=False):
  """(model with handlers, params with random leaves, buffers)."""
  config.noah.released = released
  method = methods.load("noah", config, model.backbone)
  context = methods.Context(model, params, {}, None, None, 0)
  adapter, buffers = method.stages[0].prepare(context)
  return (model._replace(handlers=method.handlers),
          {**params, "adapter": random_adapter(adapter)}, buffers)


def cut(name, leaf, genome):
  """What of a supernet's leaf "site/block/name" a subnet has."""
  _, block, leaf_name = name.split("/")
  prompts, rank, width = genome[int(block)]
  return leaf[{"prompts": np.s_[:prompts], "a": np.s_[:, :rank],
               **dict.fromkeys(("b", "b_q", "b_k", "b_v"), np.s_[:rank]),
               "down": np.s_[:, :width],
               "down_bias": np.s_[:width], "up": np.s_[:width],
               "up_bias": np.s_[:]}[leaf_name]]


@pytest.mark.parametrize("genome, pool, released, final_norm", [
    *itertools.product(GENOMES, ("cls", "gap"), (False, True), (True,)),
    *itertools.product(GENOMES[:1], ("gap",), (False, True), (False,))])
@pytest.mark.sweep(keep=3)
def test_a_masked_supernet_is_the_small_network(
    config, model, params, split, genome, pool, released, final_norm):
  model = model._replace(backbone=model.backbone.clone(
      pool=pool, final_norm=final_norm))
  tuned, big, buffers = supernet(config, model, params, released)
  want = features(tuned, big, split.images,
                  noah.sized(buffers, genome, 3, released))
  small, chosen = noah.network(model.backbone, 0, genome, released)
  leaves = trees.flatten(big["adapter"])
  small = trees.unflatten({
      name: cut(name, leaves[name], genome) for name in trees.flatten(small)})
  space = noah.Space({}, 0, DEPTH, WIDTH)
  assert trees.count(small) == space.count(genome)
  if pool == "gap":  # the mean leaves out all of a supernet's slots
    last = max(g[0] for g in genome) if released else genome[-1][0]
    assert any("keep" in p for blocks in chosen.values()
               for p in blocks.values()) == (last > 0)
  got = features(tuned, {**params, "adapter": small}, split.images, chosen)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_largest_is_vpt_deep_with_lora_and_adapters(
    config, model, params, split):
  tuned, big, buffers = supernet(config, model, params)
  got = features(tuned, big, split.images, noah.sized(buffers, GENOMES[2], 3))
  others = (("tokens", vpt_shallow.insert(1)), ("input", vpt_deep.replace(1)),
            ("q", lora.low_rank("b")), ("v", lora.low_rank("b")),
            ("fc2", adapter_lib.handler("quick", "output")))
  one = {site: {str(i): {"scale": np.float32(1)} for i in range(DEPTH)}
         for site in ("q", "v", "fc2")}
  want = features(model._replace(handlers=others), big, split.images, one)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_largest_of_the_released_code_is_its_three_methods(
    config, model, params, split):
  """VPT-Deep, and `lora` and `adapter` as protocol=noah sets them."""
  tuned, big, buffers = supernet(config, model, params, released=True)
  got = features(tuned, big, split.images,
                 noah.sized(buffers, GENOMES[2], 3, True))
  others = (("tokens", vpt_shallow.insert(1)), ("input", vpt_deep.replace(1)),
            *lora.shared(("q", "k", "v")),
            ("block", adapter_lib.handler("quick", "branch")))
  one = {site: {str(i): {"scale": np.float32(1)} for i in range(DEPTH)}
         for site in ("q", "block")}
  want = features(model._replace(handlers=others), big, split.images, one)
  np.testing.assert_allclose(got, want, atol=2e-5)


def attention(q, k, v, heads):
  """(B, M, D), (B, N, D), (B, N, D) -> (B, M, D), softmax(q k^T / sqrt d) v."""
  def split(x):
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
  q, k, v = split(q), split(k), split(v)
  scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  y = weights / weights.sum(-1, keepdims=True) @ v
  return y.swapaxes(1, 2).reshape(*q.shape[:1], -1, q.shape[1] * q.shape[3])


def released_block(x, b, p, prompts, heads):
  """A block of the authors' code in numpy: tokens (B, N, D) in and out.

  Args:
    b: {"norm1": (scale, bias), "q": (kernel, bias), ...}.
    p: {"a", "b_q", ..., "down", ...} of the module.
    prompts: (P, D) of this block, or None: those that enter stay.
  """
  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6)
    return x * b[name][0] + b[name][1]
  if prompts is not None:
    new = np.broadcast_to(prompts, (len(x), *prompts.shape))
    x = np.concatenate([x[:, :5], new], 1)  # [CLS] and 4 patches
  z = norm(x, "norm1")
  low = z @ p["a"]
  q, k, v = (z @ b[s][0] + b[s][1] + low @ p[f"b_{s}"] for s in "qkv")
  x = x + attention(q, k, v, heads) @ b["proj"][0] + b["proj"][1]
  h = norm(x, "norm2") @ b["fc1"][0] + b["fc1"][1]
  h = h / 2 * (1 + np.tanh((2 / np.pi) ** .5 * (h + 0.044715 * h ** 3)))
  z = h @ b["fc2"][0] + b["fc2"][1]
  a = z @ p["down"] + p["down_bias"]
  a = a / (1 + np.exp(-1.702 * a))
  return x + z + a @ p["up"] + p["up_bias"]


def test_the_released_network_is_the_authors_formula_in_float64(
    model, params, split):
  """Blocks with 2, no and 3 prompts; the order of tokens does not matter."""
  genome = ((2, 1, 2), (0, 2, 1), (3, 1, 3))
  vit = model.backbone.clone(dtype=np.float64, every_token=True)
  double = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
  adapter, buffers = noah.network(vit, 0, genome, released=True)
  adapter, params = double((random_adapter(adapter), params))
  seen = {}

  def tap(site, block, y, x):
    seen[site, block] = y
    return y
  tuned = model._replace(backbone=vit, handlers=noah.handlers(vit, True))
  with jax.enable_x64(True):
    tuned.features({**params, "adapter": adapter}, split.images[:3], buffers,
                   extra_tap=tap)
  flat = trees.flatten(params["backbone"])
  # [CLS], the prompts of block 0, the patches -> [CLS], patches.
  x = np.delete(np.asarray(seen["input", 0], np.float64), [1, 2], 1)
  for i in range(DEPTH):
    b = {s: tuple(flat[f"{vit.sites[s][i].path}/{leaf}"].reshape(
        (-1, vit.sites[s][i].width) if leaf == "kernel" else -1)
                  for leaf in ("kernel", "bias")) for s in lora.SITES}
    b |= {s: tuple(flat[f"{vit.norms[s][i]}/{leaf}"]
                   for leaf in ("scale", "bias")) for s in ("norm1", "norm2")}
    p = adapter["q"][str(i)] | adapter["block"][str(i)]
    own = adapter["input" if i else "tokens"].get(str(i))
    x = released_block(x, b, p, own and own["prompts"], vit.heads)
    got = np.asarray(seen["block", i])
    count = x.shape[1] - 5
    got = np.concatenate([got[:, :1], got[:, 1 + count:], got[:, 1:1 + count]],
                         1)
    # The layer norm of a backbone is float32, whatever its dtype.
    np.testing.assert_allclose(got, x, atol=2e-5)


def test_every_module_of_the_released_network_drops_out(
    config, model, params, split):
  adapter, buffers = noah.network(
      model.backbone, 0, ((2, 1, 2), (0, 2, 1), (3, 1, 3)), True, 0.1)
  for site, blocks in adapter.items():
    for block in blocks:
      assert buffers[site][block]["dropout"] == np.float32(0.1)
  config.noah.update(released=True, dropout=0.1)
  method = methods.load("noah", config, model.backbone)
  _, buffers = method.stages[0].prepare(methods.Context(
      model, params, {}, None, None, 0))
  rates = [x for name, x in trees.flatten(buffers).items()
           if name.endswith("/dropout")]
  assert len(rates) == 3 * DEPTH and set(rates) == {np.float32(0.1)}


def test_a_block_without_prompts_sees_those_that_enter_it():
  """A draw of the released supernet: 0 at "input" keeps the last size."""
  choices = {"choices": jnp.array([0, 0, 5, 7])}
  buffers = {"input": {str(i): dict(choices) for i in range(1, 6)},
             "scores": {str(i): dict(choices) for i in range(6)}}
  kept = 0
  for seed in range(8):
    drawn = noah.sample(buffers, jax.random.key(seed))
    last = int(drawn["scores"]["0"]["size"])
    for i in range(1, 6):
      own = int(drawn["input"][str(i)]["size"])
      kept += not own and last > 0
      last = own or last
      assert int(drawn["scores"][str(i)]["size"]) == last
  assert kept > 3


def test_a_training_step_draws_every_choice():
  buffers = {"q": {"0": {"choices": jnp.array([0, 4, 8])}},
               "input": {"1": {"before": jnp.arange(3)}}}
  drawn = jax.vmap(lambda key: noah.sample(buffers, key)["q"]["0"]["size"])(
      jax.random.split(jax.random.key(0), 100))
  assert set(np.asarray(drawn).tolist()) == {0, 4, 8}
  kept = noah.sample(buffers, jax.random.key(0))["input"]["1"]
  assert list(kept) == ["before"]


def searched(budget, score, known=(), seed=0, **changes):
  space = noah.Space({"prompts": (0, 5), "rank": (0, 4), "width": (0, 8)},
                     budget, 4, 16)
  c = ml_collections.ConfigDict(dict(
      population=20, generations=12, parents=5, mutations=10, crossovers=5,
      mutation_rate=0.2) | changes)
  asked, history = [], []

  def asks(genome):
    asked.append(genome)
    return score(genome)
  best = noah.search(space, c, seed, asks,
                     lambda *args: history.append(args[:2]))
  return space, best, asked, history


def test_the_search_keeps_to_the_budget_asks_once_and_improves():
  space, best, asked, history = searched(
      1500, lambda g: sum(r + w for _, r, w in g))
  assert len(asked) == len(set(asked))
  assert all(space.count(g) <= 1500 for g in asked)
  scores = [sum(r + w for _, r, w in g) for _, g in history]
  assert scores == sorted(scores) and len(scores) == 12
  # By exhaustion over all 4^4 mixes without prompts, which only cost.
  blocks = list(itertools.product((0, 4), (0, 8)))
  optimum = max(sum(r + w for r, w in g) for g in itertools.product(
      blocks, repeat=4) if space.count([(0, *b) for b in g]) <= 1500)
  assert scores[-1] == optimum
  assert sum(r + w for _, r, w in best) == optimum


def test_of_equals_the_smaller_network_wins():
  space, best, asked, _ = searched(10 ** 9, lambda g: 1.0)
  assert space.count(best) == min(map(space.count, asked))


def test_a_tight_budget_is_met():
  """Less than a random network of a thousand has."""
  space, best, asked, _ = searched(600, lambda g: 1.0)
  assert len(asked) > 20 and max(map(space.count, asked)) <= 600


@pytest.mark.slow
def test_the_search_is_on_val200(config, model, params, split, tmp_path,
                                 monkeypatch):
  half = Split(split.images[:20], split.labels[:20])
  seen, top1 = [], noah.evaluate.top1
  monkeypatch.setattr(noah.evaluate, "top1", lambda *args: (
      seen.append(len(args[-1])), top1(*args))[1])
  job = make_job(
      config, model, split, "noah", val=None, holdout=(split, half))
  run(job, params, tmp_path)
  assert set(seen) == {20}


@pytest.mark.sweep
@pytest.mark.parametrize("stage, epoch", [("supernet", 2), ("winner", 1),
                                          ("winner", 2), ("winner", 3)])
@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(
    config, model, params, split, tmp_path, stage, epoch):
  config.noah.budget = 400  # so that the winner lacks modules
  job = make_job(config, model, split, "noah",
                 dict(epochs=3, save_seconds=0))
  _, want = run(job, params, tmp_path / "a")
  kill_after(stage, epoch, job, params, tmp_path / "b")
  for _ in range(2):  # goes on, then reloads
    _, got = run(job, params, tmp_path / "b")
    assert got.keys() == want.keys()
    assert all((got[k] == want[k]).all() for k in want)


def test_a_damaged_search_starts_anew(tmp_path):
  """The notes of a stage, where the search keeps its scores."""
  stages = checkpoint.Stages(stores.open_store(tmp_path))
  path = tmp_path / "stages" / "a-notes.json"
  with stages.open("a") as store:
    assert store.notes() == {}
    store.write_notes({"[[1]]": 50.0})
    assert store.notes() == {"[[1]]": 50.0}
    for damaged in ("", '{"[[1]]": 5', "[1]"):
      path.write_text(damaged)
      assert store.notes() == {}


@pytest.mark.slow
def test_blocks_below_the_first_module_run_once(
    config, model, params, split, tmp_path):
  """Their tokens must not hold the prompts of the block that comes next."""
  adapter, buffers = noah.network(
      model.backbone, 0, ((0, 0, 0), (2, 0, 0), (0, 0, 0)))
  method = methods.load("noah", config, model.backbone)
  tuned = model._replace(handlers=method.handlers)
  new = {**params, "adapter": adapter}
  assert train.frozen_blocks(
      model.backbone, new, method.stages[1].rules) == 1
  tokens = tuned.tokens(new, split.images, buffers, 1)
  assert tokens.shape == (37, 5, WIDTH)
  np.testing.assert_allclose(
      features(tuned._replace(start=1), new, tokens, buffers),
      features(tuned, new, split.images, buffers), atol=1e-5)


@pytest.mark.slow
def test_an_interrupted_search_goes_the_same_way(
    config, model, params, split, tmp_path, monkeypatch):
  asked = []
  top1 = noah.evaluate.top1

  def counted(*args):
    asked.append(1)
    if len(asked) == 6:
      raise KeyboardInterrupt
    return top1(*args)
  job = make_job(config, model, split, "noah")
  whole, want = run(job, params, tmp_path / "whole")
  monkeypatch.setattr(noah.evaluate, "top1", counted)
  with pytest.raises(KeyboardInterrupt):
    run(job, params, tmp_path / "cut")
  again, got = run(job, params, tmp_path / "cut")
  assert all((got[k] == want[k]).all() for k in want)
  records = [r for r in again.history if r["stage"] == "search"]
  assert records == [r for r in whole.history if r["stage"] == "search"]
  assert [r["epoch"] for r in records] == [1, 2, 3]
  assert records[-1]["params"] <= records[-1]["budget"]


def test_the_search_holds_val200_out(config, model, split):
  half = Split(split.images[:20], split.labels[:20])
  job = make_job(config, model, split, "noah", holdout=(half, split))
  supernet, winner = (train.StageRun(job, i, None) for i in (0, 1))
  assert supernet._split is half and winner._split is split


def test_the_winner_has_no_leaf_that_it_does_not_use(
    config, model, params, split, tmp_path):
  outcome, flat = run(make_job(config, model, split, "noah"), params, tmp_path)
  record = [r for r in outcome.history if r["stage"] == "search"][-1]
  count = sum(v.size for k, v in flat.items() if k.startswith("adapter/"))
  assert count == record["params"]
  assert not any("slots" in k for k in trees.flatten(
      parallel.unreplicate(outcome.state.buffers)))


@pytest.mark.parametrize("key, value, message", [
    ("prompts", (), "config.noah.prompts is \\(\\); give integers >= 0"),
    ("prompts", ("a", "b"), "give integers >= 0"),
    ("rank", (0.5, 4), "give integers >= 0"),
    ("mutation_rate", float("nan"), "give a probability"),
    ("width", (-1, 2), "give integers >= 0"),
    ("rank", (0,), "at least one of them above 0"),
    ("generations", 0, "config.noah.generations is 0; give 1 or more"),
])
def test_wrong_options_are_one_sentence(config, vit, key, value, message):
  config.noah[key] = value
  with pytest.raises(UserError, match=message):
    methods.load("noah", config, vit)


def test_a_budget_below_the_smallest_subnet_is_one_sentence(config, vit):
  config.noah.prompts, config.noah.budget = (2, 3), 10
  with pytest.raises(UserError, match="the smallest subnet has 96 parameters"):
    methods.load("noah", config, vit)
