"""The judge's numbers against numbers worked out by hand or by others, and against simulations of a known truth.

Rates of a simulation are held against the binomial's quantiles of one in a thousand on either side.
"""

import math
from itertools import product

import numpy as np
import pytest
from scipy import integrate, stats

from moe_lab.study import statistics
from moe_lab.study.statistics import Range, estimate, holm, interval, p_value, power, seeds_to_settle, sign_flip

ABOVE_0, BELOW_0 = (0.0, math.inf), (-math.inf, 0.0)
# Student 1908, table 1: hours of sleep gained by ten patients, laevo- minus dextro-hyoscyamine.
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]


def likely(hits: int, n: int, rate: float) -> bool:
    """Whether so many hits of n are no surprise at that rate."""
    low, high = stats.binom.ppf((0.001, 0.999), n, rate)
    return low <= hits <= high


def drawn(seed: int, repeats: int, n: int, mean: float, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, spread, (repeats, n))


def test_students_own_example() -> None:
    n, mean = 10, 15.8 / 10
    spread = math.sqrt(sum((x - mean) ** 2 for x in SLEEP) / 9)
    half = 2.262157 * spread / math.sqrt(n)  # the table's t of 9 degrees of freedom, 2.5 % on each side
    found = estimate(SLEEP, ABOVE_0)
    assert (found.n, found.level) == (10, 0.95)
    assert (found.mean, spread) == (pytest.approx(1.58), pytest.approx(1.229995, abs=1e-6))
    assert (found.low, found.high) == (pytest.approx(mean - half, abs=1e-6), pytest.approx(mean + half, abs=1e-6))
    assert found.p == pytest.approx(0.002833, abs=1e-6)  # t = 4.0621
    assert found.boot_low is not None and found.boot_high is not None
    assert 0.7001 < found.boot_low < 1.58 < found.boot_high < 2.4599


@pytest.mark.parametrize("inside", [ABOVE_0, BELOW_0, (0.5, math.inf), (-1.0, 1.0), (-2.0, 2.0), (-2.6, 2.6)])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_p_and_interval_say_the_same(inside: Range, alpha: float) -> None:
    for effects in (SLEEP, [-x for x in SLEEP], SLEEP[:3], [x / 9 for x in SLEEP]):
        found = estimate(effects, inside, alpha)
        assert found.low is not None and found.high is not None and found.p is not None
        assert (statistics.decide((found.low, found.high), inside) is not None) == (found.p <= alpha)


def test_equivalence_is_two_one_sided_tests() -> None:
    effects = [0.1, -0.2, 0.3, 0.0, 0.1]
    mean, n = 0.06, 5
    error = math.sqrt(sum((x - mean) ** 2 for x in effects) / 4) / math.sqrt(n)
    half = 2.131847 * error  # 5 % on each side of t with 4 degrees of freedom
    found = estimate(effects, (-0.4, 0.4))
    assert found.level == pytest.approx(0.9)
    assert (found.low, found.high) == (pytest.approx(mean - half, abs=1e-6), pytest.approx(mean + half, abs=1e-6))
    lower, upper = stats.t.sf((mean + 0.4) / error, 4), stats.t.cdf((mean - 0.4) / error, 4)
    assert found.p == pytest.approx(max(lower, upper)) and upper > lower
    far = estimate([x + 1 for x in effects], (-0.4, 0.4))
    assert far.p == pytest.approx(stats.t.sf((mean + 1 - 0.4) / error, 4))


def test_holm_by_hand() -> None:
    """Sorted: 0.005 < 0.05/4, 0.01 < 0.05/3, 0.03 > 0.05/2: from there on, all have the third's level."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.05 / 3, 0.025, 0.025, 0.0125])
    assert holm([0.2, 0.001]) == pytest.approx([0.05, 0.025])
    assert holm([0.026, 0.03]) == pytest.approx([0.025, 0.025])  # 0.03 < 0.05, but the smaller one failed before
    assert holm([1.0], 0.1) == [0.1] and holm([]) == []


@pytest.mark.parametrize("inside", [ABOVE_0, BELOW_0, (0.15, math.inf), (-0.5, 0.5)])
def test_sign_flips_in_plain_loops(inside: Range) -> None:
    effects = [0.3, 0.1, -0.2, 0.4, 0.25]

    def tail(bound: float, sign: int) -> float:
        """Share of all flips about the bound that lie at least as far on that side of it."""
        if math.isinf(bound):
            return float(bound * sign > 0)
        seen = sign * sum(x - bound for x in effects)
        flips = [sign * sum(s * (x - bound) for s, x in zip(signs, effects, strict=True)) for signs in FLIPS]
        return sum(flip >= seen - 1e-9 for flip in flips) / len(FLIPS)

    within = max(tail(inside[0], 1), tail(inside[1], -1))
    without = min(tail(inside[0], -1), tail(inside[1], 1))
    both = 1 if math.isfinite(sum(inside)) else 2
    p, least = sign_flip(effects, inside)
    assert p == pytest.approx(min(1.0, both * min(within, without)))
    assert least == both * 2**-5


FLIPS = list(product((-1, 1), repeat=5))


@pytest.mark.parametrize("n", [2, 5, 13, 20])
def test_the_floor_of_sign_flips_is_met_where_all_effects_agree(n: int) -> None:
    p, least = sign_flip([1.0 + i for i in range(n)], ABOVE_0)
    assert p == pytest.approx(least)
    assert least == pytest.approx(max(2.0 ** (1 - n), 2e-4))  # from 14 seeds on 9999 flips are drawn


@pytest.mark.parametrize(
    "n, d, critical", [(2, 3.0, 12.7062), (4, 2.0, 3.18245), (5, 1.6, 2.77645), (10, 1.0, 2.26216)]
)
def test_power_by_integration(n: int, d: float, critical: float) -> None:
    """The mean is normal and the variance chi-square; t is beyond its critical value where z > critical s - d."""
    df = n - 1
    found, _ = integrate.quad(
        lambda s: stats.norm.sf(critical * s - d * math.sqrt(n)) * stats.chi.pdf(s * math.sqrt(df), df) * math.sqrt(df),
        *(0, 10),
    )
    assert power(n, d, 1.0, ABOVE_0) == pytest.approx(found, abs=1e-5)


def test_seeds_of_the_tables() -> None:
    """Paired t test, two-sided 5 %, power 80 %: Cohen's medium, large and small effect (G*Power: 34, 15, 199)."""
    assert [seeds_to_settle(d, 1.0, ABOVE_0) for d in (0.5, 0.8, 0.2)] == [34, 15, 199]
    assert [seeds_to_settle(-d, 1.0, ABOVE_0) for d in (0.5, 0.8, 0.2)] == [34, 15, 199]
    assert seeds_to_settle(1 + 0.5 / 7, 1 / 7, (1.0, math.inf)) == 34
    assert seeds_to_settle(0.0, 1.0, ABOVE_0) is None
    assert seeds_to_settle(1e-4, 1.0, ABOVE_0) is None
    assert seeds_to_settle(0.1, 0.0, ABOVE_0) == 2
    n = seeds_to_settle(0.1, 1.0, (-0.6, 0.6))
    assert n is not None and power(n - 1, 0.1, 1.0, (-0.6, 0.6)) < 0.8 <= power(n, 0.1, 1.0, (-0.6, 0.6))


