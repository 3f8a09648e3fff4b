"""NOAH (Zhang et al., 2022, arXiv 2206.04673): the mix of prompts, LoRA and
adapters that a search finds.

A supernet has prompts, LoRA on q and v and an adapter after the MLP in every
block, each as large as its largest choice. It is trained on the training split
without the validation split; each step draws a subnet, which has the first
prompts, ranks and hidden units of each block. Then an evolutionary search on
the validation split finds the best subnet within a budget of parameters. That
one is trained from its initial values on everything that the run trains on.
(The authors' search draws depths too; here 0 is a size.)

`noah.released` is the network of the authors' code (ZhangYuanhan-AI/NOAH at
e9c55f3), which differs from the paper:
  LoRA      on q, k and v, with one down-projection for the three
  adapter   after the MLP and its drop-path, which so never drops the adapter
  prompts   a block without prompts of its own keeps those that enter it
Still different: their prompts are new tokens beside kept ones where a block
with prompts follows one without (their search draws no such subnet), and their
LoRA and adapters start at random (deviation 0.02), here at 0.

Under protocol=val the winner's validation accuracy is optimistic: the search
has used that split. Under protocol=final nothing uses the test set.
"""
from collections.abc import Callable
import functools
import json
from typing import Any, NamedTuple
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ttc_jax import evaluate, parallel, trees
from ttc_jax.errors import UserError
from ttc_jax.methods import (
  TUNE_ADAPTER,
  Context,
  Method,
  Stage,
  check_rate,
  dropout,
  lora,
  options,
  rate,
  vpt_shallow,
)
from ttc_jax.methods import adapter as adapter_lib
from ttc_jax.products import product
from ttc_jax.taps import Handler, Shared

OPTIONS = ("noah",)


class Sizes(NamedTuple):
  """Sizes of a block's modules: prompts, LoRA's rank, the adapter's width."""
  prompts: int
  rank: int
  width: int


MODULES = Sizes._fields
# The module whose size a handler reads at a site.
MODULE = {"input": "prompts", "scores": "prompts", "q": "rank", "v": "rank",
          "fc2": "width", "block": "width"}
# The sites where sizes are read.
PAPER = ("scores", "q", "v", "fc2")
RELEASED = ("input", "scores", "q", "block")

Genome = tuple[Sizes, ...]  # a subnet: the sizes of every block


# --- Handlers -----------------------------------------------------------------

def _first(p, h):
  """Zeroes the hidden units from number `size` on; without a size, none."""
  if "size" not in p:
    return h
  return jnp.where(jnp.arange(h.shape[-1]) < p["size"], h, 0)


# Cached, since compiled functions are found by their handlers.
@functools.cache
def low_rank(up: str) -> Handler:
  """Returns `(p, y, x) -> y + (drop(x) a) b` with the first `size` ranks.

  Args:
    up: the name of b in p.
  """
  def handler(p, y, x):
    h = _first(p, product(dropout(p, x), p["a"].astype(y.dtype)))
    return y + product(h, p[up].astype(y.dtype))
  return handler


@functools.cache
def bottleneck(reads: str) -> Handler:
  """Returns `(p, y, x) -> y + up(drop(act(down(z))))` with the first `size`
  hidden units; z is y, or what `reads` says.

  A size of 0 returns y: not even the bias of `up` is added. After it prompts
  are left out if the pooling reads this site.
  """
  def adapt(p, y, x):
    def cast(name):
      return p[name].astype(y.dtype)
    z = adapter_lib.READS[reads](y, x)
    h = adapter_lib.ACTIVATIONS["quick"](
        product(z, cast("down")) + cast("down_bias"))
    change = product(_first(p, dropout(p, h)), cast("up")) + cast("up_bias")
    return y + (jnp.where(p["size"] > 0, change, 0) if "size" in p else change)

  def handler(p, y, x):
    y = adapt(p, y, x) if "down" in p else y
    return vpt_shallow.leave_out(p, y, x) if "keep" in p else y
  return handler


