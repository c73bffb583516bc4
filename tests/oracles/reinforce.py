"""Policy gradient on a token's own loss (arXiv 2202.01169, 1511.06297), token by token in float64, moe-lab unused.

An ordered choice a_1 .. a_k without replacement has probability prod_s exp(z_{a_s}) / sum of exp(z) over what is left.
"""

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor


def log_prob(z: Sequence[float], choice: Sequence[int]) -> float:
    """Log-probability of one ordered choice."""
    left, total = list(range(len(z))), 0.0
    for a in choice:
        total += z[a] - math.log(sum(math.exp(z[i]) for i in left))
        left.remove(a)
    return total


def score(z: Sequence[float], choice: Sequence[int]) -> list[float]:
    """d log_prob / dz: at every draw 1 for what was drawn, less the probability of each that was left."""
    left, grad = list(range(len(z))), [0.0] * len(z)
    for a in choice:
        total = sum(math.exp(z[i]) for i in left)
        for i in left:
            grad[i] += (1.0 if i == a else 0.0) - math.exp(z[i]) / total
        left.remove(a)
    return grad


def entropy_slope(z: Sequence[float]) -> list[float]:
    """d H / dz_j = -p_j (log p_j + H) of the softmax."""
    total = sum(math.exp(v) for v in z)
    p = [math.exp(v) / total for v in z]
    H = -sum(v * math.log(v) for v in p)
    return [-v * (math.log(v) + H) for v in p]


def gradient(
    z: Sequence[Sequence[float]],
    choices: Sequence[Sequence[int]],
    losses: Sequence[float],
    baselines: Sequence[float],
    counted: Sequence[bool],
    bonus: float,
) -> list[list[float]]:
    """d L / dz of given draws, L = mean over counted tokens of (loss - baseline) log pi(choice) - bonus * H."""
    n, rows = sum(counted), []
    for z_t, choice, loss, baseline, counts in zip(z, choices, losses, baselines, counted, strict=True):
        slope, flat = score(z_t, choice), entropy_slope(z_t)
        rows.append([((loss - baseline) * s - bonus * f) * counts / n for s, f in zip(slope, flat, strict=True)])
    return rows


def exact(z_TE: Tensor, loss_of: Callable[[int, tuple[int, ...]], float], k: int) -> Tensor:
    """d / dz of the mean over tokens of the expected loss, by enumerating every ordered choice of k experts."""
    z_TE = z_TE.detach().double().clone().requires_grad_()
    T, E = z_TE.shape
    total = z_TE.new_zeros(())
    for t in range(T):
        for choice in itertools.permutations(range(E), k):
            left, p = list(range(E)), z_TE.new_ones(())
            for a in choice:
                p = p * z_TE[t, a].exp() / sum(z_TE[t, i].exp() for i in left)
                left.remove(a)
            total = total + p * loss_of(t, choice) / T
    total.backward()
    assert z_TE.grad is not None
    return z_TE.grad
