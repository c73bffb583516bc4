"""Counts and sums by expert, over all tokens or over stretches of them, without a wait for the device."""

import torch
from torch import Tensor


def count(index_N: Tensor, size: int) -> Tensor:
    """How often each of 0..size-1 occurs, int64 [size]; unlike bincount it never waits for the device."""
    return torch.zeros(size, dtype=torch.int64, device=index_N.device).scatter_add_(
        0, index_N, torch.ones_like(index_N)
    )


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