@functools.cache
def exchange(first: int) -> Handler:
  """Returns the handler that replaces the last block's prompts by the block's.

  With a size at this site, a size of 0 keeps the last block's.
  """
  def handler(p, y, x):
    del x
    end = first + (len(p["before"]) if "before" in p else 0)
    new = [vpt_shallow.prompts(p, y)] if "prompts" in p else []
    if new and "size" in p:
      new = [jnp.where(p["size"] > 0, new[0], y[:, first:end])]
    return jnp.concatenate([y[:, :first], *new, y[:, end:]], axis=1)
  return handler


@functools.cache
def hide(first: int) -> Handler:
  """Returns the handler that masks attention to prompts from `size` on."""
  def handler(p, y, x):
    del x
    at = jnp.arange(y.shape[-1]) - first
    hidden = (at >= p["size"]) & (at < len(p["slots"]))
    return jnp.where(hidden, jnp.finfo(y.dtype).min, y)
  return handler


def handlers(backbone: nn.Module, released: bool = False
             ) -> tuple[tuple[str, Handler | Shared], ...]:
  """Returns the handlers of supernet and subnets."""
  first = backbone.prefix
  acting: dict[str, Handler | Shared] = {
      vpt_shallow.last_site(backbone)[0]: vpt_shallow.leave_out,
      "tokens": exchange(first), "input": exchange(first),
      "scores": hide(first)}
  if released:
    acting |= {"q": low_rank("b_q"), "k": Shared("q", low_rank("b_k")),
               "v": Shared("q", low_rank("b_v")), "block": bottleneck("branch")}
  else:
    acting |= {"q": low_rank("b"), "v": low_rank("b"),
               "fc2": bottleneck("output")}
  return tuple(acting.items())


# --- Networks of given sizes --------------------------------------------------

def network(backbone: nn.Module, seed: int, genome: Genome,
            released: bool = False,
            drop: float = 0.0) -> tuple[trees.Tree, trees.Tree]:
  """Returns the adapter and the buffers of a network of exactly these sizes.

  Args:
    released: the network of the authors' code, see above.
    drop: dropout rate of prompts, LoRA's input and the adapter's hidden units.
  """
  rng = np.random.default_rng(seed)
  sites = backbone.sites
  adapter: dict[str, Any] = {
      site: {} for site in ("tokens", "input", "q", "v", "fc2", "block")}
  buffers: dict[str, Any] = {"input": {}}
  before = 0
  for i, (prompts, rank, width) in enumerate(genome):
    block, site = str(i), "input" if i else "tokens"
    if prompts:
      adapter[site][block] = vpt_shallow.init(rng, backbone, prompts)
    keep = released and not prompts
    if before and not keep:
      buffers["input"][block] = {"before": np.arange(before)}
    before = before if keep else prompts
    if rank and released:
      adapter["q"][block] = lora.init_shared(
          rng, sites["q"][i].inputs,
          {name: sites[name][i].width for name in ("q", "k", "v")}, rank)
    elif rank:
      for name in ("q", "v"):
        adapter[name][block] = lora.init(
            rng, sites[name][i].inputs, sites[name][i].width, rank)
    if width:
      adapter["block" if released else "fc2"][block] = adapter_lib.init(
          rng, sites["fc2"][i].width, width)
  for site, blocks in adapter.items():
    for block in blocks if drop else ():
      buffers.setdefault(site, {}).setdefault(block, {}).update(rate(drop))
  for site, blocks in vpt_shallow.pooling(backbone, before).items():
    for block, entry in blocks.items():
      buffers.setdefault(site, {}).setdefault(block, {}).update(entry)
  return ({k: v for k, v in adapter.items() if v},
          {k: v for k, v in buffers.items() if v})


