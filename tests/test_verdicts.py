"""The judge on rows made up for each state, and its remedies as the config would take them."""

import itertools
import json
from typing import Any

import pytest
from tiny import tiny

from moe_lab.observe.remedies import remedies
from moe_lab.observe.verdict import FROZEN, UNLEARNED, VERDICTS, Judge

E, TOKENS = 8, 512  # tokens per update
EVEN = [1.0] * E
ONE = [93.0, *[1.0] * (E - 1)]  # 93 % to one expert
HALF = [1.0] * 4 + [0.0] * 4


def row(step: int, load: list[float] = EVEN, *, window: int = 10, loss: list[float] | None = None, **more: Any) -> dict:
    """A row of one layer; k = 1. Values that are not given are those of a healthy layer."""
    selected = [round(x / sum(load) * TOKENS * window) for x in load]
    values = {"token_entropy": 0.5, "load_flutter": 0.05, "load_flutter_floor": 0.05}
    for name, value in (("domain", 0.2), ("token", 0.5), ("position", 0.01)):
        values |= {f"nmi_{name}": value, f"nmi_{name}_floor": 0.01}
    mass = more.pop("mass", selected)
    ratio = more.pop("ratio", None)
    values |= more
    found: dict[str, Any] = {"step": step, "window": window, "loss": 2.0} | {f"moe/{k}": [v] for k, v in values.items()}
    if ratio is not None:
        found["moe/router_grad_ratio"] = [ratio]
    return found | {"moe/selected": [selected], "moe/gate_mass": [mass], "moe/expert_loss": [loss or [2.0] * E]}


def run(judge: Judge, steps: range, load: list[float] = EVEN, **more: Any) -> list[str | None]:
    return [judge.see(row(step, load, window=steps.step, **more))[0] for step in steps]


CONFIG: dict[str, Any] = {"balance": {"switch": {"weight": 0.01}}, "router": {"name": "topk", "k": 1}}


def judge(domains: int = 4, k: int = 1, experts: int = E) -> Judge:
    return Judge(experts, k, domains, CONFIG)


STATES: dict[str, dict[str, Any]] = {
    "healthy": {},
    "collapsed": {"load": ONE},
    "undecided": {"token_entropy": 0.97, "nmi_domain": 0.012},
    "balanced but unspecialised": {"nmi_domain": 0.012},
    "oscillating": {"load_flutter": 0.4},
    "frozen": {"ratio": 1e-6},
}
FIXED: dict[str, Any] = {"router": {"name": "hash", "k": 1}, "balance": CONFIG["balance"]}


@pytest.mark.parametrize("state", STATES)
def test_each_state(state: str):
    j = judge()
    found = run(j, range(10, 310, 10), **STATES[state])
    assert found[-1] == state and set(found) <= {None, state}
    told = j.report()[0]
    assert told["verdict"] == state and told["layer"] == 0 and told["since"] and told["why"].count(".") < 12
    assert bool(told["remedies"]) == (state != "healthy")
    assert {*STATES, UNLEARNED} == set(VERDICTS)


@pytest.mark.parametrize("name", ["hash", "random"])
def test_a_router_that_learns_nothing_says_what_its_load_is_and_gets_no_advice(name: str):
    for state in STATES.values():
        j = Judge(E, 1, 4, FIXED | {"router": {"name": name, "k": 1}})
        assert set(run(j, range(10, 310, 10), **state)) == {None, UNLEARNED}
        told = j.report()[0]
        assert told["remedies"] == [] and "nothing to train" in told["why"] and "load CV" in told["why"]
    assert "collapsed" not in run(Judge(E, 1, 4, FIXED), range(10, 60, 10), ONE)


@pytest.mark.parametrize("name", ["base", "expert_choice", "soft_moe"])
def test_no_balance_weight_where_the_load_is_even_by_itself(name: str):
    cfg = {"router": {"name": name, "k": 1}, "balance": CONFIG["balance"]}
    assert not [tip for verdict in VERDICTS for tip in remedies(verdict, 0.5, 1, cfg) if tip.startswith("balance")]


def test_a_share_below_chance_is_none():
    j = judge()
    run(j, range(10, 310, 10), nmi_domain=0.0, nmi_token=0.0, nmi_position=0.0)
    assert "tells 0.0% of the domain" in j.report()[0]["why"] and "(0% of the token)" in j.report()[0]["why"]


def test_nothing_is_said_too_early():
    """20 updates that are not judged, 50 that are, and three rows that agree."""
    found = run(judge(), range(10, 210, 10))
    assert found[:8] == [None] * 8 and found[8] == "healthy"
    assert run(judge(), range(1, 60), load=ONE) == [None] * 59
    assert judge().report() == []


