"""ReMoE (arXiv 2412.14711) in plain loops, float64, moe-lab unused.

R = relu(x W); y_t = sum_e R_te E_e(x_t). L_reg = 1/(L T) sum over layers, tokens, experts of f_le R_lte with
f_le = E / (k T) * number of tokens with R_lte > 0 (1 without the load term), no gradient through f.
lambda <- lambda * alpha^sign((1 - k/E) - S), S = 1 - (share of R > 0 over layers, tokens and experts).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def layer(x_TD: Tensor, weight_ED: Tensor, out_TED: Tensor) -> Tensor:
    rows = []
    for t in range(x_TD.shape[0]):
        y = torch.zeros_like(x_TD[t])
        for e in range(weight_ED.shape[0]):
            z = (x_TD[t] * weight_ED[e]).sum()
            if z > 0:
                y = y + z * out_TED[t, e]
        rows.append(y)
    return torch.stack(rows)


def regulariser(gates: Sequence[Tensor], k: int, load: bool) -> Tensor:
    """L_reg of the gate values R [T, E] of each layer."""
    total = torch.zeros((), dtype=torch.float64)
    for R in gates:
        T, E = R.shape
        for e in range(E):
            f = E / (k * T) * sum(float(R[t, e].detach()) > 0 for t in range(T)) if load else 1.0
            for t in range(T):
                total = total + f * R[t, e] / (len(gates) * T)
    return total


def sparsity(gates: Sequence[Tensor]) -> float:
    values = [float(v) for R in gates for row in R for v in row]
    return 1 - sum(v > 0 for v in values) / len(values)


def adapted(strength: float, S: float, k: int, E: int, alpha: float) -> float:
    missing = (1 - k / E) - S
    return strength * alpha if missing > 0 else strength / alpha if missing < 0 else strength