def sized(buffers: trees.Tree, genome: Genome, slots: int,
          released: bool = False) -> trees.Tree:
  """Returns the supernet's buffers with a subnet's sizes, not replicated.

  Args:
    slots: how many prompts the supernet has in each block.
  """
  out = {site: {b: dict(p) for b, p in blocks.items()}
         for site, blocks in buffers.items()}
  seen = 0  # prompts that the block's attention sees
  for i, sizes in enumerate(genome):
    seen = sizes[0] or (seen if released else 0)
    for site in RELEASED if released else PAPER:
      if site == "input" and not i:
        continue  # the prompts of block 0 are inserted at "tokens"
      entry = out.setdefault(site, {}).setdefault(str(i), {})
      entry["size"] = np.int32(sizes[MODULES.index(MODULE[site])])
      if site == "scores":
        entry |= {"slots": np.arange(slots), "size": np.int32(seen)}
  return out


def sample(buffers: trees.Tree, key: jax.Array) -> trees.Tree:
  """Draws a training step's subnet: a size for every module of every block."""
  def draw(site, block, p):
    if "choices" not in p:
      return p
    name = f"{MODULE[site]}/{block}".encode()
    return {**p, "size": jax.random.choice(
        jax.random.fold_in(key, zlib.crc32(name)), p["choices"])}
  drawn = {site: {b: draw(site, b, p) for b, p in blocks.items()}
           for site, blocks in buffers.items()}
  if any("choices" in p for p in drawn.get("input", {}).values()):
    # Released: a block without prompts sees those that enter.
    seen = jnp.int32(0)
    for block in sorted(drawn["scores"], key=int):
      p = drawn["scores"][block]
      p["size"] = seen = jnp.where(p["size"] > 0, p["size"], seen)
  return drawn


class Space(NamedTuple):
  """The subnets that the search draws from.

  Attributes:
    choices: {module: sizes, ascending}.
    budget: the largest number of parameters.
    depth: L, number of blocks.
    width: D of the backbone.
  """
  choices: dict[str, tuple[int, ...]]
  budget: int
  depth: int
  width: int

  @property
  def smallest(self) -> Genome:
    return (Sizes(*(min(self.choices[m]) for m in MODULES)),) * self.depth

  @property
  def largest(self) -> Genome:
    return (Sizes(*(max(self.choices[m]) for m in MODULES)),) * self.depth

  def count(self, genome: Genome) -> int:
    """Number of parameters: P D + 2 r 2 D + w (2 D + 1) + D a block."""
    D = self.width
    return sum(p * D + 4 * r * D + (w and w * (2 * D + 1) + D)
               for p, r, w in genome)

  def fit(self, rng: np.random.Generator, genome: Genome) -> Genome:
    """Makes random modules smaller until the budget holds."""
    sizes = list(genome)
    while self.count(tuple(sizes)) > self.budget:
      i = rng.integers(self.depth)
      module = MODULES[rng.integers(len(MODULES))]
      smaller = [s for s in self.choices[module]
                 if s < getattr(sizes[i], module)]
      if smaller:
        sizes[i] = sizes[i]._replace(**{module: smaller[-1]})
    return tuple(sizes)

  def draw(self, rng: np.random.Generator) -> Genome:
    """Draws every size at random."""
    return tuple(Sizes(*(int(rng.choice(self.choices[m])) for m in MODULES))
                 for _ in range(self.depth))

  def mutate(self, rng: np.random.Generator, genome: Genome,
             rate: float) -> Genome:
    """Draws each size anew with probability `rate`."""
    return _mix(rng, genome, self.draw(rng), rate)

  @staticmethod
  def cross(rng: np.random.Generator, one: Genome, two: Genome) -> Genome:
    """Takes each size from one of two parents."""
    return _mix(rng, one, two, 0.5)


def _mix(rng, one, two, rate):
  """Returns `one` with each size taken from `two` with probability `rate`."""
  return tuple(Sizes(*(b if rng.random() < rate else a
                       for a, b in zip(*pair, strict=True)))
               for pair in zip(one, two, strict=True))


