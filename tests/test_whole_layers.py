"""The oldest routers through a whole MoE layer against a loop over tokens and experts in float64, without a plan.

Shapes: T tokens, D width, E experts, K chosen per token.
"""

from collections.abc import Callable

import pytest
import torch
from layers import context, draw, each_expert, make_moe, preset, randn, same_gradients
from torch import Tensor

T, D, E = 10, 6, 5
HOT = 0.75  # a temperature that fp32, in which knobs are told, holds exactly
each_k = pytest.mark.parametrize("k", [1, 2])


def by_tokens(x_TD: Tensor, experts: list[Callable[[Tensor], Tensor]], gates: Callable[[int], dict[int, Tensor]]):
    """sum of gate * expert(x) over the experts that `gates` names for each token."""
    zero_D = torch.zeros_like(x_TD[0])
    return torch.stack([sum((g * experts[e](x_D) for e, g in gates(t).items()), zero_D) for t, x_D in enumerate(x_TD)])


def softmax(scores: dict[int, Tensor]) -> dict[int, Tensor]:
    total = sum(z.exp() for z in scores.values())
    return {e: z.exp() / total for e, z in scores.items()}


@each_k
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["dense", "gumbel_softmax"])
def test_the_soft_mixtures(name: str, training: bool, k: int):
    """Every expert on every token, by the softmax of (scores + Gumbel noise * 0.5) / temperature; k moves nothing."""
    moe = make_moe(preset("router", name, k=k), D, E)
    x_TD, w_ED = randn(T, D).requires_grad_(), moe.router.weight_ED
    noise_TE = draw(moe.router, T) if training else None
    y_TD, routing = moe(x_TD, context(noise_TE, temperature=HOT, noise=0.5, training=training))

    def gates(t: int) -> dict[int, Tensor]:
        noise = [0.0] * E if noise_TE is None else (0.5 * noise_TE[t].double()).tolist()
        return softmax({e: (w_ED[e] @ x_TD[t] + noise[e]) / HOT for e in range(E)})

    same_gradients(moe, x_TD, y_TD, by_tokens(x_TD, each_expert(moe), gates))
    ranks = [sorted(range(E), key=lambda e: -gates(t)[e].item())[:k] for t in range(T)]
    assert routing.plan.selected_TK.tolist() == ranks


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_noisy_topk(training: bool, k: int):
    """H = x W + 0.5 n log(1 + exp(x W_noise)), and a softmax over the k largest of H alone. Without noise nothing
    depends on W_noise."""
    moe = make_moe(preset("router", "noisy_topk", k=k), D, E)
    x_TD, w_ED, noise_ED = randn(T, D).requires_grad_(), moe.router.weight_ED, moe.router.get_parameter("noise_ED")
    noise_TE = draw(moe.router, T) if training else None
    y_TD, routing = moe(x_TD, context(noise_TE, noise=0.5, training=training))

    def gates(t: int) -> dict[int, Tensor]:
        z = {e: w_ED[e] @ x_TD[t] for e in range(E)}
        if noise_TE is not None:
            z = {e: z[e] + 0.5 * float(noise_TE[t, e]) * (1 + (noise_ED[e] @ x_TD[t]).exp()).log() for e in range(E)}
        return softmax({e: z[e] for e in sorted(z, key=lambda e: -z[e].item())[:k]})

    assert routing.plan.selected_TK.tolist() == [list(gates(t)) for t in range(T)]
    loops_TD = by_tokens(x_TD, each_expert(moe), gates)
    if training:
        same_gradients(moe, x_TD, y_TD, loops_TD)
    else:
        torch.testing.assert_close(y_TD, loops_TD, rtol=1e-9, atol=1e-11)
