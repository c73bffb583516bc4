"""The verdict on each claim of a study: supported, refuted, or inconclusive with what would settle it.

Student's t over paired seeds, at Holm levels over all claims of the study: a claim is decided when the interval lies
wholly on one side of its bound. docs/judging.md has the rules, what they assume, and why.
"""

import math
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from moe_lab.study import statistics
from moe_lab.study.evidence import Evidence, gather
from moe_lab.study.files import Claim, Study, claims_sha256
from moe_lab.study.results import Results
from moe_lab.study.statistics import Estimate, Range

SUPPORTED, REFUTED, INCONCLUSIVE = "supported", "refuted", "inconclusive"
LARGEST_LOG = 700.0  # of a float64
TOKENS = "more tokens would settle it, not more seeds"


@dataclass(frozen=True)
class Verdict:
    """estimate and effects (of each seed) are in the units of the claim: a ratio where it compares by ratio.

    estimate: None where no seed has a value. floor: the metric's sampling floor, the larger of two arms'. changed: the
    study's claims were edited after runs of this one had begun.
    """

    claim: Claim
    verdict: str
    estimate: Estimate | None
    effects: dict[int, float]
    floor: float | None
    why: str
    changed: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"claim": self.claim.model_dump(exclude_none=True), "bound": bound(self.claim)}


def judge(study: Study, results: Results) -> list[Verdict]:
    """A verdict for each claim, in order. ValueError, in one line, where no run holds a claim's metric."""
    evidence = [gather(claim, results) for claim in study.claims]
    levels = statistics.holm([e.p for e in evidence])
    now = claims_sha256(study)
    return [_verdict(e, level, bool(e.claims - {now, None})) for e, level in zip(evidence, levels, strict=True)]


def bound(claim: Claim) -> str:
    """What the claim says of its metric, in words."""
    if claim.at_least is not None:
        return f"at least {claim.at_least:g}"
    return f"at most {claim.at_most:g}" if claim.at_most is not None else f"within {claim.within:g}"


def _verdict(e: Evidence, alpha: float, changed: bool) -> Verdict:
    found = statistics.estimate(e.effects, e.inside, alpha) if e.effects else None
    verdict, why = INCONCLUSIVE, e.no_ratio or "needs seeds: a spread is one of two or more"
    if found is not None and found.low is not None and found.high is not None:
        if why := _too_near(e):
            found = replace(found, seeds_to_settle=None)
        else:
            verdict, why = _decided(e, found, (found.low, found.high))
    floor = max((f.size for f in e.floors if f is not None), default=None)
    estimate, effects = (found, e.effects) if e.claim.by == "difference" else _ratio(found, e.effects)
    told = "; ".join(part for part in (why, *e.missing) if part)
    return Verdict(e.claim, verdict, estimate, dict(zip(e.seeds, effects, strict=False)), floor, told, changed)


def _decided(e: Evidence, found: Estimate, interval: Range) -> tuple[str, str]:
    """The verdict of two or more seeds, and what there is to say of it."""
    decided = statistics.decide(interval, e.inside)
    if decided is None:
        n = found.seeds_to_settle
        needed = f"about {n:,} seeds" if n else f"not even {statistics.MOST_SEEDS:,} seeds"
        return INCONCLUSIVE, f"the interval crosses the bound; {needed} would settle it"
    alike = f"all {found.n} seeds gave the same, so that the interval is a point"
    return SUPPORTED if decided else REFUTED, alike if statistics.constant(e.effects) else ""


def _too_near(e: Evidence) -> str:
    """Why no verdict can be had from so few tokens; nothing where it can. The rule is ours.

    Of two arms the mean difference must be further from the bound than the larger of their floors, and more than
    nothing where none is known. The two floors do not add up, since chance takes both arms away from balance, nor do
    seeds make them smaller. By ratio r it is the first arm's distance from r times the second. Of one arm the bound
    must not be nearer to balance than its floor.
    """
    if e.claim.compare is None:
        (floor,), at = e.floors, next(filter(math.isfinite, e.inside))
        if floor is None or abs(at - floor.balanced) >= floor.size:
            return ""
        return f"chance alone takes it {floor.size:.3g} from balance, beyond the bound; {TOKENS}"
    sizes = [0.0 if floor is None else floor.size for floor in e.floors]
    mean, ratio = [fmean(of_arm) for of_arm in e.values], e.claim.by == "ratio"
    for at in filter(math.isfinite, e.inside):
        times, plus = (math.exp(at), 0.0) if ratio else (1.0, at)
        distance, least = abs(mean[0] - times * mean[1] - plus), max(sizes[0], times * sizes[1])
        if least and distance <= least:
            return f"{distance:.3g} from the bound is within the sampling floor of {least:.3g}; {TOKENS}"
        if distance == 0:
            return "the arms differ by exactly the bound"
    return ""


def _ratio(found: Estimate | None, effects: list[float]) -> tuple[Estimate | None, list[float]]:
    """Of logs the ratios that they stand for; the mean becomes the geometric one."""
    names = ("mean", "low", "high", "boot_low", "boot_high")
    logs = {name: x for name in names if (x := getattr(found, name, None)) is not None}
    return found and replace(found, **{name: _exp(x) for name, x in logs.items()}), [_exp(x) for x in effects]


def _exp(x: float) -> float:
    """The interval of few seeds may end beyond the largest number that there is."""
    return math.exp(min(x, LARGEST_LOG))
