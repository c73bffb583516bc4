"""What the runs of a sweep say of one claim: its effect in each seed, and what became of the seeds that have none."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moe_lab import reading
from moe_lab.recorded import Recorded
from moe_lab.study import measure, statistics
from moe_lab.study.files import Claim
from moe_lab.study.measure import Floor
from moe_lab.study.results import Result, Results
from moe_lab.study.statistics import Range

MOST_NAMED = 3
STATES = {
    "completed": "left no config",
    "oom": "ran out of memory",
    "timeout": "took too long",
    "running": "still runs",
    "waiting": "has not begun",
    "preempted": "was stopped",
}


@dataclass(frozen=True)
class Evidence:
    """values: of each of the claim's arms, the metric over the seeds that all of them have, in one order.
    floors: of each arm. missing: in words. claims: their hashes, as its runs recorded them.
    """

    claim: Claim
    seeds: list[int]
    values: list[list[float]]
    floors: list[Floor | None]
    missing: list[str]
    claims: set[str | None]

    @property
    def no_ratio(self) -> str:
        """Why the ratio of the arms is undefined, or nothing."""
        bad = [seed for seed, *pair in zip(self.seeds, *self.values, strict=True) if min(pair) <= 0]
        if self.claim.by == "difference" or not bad:
            return ""
        return f"a value of 0 or less (seed {bad[0]}) makes no ratio; compare by: difference"

    @property
    def effects(self) -> list[float]:
        """Of each seed: the metric, the difference of the arms, or the log of their ratio."""
        if self.claim.compare is None:
            return self.values[0]
        if self.claim.by == "difference":
            return [a - b for a, b in zip(*self.values, strict=True)]
        return [] if self.no_ratio else [math.log(a) - math.log(b) for a, b in zip(*self.values, strict=True)]

    @property
    def inside(self) -> Range:
        """The effects that the claim allows. Within 0.1 by ratio is from 1 / 1.1 to 1.1."""
        claim, ratio = self.claim, self.claim.by == "ratio"
        if claim.within is not None:
            margin = math.log1p(claim.within) if ratio else claim.within
            return -margin, margin
        low = -math.inf if claim.at_least is None else math.log(claim.at_least) if ratio else claim.at_least
        high = math.inf if claim.at_most is None else math.log(claim.at_most) if ratio else claim.at_most
        return low, high

    @property
    def p(self) -> float:
        return statistics.p_value(self.effects, self.inside) if len(self.effects) > 1 else 1.0


def gather(claim: Claim, results: Results) -> Evidence:
    """ValueError, in one line, where there are runs and none of them holds the metric."""
    arms, completed = claim.arms(), results.by_arm()
    runs = [completed.get(arm, {}) for arm in arms]
    _must_be_there(claim.metric, [run for of_arm in runs for run in of_arm.values()])
    values = [{seed: _value(claim, run) for seed, run in of_arm.items()} for of_arm in runs]
    seeds = sorted(set.intersection(*({s for s, v in of_arm.items() if v is not None} for of_arm in values)))
    return Evidence(
        claim,
        seeds,
        [[v for seed in seeds if (v := of_arm[seed]) is not None] for of_arm in values],
        [_floor(claim, [of_arm[seed] for seed in seeds]) for of_arm in runs],
        [*_missing(claim, results, values, len(seeds)), *_beyond(claim, results)],
        {r.claims for r in results.results if r.job.arm in arms and r.run is not None},
    )


def _must_be_there(metric: str, runs: list[Recorded]) -> None:
    there = set().union(*(measure.holds(run) for run in runs))
    if runs and metric not in there:
        raise ValueError(measure.unknown(metric, there))
    if runs and (line := measure.matrix(metric)):
        raise ValueError(line)


def _value(claim: Claim, run: Recorded) -> float | None:
    with reading.of_a_run(run.folder):
        return measure.value(run, claim.metric, claim.reduce)


def _floor(claim: Claim, runs: list[Recorded]) -> Floor | None:
    """Of one arm: the largest of its runs. Seeds do not average it away: they are evaluated on the same tokens."""
    found = []
    for run in runs:
        with reading.of_a_run(run.folder):
            found.append(measure.floor(run, claim.metric, claim.reduce))
    return max((f for f in found if f is not None), key=lambda f: f.size, default=None)


def _missing(claim: Claim, results: Results, values: list[dict[int, float | None]], used: int) -> Iterator[str]:
    """How many of the seeds that were asked for are used, and what became of the others."""
    jobs = [{r.job.seed: r for r in results.results if r.job.arm == arm} for arm in claim.arms()]
    asked = sorted(set().union(*jobs))
    gone = [
        f"{arm} {_fate(seed, of_arm)}" if seed not in found else f"{claim.metric} is undefined in {arm} seed {seed}"
        for arm, of_arm, found in zip(claim.arms(), jobs, values, strict=True)
        for seed in asked
        if found.get(seed) is None
    ]
    if gone:
        more = f" and {len(gone) - MOST_NAMED} more" if len(gone) > MOST_NAMED else ""
        yield f"{used} of {len(asked)} seeds: {', '.join(gone[:MOST_NAMED])}{more}"


def _fate(seed: int, jobs: dict[int, Result]) -> str:
    if seed not in jobs:
        return f"has no seed {seed}"
    return f"seed {seed} {STATES.get(jobs[seed].state, jobs[seed].state)}"


def _beyond(claim: Claim, results: Results) -> Iterator[str]:
    """Arms that a wider grid made of the claim's: other settings, of which it says nothing."""
    arms = claim.arms()
    wider = sorted({r.job.arm for r in results.results if r.job.arm.split(" ")[0] in arms} - set(arms))
    if wider:
        yield f"not judged: {wider[0]}" + (f" and {len(wider) - 1} more" if len(wider) > 1 else "")
