"""What balancers move by themselves stands in the rows: the selection bias's range and l1_adaptive's lambda."""

import pytest
from tiny import loop, tiny

from moe_lab.assemble import assemble
from moe_lab.loop import Loop
from moe_lab.observe.metric import METRICS

HELD = {m.name for m in METRICS.values() if m.when == "balancer"}


def trained(*words: str, steps: int = 3) -> Loop:
    found = loop(assemble(tiny(*words, f"steps={steps}")))
    for step in range(steps):
        found.step(step)
    return found


def held_in(row: dict) -> set[str]:
    return {name for name in HELD if any(key.startswith(f"moe/{name}") for key in row)}


@pytest.mark.parametrize("name", ["loss_free", "quantile"])
def test_the_range_of_the_selection_bias(name: str):
    """Of each layer as it stands after the row's last update, their mean, and the widest."""
    run = trained("router=topk", "router.k=1", f"balance=[{name}]")
    row = run.row(3, 3)
    ranges = [max(bias) - min(bias) for bias in (moe.bias_E.tolist() for moe in run.parts.model.moes)]
    assert held_in(row) == {"bias_range"} and min(ranges) > 0
    assert row["moe/bias_range"] == pytest.approx(ranges)
    assert row["moe/bias_range/mean"] == pytest.approx(sum(ranges) / 2)
    assert row["moe/bias_range/worst"] == pytest.approx(max(ranges))


def test_a_sign_moves_the_bias_both_ways():
    """After one update some experts are up by the rate and some are down by it."""
    row = trained("router=topk", "balance=[loss_free]", "balance.loss_free.rate=0.125", steps=1).row(1, 1)
    assert row["moe/bias_range"] == pytest.approx([0.25, 0.25])


def test_lambda_of_the_adaptive_penalty():
    """Half of the gates are open where a quarter should be: it grows by alpha at each of three updates."""
    row = trained("router=relu", "router.k=1", "balance=[l1_adaptive]").row(3, 3)
    assert held_in(row) == {"l1_lambda"} and "moe/l1_lambda/worst" not in row
    assert row["moe/l1_lambda"] == pytest.approx([1e-8 * 1.2**3] * 2)
    assert row["moe/l1_lambda/mean"] == pytest.approx(1e-8 * 1.2**3)


@pytest.mark.parametrize("words", [("router=topk", "balance=[switch]"), ("model.moe=false", "balance=[]")])
def test_nothing_where_no_such_balancer_is(words: tuple[str, ...]):
    assert held_in(trained(*words, steps=1).row(1, 1)) == set()
