"""Verdicts on made-up rows whose truth is known: what must be supported, what refuted, and what neither."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from judging import METRIC, claim, results, study
from scipy import stats

from moe_lab.study import statistics
from moe_lab.study.files import Claim
from moe_lab.study.judge import INCONCLUSIVE, REFUTED, SUPPORTED, Verdict, bound, judge

NOISE = [0.01, -0.02, 0.0, 0.02, -0.01]


def one(of: Claim, a: Sequence[Any], b: Sequence[Any] = (), **more: Any) -> Verdict:
    asked = study(of)
    return judge(asked, results(asked, {"a": a, "b": b}, **more))[0]


def around(mean: float) -> list[float]:
    return [mean + x for x in NOISE]


def test_a_claim_of_one_arm() -> None:
    assert one(claim(arm="a", at_least=0.33), around(0.4)).verdict == SUPPORTED
    assert one(claim(arm="a", at_least=0.33), around(0.3)).verdict == REFUTED
    assert one(claim(arm="a", at_most=0.33), around(0.4)).verdict == REFUTED
    assert one(claim(arm="a", at_most=0.33), around(0.3)).verdict == SUPPORTED
    assert one(claim(arm="a", at_least=0.33), around(0.335)).verdict == INCONCLUSIVE


def test_pairs_take_out_what_the_seeds_share() -> None:
    """Between the arms 0.1, between the seeds 10: unpaired, nobody could tell."""
    seeds = [3.0, 13.0, 23.0, 33.0, 43.0]
    found = one(claim(at_least=0.05), [s + 0.1 + x for s, x in zip(seeds, NOISE, strict=True)], seeds)
    assert found.verdict == SUPPORTED
    assert found.effects == {seed: pytest.approx(0.1 + x) for seed, x in enumerate(NOISE)}
    assert found.estimate is not None and found.estimate.mean == pytest.approx(0.1)


def test_the_effect_is_the_first_arm_minus_the_second() -> None:
    assert one(claim(at_most=0.0), around(1.0), [2.0] * 5).verdict == SUPPORTED
    assert one(claim(at_most=0.0), around(2.0), [1.0] * 5).verdict == REFUTED


def test_a_ratio_is_one_of_logarithms() -> None:
    a, b = [2.0, 4.0, 8.4], [1.0, 2.0, 4.0]
    found = one(claim(by="ratio", at_least=1.5), a, b)
    logs = [math.log(2), math.log(2), math.log(2.1)]
    half = 4.302653 * np.std(logs, ddof=1) / math.sqrt(3)
    e = found.estimate
    assert found.verdict == SUPPORTED and e is not None
    assert e.mean == pytest.approx((2 * 2 * 2.1) ** (1 / 3))
    assert e.low == pytest.approx(math.exp(np.mean(logs) - half), rel=1e-6)
    assert e.high == pytest.approx(math.exp(np.mean(logs) + half), rel=1e-6)
    assert found.effects == pytest.approx({0: 2.0, 1: 2.0, 2: 2.1})
    assert one(claim(by="ratio", at_least=2.5), a, b).verdict == REFUTED


@pytest.mark.parametrize(
    "mean, verdict", [(1.0, SUPPORTED), (1.09, INCONCLUSIVE), (0.92, INCONCLUSIVE), (1.3, REFUTED)]
)
def test_within_by_ratio_is_as_far_down_as_up(mean: float, verdict: str) -> None:
    assert one(claim(by="ratio", within=0.1), around(mean), [1.0] * 5).verdict == verdict


def test_a_ratio_that_has_no_logarithm() -> None:
    found = one(claim(by="ratio", at_least=2), [1.0, 1.0, 1.0], [0.5, 0.0, 0.5])
    assert (found.verdict, found.estimate, found.effects) == (INCONCLUSIVE, None, {})
    assert found.why == "a value of 0 or less (seed 1) makes no ratio; compare by: difference"


def test_a_ratio_beyond_all_numbers_stays_a_number() -> None:
    found = one(claim(by="ratio", at_least=2), [1e140, 1.0], [1e-140, 1.0])
    assert found.estimate is not None and found.estimate.high is not None
    assert found.verdict == INCONCLUSIVE and 1e300 < found.estimate.high < math.inf


def test_equivalence() -> None:
    assert one(claim(within=0.1), around(2.01), [2.0] * 5).verdict == SUPPORTED
    assert one(claim(within=0.1), around(2.3), [2.0] * 5).verdict == REFUTED
    assert one(claim(within=0.1), around(1.7), [2.0] * 5).verdict == REFUTED
    assert one(claim(within=0.01), around(2.0), [2.0] * 5).verdict == INCONCLUSIVE


def test_the_level_is_that_of_all_claims_of_the_study() -> None:
    """p of about 0.03: enough alone, not among four of which none is better."""
    a = [0.7, 0.1, 0.9, 0.3, 0.6]
    asked = [claim(arm="a", at_least=0.1)]
    alone = judge(study(*asked), results(study(*asked), {"a": a}))
    assert (
        alone[0].verdict == SUPPORTED and alone[0].estimate is not None and 0.0125 < (alone[0].estimate.p or 0) < 0.05
    )
    four = study(*asked, *[claim(says=str(i), arm="a", at_least=0.5) for i in range(3)])
    found = judge(four, results(four, {"a": a}))
    assert [v.verdict for v in found] == [INCONCLUSIVE] * 4
    assert all(v.estimate is not None and v.estimate.level == pytest.approx(1 - 0.05 / 4) for v in found)


def test_claims_that_cannot_be_judged_count_among_the_claims() -> None:
    both = study(claim(arm="a", at_least=0.1), claim(arm="b", at_least=0.1))
    first, second = judge(both, results(both, {"a": around(0.5), "b": [0.5]}))
    assert first.estimate is not None and first.estimate.level == pytest.approx(0.975)
    assert second.estimate is not None and (second.estimate.n, second.estimate.low) == (1, None)
    assert (second.verdict, second.why) == (INCONCLUSIVE, "needs seeds: a spread is one of two or more")


def test_only_common_seeds_are_compared_and_the_others_are_named() -> None:
    found = one(claim(at_least=0.5), around(2.0), [1.0, 1.0, 1.0, None], states={("a", 0): "diverged", ("b", 1): "oom"})
    assert found.effects == {2: pytest.approx(1.0)}
    gone = "a seed 0 diverged, b seed 1 ran out of memory, eval/moe/max_vio is undefined in b seed 3 and 1 more"
    assert found.why.endswith(f"1 of 5 seeds: {gone}")
    short = one(claim(at_least=0.5), around(2.0), [1.0, 1.0, 1.0])
    assert short.verdict == SUPPORTED and short.why == "3 of 5 seeds: b has no seed 3, b has no seed 4"


def test_no_seed_at_all() -> None:
    found = one(claim(at_least=0.5), [1.0], [1.0], states={("a", 0): "waiting", ("b", 0): "running"})
    assert (found.verdict, found.estimate) == (INCONCLUSIVE, None)
    assert "0 of 1 seeds: a seed 0 has not begun, b seed 0 still runs" in found.why


def test_what_would_settle_it() -> None:
    found = one(claim(arm="a", at_least=0.33), around(0.338))
    spread = np.std(NOISE, ddof=1)
    n = found.estimate and found.estimate.seeds_to_settle
    assert n is not None and statistics.power(n, 0.008, float(spread), (0, math.inf)) >= 0.8
    assert found.why == f"the interval crosses the bound; about {n} seeds would settle it"
    assert "not even 10,000 seeds" in one(claim(arm="a", at_least=0.33), around(0.330001)).why


def floored(values: Sequence[float], tokens: int) -> list[dict[str, Any]]:
    """Rows of max_vio of 4 experts, k = 1; its floor on 100 tokens is 0.21, on 1,000,000 0.0021."""
    return [{METRIC: x, "eval/moe/selected": [[tokens // 4] * 4], "eval/moe/experts_per_token": [1.0]} for x in values]


@pytest.mark.parametrize(
    "asked, a, b",
    [
        (claim(at_most=0.0), 0.30, 0.40),
        (claim(at_least=0.0), 0.30, 0.40),
        (claim(within=0.15), 0.30, 0.31),
        (claim(by="ratio", at_most=1.0), 0.30, 0.40),
        (claim(by="ratio", at_most=0.5), 0.30, 0.80),
        (claim(arm="a", at_most=0.1), 0.3, 0.0),
    ],
)
def test_what_few_tokens_cannot_tell_is_inconclusive(asked: Claim, a: float, b: float) -> None:
    few = one(asked, floored(around(a), 100), floored([b] * 5, 100))
    assert few.verdict == INCONCLUSIVE and few.why.endswith("more tokens would settle it, not more seeds")
    assert few.floor == pytest.approx(0.2098, abs=1e-4) and few.estimate and few.estimate.seeds_to_settle is None
    many = one(asked, floored(around(a), 1_000_000), floored([b] * 5, 1_000_000))
    assert many.verdict != INCONCLUSIVE and many.floor == pytest.approx(0.002098, abs=1e-6)


def test_the_larger_floor_of_two_arms_counts_and_far_bounds_do_not() -> None:
    near = one(claim(at_most=0.0), floored(around(0.3), 1_000_000), floored([0.4] * 5, 100))
    assert near.verdict == INCONCLUSIVE and "0.1 from the bound is within the sampling floor of 0.21" in near.why
    assert one(claim(at_most=0.5), floored(around(0.3), 100), floored([0.3] * 5, 100)).verdict == SUPPORTED


def test_exact_numbers() -> None:
    """Whole numbers and deterministic metrics may be alike in every seed: the interval is a point, which is said."""
    found = one(claim(arm="a", at_most=0), [0, 0, 0])  # exactly the bound satisfies it
    assert (found.verdict, found.why) == (SUPPORTED, "all 3 seeds gave the same, so that the interval is a point")
    assert one(claim(arm="a", at_most=0), [1, 1, 1]).verdict == REFUTED
    assert one(claim(at_least=2), [3, 3], [0, 0]).verdict == SUPPORTED
    for asked in (claim(at_most=0.0), claim(at_least=0.0), claim(by="ratio", at_most=1)):
        same = one(asked, [0.5, 0.7], [0.5, 0.7])  # two arms that do not differ support no difference
        assert (same.verdict, same.why) == (INCONCLUSIVE, "the arms differ by exactly the bound")
    assert one(claim(within=0.1), [0.5, 0.7], [0.5, 0.7]).verdict == SUPPORTED


def test_claims_that_were_edited_after_the_runs() -> None:
    asked = study(claim(arm="a", at_least=0.1))
    found = results(asked, {"a": around(0.3), "b": around(0.3)})
    assert [v.changed for v in judge(asked, found)] == [False]
    edited = study(claim(arm="a", at_least=0.2))
    assert [v.changed for v in judge(edited, found)] == [True]


def test_an_unknown_metric_is_one_line_and_one_that_an_arm_lacks_is_undefined_there() -> None:
    asked = study(claim(arm="a", metric="eval/moe/max_voi", at_least=0.1))
    with pytest.raises(ValueError, match=r"^eval/moe/max_voi: no such metric.*eval/moe/max_vio") as told:
        judge(asked, results(asked, {"a": around(0.3)}))
    assert "\n" not in str(told.value)
    lacks = one(claim(at_least=0.1), around(0.3), [{"loss": 1.0}] * 5)
    assert lacks.verdict == INCONCLUSIVE and "0 of 5 seeds: eval/moe/max_vio is undefined in b seed 0" in lacks.why
    unrun = study(claim(arm="a", metric="nonsense", at_least=0.1))
    assert judge(unrun, results(unrun, {"a": [1.0]}, {("a", 0): "failed"}))[0].verdict == INCONCLUSIVE


def test_arms_of_a_wider_grid_are_not_mixed_in() -> None:
    asked = study(claim(arm="a", at_least=0.1))
    found = judge(asked, results(asked, {"a": around(0.3), "a optim.lr=0.1": around(0.0)}))[0]
    assert found.verdict == SUPPORTED and found.why == "not judged: a optim.lr=0.1"


def test_bounds_in_words() -> None:
    assert [bound(claim(**{how: 0.5})) for how in ("at_least", "at_most", "within")] == [
        "at least 0.5",
        "at most 0.5",
        "within 0.5",
    ]


def simulated(truth: Sequence[float], asked: Sequence[Claim], repeats: int, n: int = 5) -> list[list[str]]:
    """Verdicts of studies in which arm a of claim i exceeds b by truth[i] and noise of 1; seeds share 10."""
    rng, found = np.random.default_rng(7), []
    of = study(*asked)
    for _ in range(repeats):
        shared = rng.normal(0, 10, n)
        a = shared + np.asarray(truth)[:, None] + rng.normal(0, 1, (len(asked), n))
        rows = {
            "a": [{c.metric: a[i, s] for i, c in enumerate(asked)} for s in range(n)],
            "b": [{c.metric: shared[s] for c in asked} for s in range(n)],
        }
        found.append([v.verdict for v in judge(of, results(of, rows))])
    return found


@pytest.fixture
def verdicts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands beside a verdict takes most of the time, and decides nothing."""
    for beside in ("bootstrap", "sign_flip"):
        monkeypatch.setattr(statistics, beside, lambda effects, _: (0.0, 0.0))