@pytest.mark.parametrize("apart", [25, 50, 100, 400])
def test_rows_far_apart_are_judged_too(apart: int):
    """The dense rows of the first 100 updates, then one every `apart`: a collapse shows after 100 of its updates."""
    j = judge()
    run(j, range(10, 110, 10))
    assert j.layers[0].verdict == "healthy"
    found = run(j, range(100 + apart, 101 + 8 * apart, apart), load=ONE)
    assert found[max(2, -(-100 // apart)) if apart < 100 else 0] == "collapsed"
    assert "load CV" in j.report()[0]["why"]


def test_a_verdict_that_the_newest_rows_contradict_says_so():
    j = judge_after(ONE)
    said = []
    for step in range(310, 450, 10):
        run(j, range(step, step + 10, 10))
        told = j.report()[0]
        said.append((told["verdict"], "the rows say healthy, not yet for long enough" in told["why"]))
    assert said[0] == ("collapsed", False) and ("collapsed", True) in said and said[-1] == ("healthy", False)
    assert "rows say" not in judge_after(ONE).report()[0]["why"]


def judge_after(load: list[float]) -> Judge:
    j = judge()
    run(j, range(10, 310, 10), load=load)
    return j


def test_frozen_is_said_at_once_and_names_the_number():
    j = judge()
    assert j.see(row(1, window=1, ratio=3e-6)) == [FROZEN]
    (change,) = j.changes
    assert (change.step, change.layer, change.old, change.new, change.since) == (1, 0, None, FROZEN, 1)
    assert "3e-06" in change.why
    assert any("switch" in remedy for remedy in change.remedies)


def test_frozen_thaws_at_a_later_check():
    j = judge()
    run(j, range(10, 200, 10), ratio=1e-6)
    j.see(row(200, ratio=0.1))
    assert run(j, range(210, 260, 10))[-1] == "healthy"


def test_a_collapse_that_starves_the_router_stays_a_collapse_and_a_frozen_router_that_collapses_stays_frozen():
    j = judge()
    run(j, range(10, 200, 10), ONE, ratio=0.1)
    assert run(j, range(200, 300, 10), ONE, ratio=1e-7)[-1] == "collapsed"
    j = judge()
    run(j, range(10, 200, 10), ratio=1e-7)
    assert run(j, range(200, 300, 10), ONE)[-1] == "frozen"


def test_collapsed_since_the_first_row_of_the_unbroken_stretch():
    j = judge()
    run(j, range(10, 160, 10))
    run(j, range(160, 400, 10), ONE)
    told = j.report()[0]
    assert (told["verdict"], told["since"]) == ("collapsed", 151)  # the row of step 160 holds updates 151 to 160
    assert "100%" not in told["why"] and "load CV" in told["why"] and "0 of 8 experts are dead" in told["why"]


def test_a_skewed_start_that_recovers_is_no_collapse():
    """Under every method imbalance peaks in the first ten updates."""
    j = judge()
    found = run(j, range(1, 21), ONE) + run(j, range(30, 200, 10))
    assert set(found) == {None, "healthy"}


def test_collapse_and_recovery():
    j = judge()
    run(j, range(10, 200, 10), ONE)
    found = run(j, range(200, 400, 10))
    assert found[0] == "collapsed" and found[-1] == "healthy"
    assert found.index("healthy") >= 5  # the sums of 50 updates have to recover first
    assert len([a for a, b in itertools.pairwise(found) if a != b]) == 1


def test_no_choice_at_all_is_a_collapse():
    """All ReLU gates shut: no token has an expert, what divides by choices is undefined, and every expert is dead."""
    j, nothing = judge(), [0.0] * E
    unknown: dict[str, Any] = {f"nmi_{x}{end}": None for x in ("domain", "token", "position") for end in ("", "_floor")}
    unknown |= {"load_flutter_floor": None, "mass": nothing, "token_entropy": 1.0}
    run(j, range(10, 60, 10))
    found = [
        j.see(row(step, **unknown) | {"moe/selected": [nothing], "moe/expert_loss": [[None] * E]})[0]
        for step in range(60, 310, 10)
    ]
    assert found[-1] == "collapsed" and f"{E} of {E} experts are dead" in j.report()[0]["why"]


def test_dead_experts_are_a_collapse_though_the_rest_is_even():
    load = [1.0] * 6 + [0.0] * 2  # CV is 22 % of the ceiling
    j = judge()
    assert run(j, range(10, 310, 10), load)[-1] == "collapsed"
    assert "2 of 8 experts are dead" in j.report()[0]["why"]
    j = judge()
    assert run(j, range(10, 310, 10), [1.0] * 7 + [0.0])[-1] == "healthy"
    assert "but 1 of 8 experts are dead" in j.report()[0]["why"] and j.report()[0]["remedies"]


def test_a_soft_router_that_only_ranks_one_expert_first_has_not_collapsed():
    mass = [640.0] * E
    found = run(judge(), range(10, 210, 10), ONE, mass=mass, token_entropy=0.99, nmi_domain=0.0)
    assert found[-1] == "undecided"
    assert run(judge(), range(10, 210, 10), ONE, mass=[4760.0, *[51.0] * 7])[-1] == "collapsed"


def test_uneven_without_meaning_is_undecided_uneven_with_meaning_healthy():
    load = [2.5] + [1.0] * 7  # 20 % of the ceiling
    assert run(judge(), range(10, 210, 10), load, nmi_domain=0.0)[-1] == "undecided"
    assert run(judge(), range(10, 210, 10), load)[-1] == "healthy"


def test_noise_around_a_threshold_does_not_flip_the_verdict():
    j = judge()
    changes = 0
    for step in range(10, 1000, 10):
        wobble = 0.01 if step % 20 else -0.01
        j.see(row(step, token_entropy=0.895 + wobble, nmi_domain=0.0))
        changes += len(j.changes)
    assert changes == 1
    j = judge()
    for step in range(10, 1000, 10):
        j.see(row(step, nmi_domain=0.04 + (0.012 if step % 20 else -0.012)))
        changes += len(j.changes)
    assert changes == 2


def test_information_must_be_as_large_again_as_its_floor():
    few_sequences: dict[str, Any] = {"nmi_domain": 0.14, "nmi_domain_floor": 0.09}
    assert run(judge(), range(10, 210, 10), **few_sequences)[-1] != "healthy"


def test_position_is_an_artefact():
    j = judge()
    assert run(j, range(10, 210, 10), nmi_domain=0.05, nmi_position=0.6)[-1] == "balanced but unspecialised"
    assert "position (59% of it)" in j.report()[0]["why"]


def test_without_domains_the_token_decides():
    j = judge(domains=1)
    assert run(j, range(10, 210, 10), nmi_domain=None, nmi_domain_floor=None)[-1] == "healthy"
    assert "of the token" in j.report()[0]["why"]
    j = judge(domains=1)
    quiet: dict[str, Any] = {"nmi_domain": None, "nmi_domain_floor": None, "nmi_token": 0.05, "token_entropy": 0.96}
    assert run(j, range(10, 210, 10), **quiet)[-1] == "undecided"


def shifted(step: int, period: int, amplitude: float) -> list[float]:
    """Load that moves between the two halves of the experts and back, every `period` steps."""
    up = amplitude if step % period < period / 2 else -amplitude
    return [1 + up] * 4 + [1 - up] * 4


@pytest.mark.parametrize("period", [20, 60, 120])
def test_a_slow_swing_oscillates(period: int):
    j = judge()
    for step in range(10, 600, 10):
        j.see(row(step, shifted(step, period, 0.5)))
    assert j.report()[0]["verdict"] == "oscillating"


@pytest.mark.parametrize("kind", ["drift", "pulse", "jump", "batches"])
def test_other_movement_does_not_oscillate(kind: str):
    j, seen = judge(), set()
    for i, step in enumerate(range(10, 600, 10)):
        load = list(EVEN)
        more: dict[str, Any] = {}
        if kind == "drift":
            load = [1 + i / 120] * 4 + [1 - i / 120] * 4
        if kind == "pulse" and 20 <= i < 26:
            load = [1.5] * 4 + [0.5] * 4
        if kind == "jump" and i >= 30:
            load = [1.4] * 4 + [0.6] * 4
        if kind == "batches":  # few sequences: the domains of a batch move the load, as the floor says
            load[i * 5 % E] += 2
            more.update(load_flutter=0.45, load_flutter_floor=0.42)
        seen.add(j.see(row(step, load, **more))[0])
    assert "oscillating" not in seen and "healthy" in seen


def test_one_expert_has_nothing_to_route():
    j = judge(experts=1)
    found = j.see(row(1, [1.0], window=1, loss=[2.0], token_entropy=None, load_flutter=None, load_flutter_floor=None))
    assert found == ["healthy"] and j.report()[0]["why"] == "one expert: nothing to route"


def test_every_expert_for_every_token():
    """k = E: no choice, so only the weights can be undecided."""
    j = Judge(E, E, 4)
    for step in range(10, 210, 10):
        found = j.see(row(step, token_entropy=0.99, nmi_domain=0.0, nmi_domain_floor=0.0, load_flutter_floor=0.0))
    assert found == ["undecided"]


def test_two_of_eight_experts():
    j = Judge(E, 2, 4)
    total = 2 * TOKENS * 10
    for step in range(10, 210, 10):
        r = row(step)
        r["moe/selected"] = r["moe/gate_mass"] = [[total // 2, total // 2, 0, 0, 0, 0, 0, 0]]
        j.see(r)
    told = j.report()[0]
    assert told["verdict"] == "collapsed" and "load CV 1.73 is 100% of its ceiling 1.73, 6 of 8" in told["why"]


def test_no_layers_no_verdicts():
    j = judge()
    assert j.see({"step": 1, "window": 1, "loss": 2.0}) == [] and j.report() == [] and j.changes == []


def test_a_resumed_judge_stands_where_it_stood():
    rows = [row(s, ONE if 200 < s < 400 else EVEN, token_entropy=s / 700) for s in range(10, 600, 10)]
    first, second = judge(), judge()
    straight = [first.see(r) for r in rows]
    again = [second.see(json.loads(json.dumps(r | {"moe/verdict": v}))) for r, v in zip(rows, straight, strict=True)]
    assert straight == again and first.report() == second.report() and first.changes == second.changes
    assert len({v for (v,) in straight}) > 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["router=switch", "balance=[]"],
        ["router=softmax_ste", "schedule=anneal"],
        ["schedule.temperature=0.7"],
        ["router=sigmoid_topk", "balance=[loss_free]"],
        ["router=noisy_topk", "router.k=1", "balance=[importance,load]"],
        ["router=topk", "router.k=1"],
        ["router=switch", "explore=[jitter]"],
        ["router=switch", "explore=[gaussian,reroute]"],
        ["balance.switch.weight={curve: linear, start: 0.01, end: 0}"],
        ["balance=[gshard]", "balance.gshard.weight={curve: step, start: 0, end: 1}"],
        ["router=sigmoid_topk", "balance=[loss_free]", "balance.loss_free.rate={curve: linear, start: 0.1, end: 0}"],
        ["router=relu", "balance=[l1_adaptive]"],
        ["router=base", "allow_leak=true"],
        ["router=lpr", "router.k=1"],
        ["router=soft_moe", "allow_leak=true"],
        ["router=kmeans", "balance=[loss_free]"],
    ],
)
def test_remedies_are_overrides_that_the_config_takes(overrides: list[str]):
    cfg = tiny(*overrides)
    for tip in sorted({tip for verdict in VERDICTS for tip in remedies(verdict, 0.5, 1, cfg)}):
        override, why = tip.split(" (", 1)
        assert why.endswith(")")
        replaced = override.partition("=")[0]
        kept = [o for o in overrides if not o.startswith((f"{replaced}=", *[f"{replaced}."] * ("." not in replaced)))]
        assert tiny(*kept, override) != cfg, tip


@pytest.mark.parametrize(
    "balance, first",
    [
        (["balance=[gshard]"], "balance.gshard.weight=0.1"),
        (["balance=[z_loss,kl_uniform]"], "balance.kl_uniform.weight=0.1"),
        (["balance=[z_loss]"], "balance=[z_loss,switch]"),
        (["balance=[entropy]", "balance.entropy.of=token"], "balance=[entropy,switch]"),
        (["balance=[loss_free]"], "balance.loss_free.rate=0.05"),
        (["balance=[quantile]"], "schedule.noise=2"),
        (
            ["balance=[gshard]", "balance.gshard.weight={start:0.01,end:0.002,curve:linear}"],
            "schedule.balance=10",
        ),
    ],
)
def test_a_stronger_push_by_what_balances_already(balance: list[str], first: str):
    cfg = tiny("router=noisy_topk", *balance)
    found = remedies("collapsed", 0.0, 0, cfg)[0].split(" (")[0]
    assert found == first
    assert (
        tiny("router=noisy_topk", *(["balance=[]"] if first.startswith("balance=") else balance), *found.split()) != cfg
    )


@pytest.mark.parametrize(
    "router, explore, tip",
    [
        ("topk", [], "explore=[gumbel]"),
        ("switch", ["jitter", "reroute"], "explore=[jitter,reroute,gumbel]"),
        ("switch", ["jitter", "gaussian"], "schedule.noise=2"),
        ("noisy_topk", ["jitter"], "schedule.noise=2"),
        ("softmax_ste", [], "router=gumbel_ste"),
        ("dense", [], "router=gumbel_softmax"),
    ],
)
def test_noise_where_there_is_none_and_more_of_it_where_there_is(router: str, explore: list[str], tip: str):
    cfg = {"router": {"name": router, "k": 1}, "explore": {name: {"name": name} for name in explore}}
    assert [found.split(" (")[0] for found in remedies("collapsed", 0.0, 0, cfg) if "noise" in found] == [tip]


def test_unequal_losses_call_for_sampling():
    losses = [1.5, 2.5] * 4
    j = judge()
    run(j, range(10, 210, 10), nmi_domain=0.0, loss=losses)
    assert j.report()[0]["verdict"] == "balanced but unspecialised"
    assert "the experts' losses differ by 50%" in j.report()[0]["remedies"][0]
