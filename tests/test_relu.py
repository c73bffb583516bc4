"""ReMoE against plain loops: the layer and its gradients, the adaptive penalty, and what it does to a run.

Shapes: T tokens, D width, E experts, K slots per token.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import context, dense_weights, grad, make_moe, make_router, preset, randn
from oracles import relu as oracle
from test_default_moe import outputs
from tiny import loop, tiny

from moe_lab.assemble import assemble
from moe_lab.balance.base import Layer, mean_over_layers
from moe_lab.balance.l1_adaptive import L1Adaptive
from moe_lab.config import build, check
from moe_lab.model.moe import MoE
from moe_lab.train import train

D, E = 8, 5


def layer(E: int = E, k: int = 2) -> MoE:
    return make_moe(preset("router", "relu", k=k), D, E)


def penalty(**changes: Any) -> L1Adaptive:
    return build("balance", preset("balance", "l1_adaptive", **changes))


@pytest.mark.parametrize(("T", "E"), [(14, E), (3, E), (6, 1)])
def test_output_and_gradients(T: int, E: int) -> None:
    """Some tokens have no expert at all, some all of them, and the last expert has no token."""
    x_TD, c_TD = randn(T, D), randn(T, D, key=("c",))
    moe, twin = layer(E), layer(E)
    if E > 1:
        with torch.no_grad():
            for m in (moe, twin):
                m.router.weight_ED[:, 0] = 0.6
                m.router.weight_ED[-1] = 0
        x_TD[0], x_TD[1] = -2 * torch.eye(D)[0], 2 * torch.eye(D)[0]
    x_TD.requires_grad_()
    y_TD, routing = moe(x_TD, context())
    (y_TD * c_TD).sum().backward()
    w_TD = x_TD.detach().clone().requires_grad_()
    expected = oracle.layer(w_TD, twin.router.weight_ED, outputs(twin, w_TD))
    (expected * c_TD).sum().backward()
    torch.testing.assert_close(y_TD, expected)
    for mine, theirs in [(x_TD, w_TD), *zip(moe.parameters(), twin.parameters(), strict=True)]:
        torch.testing.assert_close(grad(mine), grad(theirs), rtol=1e-9, atol=1e-12)
    R_TE = (x_TD @ moe.router.weight_ED.T).relu()
    assert torch.equal(routing.plan.counts_E, (R_TE > 0).sum(0)), "only open gates run"
    assert torch.equal(routing.plan.selected_E, routing.plan.counts_E)
    torch.testing.assert_close(dense_weights(routing.plan), R_TE)
    if E > 1:
        open_T = (R_TE > 0).sum(-1)
        assert open_T[0] == 0 and open_T[1] == E - 1 and not y_TD[0].any() and not routing.plan.counts_E[-1]


def test_slots_are_strongest_first_and_those_without_a_choice_say_so() -> None:
    plan = layer().router(randn(20, D), context()).plan
    assert (plan.weight_TK.diff(dim=-1) <= 0).all()
    assert torch.equal(plan.selected_TK == E, plan.weight_TK == 0)


def test_the_gate_as_a_distribution() -> None:
    """Shares of the open gates; uniform where all are shut."""
    router = make_router(preset("router", "relu"), E, E)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(E))
    z_TE = torch.tensor([[3.0, 1.0, -1.0, 0.0, -2.0], [-1.0] * 5], dtype=torch.float64).requires_grad_()
    probs_TE = router(z_TE, context()).probs_TE
    expected = torch.tensor([[0.75, 0.25, 0, 0, 0], [0.2] * 5], dtype=torch.float64)
    torch.testing.assert_close(probs_TE, expected)
    (probs_TE * randn(2, E)).sum().backward()
    assert torch.isfinite(grad(z_TE)).all() and not grad(z_TE)[1].any()


@pytest.mark.parametrize("load", [True, False])
@pytest.mark.parametrize("k", [1, 2])
def test_penalty_of_two_layers(load: bool, k: int) -> None:
    """Value and gradient of lambda times the paper's regulariser, whose mean over layers the loop takes."""
    moes, x_TD = [layer(k=k), layer(k=k)], randn(14, D)
    with torch.no_grad():
        moes[1].router.weight_ED.mul_(-0.5)
    balancer = penalty(load=load, start=0.3)
    layers = [Layer(moe=moe, state=balancer.start(moe)) for moe in moes]
    routings = [moe.router(x_TD, context()) for moe in moes]
    loss = mean_over_layers(balancer, routings, layers)
    loss.backward()
    twins = [moe.router.weight_ED.detach().clone().requires_grad_() for moe in moes]
    expected = 0.3 * oracle.regulariser([(x_TD @ w_ED.T).relu() for w_ED in twins], k, load)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for moe, w_ED in zip(moes, twins, strict=True):
        torch.testing.assert_close(grad(moe.router.weight_ED), grad(w_ED), rtol=1e-6, atol=1e-12)


def gates(rows: list[list[float]], k: int) -> tuple[Any, Layer]:
    """The routing whose gate values are these, and its layer."""
    z_TE = torch.tensor(rows, dtype=torch.float64)
    n = z_TE.shape[1]
    moe = make_moe(preset("router", "relu", k=k), n, n)
    with torch.no_grad():
        moe.router.weight_ED.copy_(torch.eye(n))
    return moe.router(z_TE, context()), Layer(moe=moe, state={"strength": torch.tensor(2.0)})