@pytest.mark.usefixtures("verdicts_alone")
def test_wrong_verdicts_are_as_rare_as_promised() -> None:
    """Three claims, all on their bounds: some verdict in at most 5 % of studies (binomial bound of 1 in 1000)."""
    asked = [
        claim(says=str(i), metric=f"m{i}", **b)
        for i, b in enumerate(({"at_least": 0}, {"at_most": 1}, {"at_least": -1}))
    ]
    found = simulated([0, 1, -1], asked, 200)
    wrong = sum(any(v != INCONCLUSIVE for v in verdicts) for verdicts in found)
    assert 0 < wrong <= stats.binom.ppf(0.999, 200, 0.05)


@pytest.mark.usefixtures("verdicts_alone")
def test_true_effects_are_found_as_often_as_promised() -> None:
    """One claim, an effect of 1.8 spreads over 5 seeds: power 0.86 of the noncentral t."""
    expected = stats.nct.sf(stats.t.ppf(0.975, 4), 4, 1.8 * math.sqrt(5))
    found = [v for (v,) in simulated([1.8], [claim(at_least=0)], 200)]
    low, high = stats.binom.ppf((0.001, 0.999), 200, expected)
    assert low <= found.count(SUPPORTED) <= high and found.count(REFUTED) == 0
    opposite = [v for (v,) in simulated([1.8], [claim(at_most=0)], 200)]
    assert opposite.count(REFUTED) == found.count(SUPPORTED)


@pytest.mark.usefixtures("verdicts_alone")
def test_equivalence_is_not_claimed_at_the_margin() -> None:
    found = [v for (v,) in simulated([1.0], [claim(within=1.0)], 200, n=10)]
    for verdict in (SUPPORTED, REFUTED):
        assert 0 < found.count(verdict) <= stats.binom.ppf(0.999, 200, 0.05)
    inside = [v for (v,) in simulated([0.0], [claim(within=1.5)], 200, n=10)]
    assert inside.count(SUPPORTED) >= stats.binom.ppf(0.001, 200, statistics.power(10, 0.0, 1.0, (-1.5, 1.5)))
