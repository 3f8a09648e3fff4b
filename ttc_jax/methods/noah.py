"""NOAH (Zhang et al., 2022, arXiv 2206.04673): the mix of prompts, LoRA and
adapters that a search finds.

A supernet has prompts, LoRA on q and v and an adapter after the MLP in every
block, each as large as its largest choice. While it is trained on train800,
every step draws a subnet: the first so many prompts, ranks and hidden units of
each block. Then an evolutionary search on val200 finds the best subnet within
a budget of parameters, and that one is trained from its start on all that a
run trains on. (The authors' search draws depths too; here 0 is a size.)

Under protocol=val the winner's accuracy on val200 is optimistic: the search
looked at it. Under protocol=final nothing looks at the test set.
"""
import functools
import json
from typing import NamedTuple
import zlib

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from ttc_jax import evaluate, files, parallel
from ttc_jax.errors import UserError
from ttc_jax.methods import TUNE_ADAPTER, Method, Stage, options
from ttc_jax.methods import adapter as adapter_lib
from ttc_jax.methods import lora, vpt_shallow

OPTIONS = ("noah",)
MODULES = ("prompts", "rank", "width")
# Where a subnet's size is felt.
SITES = {"scores": "prompts", "q": "rank", "v": "rank", "fc2": "width"}

# (prompts, rank, width) of every block.
Genome = tuple[tuple[int, int, int], ...]


# --- What acts at the sites ---------------------------------------------------

def _first(p, h):
  """Zeroes the hidden units that a subnet lacks; all stay where none is."""
  if "size" not in p:
    return h
  return jnp.where(jnp.arange(h.shape[-1]) < p["size"], h, 0)


def low_rank(p, y, x):
  return y + _first(p, x @ p["a"].astype(y.dtype)) @ p["b"].astype(y.dtype)


def bottleneck(p, y, x):
  """y + up(act(down(y))); nothing, not even a bias, where the size is 0."""
  del x
  cast = lambda name: p[name].astype(y.dtype)
  h = adapter_lib.ACTIVATIONS["quick_gelu"](
      y @ cast("down") + cast("down_bias"))
  change = _first(p, h) @ cast("up") + cast("up_bias")
  return y + (jnp.where(p["size"] > 0, change, 0) if "size" in p else change)


# Cached, since compiled functions are found by their handlers.
@functools.cache
def exchange(first: int):
  """The handler that puts a block's prompts in place of the last block's."""
  def handler(p, y, x):
    del x
    rest = y[:, first + (len(p["before"]) if "before" in p else 0):]
    new = [vpt_shallow.prompts(p, y)] if "prompts" in p else []
    return jnp.concatenate([y[:, :first], *new, rest], axis=1)
  return handler


@functools.cache
def hide(first: int):
  """The handler that keeps attention from the prompts that a subnet lacks."""
  def handler(p, y, x):
    del x
    at = jnp.arange(y.shape[-1]) - first
    hidden = (at >= p["size"]) & (at < len(p["slots"]))
    return jnp.where(hidden, jnp.finfo(y.dtype).min, y)
  return handler


def handlers(backbone):
  first = backbone.prefix
  return (("tokens", exchange(first)), ("input", exchange(first)),
          ("scores", hide(first)), ("q", low_rank), ("v", low_rank),
          ("fc2", bottleneck),
          (vpt_shallow.last_site(backbone)[0], vpt_shallow.leave_out))


# --- Networks of given sizes --------------------------------------------------

def network(backbone, seed, genome):
  """The adapter and the buffers of exactly these sizes."""
  rng = np.random.default_rng(seed)
  sites = backbone.sites
  adapter = {site: {} for site in ("tokens", "input", "q", "v", "fc2")}
  buffers, before = {"input": {}}, 0
  for i, (prompts, rank, width) in enumerate(genome):
    block, site = str(i), "input" if i else "tokens"
    if prompts:
      adapter[site][block] = vpt_shallow.init(rng, backbone, prompts)
    if before:
      buffers["input"][block] = {"before": np.arange(before)}
    before = prompts
    if rank:
      for name in ("q", "v"):
        adapter[name][block] = lora.init(rng, sites[name][i], rank)
    if width:
      adapter["fc2"][block] = adapter_lib.init(rng, sites["fc2"][i].width,
                                               width)
  buffers |= vpt_shallow.pooling(backbone, before)
  return ({k: v for k, v in adapter.items() if v},
          {k: v for k, v in buffers.items() if v})


