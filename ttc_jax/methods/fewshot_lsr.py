"""Few-shot LSR (Big Vision): the head that solves a ridge regression on frozen
features.

As google-research/big_vision, evaluators/fewshot_lsr.py: every feature is
standardised by its mean and its deviation + 1e-5 over the training images; a
further feature, the constant 100, takes the bias, which the penalty so hardly
reaches; a class's target is 1 for its images and -1 for all others. With X
(N, D + 1) and Y (N, C),

  W = argmin |X W - Y|^2 + l2 |W|^2 = (X'X + l2 I)^-1 X'Y

and the class of an image is the one with the largest output. The head holds
the standardisation too, so that it is a linear head as any other.

Big Vision's evaluator has one l2, which its configurations set to 2^10, and
takes 1, 5, 10 and 25 images of each class, drawn with three seeds. Here `l2`
is an option, which `config.grid.l2` chooses on validation images;
`config.few_shot` takes some images of each class, otherwise all are used.
"""
import flax.linen as nn
import ml_collections
import numpy as np

from ttc_jax import evaluate, trees
from ttc_jax.errors import UserError
from ttc_jax.methods import TUNE_HEAD, Context, Method, Stage, options

OPTIONS = ("l2",)
SOLVED = True
GRID = tuple(2.0 ** k for k in range(-10, 21, 2))  # Big Vision's is 2^10
BIAS = 100.0      # the constant feature
LEAST_STD = 1e-5  # added to every deviation


def ridge(x: np.ndarray, y: np.ndarray, l2: float) -> np.ndarray:
  """Returns the W (D, C) that minimises |x W - y|^2 + l2 |W|^2.

  Through the eigenvectors of the smaller of x'x and xx'.

  Args:
    x: (N, D), float64. y: (N, C). l2: above 0.
  """
  wide = x.shape[1] > x.shape[0]
  values, q = np.linalg.eigh(x @ x.T if wide else x.T @ x)
  left, right = (x.T @ q, q.T @ y) if wide else (q, q.T @ (x.T @ y))
  # Rounding makes some of the smallest eigenvalues negative.
  return left @ (right / (np.maximum(values, 0) + l2)[:, None])


def head(features: np.ndarray, labels: np.ndarray, classes: int,
         l2: float) -> tuple[trees.Tree, float]:
  """Returns (head, loss) of features (N, D) and their labels (N,).

  The head is {"kernel": (D, C), "bias": (C,)}, float32, for features as they
  are; the loss is the mean of (X W - Y)^2.
  """
  x = np.asarray(features, np.float64)
  mean, std = x.mean(0), x.std(0) + LEAST_STD
  x = np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=BIAS)
  y = 2.0 * np.eye(classes)[labels] - 1
  w = ridge(x, y, l2)
  kernel = w[:-1] / std[:, None]
  bias = BIAS * w[-1] - mean @ kernel
  return ({"kernel": kernel.astype(np.float32),
           "bias": bias.astype(np.float32)}, float(((x @ w - y) ** 2).mean()))


def make(config: ml_collections.ConfigDict, backbone: nn.Module) -> Method:
  """Needs l2."""
  del backbone
  chosen = options(config, OPTIONS)
  if not chosen["l2"] > 0:
    raise UserError(f"config.l2 is {chosen['l2']:g}; give more than 0")

  def solve(context: Context):
    features = evaluate.features(
        context.model, context.params, context.buffers, context.images)
    return head(features, context.labels, context.classes, chosen["l2"])
  return Method((Stage("lsr", TUNE_HEAD.rules, solve=solve),), options=chosen)
