"""NOAH: a subnet of the supernet is the small network, and the search obeys."""
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from tests.conftest import DEPTH, WIDTH, features, random_adapter
from tests.test_train import kill_after, make_job, run
from ttc_jax import methods, parallel, train, trees
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


def supernet(config, model, params):
  """(model with handlers, params with random leaves, buffers)."""
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
               "b": np.s_[:rank], "down": np.s_[:, :width],
               "down_bias": np.s_[:width], "up": np.s_[:width],
               "up_bias": np.s_[:]}[leaf_name]]


@pytest.mark.parametrize("pool", ["cls", "gap"])
@pytest.mark.parametrize("genome", GENOMES)
def test_a_masked_supernet_is_the_small_network(
    config, model, params, split, genome, pool):
  model = model._replace(backbone=model.backbone.clone(pool=pool))
  tuned, big, buffers = supernet(config, model, params)
  want = features(tuned, big, split.images, noah.sized(buffers, genome, 3))
  small, chosen = noah.network(model.backbone, 0, genome)
  leaves = trees.flatten(big["adapter"])
  small = trees.unflatten({
      name: cut(name, leaves[name], genome) for name in trees.flatten(small)})
  space = noah.Space({}, 0, DEPTH, WIDTH)
  assert trees.count(small) == space.count(genome)
  if pool == "gap":  # the mean leaves out all of a supernet's slots
    assert ("norm" in chosen) == (genome[-1][0] > 0)
  got = features(tuned, {**params, "adapter": small}, split.images, chosen)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_largest_is_vpt_deep_with_lora_and_adapters(
    config, model, params, split):
  tuned, big, buffers = supernet(config, model, params)
  got = features(tuned, big, split.images, noah.sized(buffers, GENOMES[2], 3))
  others = (("tokens", vpt_shallow.insert(1)), ("input", vpt_deep.replace(1)),
            ("q", lora.low_rank), ("v", lora.low_rank),
            ("fc2", adapter_lib.handler("quick_gelu", False)))
  one = {site: {str(i): {"scale": np.float32(1)} for i in range(DEPTH)}
         for site in ("q", "v", "fc2")}
  want = features(model._replace(handlers=others), big, split.images, one)
  np.testing.assert_allclose(got, want, atol=2e-5)


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
  import itertools
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


@pytest.mark.parametrize("stage, epoch", [("supernet", 2), ("winner", 1),
                                          ("winner", 2), ("winner", 3)])
def test_a_killed_run_goes_on_to_the_same_bits(
    config, model, params, split, tmp_path, stage, epoch):
  config.noah.budget = 400  # so that the winner lacks modules
  job = make_job(config, model, split, "noah", epochs=3, save_seconds=0)
  _, want = run(job, params, tmp_path / "a")
  kill_after(stage, epoch, job, params, tmp_path / "b")
  for _ in range(2):  # goes on, then reloads
    _, got = run(job, params, tmp_path / "b")
    assert got.keys() == want.keys()
    assert all((got[k] == want[k]).all() for k in want)


def test_a_damaged_search_starts_anew(tmp_path):
  path = tmp_path / "stage-search.json"
  assert noah._scores(str(path)) == {}
  path.write_text('{"[[1]]": 50.0}')
  assert noah._scores(str(path)) == {"[[1]]": 50.0}
  for damaged in ("", '{"[[1]]": 5', "[1]"):
    path.write_text(damaged)
    assert noah._scores(str(path)) == {}


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
  supernet, winner = job.method.stages
  assert train._train_split(job, supernet) is half
  assert train._train_split(job, winner) is split


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
