"""Default MoE against plain loops: output, every gradient, and the running means over several micro-batches.

Shapes: T tokens, D width, E experts, K chosen per token.
"""

from typing import Any

import pytest
import torch
from layers import context, grad, make_moe, preset, randn
from oracles import default_moe as oracle
from torch import Tensor

from moe_lab.model.moe import MoE
from moe_lab.routers.default_moe import DefaultMoE

D, E = 8, 5


def layer(k: int = 2, E: int = E, **changes: Any) -> tuple[MoE, DefaultMoE]:
    moe = make_moe(preset("router", "default_moe", k=k, **changes), D, E)
    assert isinstance(moe.router, DefaultMoE)
    moe.router.mean_ED.copy_(randn(E, D, key=("means",)))
    return moe, moe.router


def outputs(moe: MoE, x_TD: Tensor) -> Tensor:
    """What each expert says of each token, [T, E, D]."""
    gate_TEF, up_TEF = torch.einsum("td,eid->tei", x_TD, moe.experts.w_in_EID).chunk(2, -1)
    return torch.einsum("tef,efd->ted", torch.nn.functional.silu(gate_TEF) * up_TEF, moe.experts.w_out_EFD)


@pytest.mark.parametrize(("T", "k", "E"), [(12, 1, E), (12, 2, E), (3, 2, E), (12, E, E), (4, 1, 1)])
def test_output_and_gradients(T: int, k: int, E: int) -> None:
    """T < E leaves experts without a token; with k=E nothing is stood in for."""
    x_TD, c_TD = randn(T, D).requires_grad_(), randn(T, D, key=("c",))
    moe, router = layer(k, E)
    y_TD, routing = moe(x_TD, context())
    assert int(routing.plan.counts_E.sum()) == T * k, "more experts run than were chosen"
    (y_TD * c_TD).sum().backward()

    twin, stands = layer(k, E)
    w_TD = x_TD.detach().clone().requires_grad_()
    expected = oracle.layer(w_TD, stands.weight_ED, outputs(twin, w_TD), stands.mean_ED, k)
    (expected * c_TD).sum().backward()
    torch.testing.assert_close(y_TD, expected)
    pairs = [(x_TD, w_TD), *zip(moe.parameters(), twin.parameters(), strict=True)]
    for mine, theirs in pairs:
        torch.testing.assert_close(grad(mine), grad(theirs), rtol=1e-9, atol=1e-12)
    if E > 1:
        assert (grad(router.weight_ED).norm(dim=1) > 0).all(), "a gate without a gradient"


def test_a_gate_hears_of_the_mean_of_an_expert_that_does_not_run() -> None:
    """d y / d p_i is m_i there: with another mean in its place the gradient at its row is another."""
    x_TD, found = randn(1, D), []
    for factor in (1.0, -3.0):
        moe, router = layer(1)
        idle = int((x_TD @ router.weight_ED.T).argmin())
        router.mean_ED[idle] *= factor
        y_TD, _ = moe(x_TD, context())
        y_TD.sum().backward()
        found.append(grad(router.weight_ED)[idle])
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("parts", [1, 3])
def test_the_means_move_once_per_update(parts: int) -> None:
    """To the mean over all micro-batches; an expert without a row keeps its own, one never chosen too."""
    x_TD = randn(12, D)
    moe, router = layer(1)
    with torch.no_grad():
        router.weight_ED[3] = router.weight_ED[0]  # its twin is first: never chosen
    before_ED, total = router.mean_ED.clone(), {}
    for part in x_TD.chunk(parts):
        _, routing = moe(part, context())
        for name, t in router.statistics(part, routing).items():
            total[name] = total[name] + t if name in total else t
    router.after_step(total, 0.0)
    chosen = (x_TD @ router.weight_ED.T).argmax(-1, keepdim=True).tolist()
    assert [3] not in chosen and router.rate.at(0.0) == 0.05
    torch.testing.assert_close(router.mean_ED, oracle.moved(before_ED, outputs(moe, x_TD).detach(), chosen, 0.05))
    assert torch.equal(router.mean_ED[3], before_ED[3])


def test_rows_that_capacity_drops_are_no_part_of_the_means() -> None:
    x_TD = randn(12, D)
    moe, router = layer(1)
    _, routing = moe(x_TD, context(capacity=0.5))
    stats = router.statistics(x_TD, routing)
    assert int(stats["rows_E"].sum()) < 12
    kept = routing.plan.kept_TK.squeeze(1)
    chosen = routing.plan.selected_TK[:, 0].masked_fill(~kept, -1).tolist()
    said = outputs(moe, x_TD).detach()
    for i in range(E):
        expected = sum((said[t, i] for t in range(12) if chosen[t] == i), torch.zeros(D, dtype=torch.float64))
        torch.testing.assert_close(stats["output_sum_ED"][i], expected)


def test_at_the_start_it_is_plain_top_k() -> None:
    x_TD = randn(12, D)
    moe, router = layer()
    router.mean_ED.zero_()
    plain = make_moe(preset("router", "topk", renormalise=False), D, E)
    assert torch.equal(moe(x_TD, context())[0], plain(x_TD, context())[0])