@pytest.mark.parametrize("effects", [[0.5] * 4, [0.1 + 0.2, 0.3, 0.3]])
def test_effects_that_are_all_alike_are_a_point(effects: list[float]) -> None:
    found = estimate(effects, ABOVE_0)
    assert (found.low, found.high) == (pytest.approx(effects[0]), pytest.approx(effects[0]))
    assert (found.p, found.seeds_to_settle) == (0.0, 2)
    assert found.sign_flip_p == found.sign_flip_floor
    assert estimate(effects, (effects[0] + 1, math.inf)).p == 0


def test_one_seed_has_no_spread_and_two_a_wide_interval() -> None:
    one = estimate([0.5], ABOVE_0)
    assert (one.mean, one.n, one.level) == (0.5, 1, 0.95)
    assert {one.low, one.high, one.p, one.boot_low, one.sign_flip_p, one.seeds_to_settle} == {None}
    two = estimate([0.4, 0.6], ABOVE_0)
    assert (two.low, two.high) == (pytest.approx(0.5 - 12.7062 * 0.1, abs=1e-4), pytest.approx(1.77062, abs=1e-4))
    assert two.sign_flip_p == two.sign_flip_floor == 0.5


@pytest.mark.parametrize("inside, mean, rate", [(ABOVE_0, 0.0, 0.05), ((-1.0, 1.0), 1.0, 0.10)])
def test_how_often_a_claim_on_its_bound_is_decided(inside: Range, mean: float, rate: float) -> None:
    """Against one bound 2.5 % on each side; at a margin 5 % are called equivalent and 5 % not."""
    level, verdicts = estimate([0.0, 1.0], inside).level, []
    for effects in drawn(0, 1000, 5, mean):
        verdicts.append(statistics.decide(interval(effects.tolist(), level), inside))
    assert likely(sum(v is not None for v in verdicts), 1000, rate)
    assert likely(sum(v is True for v in verdicts), 1000, rate / 2)


@pytest.mark.parametrize("n, level", [(2, 0.95), (5, 0.9875), (8, 0.9)])
def test_coverage(n: int, level: float) -> None:
    found = [interval(effects.tolist(), level) for effects in drawn(n, 600, n, 3.0, 0.2)]
    assert likely(sum(low <= 3.0 <= high for low, high in found), 600, level)


@pytest.mark.parametrize(
    "n, mean, inside",
    [(5, 1.6, ABOVE_0), (5, -1.6, ABOVE_0), (8, 0.1, (-1.2, 1.2)), (20, 0.2, (-1.0, 1.0)), (6, 2.5, (-1, 1))],
)
def test_power_is_that_of_a_simulation(n: int, mean: float, inside: Range) -> None:
    right, level = inside[0] < mean < inside[1], estimate([0.0, 1.0], inside).level
    found = [statistics.decide(interval(e.tolist(), level), inside) for e in drawn(n, 500, n, mean)]
    assert likely(sum(v is right for v in found), 500, power(n, mean, 1.0, inside))


def test_several_claims_on_their_bounds_have_the_level_of_one() -> None:
    """Four claims, all true effects on the bound: some decided in at most 5 % of studies, and nearly 5 are."""
    wrong = 0
    for study in np.random.default_rng(1).normal(0, 1, (500, 4, 5)):
        p = [p_value(effects.tolist(), ABOVE_0) for effects in study]
        wrong += any(x <= level for x, level in zip(p, holm(p), strict=True))
    assert likely(wrong, 500, 1 - (1 - 0.05 / 4) ** 4)
