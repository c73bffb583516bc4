"""Online K-means routing (arXiv 2605.12476) in plain loops, float64, moe-lab unused."""

import math

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def route(x_TD: Tensor, mean_ED: Tensor, bias: list[float], k: int, tau: float, gate: str):
    """Chosen experts of each token, strongest first, and their weights: lists over tokens.

    cos(x, mean) + bias ranks; the weight knows no bias: softmax of the chosen cosines / tau, sigmoid(cosine / tau), or
    1/k.
    """
    experts, weights = [], []
    for x in x_TD:
        cosines = [cosine(x, m) for m in mean_ED]
        best = sorted(range(len(cosines)), key=lambda i: -(float(cosines[i].detach()) + bias[i]))[:k]
        if gate == "softmax":
            total = sum((cosines[i] / tau).exp() for i in best)
            weight = [(cosines[i] / tau).exp() / total for i in best]
        elif gate == "sigmoid":
            weight = [1 / (1 + (-cosines[i] / tau).exp()) for i in best]
        else:
            weight = [torch.tensor(1 / k, dtype=torch.float64)] * k
        experts.append(best)
        weights.append(weight)
    return experts, weights


def moved(mean_ED: Tensor, x_TD: Tensor, chosen: list[list[int]], rate: float) -> Tensor:
    """(1 - rate) mean + rate * mean of the tokens that chose the expert, where there were any."""
    new_ED = mean_ED.clone()
    for i in range(mean_ED.shape[0]):
        came = [x for x, experts in zip(x_TD, chosen, strict=True) if i in experts]
        if came:
            new_ED[i] = (1 - rate) * mean_ED[i] + rate * sum(came) / len(came)
    return new_ED


def farthest(x_TD: Tensor, first: int, n: int) -> list[int]:
    """From the first token on, always the token whose largest cosine with those taken is smallest."""
    taken = [first]
    while len(taken) < n:
        nearest = [max(float(cosine(x, x_TD[i])) for i in taken) for x in x_TD]
        taken.append(min(range(len(nearest)), key=lambda t: (nearest[t], t)))
    return taken


def spread(x_TD: Tensor, n: int, same: float = 1 - 1e-6) -> list[int]:
    """Positions T * frac(i * golden ratio), i = 1, 2, ..., those left out that point where an earlier one does."""
    T, taken, i = x_TD.shape[0], [], 0
    while len(taken) < n and i < 20 * T:
        i += 1
        t = int(T * math.fmod(i * (math.sqrt(5) - 1) / 2, 1))
        if all(float(cosine(x_TD[t], x_TD[j])) < same for j in taken):
            taken.append(t)
    return taken
