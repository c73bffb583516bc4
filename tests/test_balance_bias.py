"""Balancers that move the selection bias: the rules in plain loops, and loads that they even out.

Shapes: T tokens, E experts, K chosen per token.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exploring import at_work
from layers import context, make_moe, preset, randn
from oracles import balance as oracle
from tiny import tiny
from torch import Tensor

from moe_lab.balance.base import Balancer, Layer
from moe_lab.balance.quantile import BINS, bins, quantile
from moe_lab.config import build, check
from moe_lab.model.moe import MoE

E = 6


def loss_free(**options: Any) -> Balancer:
    return build("balance", {"name": "loss_free"} | options)


def moved(balancer: Balancer, bias: list[float], load: list[int], progress: float = 0.0, rate: float = 1.0) -> list:
    bias_E = torch.tensor(bias, dtype=torch.float64)
    layer = Layer(SimpleNamespace(bias_E=bias_E))  # pyright: ignore[reportArgumentType]
    balancer.after_step(layer, {"selected_E": torch.tensor(load)}, rate, progress)
    return bias_E.tolist()


LOADS = {"even": [4, 4, 4, 4], "skewed": [9, 4, 2, 1], "collapsed": [16, 0, 0, 0], "one dead": [6, 5, 5, 0]}


@pytest.mark.parametrize("recentre", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("update", ["sign", "proportional"])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_loss_free_moves_as_the_papers_rules(load: list[int], update: str, decay: float, recentre: bool):
    bias = [0.3, -0.1, 0.0, 0.2]
    balancer = loss_free(rate=0.02, update=update, decay=decay, recentre=recentre)
    expected = oracle.loss_free(bias, load, 0.02, update, decay, recentre)
    assert moved(balancer, bias, load) == pytest.approx(expected, rel=1e-6)


def test_loss_free_rate_is_a_curve():
    """0.1 to 0 in a straight line, times schedule.bias_rate."""
    balancer = loss_free(rate={"curve": "linear", "start": 0.1, "end": 0.0})
    for progress, rate, step in ((0.0, 1.0, 0.1), (0.25, 1.0, 0.075), (0.25, 2.0, 0.15), (1.0, 1.0, 0.0)):
        assert moved(balancer, [0.0, 0.0], [3, 1], progress, rate) == pytest.approx([-step, step])


def test_a_frozen_bias_stands_still():
    """Neither steps nor decays from that fraction of the run on; before it nothing is different."""
    frozen, free = (loss_free(rate=0.1, decay=0.5, recentre=True, freeze=freeze) for freeze in (0.75, None))
    for progress in (0.0, 0.5, 0.74):
        assert moved(frozen, [0.4, -0.2], [3, 1], progress) == moved(free, [0.4, -0.2], [3, 1], progress)
    for progress in (0.75, 1.0):
        assert moved(frozen, [0.4, -0.2], [3, 1], progress) == [0.4, -0.2]
        assert moved(free, [0.4, -0.2], [3, 1], progress) != [0.4, -0.2]


# Quantile


def identity_moe(name: str, k: int) -> MoE:
    """Logits are the tokens."""
    moe = make_moe(preset("router", name, k=k), E, E, "mlp", width=8)
    with torch.no_grad():
        moe.router.get_parameter("weight_ED").copy_(torch.eye(E))
    return moe


def update(moe: MoE, x_TE: Tensor, n: int = 1, rate: float = 1.0) -> None:
    """One update of `n` micro-batches."""
    balancer, total = build("balance", {"name": "quantile"}), {}
    for part in x_TE.chunk(n):
        routing = moe.router(part, context(bias_E=moe.bias_E))
        for name, t in balancer.statistics(routing, Layer(moe)).items():
            total[name] = total[name] + t if name in total else t
    balancer.after_step(Layer(moe), total, rate, 0.0)


def load(moe: MoE, x_TE: Tensor) -> Tensor:
    return moe.router(x_TE, context(bias_E=moe.bias_E)).plan.selected_E


@pytest.mark.parametrize("name", ["sigmoid_topk", "topk"])
@pytest.mark.parametrize("k", [1, 2])
def test_quantile_is_that_of_sorted_margins(name: str, k: int):
    """From no bias and again from the bias found: within a bin's width of the order statistic, which itself lies
    anywhere between two neighbours; so tokens are many."""
    T, x_TE = 3000, randn(3000, E) + torch.linspace(1, -1, E)
    moe = identity_moe(name, k)
    gate = (lambda z: z.sigmoid()) if name == "sigmoid_topk" else (lambda z: z.softmax(-1))
    for _ in range(2):
        expected = oracle.quantile_bias(gate(x_TE), moe.bias_E.tolist(), k)
        _, width = bins(moe.bias_E)
        update(moe, x_TE)
        got = moe.bias_E.tolist()
        assert got == pytest.approx(expected, abs=2 * float(width) + 2 / T)
        assert sum(got) == pytest.approx(0, abs=1e-6)  # the quantile is fp32
        assert max(got) - min(got) > 20 * float(width)


@pytest.mark.parametrize("k", [1, 2])
def test_quantile_evens_out_a_fixed_batch_in_two_updates(k: int):
    x_TE = randn(6000, E) + torch.linspace(2, -2, E)
    moe = identity_moe("sigmoid_topk", k)
    imbalance = []
    for _ in range(8):
        load_E = load(moe, x_TE).double()
        imbalance.append(float(load_E.max() / load_E.mean() - 1))
        update(moe, x_TE)
    assert imbalance[0] > 0.8 and imbalance[2] < 0.3 * imbalance[0] and imbalance[-1] < 0.05


def test_quantile_adds_up_over_micro_batches():
    x_TE = randn(600, E) + torch.linspace(1, -1, E)
    whole, cut = identity_moe("sigmoid_topk", 2), identity_moe("sigmoid_topk", 2)
    update(whole, x_TE)
    update(cut, x_TE, n=4)
    assert whole.bias_E.any() and torch.equal(whole.bias_E, cut.bias_E)


@pytest.mark.parametrize("name", ["expert_dropout", "router_dropout"])
def test_quantile_does_not_count_who_leaves_experts_out(name: str):
    """An expert that is out for an update would seem to need the bias of one that scores 0, and flood the next."""
    moe, x_TD = make_moe(preset("router", "sigmoid_topk"), 16, E), randn(40, 16)
    exploring = (at_work(name, 40, 16, E, 0.9),)
    found = [moe.router(x_TD, context(bias_E=moe.bias_E, exploring=e)) for e in ((), exploring)]
    noisy_TE = found[1].noisy_TE
    assert noisy_TE is not None and noisy_TE.isinf().any(), "nobody is out"
    clean, explored = (build("balance", {"name": "quantile"}).statistics(r, Layer(moe))["count_EB"] for r in found)
    assert torch.equal(clean, explored)


def test_quantile_goes_part_of_the_way_at_a_smaller_bias_rate():
    x_TE = randn(600, E) + torch.linspace(1, -1, E)
    whole, half, none = (identity_moe("sigmoid_topk", 2) for _ in range(3))
    update(whole, x_TE)
    update(half, x_TE, rate=0.5)
    update(none, x_TE, rate=0.0)
    torch.testing.assert_close(half.bias_E, whole.bias_E / 2)
    assert not none.bias_E.any()


def test_quantile_of_a_histogram_by_hand():
    """Counts (0, 4, 0, 4): half of 8 is reached at the end of the second bin, a quarter in its middle, 7/8 in the
    middle of the fourth's second half."""
    count_EB = torch.tensor([[0, 4, 0, 4]])
    for share, place in ((0.25, 1.5), (0.5, 2.0), (0.875, 3.75)):
        assert quantile(count_EB, share).tolist() == [place]