def sized(buffers, genome, slots):
  """The supernet's buffers with the sizes of a subnet, as on one device."""
  out = {site: {b: dict(p) for b, p in blocks.items()}
         for site, blocks in buffers.items()}
  for i, sizes in enumerate(genome):
    for site, module in SITES.items():
      entry = out.setdefault(site, {}).setdefault(str(i), {})
      entry["size"] = np.int32(sizes[MODULES.index(module)])
      if site == "scores":
        entry["slots"] = np.arange(slots)
  return out


def sample(buffers, key):
  """A training step's subnet: a choice for every module of every block."""
  def draw(site, block, p):
    if "choices" not in p:
      return p
    name = f"{SITES[site]}/{block}".encode()
    return {**p, "size": jax.random.choice(
        jax.random.fold_in(key, zlib.crc32(name)), p["choices"])}
  return {site: {b: draw(site, b, p) for b, p in blocks.items()}
          for site, blocks in buffers.items()}


class Space(NamedTuple):
  """The subnets: choices of every module, and the most parameters."""
  choices: dict[str, tuple[int, ...]]
  budget: int
  depth: int
  width: int

  @property
  def smallest(self) -> Genome:
    return (tuple(min(self.choices[m]) for m in MODULES),) * self.depth

  @property
  def largest(self) -> Genome:
    return (tuple(max(self.choices[m]) for m in MODULES),) * self.depth

  def count(self, genome: Genome) -> int:
    """Parameters: P D + 2 r 2 D + w (2 D + 1) + D a block."""
    D = self.width
    return sum(p * D + 4 * r * D + (w and w * (2 * D + 1) + D)
               for p, r, w in genome)

  def fit(self, rng, genome: Genome) -> Genome:
    """Makes random modules smaller until the budget holds."""
    sizes = [list(block) for block in genome]
    while self.count(sizes) > self.budget:
      i, m = rng.integers(self.depth), rng.integers(len(MODULES))
      smaller = [s for s in self.choices[MODULES[m]] if s < sizes[i][m]]
      if smaller:
        sizes[i][m] = smaller[-1]
    return tuple(map(tuple, sizes))

  def draw(self, rng) -> Genome:
    return tuple(tuple(int(rng.choice(self.choices[m])) for m in MODULES)
                 for _ in range(self.depth))

  def mutate(self, rng, genome: Genome, rate: float) -> Genome:
    new = self.draw(rng)
    return tuple(tuple(b if rng.random() < rate else a for a, b in zip(*pair))
                 for pair in zip(genome, new))

  @staticmethod
  def cross(rng, one: Genome, two: Genome) -> Genome:
    return tuple(tuple(b if rng.random() < 0.5 else a for a, b in zip(*pair))
                 for pair in zip(one, two))


def prepare_supernet(context, *, space):
  backbone = context.model.backbone
  adapter, buffers = network(backbone, context.seed, space.largest)
  buffers = sized(buffers, space.largest, space.largest[0][0])
  for site, module in SITES.items():
    for entry in buffers.get(site, {}).values():
      entry["choices"] = np.array(space.choices[module], np.int32)
  return adapter, buffers


# --- The search ---------------------------------------------------------------

