"""Load losses against plain loops over tokens and experts (tests/oracles/balance.py): values, gradients, every scope.

Shapes: T tokens, S tokens of a sequence, E experts, K chosen per token.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import context, make_moe, make_router, preset, randn
from oracles import balance as oracle
from peers import FP32, close, gating, set_weights
from torch import Tensor

from moe_lab.balance.base import Balancer, Layer
from moe_lab.config import build
from moe_lab.model.transformer import Output
from moe_lab.routing import Assignments, Routing
from moe_lab.schedules import Values
from moe_lab.upkeep import Upkeep

Loss = Callable[[Tensor, list[list[int]]], Tensor]  # of logits [T, E] and each token's experts


def importance(logits_TE: Tensor, chosen: list[list[int]]) -> Tensor:
    p = oracle.softmax(logits_TE)
    return oracle.importance([[row[e] for e in es] for row, es in zip(p, chosen, strict=True)], chosen, len(p[0]))


LOSSES: dict[str, tuple[dict[str, Any], Loss]] = {
    "switch": ({"name": "switch"}, lambda z, c: oracle.switch(oracle.softmax(z), c)),
    "gshard": ({"name": "gshard"}, lambda z, c: oracle.gshard(oracle.softmax(z), c)),
    "importance": ({"name": "importance"}, importance),
    "squared_load": ({"name": "squared_load"}, lambda z, c: oracle.squared_load(oracle.softmax(z))),
    "kl_uniform": ({"name": "kl_uniform"}, lambda z, c: oracle.kl_uniform(oracle.softmax(z))),
    "variance": ({"name": "variance"}, lambda z, c: oracle.variance(oracle.softmax(z))),
    "mean": ({"name": "entropy"}, lambda z, c: oracle.entropy(oracle.softmax(z), "mean")),
    "token": ({"name": "entropy", "of": "token"}, lambda z, c: oracle.entropy(oracle.softmax(z), "token")),
    "mutual_information": (
        {"name": "entropy", "of": "mutual_information"},
        lambda z, c: oracle.entropy(oracle.softmax(z), "mutual_information"),
    ),
}
E = 4
EVEN = torch.eye(E, dtype=torch.float64).repeat(3, 1) * 2  # every expert is first as often, all have the same mean gate
COLLAPSED = torch.tensor([9.0, 8.0, -9.0, -9.0], dtype=torch.float64).repeat(12, 1)
CASES = {
    "even": EVEN,
    "skewed": randn(12, E) * 1.5 + torch.linspace(2, -2, E),
    "collapsed": COLLAPSED,
    "one dead": randn(12, E) + torch.tensor([0.0, 0, 0, -30]),
    "fewer tokens than experts": randn(2, E),
    "one token": randn(1, E),
    "undecided": torch.zeros(12, E, dtype=torch.float64),
}


def routing(logits_TE: Tensor, k: int) -> Routing:
    """A top-k softmax routing that does not renormalise."""
    probs_TE = logits_TE.softmax(-1)
    top = probs_TE.topk(k)
    return Routing(Assignments(top.indices, top.values, logits_TE.shape[1]), logits_TE, probs_TE, logits_TE)


def leaf(t: Tensor) -> Tensor:
    return t.clone().requires_grad_()


def loss_of(name: str, **options: Any) -> Balancer:
    return build("balance", LOSSES[name][0] | options)


def agree(ours: Tensor, theirs: Tensor, by: tuple[Tensor, Tensor]) -> None:
    """Values, and gradients by the first and by the second tensor."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    grads = [torch.autograd.grad(loss, z, allow_unused=True)[0] for loss, z in zip((ours, theirs), by, strict=True)]
    mine, other = (torch.zeros_like(z) if g is None else g for g, z in zip(grads, by, strict=True))
    torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_formula(name: str, case: str, k: int):
    a, b = leaf(CASES[case]), leaf(CASES[case])
    r = routing(a, k)
    agree(loss_of(name).loss(r), LOSSES[name][1](b, r.plan.selected_TK.tolist()), (a, b))