def test_quantile_sees_every_token_in_its_range():
    """Merits of 0 and 1 under biases far apart: the histogram holds T tokens of each expert, none at a wrong end."""
    moe = identity_moe("sigmoid_topk", 1)
    moe.bias_E.copy_(torch.linspace(-3, 3, E))
    x_TE = torch.where(randn(50, E) > 0, 60.0, -60.0).double()
    routing = moe.router(x_TE, context(bias_E=moe.bias_E))
    count_EB = build("balance", {"name": "quantile"}).statistics(routing, Layer(moe))["count_EB"]
    assert count_EB.sum(-1).tolist() == [50] * E
    low, width = bins(moe.bias_E)
    merit_TE = x_TE.sigmoid()
    second_T1 = (merit_TE + moe.bias_E).topk(2, -1).values[:, 1:]
    mean_E = (second_T1 - merit_TE).mean(0)
    centres_B = low + width * (torch.arange(BINS).double() + 0.5)
    torch.testing.assert_close((count_EB * centres_B).sum(-1) / 50, mean_E, rtol=0, atol=float(width))


def test_two_that_move_the_bias_are_refused_together():
    one = tiny("router=sigmoid_topk", "balance=[switch,quantile]")
    both = one | {"balance": one["balance"] | {"loss_free": preset("balance", "loss_free")}}
    assert check(both) == ["balance=[loss_free,quantile]: both move the same selection bias; take one of them"]
