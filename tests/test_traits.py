"""What a router declares (`traits`) against what it does, for every preset under the options that change a trait.

Shapes: B sequences of S tokens, T = B * S, D width, E experts, K chosen per token.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from layers import combinations, context, make_moe, norm, preset, randn, router_cases, underway
from torch import Tensor

from moe_lab import seeding
from moe_lab.config import registered
from moe_lab.model.moe import MoE
from moe_lab.routing import Context, Router, Routing, Traits

B, S, D, E = 3, 12, 16, 6
T = B * S
# Options that change what a router promises, beside those that all tests of routers try.
MORE: dict[str, list[Any]] = {
    "order": ["gate_first", "topk_first"],
    "causal": ["none", "blocks", "prefix"],
    "group": ["sequence", "micro_batch", "mixed"],
    "baseline": ["none", "mean", "critic"],
    "version": ["v1", "v2"],
}
every = pytest.mark.parametrize("node", router_cases(MORE))
# Which rows get a gradient turns on these together, in a way of its own for each router that does not just take k best.
GATES = {
    "k": [1, 2],
    "gate": ["softmax", "sigmoid", "normalised_sigmoid"],
    "order": ["gate_first", "topk_first"],
    "renormalise": [False, True],
}
every_gate = pytest.mark.parametrize(
    "node",
    [
        pytest.param(preset("router", name, **changes), id="-".join([name, *map(str, changes.values())]))
        for name in ("default_moe", "expert_choice", "noisy_topk", "sinkhorn")
        for changes in combinations(GATES, whole=True)
    ],
)


def declared(node: dict[str, Any]) -> Traits:
    return registered("router")[node["name"]].traits(node, E)


def tokens() -> tuple[Tensor, Tensor]:
    """Inputs [T, D] and ids [T] of B sequences."""
    ids_T = torch.randint(50, (T,), generator=seeding.generator("ids"))
    return randn(T, D, key=("x",)), ids_T


def drawn(moe: MoE, *key: int | str, training: bool) -> dict[str, Any]:
    """Noise and draws as the loop makes them."""
    router = moe.router
    sizes = {"TE": (T, E), "TD": (T, D), "T": (T,), "E": (E,)}
    draws = {
        name: seeding.noise(d.kind, sizes[d.shape], *key, name)
        for name, d in router.draws.items()
        if training or d.evaluate
    }
    noise_TE = seeding.noise(router.noise, (T, E), *key) if training and router.noise != "none" else None
    return {"noise_TE": noise_TE, "draws": draws, "training": training}


def built(node: dict[str, Any]) -> MoE:
    moe = make_moe(node, D, E)
    if moe.router.data_dependent_init:
        moe.router.init_from(randn(T, D, key=("first",)))
    return underway(moe)


def run(
    moe: MoE, x_TD: Tensor, ids_T: Tensor, *key: int | str, training: bool, seq_len: int = S
) -> tuple[Tensor, Routing]:
    ctx: Context = context(seq_len=seq_len, ids_T=ids_T, **drawn(moe, *key, training=training))
    return moe(x_TD, ctx)


def objective(moe: MoE, y_TD: Tensor, routing: Routing, target_TD: Tensor) -> Tensor:
    """A task loss and, where the router has one, its own objective on it."""
    loss_T = (y_TD - target_TD).square().mean(-1)
    own = moe.router.objective(routing, loss_T.detach(), torch.ones(T, dtype=torch.bool))
    return loss_T.mean() if own is None else loss_T.mean() + own


@every
def test_live(node: dict[str, Any]) -> None:
    moe, (x_TD, ids_T) = built(node), tokens()
    y_TD, routing = run(moe, x_TD, ids_T, training=True)
    objective(moe, y_TD, routing, randn(T, D, key=("target",))).backward()
    parameters = [p for p in moe.router.parameters() if p.requires_grad]
    if declared(node).live is None:
        assert not parameters
        return
    assert parameters
    ratio = norm(p.grad for p in parameters if p.grad is not None) / norm(p.grad for p in moe.experts.parameters())
    assert ratio > 1e-2 if declared(node).live else ratio < 1e-8


@every
def test_learns_and_even(node: dict[str, Any]) -> None:
    """What learns has a parameter or moves after an update; what is even runs as many rows of each expert."""
    moe, (x_TD, ids_T) = built(node), tokens()
    router = moe.router
    moves = type(router).after_step is not Router.after_step
    assert router.learns == (moves or any(p.requires_grad for p in router.parameters()))
    rows_E = run(moe, x_TD, ids_T, training=True)[1].plan.counts_E
    if router.even:
        assert rows_E.max() - rows_E.min() <= 1


@every
def test_rows(node: dict[str, Any]) -> None:
    """The gradient of one token's output by its own scores: at the experts that it uses, at all, or at none. Of tokens
    with other numbers of experts one of most: where one expert alone has a renormalised weight, no row gets any."""
    moe, (x_TD, ids_T) = built(node), tokens()
    y_TD, routing = run(moe, x_TD, ids_T, training=True)
    used_T = (routing.plan.selected_TK < E).sum(-1).tolist()
    t = max(range(5, T), key=used_T.__getitem__)
    value = (y_TD[t] * randn(D, key=("c",))).sum()
    loss_T = torch.zeros(T, dtype=torch.float64)
    loss_T[t] = value.detach()
    own = moe.router.objective(routing, loss_T, torch.arange(T) == t)
    value = value if own is None else value + own
    gradient = torch.zeros(T, E, dtype=torch.float64)
    if routing.logits_TE.requires_grad:
        (found,) = torch.autograd.grad(value, routing.logits_TE, allow_unused=True)
        gradient = gradient if found is None else found
    reached = {e for e in range(E) if abs(float(gradient[t, e])) > 1e-12}
    experts = {e for e in routing.plan.selected_TK[t].tolist() if e < E}
    expected = {"selected": experts, "all": set(range(E)), "none": set(), "shared": set()}[declared(node).rows]
    assert reached == (set() if declared(node).live is False else expected)


@every
@pytest.mark.parametrize("training", [True, False])
def test_causal(node: dict[str, Any], training: bool) -> None:
    """Other tokens after position 6 of each sequence, the same draws: what stands before it."""
    moe, (x_TD, ids_T) = built(node), tokens()
    late_T = torch.arange(T) % S > 6
    other_TD = torch.where(late_T[:, None], 3 * randn(T, D, key=("other",)), x_TD)
    before, after = (
        run(moe, x, ids, training=training)[0]
        for x, ids in ((x_TD, ids_T), (other_TD, torch.where(late_T, 49 - ids_T, ids_T)))
    )
    moved = float((before - after)[~late_T].abs().max().detach())
    if declared(node).causal:
        assert moved < 1e-12  # in another order of rows a product may round differently
    elif training:
        assert moved > 1e-6


@every
@pytest.mark.parametrize("training", [True, False])
def test_batch_independent(node: dict[str, Any], training: bool) -> None:
    """Other sequences beside the first, the same draws."""
    moe, (x_TD, ids_T) = built(node), tokens()
    others_T = torch.arange(T) >= S
    other_TD = torch.where(others_T[:, None], 3 * randn(T, D, key=("other",)), x_TD)
    before, after = (run(moe, x, ids_T, training=training)[0] for x in (x_TD, other_TD))
    moved = float((before - after)[~others_T].abs().max().detach())
    if declared(node).batch_independent:
        assert moved < 1e-12
    elif training:
        assert moved > 1e-6


@every
def test_stochastic_in_training_and_deterministic_in_evaluation(node: dict[str, Any]) -> None:
    moe, (x_TD, ids_T) = built(node), tokens()
    first, second = (run(moe, x_TD, ids_T, i, training=True)[0] for i in range(2))
    assert torch.equal(first, second) != declared(node).stochastic
    once, again = (run(moe, x_TD, ids_T, "evaluation", training=False)[0] for _ in range(2))
    assert torch.equal(once, again)


@every
def test_dropless(node: dict[str, Any]) -> None:
    """Skewed tokens, who all prefer the same experts: each still gets the experts that it chose, one at least."""
    moe, (x_TD, ids_T) = built(node), tokens()
    _, routing = run(moe, x_TD[:1] + 0.1 * x_TD, ids_T, training=True)
    served_T = (routing.plan.selected_TK < E).any(-1)
    assert routing.plan.kept_TK is None
    assert bool(served_T.all()) == declared(node).dropless


@every
def test_static_shapes(node: dict[str, Any]) -> None:
    moe, (x_TD, ids_T) = built(node), tokens()
    shapes = set()
    for scale in (0.01, 1.0, 30.0):
        plan = run(moe, scale * x_TD, ids_T, training=True)[1].plan
        shapes.add((*plan.gather(x_TD).shape, *plan.selected_TK.shape))
    assert (len(shapes) == 1) == declared(node).static_shapes


@every
def test_flops(node: dict[str, Any]) -> None:
    """For any tokens, of any size and sign, in sequences of any length."""
    moe, (x_TD, ids_T) = built(node), tokens()
    tried = ((0.3 * x_TD, S), (x_TD, S), (3 * x_TD, S), (-x_TD, S), (x_TD, S // 2))
    plans = [run(moe, x, ids_T, training=True, seq_len=seq_len)[1].plan for x, seq_len in tried]
    rows = [int(plan.counts_E.sum()) for plan in plans]
    flops = declared(node).flops
    if flops is None:
        assert len(set(rows)) > 1
    else:
        assert rows == [round(flops * T * node["k"])] * len(plans)


@every_gate
def test_live_and_rows_of_every_gate(node: dict[str, Any]) -> None:
    test_live(node)
    test_rows(node)


@pytest.mark.parametrize(
    "node",  # a critic learns of the losses even where there is nothing to choose
    [case for case in router_cases(MORE) if case.values[0]["k"] == 1 and case.values[0].get("baseline") != "critic"],
)
def test_live_with_one_expert(node: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax over one expert is 1, and a choice of one is none; a gate that stands by itself still learns."""
    monkeypatch.setitem(globals(), "E", 1)
    test_live(node | {"block": S // 3} if "block" in node else node)  # more than one block


def test_a_wrong_trait_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: each is given a router that promises the opposite."""
    topk = preset("router", "topk")
    of = registered("router")["topk"]
    good = of.traits(topk, E)
    lies: list[tuple[dict[str, Any], Callable[..., None], dict[str, Any]]] = [
        ({"live": False}, test_live, {}),
        ({"rows": "all"}, test_rows, {}),
        ({"stochastic": True}, test_stochastic_in_training_and_deterministic_in_evaluation, {}),
        ({"causal": False}, test_causal, {"training": True}),
        ({"batch_independent": False}, test_batch_independent, {"training": True}),
        ({"dropless": False}, test_dropless, {}),
        ({"static_shapes": False}, test_static_shapes, {}),
        ({"flops": 2.0}, test_flops, {}),
    ]
    for lie, test, more in lies:
        monkeypatch.setattr(of, "traits", classmethod(lambda cls, node, E, lie=lie: replace(good, **lie)))
        with pytest.raises(AssertionError):
            test(topk, **more)
