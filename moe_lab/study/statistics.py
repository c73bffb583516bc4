"""Statistics over seeds: a mean, its interval, how sure one may be of it, and how many seeds would do. All from SciPy.

A claim says that the mean effect over seeds lies in a range [low, high]: at least a number [b, inf], at most a number
[-inf, b], or within a margin of zero [-w, w]. Shapes: n effects, one per seed; for a paired claim their differences.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

ALPHA = 0.05  # of all claims of a study together
POWER = 0.8  # at which a number of seeds is said to settle a claim
MOST_SEEDS = 10_000
RESAMPLES = 9999  # of the bootstrap; and of the sign flips, which are all 2^n of them up to n = 13
ALIKE = 1e-12  # effects that differ by less, relatively, are the same number to rounding

Range = tuple[float, float]
Side = Literal["less", "greater"]


@dataclass(frozen=True)
class Estimate:
    """The mean of n effects and what is known of it. None where n = 1 leaves nothing to estimate a spread from.

    low, high: Student's t interval at `level`, which decides. boot_*: the bootstrap's percentiles at the same level.
    p: of the claim's test, before Holm. sign_flip_p: the same question asked by flipping signs, which cannot fall below
    sign_flip_floor. seeds_to_settle: None too where no number up to MOST_SEEDS would do.
    """

    mean: float
    low: float | None
    high: float | None
    level: float
    p: float | None
    n: int
    boot_low: float | None
    boot_high: float | None
    sign_flip_p: float | None
    sign_flip_floor: float | None
    seeds_to_settle: int | None


def estimate(effects: Sequence[float], inside: Range, alpha: float = ALPHA) -> Estimate:
    """Everything about n >= 1 effects, for a claim that their mean lies inside a range, tested at level alpha."""
    mean, n, level = float(np.mean(effects)), len(effects), 1 - 2 * alpha / sides(inside)
    if n == 1:
        return Estimate(mean, None, None, level, None, 1, None, None, None, None, None)
    flip_p, flip_floor = sign_flip(effects, inside)
    return Estimate(
        mean,
        *interval(effects, level),
        level,
        p_value(effects, inside),
        n,
        *bootstrap(effects, level),
        flip_p,
        flip_floor,
        seeds_to_settle(mean, float(np.std(effects, ddof=1)), inside, alpha),
    )


def sides(inside: Range) -> int:
    """How many sides share alpha: both sides of one bound. A claim with two bounds is two one-sided tests that must
    both hold (TOST, Schuirmann 1987): each has all of alpha, and the interval that goes with them is of 90 %."""
    return 1 if all(map(math.isfinite, inside)) else 2


def decide(found: Range, inside: Range) -> bool | None:
    """Whether an interval lies wholly inside a range (True) or wholly outside (False); None: it crosses a bound."""
    if inside[0] <= found[0] and found[1] <= inside[1]:
        return True
    return False if found[1] < inside[0] or found[0] > inside[1] else None


def interval(effects: Sequence[float], level: float) -> Range:
    """Student's t interval of the mean; for n paired differences that of the paired t test."""
    if constant(effects):
        return float(np.mean(effects)), float(np.mean(effects))
    found = stats.ttest_1samp(effects, 0.0).confidence_interval(level)
    return float(found.low), float(found.high)


def p_value(effects: Sequence[float], inside: Range) -> float:
    """The level at which the interval no longer crosses a bound: the two-sided p of the t test against one bound; with
    two, the smaller p of equivalence (TOST: the larger of its two one-sided ones) and of its opposite."""
    low, high = inside
    within = max(_one_sided(effects, low, "greater"), _one_sided(effects, high, "less"))
    without = min(_one_sided(effects, low, "less"), _one_sided(effects, high, "greater"))
    return min(1.0, sides(inside) * min(within, without))


def _one_sided(effects: Sequence[float], bound: float, side: Side) -> float:
    """p of the t test that the mean lies on that side of the bound. Effects that are all alike are exact."""
    if math.isinf(bound):
        return float((bound > 0) != (side == "less"))
    if constant(effects):
        mean = float(np.mean(effects))
        return float(not (mean < bound if side == "less" else mean > bound))
    found: Any = stats.ttest_1samp(effects, bound, alternative=side)
    return float(found.pvalue)


def holm(p: Sequence[float], alpha: float = ALPHA) -> list[float]:
    """The level of each of m tests (Holm 1979): the smallest p is held against alpha / m, the next against
    alpha / (m - 1), and so on; from the first that fails, all others have its level."""
    levels, level = [alpha] * len(p), 0.0
    failed = False
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        level = level if failed else alpha / (len(p) - rank)
        failed = failed or p[i] > level
        levels[i] = level
    return levels


def constant(effects: Sequence[float]) -> bool:
    """All the same number. A t interval of them is a point: nothing speaks of how they might have differed."""
    return float(np.ptp(effects)) <= ALIKE * float(np.max(np.abs(effects)))


def bootstrap(effects: Sequence[float], level: float) -> Range:
    """The bootstrap's percentile interval of the mean. BCa is undefined where all are alike. Too narrow for few."""
    rng = np.random.default_rng(0)
    found = stats.bootstrap(
        (effects,), np.mean, method="percentile", n_resamples=RESAMPLES, confidence_level=level, rng=rng
    ).confidence_interval
    return float(found.low), float(found.high)


def sign_flip(effects: Sequence[float], inside: Range) -> tuple[float, float]:
    """p as `p_value` has it, of a test that takes effects to be symmetric about the bound and no more; and the smallest
    p that it could have given: 2^(1-n) against one bound, 2^-n of two, while all flips are tried."""
    low, high = inside
    within = max(_flipped(effects, low, "greater"), _flipped(effects, high, "less"))
    without = min(_flipped(effects, low, "less"), _flipped(effects, high, "greater"))
    least = max(2.0 ** -len(effects), 1 / (RESAMPLES + 1))
    return min(1.0, sides(inside) * min(within, without)), sides(inside) * least


def _flipped(effects: Sequence[float], bound: float, side: Side) -> float:
    if math.isinf(bound):
        return float((bound > 0) != (side == "less"))
    found = stats.permutation_test(
        (np.asarray(effects) - bound,),
        np.mean,
        permutation_type="samples",
        alternative=side,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def power(n: int, mean: float, spread: float, inside: Range, alpha: float = ALPHA) -> float:
    """The chance that n seeds decide a claim the right way, if effects are normal with this mean and spread > 0.

    Noncentral t, exact but for the wrong side, which is left out. For two bounds the usual lower approximation: that
    neither of the two tests fails is taken as 1 minus both chances (Phillips 1990).
    """
    low, high = inside
    needed, per_seed = stats.t.isf(alpha / sides(inside), n - 1), math.sqrt(n) / spread

    def clears(distance: float) -> float:
        return float(stats.nct.sf(needed, n - 1, np.clip(distance * per_seed, -1e6, 1e6)))

    if low <= mean <= high:
        return max(0.0, clears(mean - low) + clears(high - mean) - 1)
    return clears(max(low - mean, mean - high))


def seeds_to_settle(mean: float, spread: float, inside: Range, alpha: float = ALPHA) -> int | None:
    """The smallest number of seeds with that POWER, if mean and spread are what they seem to be; None: too many."""
    if mean in inside:
        return None
    if spread == 0:
        return 2
    enough = MOST_SEEDS
    if power(enough, mean, spread, inside, alpha) < POWER:
        return None
    too_few = 1
    while enough - too_few > 1:
        n = (enough + too_few) // 2
        enough, too_few = (n, too_few) if power(n, mean, spread, inside, alpha) >= POWER else (enough, n)
    return enough