def search(space: Space, c, seed: int, score, on_generation) -> Genome:
  """Evolution within the budget: the best by `score`, then the smallest.

  Each generation keeps the `parents` best of all so far, mutates and crosses
  them, and fills up with random ones; none is scored twice. It depends on the
  seed and the scores alone, so a search with the scores of an interrupted one
  at hand goes the same way.
  """
  rng, scores, population = np.random.default_rng(seed), {}, []

  def add(draw, count, tries=1000):
    for _ in range(tries):
      if count <= 0:
        return
      genome = space.fit(rng, draw())
      if genome not in scores:
        scores[genome] = None
        population.append(genome)
        count -= 1

  def ranked():
    return sorted(scores, key=lambda g: (-scores[g], space.count(g), g))

  for generation in range(c.generations):
    if generation:
      parents = ranked()[:c.parents]
      pick = lambda: parents[rng.integers(len(parents))]
      add(lambda: space.mutate(rng, pick(), c.mutation_rate), c.mutations)
      add(lambda: space.cross(rng, pick(), pick()), c.crossovers)
    add(lambda: space.draw(rng), c.population - len(population))
    for genome in population:
      scores[genome] = score(genome)
    best = ranked()[0]
    on_generation(generation, best, scores, population)
    population.clear()
  return best


def _scores(path):
  """{genome: accuracy} of an interrupted search; damaged, it starts anew."""
  try:
    with open(path, encoding="utf-8") as f:
      return dict(json.load(f))
  except FileNotFoundError:
    return {}
  except (TypeError, ValueError):
    logging.warning("%s is damaged: the search starts anew", path)
    return {}


def prepare_winner(context, *, space, config):
  """Searches, then makes the winner anew; the search goes on where it was."""
  path = context.directory + "-search.json"
  known = _scores(path)

  def score(genome):
    name = json.dumps(genome)
    if name not in known:
      buffers = parallel.replicate(sized(
          parallel.unreplicate(context.buffers), genome,
          space.largest[0][0]))
      known[name] = evaluate.top1(context.model, context.params, buffers,
                                  *context.val)
    return known[name]

  def on_generation(generation, best, scores, population):
    files.write_text(path, json.dumps(known))
    context.log({
        "stage": "search", "epoch": generation + 1,
        "epochs": config.generations, "val_top1": scores[best],
        "mean_top1": float(np.mean([scores[g] for g in population or [best]])),
        "params": space.count(best), "budget": space.budget,
        "genome": [list(sizes) for sizes in best]})
  try:
    best = search(space, config, context.seed, score, on_generation)
  finally:  # a request to end may come within a generation
    if known:
      files.write_text(path, json.dumps(known))
  return network(context.model.backbone, context.seed, best)


def make(config, backbone) -> Method:
  vpt_shallow.check_takes_prompts(backbone)
  c = config.noah
  for name in MODULES:
    if not all(isinstance(v, int) and v >= 0 for v in c[name]) or not any(
        c[name]):
      raise UserError(f"config.noah.{name} is {c[name]}; give integers >= 0, "
                      "at least one of them above 0")
  for key in ("population", "generations", "parents"):
    if c[key] < 1:
      raise UserError(f"config.noah.{key} is {c[key]}; give 1 or more")
  if not 0 <= c.mutation_rate <= 1:
    raise UserError(f"config.noah.mutation_rate is {c.mutation_rate}; give a "
                    "probability")
  space = Space({m: tuple(sorted(set(c[m]))) for m in MODULES}, 0,
                backbone.depth, backbone.width)
  smallest, largest = map(space.count, (space.smallest, space.largest))
  space = space._replace(budget=c.budget or (smallest + largest) // 2)
  if space.budget < smallest:
    raise UserError(f"config.noah.budget is {c.budget}, but the smallest "
                    f"subnet has {smallest} parameters; raise it, or add 0 to "
                    "the choices")
  return Method(
      (Stage("supernet", TUNE_ADAPTER,
             functools.partial(prepare_supernet, space=space), holdout=True,
             sample=sample),
       Stage("winner", TUNE_ADAPTER, functools.partial(
           prepare_winner, space=space, config=c))),
      options=options(config, OPTIONS), handlers=handlers(backbone),
      cannot_merge="prompts are tokens, and the adapter's activation is no "
      "linear map")
