"""Default MoE (arXiv 2504.12463) in plain loops, float64, moe-lab unused.

y_t = sum over the k most probable of p_ti E_i(x_t) + sum over the others of p_ti m_i, with p the softmax over all
experts and m_i the running mean of what expert i said: after each update m_i <- (1 - rate) m_i + rate * mean of its
outputs, where it had any.
"""

import torch
from torch import Tensor


def layer(x_TD: Tensor, weight_ED: Tensor, out_TED: Tensor, mean_ED: Tensor, k: int) -> Tensor:
    """y [T, D]; out_TED[t, i] is what expert i says of token t."""
    rows = []
    for t in range(x_TD.shape[0]):
        z = [(weight_ED[i] * x_TD[t]).sum() for i in range(weight_ED.shape[0])]
        total = sum(v.exp() for v in z)
        best = sorted(range(len(z)), key=lambda i: -float(z[i].detach()))[:k]
        y = torch.zeros_like(x_TD[t])
        for i, v in enumerate(z):
            y = y + v.exp() / total * (out_TED[t, i] if i in best else mean_ED[i])
        rows.append(y)
    return torch.stack(rows)


def moved(mean_ED: Tensor, out_TED: Tensor, chosen: list[list[int]], rate: float) -> Tensor:
    """The running means after an update in which token t went to the experts chosen[t]."""
    new_ED = mean_ED.clone()
    for i in range(mean_ED.shape[0]):
        said = [out_TED[t, i] for t, experts in enumerate(chosen) if i in experts]
        if said:
            new_ED[i] = (1 - rate) * mean_ED[i] + rate * sum(said) / len(said)
    return new_ED
