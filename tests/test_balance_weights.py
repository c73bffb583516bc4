"""Losses of the router's rows and the experts' matrices, which see no token, against plain loops.

Shapes: T tokens, D width, E experts, F hidden.
"""

import itertools
from typing import Any

import pytest
import torch
from layers import context, make_moe, make_router, preset, randn
from oracles import balance as oracle
from tiny import tiny
from torch import Tensor

from moe_lab.assemble import assemble
from moe_lab.balance.base import Balancer, Layer
from moe_lab.balance.erc import reach
from moe_lab.config import build
from moe_lab.drawing import draw
from moe_lab.model.moe import MoE
from moe_lab.routing import Routing

D = 8


def moe_of(E: int, experts: str = "swiglu") -> MoE:
    return make_moe(preset("router", "topk", k=1), D, E, experts, width=16)


def rows_of(moe: MoE) -> torch.nn.Parameter:
    return moe.router.get_parameter("weight_ED")


def loss(name: str, moe: MoE, drawn: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
    balancer: Balancer = build("balance", {"name": name} | options)
    routing: Routing = moe.router(randn(5, D), context())
    return balancer.loss(routing, Layer(moe, draws=drawn or {}))


def close(ours: Tensor, theirs: Tensor, by: list[tuple[Tensor, Tensor]]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for mine, other in by:
        (a,) = torch.autograd.grad(ours, mine, retain_graph=True)
        (b,) = torch.autograd.grad(theirs, other, retain_graph=True)
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


# SimBal


@pytest.mark.parametrize("E", [1, 2, 5, D + 3])
def test_simbal_is_the_papers(E: int):
    moe = moe_of(E)
    rows_ED = leaf(rows_of(moe))
    close(loss("simbal", moe), oracle.simbal(rows_ED), [(rows_of(moe), rows_ED)])


def test_what_simbal_is_worth():
    """0 for orthonormal rows, E for rows of zeros, E^2 - E where all rows are one unit vector."""
    E, moe = 5, moe_of(5)
    unit_D = torch.nn.functional.normalize(randn(D), dim=0)
    for rows_ED, worth in ((torch.eye(D)[:E], 0), (torch.zeros(E, D), E), (unit_D.expand(E, D), E * E - E)):
        with torch.no_grad():
            rows_of(moe).copy_(rows_ED)
        assert loss("simbal", moe).item() == pytest.approx(worth, abs=1e-12)


@pytest.mark.parametrize("zeros", [False, True])
def test_simbal_starts_from_orthonormal_rows_of_the_same_span(zeros: bool):
    """Gram and Schmidt: each row is its own drawn row less what lies along earlier ones, and points its way."""
    E, moe = 5, moe_of(5)
    if zeros:  # noisy_topk starts there
        torch.nn.init.zeros_(rows_of(moe))
    before_ED = rows_of(moe).detach().clone()
    build("balance", {"name": "simbal", "orthogonal": False}).start(moe)
    assert torch.equal(rows_of(moe), before_ED)
    build("balance", {"name": "simbal"}).start(moe)
    rows_ED = rows_of(moe).detach()
    torch.testing.assert_close(rows_ED @ rows_ED.T, torch.eye(E, dtype=torch.float64))
    assert loss("simbal", moe).item() == pytest.approx(0, abs=1e-12)
    if not zeros:
        lower_EE = before_ED @ rows_ED.T  # no drawn row needs a later direction
        torch.testing.assert_close(lower_EE, lower_EE.tril())
        assert (lower_EE.diagonal() > 0).all()


# Expert-router coupling


@pytest.mark.parametrize("alpha", [1.0, 0.5, 1.05])
@pytest.mark.parametrize("experts", ["swiglu", "mlp"])
@pytest.mark.parametrize("E", [2, 4])
def test_erc_is_the_papers(E: int, experts: str, alpha: float):
    """Gradients to the router's rows and to the experts; of gated experts the gate's matrix answers."""
    moe = moe_of(E, experts)
    uniform_ED = torch.rand(E, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows_ED, w_EID = leaf(rows_of(moe)), leaf(moe.experts.w_in_EID)
    ours = loss("erc", moe, {"delta": uniform_ED}, alpha=alpha)
    theirs = oracle.erc(rows_ED, w_EID[:, : moe.experts.width], uniform_ED, alpha)
    close(ours, theirs, [(rows_of(moe), rows_ED), (moe.experts.w_in_EID, w_EID)])


def test_erc_stays_within_half_the_way_to_the_nearest_row():
    """At the ends of delta a row has moved by at most half the distance to its nearest neighbour."""
    rows_ED = randn(6, D)
    torch.testing.assert_close(reach(rows_ED).flatten().tolist(), oracle.erc_reach(rows_ED))
    moved_ED = (rows_ED * reach(rows_ED)).norm(dim=-1)
    apart_EE = torch.cdist(rows_ED, rows_ED) + 1e9 * torch.eye(6)
    torch.testing.assert_close(moved_ED, apart_EE.amin(-1) / 2)
    assert reach(randn(1, D)).tolist() == [[0.0]]


def test_what_erc_is_worth():
    """0 where each expert reads its own row only; 2 (1 - 1/E) (1 - alpha) M where all rows and experts are alike."""
    E, moe = 4, moe_of(4, "mlp")
    with torch.no_grad():
        rows_of(moe).copy_(torch.eye(D)[:E])
        moe.experts.w_in_EID.zero_()
        moe.experts.w_in_EID[torch.arange(E), 0, torch.arange(E)] = 3.0
    middle = {"delta": torch.full((E, D), 0.5)}
    assert loss("erc", moe, middle).item() == 0
    with torch.no_grad():
        rows_of(moe).copy_(torch.eye(D)[:1].expand(E, D))
        moe.experts.w_in_EID.copy_(moe.experts.w_in_EID[:1].expand_as(moe.experts.w_in_EID))
    assert loss("erc", moe, middle).item() == 0
    assert loss("erc", moe, middle, alpha=0.5).item() == pytest.approx(2 * 0.75 * 0.5 * 3)


def test_erc_leaves_out_experts_without_a_network():
    """They answer no row; their rows still count as neighbours that a stretched row must not reach."""
    moe = make_moe(preset("router", "topk", k=1), D, 3, "mlp", width=16, zero_experts=1)
    moe.router = make_router(preset("router", "topk", k=1), D, 4)
    uniform_ED = torch.rand(4, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        rows_of(moe)[3] = rows_of(moe)[0] + 0.01
    rows_ED, w_EID = leaf(rows_of(moe)), leaf(moe.experts.w_in_EID)
    ours, theirs = loss("erc", moe, {"delta": uniform_ED}), oracle.erc(rows_ED, w_EID, uniform_ED, 1.0)
    close(ours, theirs, [(rows_of(moe), rows_ED), (moe.experts.w_in_EID, w_EID)])


def test_erc_of_one_expert_is_nothing():
    moe = moe_of(1)
    assert loss("erc", moe, {"delta": torch.rand(1, D)}).item() == 0


# Orthogonal experts


@pytest.mark.parametrize("experts", ["swiglu", "mlp"])
@pytest.mark.parametrize("E", [2, 5])
def test_orthogonal_experts_against_loops(E: int, experts: str):
    moe = moe_of(E, experts)
    w_EID = leaf(moe.experts.w_in_EID)
    theirs = oracle.orthogonal_experts(w_EID[:, : moe.experts.width])
    close(loss("orthogonal_experts", moe), theirs, [(moe.experts.w_in_EID, w_EID)])


def test_what_orthogonal_experts_are_worth():
    """1 where all are copies, 0 where they read other inputs and where there is one; the router gets nothing."""
    moe = moe_of(3, "mlp")
    with torch.no_grad():
        moe.experts.w_in_EID.copy_(moe.experts.w_in_EID[:1].expand_as(moe.experts.w_in_EID))
    copies = loss("orthogonal_experts", moe)
    assert copies.item() == pytest.approx(1)
    assert torch.autograd.grad(copies, rows_of(moe), allow_unused=True) == (None,)
    with torch.no_grad():
        moe.experts.w_in_EID.zero_()
        moe.experts.w_in_EID[torch.arange(3), :, torch.arange(3)] = 1.0
    assert loss("orthogonal_experts", moe).item() == 0
    assert loss("orthogonal_experts", moe_of(1)).item() == 0


# Together with the loop


def test_what_a_balancer_draws_is_by_position_and_the_same_in_all_micro_batches():
    """Another draw at each update and layer, none in evaluation; cut into micro-batches it stays whole."""
    parts = assemble(tiny("balance=[erc,switch]"))
    first, again, later = (draw(parts, 128, 0, "noise", step, training=True) for step in (0, 0, 1))
    deltas = [layer.balancers["erc"]["delta"] for layer in (*first, *later)]
    assert all(d.shape == (4, 32) and 0 <= d.min() < 0.2 and 0.8 < d.max() < 1 for d in deltas)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(deltas, 2))
    for a, b, moe in zip(first, again, parts.model.moes, strict=True):
        assert torch.equal(a.balancers["erc"]["delta"], b.balancers["erc"]["delta"])
        assert a.chunk(2, 1, moe.router, []).balancers is a.balancers
        assert a.balancers["switch"] == {}
    assert [layer.balancers for layer in draw(parts, 128, 0, "eval noise", 0, training=False)] == [{}, {}]


def test_erc_and_simbal_of_rows_of_zeros_are_finite():
    """noisy_topk starts there: no answer, and no gradient that is not a number."""
    moe = moe_of(4)
    torch.nn.init.zeros_(rows_of(moe))
    for found in (loss("erc", moe, {"delta": torch.rand(4, D)}), loss("simbal", moe)):
        found.backward()
        assert found.isfinite() and rows_of(moe).grad.isfinite().all()  # pyright: ignore[reportOptionalMemberAccess]
