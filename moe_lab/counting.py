"""Counts, sums and order by expert, over all tokens or over stretches of them, without a wait for the device."""

import torch
from torch import Tensor


def count(index_N: Tensor, size: int) -> Tensor:
    """How often each of 0..size-1 occurs, int64 [size]; unlike bincount it never waits for the device."""
    return torch.zeros(size, dtype=torch.int64, device=index_N.device).scatter_add_(
        0, index_N, torch.ones_like(index_N)
    )


def sort(key_N: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable order of keys in 0..size-1, its inverse, both [N], and how often each key occurs [size]; all int64."""
    counts_X, row_N = count(key_N, size), torch.arange(len(key_N), device=key_N.device)
    if size > 16 or key_N.device.type != "cpu":
        order_N = torch.argsort(key_N, stable=True)
        return order_N, torch.empty_like(order_N).scatter_(0, order_N, row_N), counts_X
    # Of so few keys a CPU counts each row's equals in half the time of a sort.
    so_far_XN = (torch.arange(size)[:, None] == key_N).cumsum(1, dtype=torch.int32)
    before_X = counts_X.cumsum(0) - counts_X - 1
    inverse_N = before_X.index_select(0, key_N) + so_far_XN.gather(0, key_N[None])[0]
    return torch.empty_like(inverse_N).scatter_(0, inverse_N, row_N), inverse_N, counts_X


def count_by_group(selected_TK: Tensor, num_experts: int, groups: int) -> Tensor:
    """How often each expert occurs in each of `groups` equal stretches of tokens, int64 [G, E]; E stands for none."""
    cell_N = _cells(selected_TK, num_experts + 1, groups)
    return count(cell_N, groups * (num_experts + 1)).view(groups, -1)[:, :num_experts]


def sum_by_group(expert_TK: Tensor, weight_TK: Tensor, num_experts: int, groups: int) -> Tensor:
    """Weights summed by expert over each of `groups` equal stretches of tokens, [G, E], with gradients."""
    cell_N = _cells(expert_TK, num_experts, groups)
    total_N = torch.zeros(groups * num_experts, dtype=weight_TK.dtype, device=weight_TK.device)
    return total_N.scatter_add(0, cell_N, weight_TK.reshape(-1)).view(groups, num_experts)


def _cells(index_TK: Tensor, size: int, groups: int) -> Tensor:
    """Where each entry counts in a flat [groups, size] table, [T * K]."""
    if groups > 1:
        T = index_TK.shape[0]
        index_TK = index_TK + (torch.arange(T, device=index_TK.device) // (T // groups) * size)[:, None]
    return index_TK.reshape(-1)
