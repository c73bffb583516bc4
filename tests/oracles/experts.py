"""Experts as loops over tokens, experts and neurons, in float64.

Every expert is an object of its own: (kind, *weights). Feed-forward experts hold the matrices of their own width, so
that nothing is padded here; experts without networks are MoE++'s (arXiv 2410.07348, section 3.1).
Shapes: D width of the stream, F hidden neurons of one expert, T tokens, E experts.
"""

import math
from typing import Any

import torch
from torch import Tensor


def gelu(z: Tensor) -> Tensor:
    return z * (1 + torch.erf(z / math.sqrt(2))) / 2


def silu(z: Tensor) -> Tensor:
    return z / (1 + torch.exp(-z))


def mlp(x_D: Tensor, w_in_FD: Tensor, w_out_FD: Tensor) -> Tensor:
    """sum_n gelu(w_in[n] . x) w_out[n]"""
    return sum((gelu(w_in_FD[n] @ x_D) * w_out_FD[n] for n in range(len(w_in_FD))), torch.zeros_like(x_D))


def swiglu(x_D: Tensor, w_gate_FD: Tensor, w_up_FD: Tensor, w_out_FD: Tensor) -> Tensor:
    """sum_n silu(w_gate[n] . x) (w_up[n] . x) w_out[n]"""
    y_D = torch.zeros_like(x_D)
    for n in range(len(w_gate_FD)):
        y_D = y_D + silu(w_gate_FD[n] @ x_D) * (w_up_FD[n] @ x_D) * w_out_FD[n]
    return y_D


def zero(x_D: Tensor) -> Tensor:
    return torch.zeros_like(x_D)


def copy(x_D: Tensor) -> Tensor:
    return x_D


def constant(x_D: Tensor, mix_2D: Tensor, v_D: Tensor) -> Tensor:
    """a_1 x + a_2 v with [a_1, a_2] = softmax(W_c x)."""
    first, second = torch.exp(mix_2D[0] @ x_D), torch.exp(mix_2D[1] @ x_D)
    return first / (first + second) * x_D + second / (first + second) * v_D


KINDS = {"mlp": mlp, "swiglu": swiglu, "zero": zero, "copy": copy, "constant": constant}


def expert(x_D: Tensor, kind: str, *weights: Tensor) -> Tensor:
    return KINDS[kind](x_D, *weights)


def layer(x_TD: Tensor, weight_TE: Tensor, experts: list[tuple[Any, ...]]) -> Tensor:
    """y_t = sum_e w_te E_e(x_t) over the experts that have a weight"""
    y_TD = []
    for x_D, weight_E in zip(x_TD, weight_TE, strict=True):
        y_D = torch.zeros_like(x_D)
        for e in range(len(experts)):
            if weight_E[e] != 0:
                y_D = y_D + weight_E[e] * expert(x_D, *experts[e])
        y_TD.append(y_D)
    return torch.stack(y_TD)


def multiplications(kind: str, *weights: Tensor) -> int:
    """Multiplications of weights with a token in one call: what a FLOP count counts, two FLOPs each."""
    return 0 if kind in ("zero", "copy") else sum(w.numel() for w in weights)


def split(num: int, k: int, width: int, granularity: int) -> tuple[int, int, int]:
    """DeepSeekMoE (arXiv 2401.06066, section 3.1): m N experts of 1/m of the width, m K of them chosen."""
    return num * granularity, k * granularity, width // granularity
