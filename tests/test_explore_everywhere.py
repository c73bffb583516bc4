"""Which explorers act on which routers: those that may do what they say, the others are refused for a reason.

Shapes: T tokens, D width, E experts.
"""

from typing import Any

import pytest
import torch
from exploring import EXPLORERS, at_work
from layers import context, dense_weights, make_moe, make_router, preset, randn, router_cases, told
from oracles import explore as oracle
from tiny import tiny

from moe_lab.assemble import assemble
from moe_lab.config import registered
from moe_lab.evaluate import Evaluator

T, D, E = 24, 12, 6
LOUD = {"jitter": 0.9, "dropout": 0.5, "gaussian": 3.0, "gumbel": 3.0, "second_expert": 2.0}
INPUT, LOGITS = {"jitter", "dropout"}, {"gaussian", "gumbel"}
# Where a ranking of each token's scores does not decide: what may act. Elsewhere it is all that finds what it needs.
UNRANKED = {
    "base": INPUT | LOGITS,
    "sinkhorn": INPUT | LOGITS,
    "expert_choice": INPUT | LOGITS,
    "relu": INPUT | LOGITS,
    "sparsemixer": INPUT,
    "dselect_k": INPUT,
    "soft_moe": INPUT,
    "random-k=1-draw=fixed": INPUT,
    "random-k=1-draw=fresh": set(),
    "hash": set(),
}
CASES = {case.id: case.values[0] for case in router_cases()}


def refusals(node: dict[str, Any], name: str) -> list[str]:
    experts = {"num": 4, "granularity": 1, "zero_experts": 0, "copy_experts": 0, "constant_experts": 0}
    cfg = {"router": {"k": 1} | node, "experts": experts, "explore": {name: preset("explore", name)}, "balance": {}}
    return registered("explore")[name].conflicts(cfg["explore"][name], cfg)


def acting() -> list[tuple[str, str]]:
    return [(case, name) for case, node in CASES.items() for name in EXPLORERS if not refusals(node, name)]


def test_what_acts_on_routers_without_a_ranking():
    for case, node in CASES.items():
        for known, allowed in UNRANKED.items():
            if case.split("-")[0] == known or case == known:
                assert {name for name in EXPLORERS if not refusals(node, name)} == allowed, case
    unranked = {name for name, cls in registered("router").items() if not cls.scored}
    assert unranked == {known.split("-")[0] for known in UNRANKED}


def test_every_router_with_scores_takes_the_four_kinds_of_noise():
    for case, node in CASES.items():
        router = registered("router")[node["name"]]
        if router.scored:
            allowed = {name for name in EXPLORERS if not refusals(node, name)}
            assert allowed >= (INPUT if router.noise != "none" else INPUT | LOGITS), case


@pytest.mark.parametrize("case, name", acting())
def test_the_output_changes_with_the_draws_and_stays_finite(case: str, name: str):
    moe, x_TD = make_moe(CASES[case], D, E), randn(T, D).requires_grad_()
    here = told(moe.router, T)
    loud = LOUD.get(name, 0.6)
    works = [at_work(name, T, D, E, strength, key) for strength, key in ((loud, 0), (loud, 1), (0.0, 0))]
    first, second, silent = (moe(x_TD, context(**here, exploring=(work,)))[0] for work in works)
    assert torch.equal(silent, moe(x_TD, context(**here))[0]) and not torch.equal(first, second)
    (first * randn(T, D, key=("c",))).sum().backward()
    assert torch.isfinite(first).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in (x_TD, *moe.parameters()))


@pytest.mark.parametrize("case", sorted({case for case, name in acting() if name == "jitter"}))
def test_input_noise_is_all_that_the_router_hears(case: str):
    """It decides as if the noisy tokens were its tokens; the experts see them as they are (test_explore.py)."""
    router, x_TD, work = make_router(CASES[case], D, E), randn(T, D), at_work("jitter", T, D, E, 0.9)
    here = told(router, T)
    noisy_TD = torch.stack([oracle.jittered(x_TD[t], work.drawn["channels"][t], 0.9) for t in range(T)])
    heard, plain = router(x_TD, context(**here, exploring=(work,))), router(noisy_TD, context(**here))
    torch.testing.assert_close(heard.logits_TE, plain.logits_TE)
    torch.testing.assert_close(dense_weights(heard.plan), dense_weights(plain.plan))


@pytest.mark.parametrize("name", sorted(LOGITS))
@pytest.mark.parametrize("case", [case for case, node in CASES.items() if UNRANKED.get(node["name"], set()) >= LOGITS])
def test_logit_noise_decides_as_scores_would(case: str, name: str):
    """Tokens that are their own logits: noise on the scores is the same as other tokens, and what balances is clean."""
    router, x_TE, work = make_router(CASES[case], E, E), randn(T, E), at_work(name, T, E, E, 1.5)
    with torch.no_grad():
        router.get_parameter("weight_ED").copy_(torch.eye(E))
    here = told(router, T)
    noisy, clean = router(x_TE, context(**here, exploring=(work,))), router(x_TE, context(**here))
    other = router(x_TE + 1.5 * work.drawn["logits"], context(**here))
    torch.testing.assert_close(dense_weights(noisy.plan), dense_weights(other.plan))
    assert not torch.allclose(dense_weights(noisy.plan), dense_weights(clean.plan))
    assert torch.equal(noisy.probs_TE, clean.probs_TE) and torch.equal(noisy.logits_TE, clean.logits_TE)


RUNS = [
    *[("expert_choice", "gumbel"), ("sinkhorn", "gaussian"), ("base", "gumbel"), ("relu", "gaussian")],
    *[("sparsemixer", "jitter"), ("dselect_k", "dropout"), ("soft_moe", "jitter"), ("random", "dropout")],
]


@pytest.mark.parametrize("router, name", RUNS)
def test_evaluation_is_free_of_it(router: str, name: str):
    words = (f"router={router}", "balance=[]", "allow_leak=true")
    loud, plain = assemble(tiny(*words, f"explore=[{name}]")), assemble(tiny(*words))
    values = loud.schedules.at(0, 40)
    first, without = Evaluator(loud)(values), Evaluator(plain)(values)
    evaluated = [key for key in first if key.startswith("eval/")]
    assert len(evaluated) > 20 and all(first[key] == without[key] for key in evaluated)
