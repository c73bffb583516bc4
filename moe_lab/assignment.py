"""Assigning tokens to experts evenly, for a fixed number of rounds, so that nothing waits for the device.

Shapes: T tokens, E experts.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURES = [0.3 * 0.01 ** (i / 15) for i in range(16)]  # of the spread of the scores: 0.3 to 0.003
# By how much of the spread a bid raises the price beyond need: little at first, so that the assignment is good; then
# more and more, so that tokens which are alike do not outbid each other for ever.
RAISES = [0.001 * 300 ** (i / 31) for i in range(32)]


def prices(score_TE: Tensor, temperatures: Iterable[float | Tensor]) -> Tensor:
    """Sinkhorn: prices [E] at which softmax((score - price) / t) asks for every expert alike (arXiv 1306.0895).

    One scaling of rows and then columns of exp(score / t) per temperature; -price / t is the columns' logarithm.
    """
    T, E = score_TE.shape
    price_E = score_TE.new_zeros(E)
    for t in temperatures:
        demand_E = ((score_TE - price_E) / t).log_softmax(-1).logsumexp(0)  # logarithms of tokens
        price_E = price_E + t * (demand_E - math.log(T / E))
    return price_E


def balanced(score_TE: Tensor) -> Tensor:
    """Each token's expert, int64 [T], at most ceil(T / E) tokens each, of nearly the largest total score.

    An auction (Bertsekas 1992): tokens without an expert bid for the one that is worth most to them at its price, by
    how much it is worth more than the next; an expert keeps its highest bids and charges the lowest of these. It starts
    from Sinkhorn's prices, which leaves it little to do, and whoever is left after the last round gets what is free.
    """
    T, E = score_TE.shape
    room = -(-T // E)
    if E == 1:
        return score_TE.new_zeros(T, dtype=torch.int64)
    # Rows to whom every expert is alike stand for the places that stay free. What all tokens think of an expert, or a
    # token of all experts, changes nothing.
    value_TE = F.pad(score_TE, (0, 0, 0, E * room - T))
    value_TE = value_TE - value_TE.mean(0)
    value_TE = value_TE - value_TE.mean(1, keepdim=True)
    spread = (value_TE.max() - value_TE.min()).clamp_min(1e-20)
    price_E = prices(value_TE, [spread * t for t in TEMPERATURES])
    expert_T = torch.full((E * room,), E, device=score_TE.device)
    bid_T = value_TE.new_zeros(E * room)
    for share in RAISES:
        (first_T, second_T), (best_T, _) = (t.unbind(1) for t in (value_TE - price_E).topk(2, -1))
        free_T = expert_T == E
        bid_T = torch.where(free_T, price_E[best_T] + first_T - second_T + share * spread, bid_T)
        expert_T = torch.where(free_T, best_T, expert_T)
        kept_T, full_E = _rank(expert_T, bid_T) < room, _count(expert_T, E) >= room
        expert_T = torch.where(kept_T, expert_T, E)
        lowest_E = bid_T.new_full((E + 1,), torch.inf).scatter_reduce(0, expert_T, bid_T, "amin")[:E]
        price_E = torch.where(full_E, lowest_E, price_E)
    free_T = expert_T == E
    ends_E = (room - _count(expert_T, E)).cumsum(0)
    return torch.where(free_T, torch.searchsorted(ends_E, free_T.cumsum(0) - 1, right=True), expert_T)[:T]


def _count(expert_T: Tensor, E: int) -> Tensor:
    """Tokens of each expert; E stands for none."""
    return expert_T.new_zeros(E + 1).scatter_add(0, expert_T, torch.ones_like(expert_T))[:E]


def _rank(expert_T: Tensor, bid_T: Tensor) -> Tensor:
    """How many tokens of the same expert bid more, or as much and come before."""
    order_T = bid_T.argsort(descending=True, stable=True)
    order_T = order_T[expert_T[order_T].argsort(stable=True)]
    place_T = torch.empty_like(order_T).scatter(0, order_T, torch.arange(len(order_T), device=order_T.device))
    sorted_T = expert_T[order_T]
    return place_T - torch.searchsorted(sorted_T, expert_T)