def prepare_supernet(context: Context, *, space: Space, released: bool,
                     drop: float) -> tuple[trees.Tree, trees.Tree]:
  """Returns the largest network, with the choices of every size."""
  adapter, buffers = network(context.model.backbone, context.seed,
                             space.largest, released, drop)
  buffers = sized(buffers, space.largest, space.largest[0].prompts, released)
  for site in RELEASED if released else PAPER:
    for entry in buffers.get(site, {}).values():
      entry["choices"] = np.array(space.choices[MODULE[site]], np.int32)
  return adapter, buffers


# --- The search ---------------------------------------------------------------

def search(space: Space, c: ml_collections.ConfigDict, seed: int,
           score: Callable[[Genome], float],
           on_generation: Callable[..., None]) -> Genome:
  """Returns the best subnet within the budget: the highest score, then the
  fewest parameters.

  Each generation mutates and crosses the best `c.parents` of all before it,
  and is filled up with random ones; no subnet is scored twice. The search
  depends on the seed and the scores alone: it repeats exactly.

  Args:
    c: `config.noah`.
    score: `(genome) -> accuracy`.
    on_generation: called as `(number, best, scores, population)`.
  """
  rng = np.random.default_rng(seed)
  scores: dict[Genome, float] = {}
  population: list[Genome] = []

  def add(draw, count, tries=1000):
    for _ in range(tries):
      if count <= 0:
        return
      genome = space.fit(rng, draw())
      if genome not in scores:
        scores[genome] = float("nan")  # scored with its generation
        population.append(genome)
        count -= 1

  def ranked():
    return sorted(scores, key=lambda g: (-scores[g], space.count(g), g))

  def breed(parents):
    def pick():
      return parents[rng.integers(len(parents))]
    add(lambda: space.mutate(rng, pick(), c.mutation_rate), c.mutations)
    add(lambda: space.cross(rng, pick(), pick()), c.crossovers)

  for generation in range(c.generations):
    if generation:
      breed(ranked()[:c.parents])
    add(lambda: space.draw(rng), c.population - len(population))
    for genome in population:
      scores[genome] = score(genome)
    best = ranked()[0]
    on_generation(generation, best, scores, population)
    population.clear()
  return best


def prepare_winner(
    context: Context, *, space: Space,
    config: ml_collections.ConfigDict) -> tuple[trees.Tree, trees.Tree]:
  """Searches, and returns the winner with its initial values.

  The scores are kept beside the stage's states: an interrupted search goes on.
  """
  if context.val is None:
    raise ValueError("the search needs the validation split")
  val, store = context.val, context.notes
  known: dict[str, float] = store.notes() if store else {}

  def score(genome):
    name = json.dumps(genome)
    if name not in known:
      buffers = parallel.replicate(sized(
          parallel.unreplicate(context.buffers), genome,
          space.largest[0].prompts, config.released))
      known[name] = evaluate.top1(context.model, context.params, buffers,
                                  *val)
    return known[name]

  def on_generation(generation, best, scores, population):
    if store:
      store.write_notes(known)
    context.log({
        "stage": "search", "epoch": generation + 1,
        "epochs": config.generations, "val_top1": scores[best],
        "mean_top1": float(np.mean([scores[g] for g in population or [best]])),
        "params": space.count(best), "budget": space.budget,
        "genome": [list(sizes) for sizes in best]})
  try:
    best = search(space, config, context.seed, score, on_generation)
  finally:  # a request to end may come within a generation
    if known and store:
      store.write_notes(known)
  return network(context.model.backbone, context.seed, best, config.released,
                 config.dropout)


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Reads `config.noah`; a budget of 0 is the mean of the smallest and the
  largest subnet's parameters."""
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
  check_rate("noah.dropout", c.dropout)
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
             functools.partial(prepare_supernet, space=space,
                               released=c.released, drop=c.dropout),
             holdout=True, sample=sample),
       Stage("winner", TUNE_ADAPTER, functools.partial(
           prepare_winner, space=space, config=c))),
      options=options(config, OPTIONS, noah={"budget": space.budget}),
      handlers=handlers(backbone, c.released),
      cannot_merge="prompts are tokens, and the adapter's activation is not "
      "linear")
