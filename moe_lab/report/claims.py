"""A claim and its verdict in a sentence, and the interval against the bound as a small picture."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from markupsafe import Markup, escape

from moe_lab.report.words import clean, significant
from moe_lab.study.files import Claim
from moe_lab.study.judge import Verdict
from moe_lab.study.statistics import Estimate

WIDTH, HEIGHT, EDGE = 240, 30, 10  # of the picture
MARKS = {"supported": "✓", "refuted": "✗", "inconclusive": "?"}
CHANGED = "the claims were edited after its runs began"


@dataclass(frozen=True)
class ClaimView:
    verdict: str  # supported | refuted | inconclusive
    mark: str
    says: str
    found: str  # the effect, its interval and what was claimed
    why: str
    more: str  # the other tests
    source: str
    picture: Markup | str  # SVG, or nothing
    changed: bool


def view(verdict: Verdict) -> ClaimView:
    claim, estimate = verdict.claim, verdict.estimate
    name = verdict.verdict if verdict.verdict in MARKS else "inconclusive"
    found = (
        f"{_effect(claim)}: {_estimated(estimate)}; claimed {bound(claim)}." if estimate else f"Claimed {bound(claim)}."
    )
    picture = _picture(verdict, found) if estimate else ""
    says, why, source = sentence(claim.says), sentence(verdict.why), clean(claim.source)
    return ClaimView(name, MARKS[name], says, found, why, _more(estimate), source, picture, verdict.changed)


def sentence(text: str) -> str:
    text = clean(text)
    return text[:1].upper() + text[1:]


def tally(verdicts: list[Verdict]) -> str:
    """`3 supported, 1 refuted` of a study's claims."""
    counts = {name: sum(v.verdict == name for v in verdicts) for name in MARKS}
    return ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "no claims"


def _effect(claim: Claim) -> str:
    over = [f"steps: {claim.reduce.steps.replace('_', ' ')}"]
    over += [f"layers: {claim.reduce.layers}"] if "moe/" in claim.metric and claim.metric.count("/") < 3 else []
    of = f"{clean(claim.metric)} ({', '.join(over)})"
    if claim.compare is None:
        return f"{of} of {clean(claim.arms()[0])}"
    sign = "/" if claim.by == "ratio" else "minus"
    return f"{of} of {clean(claim.compare[0])} {sign} {clean(claim.compare[1])}"


def _estimated(estimate: Estimate) -> str:
    seeds = f"{estimate.n} seed{'s' * (estimate.n != 1)}"
    if estimate.low is None:
        return f"{significant(estimate.mean)} ({seeds})"
    interval = f"[{significant(estimate.low)}, {significant(estimate.high)}]"
    return f"{significant(estimate.mean)} {interval} ({100 * estimate.level:.4g} % interval, {seeds})"


def _more(estimate: Estimate | None) -> str:
    if estimate is None or estimate.low is None:
        return ""
    told = [f"t test p = {significant(estimate.p)}"]
    if estimate.boot_low is not None:
        told.append(f"bootstrap [{significant(estimate.boot_low)}, {significant(estimate.boot_high)}]")
    if estimate.sign_flip_p is not None:
        told.append(
            f"sign flips p = {significant(estimate.sign_flip_p)} (at least {significant(estimate.sign_flip_floor)})"
        )
    return "; ".join(told)


def bound(claim: Claim) -> str:
    """As `study.judge.bound`, with what the two arms are within of."""
    if claim.within is not None:
        return f"within {significant(claim.within)}" + (" of equal" if claim.by == "ratio" else " of no difference")
    return (
        f"at least {significant(claim.at_least)}" if claim.at_most is None else f"at most {significant(claim.at_most)}"
    )


def _bounds(claim: Claim) -> list[float]:
    if claim.within is not None:
        return [1 / (1 + claim.within), 1 + claim.within] if claim.by == "ratio" else [-claim.within, claim.within]
    return [bound for bound in (claim.at_least, claim.at_most) if bound is not None]


def _picture(verdict: Verdict, alt: str) -> Markup:
    """Mean, interval and seeds on a line, the claim's bounds across it, what it claims shaded: made of numbers alone.

    alt: the same in words.
    """
    estimate = verdict.estimate
    assert estimate is not None
    core = [estimate.mean, *verdict.effects.values(), *_bounds(verdict.claim)]
    room = (max(core) - min(core)) or abs(core[0]) or 1.0
    # An interval of two seeds may be wider than all else by far: it goes to the edge then.
    low = min(core) if estimate.low is None else max(min(estimate.low, *core), min(core) - room)
    high = max(core) if estimate.high is None else min(max(estimate.high, *core), max(core) + room)

    def x(value: float) -> float:
        return EDGE + (WIDTH - 2 * EDGE) * min(max((value - low) / ((high - low) or room), 0), 1)

    head = f'<svg class="interval" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}">'
    return Markup(f"{head}{''.join(_parts(verdict, estimate, x))}</svg>")


def _parts(verdict: Verdict, estimate: Estimate, x: Callable[[float], float]) -> Iterator[str]:
    claim, middle = verdict.claim, HEIGHT / 2
    bounds = [x(b) for b in _bounds(claim)]
    left = 0.0 if claim.at_most is not None else bounds[0]
    right = WIDTH if claim.at_least is not None else bounds[-1]
    yield f'<rect class="claimed" x="{left:.1f}" y="2" width="{right - left:.1f}" height="{HEIGHT - 4}"/>'
    for at in bounds:
        yield f'<path class="bound" d="M{at:.1f} 2V{HEIGHT - 2}"/>'
    if estimate.low is not None and estimate.high is not None:
        yield f'<path class="range" d="M{x(estimate.low):.1f} {middle}H{x(estimate.high):.1f}"/>'
    for effect in verdict.effects.values():
        yield f'<circle class="seed" cx="{x(effect):.1f}" cy="{middle + 7}" r="1.6"/>'
    yield f'<circle class="mean" cx="{x(estimate.mean):.1f}" cy="{middle}" r="4"/>'