@pytest.mark.parametrize("name", LOSSES)
def test_one_expert_is_balanced(name: str):
    z_TE = leaf(randn(5, 1))
    loss = loss_of(name).loss(routing(z_TE, 1))
    assert loss.item() == pytest.approx(1 if name in ("switch", "gshard") else 0, abs=1e-12)
    if loss.requires_grad:
        loss.backward()
        assert z_TE.grad is not None and not z_TE.grad.any()


# What each docstring says: decided and spread evenly, all to expert 0 without doubt, no token decided; with k = 1.
WORTH = {
    "switch": (1, E, 1),
    "gshard": (1, E, 1),
    "importance": (0, E - 1, None),
    "squared_load": (0, E - 1, 0),
    "variance": (0, 1 - 1 / E, 1 - 1 / E),
    "mean": (0, math.log(E), 0),
    "token": (0, 0, math.log(E)),
    "mutual_information": (0, math.log(E), math.log(E)),
    "kl_uniform": (0, None, 0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_the_docstring_says_it_is_worth(name: str):
    spread_TE = torch.eye(E, dtype=torch.float64).repeat(2, 1) * 200
    collapsed_TE = torch.tensor([200.0, 0, 0, 0], dtype=torch.float64).repeat(8, 1)
    undecided_TE = torch.zeros(8, E, dtype=torch.float64)
    for logits_TE, worth in zip((spread_TE, collapsed_TE, undecided_TE), WORTH[name], strict=True):
        if worth is not None:
            assert loss_of(name).loss(routing(logits_TE, 1)).item() == pytest.approx(worth, abs=1e-12)


def test_collapse_onto_k_experts():
    """Both of two experts get all tokens: E/k for switch; gshard sees that all first choices are one expert's."""
    assert loss_of("switch").loss(routing(COLLAPSED, 2)).item() == pytest.approx(E / 2, abs=1e-6)
    first = loss_of("gshard").loss(routing(COLLAPSED, 2)).item()
    assert first == pytest.approx(E / (1 + math.exp(-1)), abs=1e-6)  # E * 1 * P_0


@pytest.mark.parametrize("depth", [5.0, 10.0, 20.0])
def test_what_reaches_a_dead_expert(depth: float):
    """The summed gradient of its logits: kl_uniform's tends to -1/E, that of the others dies like its probability."""
    logits_TE = randn(30, E) * 0.1 - depth * torch.tensor([0.0, 0, 0, 1])
    pushes = {}
    for name in ("kl_uniform", "mean", "squared_load", "switch", "importance"):
        z_TE = leaf(logits_TE)
        loss_of(name).loss(routing(z_TE, 1)).backward()
        assert z_TE.grad is not None
        pushes[name] = z_TE.grad[:, 3].sum().item()
    assert pushes["kl_uniform"] == pytest.approx(-1 / E, abs=2 * math.exp(-depth))
    for name in ("mean", "squared_load", "switch"):
        assert abs(pushes[name]) < E * (depth + 1) * math.exp(-depth)
    assert abs(pushes["importance"]) < 2 * math.exp(-depth)  # only through the softmax's denominator


@pytest.mark.parametrize("name", ["kl_uniform", "mean", "mutual_information", "token"])
def test_gradients_stay_finite_where_probabilities_underflow(name: str):
    z_TE = (torch.tensor([0.0, -300.0, -400.0]).repeat(4, 1)).requires_grad_()
    loss = loss_of(name).loss(routing(z_TE, 1))
    loss.backward()
    assert loss.isfinite() and z_TE.grad is not None and z_TE.grad.isfinite().all()


@pytest.mark.parametrize("name", ["switch", "gshard", "importance"])
def test_nothing_chosen_is_no_error(name: str):
    """Ragged plans may choose nothing at all: no load, no push."""
    z_TE = leaf(randn(6, E))
    top = z_TE.softmax(-1).topk(2)
    none_TK = torch.zeros(6, 2, dtype=torch.bool)
    r = Routing(Assignments(top.indices, top.values, E, chosen_TK=none_TK), z_TE, z_TE.softmax(-1))
    loss = loss_of(name).loss(r)
    loss.backward()
    assert loss.item() == 0 and z_TE.grad is not None and not z_TE.grad.any()


# Scopes


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_scope_sequence_is_the_mean_over_sequences(name: str, k: int):
    S, z_TE = 4, CASES["skewed"]
    a, b = leaf(z_TE), leaf(z_TE)
    r = routing(a, k)
    chosen = r.plan.selected_TK.tolist()
    expected = oracle.by_sequence(lambda s: LOSSES[name][1](b[s], chosen[s]), len(b), S)
    agree(loss_of(name, scope="sequence").loss(r, Layer(seq_len=S)), expected, (a, b))


def test_scope_sequence_of_shazeers_load():
    T, S, k = 8, 4, 2
    clean_TE, noise_TE, std_TE = randn(T, E), randn(T, E, key=("n",)), randn(T, E, key=("s",)).exp()
    noisy_TE = clean_TE + noise_TE * std_TE
    top = noisy_TE.topk(k)
    r = Routing(Assignments(top.indices, top.values, E), clean_TE, clean_TE.softmax(-1), noisy_TE, std_TE)
    expected = oracle.by_sequence(lambda s: oracle.load(clean_TE[s], noisy_TE[s], std_TE[s], k), T, S)
    loss = build("balance", {"name": "load", "scope": "sequence"}).loss(r, Layer(seq_len=S))
    torch.testing.assert_close(loss, expected)
    assert loss.item() > 1.2 * build("balance", {"name": "load"}).loss(r).item()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_scope_global_batch_is_that_of_all_tokens_so_far(name: str, k: int):
    """Value: the formula over the tokens of all micro-batches so far. Gradient: that of the same, times the number of
    micro-batches so far, since this one's mean moves as if the others moved with it."""
    balancer = loss_of(name, scope="global_batch")
    run = Run(balancer)
    z_TE, chosen = torch.zeros(0, E, dtype=torch.float64), []
    for i in range(3):
        part = randn(6, E, key=("part", i)) * 1.5 + torch.linspace(2, -2, E) * (i - 1)
        a, b = leaf(part), leaf(part)
        r = routing(a, k)
        chosen += r.plan.selected_TK.tolist()
        z_TE = torch.cat([z_TE, b])
        ours, theirs = balancer.loss(r, run.layer()), LOSSES[name][1](z_TE, chosen)
        agree(ours, theirs.detach() + (i + 1) * (theirs - theirs.detach()), (a, b))
        run.add(r)
        z_TE = z_TE.detach()


@pytest.mark.parametrize("name", LOSSES)
def test_scope_global_batch_of_copies_is_one_big_batch(name: str):
    """Micro-batches with the same tokens in other orders: values and gradients of one big batch, exactly."""
    part, k, n = CASES["skewed"], 2, 3
    balancer = loss_of(name, scope="global_batch")
    run = Run(balancer)
    big = leaf(part.repeat(n, 1))
    whole = loss_of(name).loss(routing(big, k))
    (expected,) = torch.autograd.grad(whole, big, allow_unused=True)
    for i in range(n):
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(i))
        z_TE = leaf(part[order])
        r = routing(z_TE, k)
        loss = balancer.loss(r, run.layer())
        torch.testing.assert_close(loss, whole)
        (got,) = torch.autograd.grad(loss / n, z_TE, allow_unused=True)
        assert got is not None and expected is not None
        torch.testing.assert_close(got, expected[: len(part)][order])
        run.add(r)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scope", ["global_batch", "running"])
def test_the_first_micro_batch_has_no_past(name: str, scope: str):
    r = routing(CASES["skewed"], 2)
    balancer = loss_of(name, scope=scope)
    torch.testing.assert_close(balancer.loss(r, Run(balancer).layer()), loss_of(name).loss(r))


def test_scope_running_by_hand():
    """Updates of two micro-batches; the mean of an update is that of both, and the loss is taken at a mean that
    forgets: the oracle's weights d^(u - v) over their sum."""
    d = 0.7
    balancer = build("balance", {"name": "squared_load", "scope": "running", "decay": d})
    run = Run(balancer)
    past: list[Tensor] = []
    for u in range(4):
        parts = [CASES["skewed"] + randn(12, E, key=(u, i)) for i in range(2)]
        means = [part.softmax(-1).mean(0) for part in parts]
        for part, mean_E in zip(parts, means, strict=True):
            z_TE = leaf(part)
            r = routing(z_TE, 1)
            loss = balancer.loss(r, run.layer())
            P = [oracle.running_means([*(float(p[e]) for p in past), float(mean_E[e])], d)[-1] for e in range(E)]
            assert loss.item() == pytest.approx(E * sum((p - 1 / E) ** 2 for p in P), rel=1e-6)
            # Gradient: of this micro-batch's mean, at that value.
            (got,) = torch.autograd.grad(loss, z_TE)
            slope_E = torch.tensor([2 * E * (p - 1 / E) for p in P], dtype=torch.float64)
            (expected,) = torch.autograd.grad((z_TE.softmax(-1).mean(0) * slope_E).sum(), z_TE)
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
            run.add(r)
        run.close()
        past.append(sum(means) / 2)  # pyright: ignore[reportArgumentType]


class Run:
    """The upkeep of one layer under one balancer, as the loop does it."""

    def __init__(self, balancer: Balancer):
        moe = make_moe(preset("router", "topk", k=1), 8, E, "mlp", width=8)
        self.upkeep = Upkeep([moe], {"b": balancer})

    def layer(self) -> Layer:
        return self.upkeep.layers("b", 1)[0]

    def add(self, routing: Routing) -> None:
        T = routing.probs_TE.shape[0]
        out = Output(torch.zeros(()), (routing,), (torch.zeros(T, 8),))
        self.upkeep.add(out, torch.zeros(T), torch.ones(T, dtype=torch.bool), 1)

    def close(self) -> None:
        self.upkeep.close(Values(temperature=1, noise=1, balance=1, bias_rate=1, progress=0), 1)


# DeepSeek-V3's sequence-wise loss


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("S", [3, 12])
def test_seq_aux_is_the_papers(k: int, S: int):
    """With a selection bias in play: f counts who was chosen, P the sigmoid scores over their sum."""
    a, b = leaf(CASES["skewed"]), leaf(CASES["skewed"])
    router = make_router(preset("router", "sigmoid_topk", k=k), E, E)
    with torch.no_grad():
        router.get_parameter("weight_ED").copy_(torch.eye(E))
    r = router(a, context(bias_E=torch.tensor([-0.5, 0, 0, 0.5])))
    assert not torch.equal(r.plan.selected_TK, router(a, context()).plan.selected_TK)
    ours = build("balance", {"name": "seq_aux"}).loss(r, Layer(seq_len=S))
    agree(ours, oracle.seq_aux(b, r.plan.selected_TK.tolist(), S), (a, b))


def test_seq_aux_sees_what_a_batch_hides():
    """Two sequences, each all to another pair of experts: E/k within each, though the batch is even."""
    z_TE = torch.full((8, 4), -40.0, dtype=torch.float64)
    z_TE[:4, :2] = z_TE[4:, 2:] = 3.0
    loss = build("balance", {"name": "seq_aux"})
    assert loss.loss(routing(z_TE, 2), Layer(seq_len=4)).item() == pytest.approx(2)
    assert loss.loss(routing(z_TE, 2), Layer(seq_len=8)).item() == pytest.approx(1)
    assert loss.loss(routing(torch.zeros(8, 4), 4), Layer(seq_len=4)).item() == pytest.approx(1)


# st-moe-pytorch's balance loss counts first choices, whatever k: GShard's.


@pytest.mark.parametrize("k", [2, 3])
def test_gshard_against_st_moe(k: int):
    T, D = 48, 16
    gate = gating(D, E, k)
    ours = make_router(preset("router", "topk", k=k), D, E)
    set_weights({gate.to_gates.weight: ours.get_parameter("weight_ED")})
    x_TD = randn(T, D)
    theirs = gate(x_TD[None])[2]
    mine = build("balance", {"name": "gshard"}).loss(ours(x_TD, context()))
    (a,) = torch.autograd.grad(mine, ours.get_parameter("weight_ED"))
    (b,) = torch.autograd.grad(theirs, gate.to_gates.weight)
    close({"value": (mine, theirs), "gradient": (a, b)}, FP32)  # its counts are fp32