def test_penalty_by_hand_at_balance_at_collapse_and_with_no_gate_open() -> None:
    """lambda = 2, k = 1, four experts, open gates of 0.5. One each: f = 1 and 2 * 4 * 0.5/4 = 1. All on one: f = 4
    and 2 * 4 * 0.5 = 4. Without the load term both are 2 * 0.5 = 1. All gates open with k = 4: f = 1, 2 * 4 * 0.5."""
    for rows, k, with_load, without in [
        ((torch.eye(4) * 1.5 - 1).tolist(), 1, 1.0, 1.0),
        ([[0.5, -1, -1, -1]] * 4, 1, 4.0, 1.0),
        ([[0.5] * 4] * 4, 4, 4.0, 4.0),
        ([[-1.0] * 4] * 4, 1, 0.0, 0.0),
    ]:
        routing, where = gates(rows, k)
        assert float(penalty().loss(routing, where).detach()) == pytest.approx(with_load)
        assert float(penalty(load=False).loss(routing, where).detach()) == pytest.approx(without)


@pytest.mark.parametrize(("shifts", "grows"), [((1.0, 1.0), True), ((0.0, -9.0), True), ((-0.4, -9.0), False)])
def test_lambda_follows_the_sparsity_of_all_layers_and_micro_batches(shifts: tuple[float, float], grows: bool) -> None:
    """The second layer is shut: whether lambda grows is a matter of the layers' mean, and both keep the same."""
    x_TD, moes = randn(14, D), [layer(k=1), layer(k=1)]
    x_TD[:, -1] = 1.0
    balancer = penalty(start=0.3)
    layers = [Layer(moe=moe, state=balancer.start(moe)) for moe in moes]
    stats: list[dict[str, torch.Tensor]] = [{}, {}]
    values = []
    for shift, where, total in zip(shifts, layers, stats, strict=True):
        assert where.moe is not None
        with torch.no_grad():
            where.moe.router.weight_ED[:, -1] = shift
        for part in x_TD.chunk(2):
            routing = where.moe.router(part, context())
            values.append(routing.logits_TE.detach().relu())
            for name, t in balancer.statistics(routing, where).items():
                total[name] = total[name] + t if name in total else t
    balancer.after_update(layers, stats, 1.0, 0.0)
    expected = oracle.adapted(0.3, oracle.sparsity(values), 1, E, 1.2)
    assert (expected > 0.3) == grows, "the case is not what it says"
    assert oracle.sparsity(values[:2]) < 0.8, "the first layer alone always asks for more"
    for where in layers:
        assert float(where.state["strength"]) == pytest.approx(expected, rel=1e-6)


def test_lambda_stays_where_the_sparsity_is_met() -> None:
    routing, where = gates((torch.eye(4) * 1.5 - 1).tolist(), 1)
    penalty().after_update([where], [penalty().statistics(routing, where)], 1.0, 0.0)
    assert float(where.state["strength"]) == 2.0


@pytest.mark.parametrize("off", ["balance.l1_adaptive.weight", "schedule.balance"])
def test_lambda_waits_for_its_weight(off: str) -> None:
    """While the penalty is off it cannot answer: lambda would grow until it is infinite (after 600 updates)."""
    curve = off + "={curve: step, start: 0, end: 1, until: 0.5}"
    trained = loop(assemble(tiny("router=relu", "router.k=1", "balance=[l1_adaptive]", curve, "steps=5")))
    found = []
    for step in range(5):
        trained.step(step)
        found.append(float(trained.upkeep.states["l1_adaptive"][0]["strength"]))
    assert found == pytest.approx([1e-8, 1e-8, 1.2e-8, 1.44e-8, 1.728e-8], rel=1e-6)


@pytest.mark.parametrize("open_gates", [True, False])
def test_lambda_comes_back_from_anywhere(open_gates: bool) -> None:
    """A thousand updates one way and as many the other: neither infinite nor 0, from where no factor leads back."""
    shut, wide = [[-1.0] * 4] * 4, [[0.5] * 4] * 4
    routings = [gates(rows, 1) for rows in ((wide, shut) if open_gates else (shut, wide))]
    where, found = routings[0][1], []
    for routing, _ in routings:
        for _ in range(1000):
            penalty().after_update([where], [penalty().statistics(routing, where)], 1.0, 0.0)
        found.append(float(where.state["strength"]))
    first, last = found
    assert 0 < first < float("inf") and (first > 1e3 > 1e-3 > last if open_gates else first < 1e-3 < 1e3 < last)


def test_other_routers_have_no_gates_to_close() -> None:
    cfg = tiny("router=relu", "balance=[l1_adaptive]")
    cfg["router"] = preset("router", "topk")
    assert check(cfg) == [
        "balance.l1_adaptive: router=topk opens no gates that a penalty could close; take router=relu"
    ]


@pytest.mark.parametrize("load", ["true", "false"])
def test_a_run_ends_at_k_experts_per_token(load: str, tmp_path: Path) -> None:
    """From about half of the experts to one in four, with a lambda that suits a short run; evaluation sees them too."""
    words = ("router=relu", "router.k=1", "balance=[l1_adaptive]", f"balance.l1_adaptive.load={load}")
    words = (*words, "balance.l1_adaptive.start=0.001", "balance.l1_adaptive.alpha=1.05")
    cfg = tiny(*words, "steps=200", "log_every=20", "eval_every=200")
    train(cfg, tmp_path, [], {})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    tokens = 2 * cfg["batch_size"] * cfg["seq_len"]  # in two layers

    def per_token(rows: list[dict[str, Any]]) -> float:
        return sum(sum(map(sum, row["moe/selected"])) for row in rows) / sum(tokens * row["window"] for row in rows)

    assert per_token(rows[:10]) > 1.5, "it starts sparse: nothing to see"
    assert per_token(rows[-4:]) == pytest.approx(1, abs=0.1)
    assert all(row["moe/selected"] == row["moe/kept"] for row in rows)
    assert rows[-1]["eval/loss_top1"] != rows[-1]["eval/loss"], "some tokens have more than k = 1 experts"
