"""Curves over training with a band over seeds; balance against loss; the losses of single experts."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from moe_lab.cli import cut
from moe_lab.report.arms import BALANCE, Arm, interval
from moe_lab.report.axes import evaluations, line_at, log_steps, names_as_rows
from moe_lab.report.figure import LONGEST_NAME, Figure, Panel
from moe_lab.report.look import INK, MUTED, colour, dash, marker
from moe_lab.report.words import spread

FEW = 10  # points of a curve: each has its mark, and its step stands below
BANDS = 12  # arms: with more, bands hide the curves
CURVE = "The line is the mean over seeds, the band goes from the lowest to the highest."
BALANCED = f"""Worst layer, as trained (noise included); entropy: mean over layers. 0.33 of the ceiling counts as
collapsed. Entropy 1: undecided, 0: decided; it says nothing of balance. {CURVE}"""
NO_DEAD = " No layer of any run has a dead expert in any row."
CHURN = f"""Share of the choices of the same validation tokens that changed, worst layer, without noise. It should
fall; 0 from the start means that nothing learns. {CURVE}"""
EXPERTS = """Loss of an expert's validation tokens minus the mean of its layer's experts, nats: the thin line goes
from the lowest to the highest expert of any layer, the thick one holds the middle half, the mark is the median; the
seed with the median balance. Experts without tokens have none."""


def balance(arms: list[Arm]) -> list[Figure]:
    """CV, entropy and dead experts while training."""
    arms = [arm for arm in arms if any(run.experts for run in arm.runs.values())]
    panels = {
        "load CV, share of its ceiling": ("moe/load_cv_of_ceiling/worst", (0.0, 1.0)),
        "gate entropy, share of ln E": ("moe/token_entropy/mean", (0.0, 1.0)),
        "dead experts": ("moe/dead_experts/worst", (0.0, None)),
    }
    dead = max((x for arm in arms for x in arm.band("moe/dead_experts/worst")[3]), default=0)
    if not dead:
        del panels["dead experts"]
    found = [_panel(arms, title, key, span) for title, (key, span) in panels.items() if _any(arms, key)]
    if not found:
        return []
    end = {arm.name: _end(arm, "moe/load_cv_of_ceiling/worst") for arm in arms}
    sure = {arm.name: _end(arm, "moe/token_entropy/mean") for arm in arms}
    return [
        Figure(
            "balance",
            "Balance and confidence while training",
            f"Load CV of the worst layer at the end, as a share of its ceiling: {spread(end, 2)}. "
            f"Entropy of the gate, mean over layers: {spread(sure, 2)}.{'' if dead else NO_DEAD}",
            BALANCED,
            "moe/load_cv_of_ceiling/worst, moe/token_entropy/mean and moe/dead_experts/worst of metrics.jsonl by step",
            found,
            arms,
        )
    ]


def loss(arms: list[Arm]) -> list[Figure]:
    panels = {"training loss, nats": "loss", "validation loss, nats": "eval/loss"}
    found = [_panel(arms, title, key, (None, None)) for title, key in panels.items() if _any(arms, key)]
    if not found:
        return []
    end = {arm.name: arm.mean("eval/loss") for arm in arms}
    return [
        Figure(
            "loss",
            "Loss while training",
            f"Validation loss at the end: {spread(end)} nats.",
            f"Task loss per token; balance terms are not in it. {CURVE}",
            "loss and eval/loss of metrics.jsonl against step",
            found,
            arms,
        )
    ]


def churn(arms: list[Arm]) -> list[Figure]:
    key = "eval/moe/churn/worst"
    arms = [arm for arm in arms if _any([arm], key)]
    if not arms:
        return []
    end = {arm.name: _end(arm, key) for arm in arms}
    return [
        Figure(
            "churn",
            "Churn: how much of the routing changes between evaluations",
            f"Share of the choices that differ from those at the evaluation before, at the end: {spread(end, 2)}.",
            CHURN,
            "eval/moe/churn/worst of metrics.jsonl against step",
            [_panel(arms, "choices that changed", key, (0.0, 1.0))],
            arms,
        )
    ]


def _any(arms: list[Arm], key: str) -> bool:
    return any(len(run.curves[key][0]) for arm in arms for run in arm.runs.values())


def _end(arm: Arm, key: str) -> float:
    values = arm.band(key)[1]
    return float(values[-1]) if len(values) else math.nan


def _panel(arms: list[Arm], title: str, key: str, span: tuple[float | None, float | None]) -> Panel:
    says = f"{title}: ends at {spread({arm.name: _end(arm, key) for arm in arms})}"
    return Panel(title, says, partial(_curves, arms=arms, key=key, span=span))


def _curves(axes: Axes, arms: list[Arm], key: str, span: tuple[float | None, float | None]) -> None:
    seen: set[float] = set()
    for arm in arms:
        steps, mean, low, high = arm.band(key)
        if not len(steps):
            continue
        seen |= set(steps)
        few = len(steps) <= FEW
        (line,) = axes.plot(steps, mean, color=colour(arm.index), marker=marker(arm.index) if few else "")
        line.set_dashes(dash(arm.index) or (None, None))
        if len(arms) <= BANDS and len(arm.runs) > 1:
            axes.fill_between(steps, low, high, color=colour(arm.index), alpha=0.15, linewidth=0)
    evaluations(axes, sorted(seen)) if len(seen) <= FEW else log_steps(axes, min(seen), max(seen))
    _limit(axes, *span)
    if key.endswith("load_cv_of_ceiling/worst"):
        line_at(axes, 1 / 3, "collapsed from here on", MUTED)


def _limit(axes: Axes, low: float | None, high: float | None) -> None:
    """From 0 where that is the lowest there can be; up to the ceiling where curves come near it."""
    if low is None:
        return
    top = axes.get_ylim()[1]
    if high is not None and top > 0.6 * high:
        top = 1.02 * high
    axes.set_ylim(low, max(top, 0.1) if high is not None else max(top, 1))


def frontier(arms: list[Arm]) -> list[Figure]:
    """What balance costs: each arm's validation loss against its imbalance, without noise."""
    arms = [arm for arm in arms if arm.values(BALANCE) and arm.values("eval/loss")]
    if len(arms) < 2:
        return []
    best = min(arms, key=lambda arm: arm.mean("eval/loss"))
    even = min(arms, key=lambda arm: arm.mean(BALANCE))
    price = even.mean("eval/loss") - best.mean("eval/loss")
    finding = (
        f"Lowest loss: {best.name} ({best.mean('eval/loss'):.3f} nats at {best.mean(BALANCE):.2f} of the ceiling). "
    )
    finding += f"Most even load: {even.name} ({even.mean('eval/loss'):.3f} nats at {even.mean(BALANCE):.2f})"
    finding += f", {price:.3f} nats above the lowest." if even is not best else ": the same arm."
    return [
        Figure(
            "frontier",
            "Balance against loss",
            finding,
            "Each small dot is a seed, each large mark an arm's mean with its 95 % intervals. Down and left is better; "
            "the line joins the arms that no other beats in both.",
            "eval/loss against eval/moe/load_cv_of_ceiling/worst, the last values in metrics.jsonl",
            [Panel("validation loss against load CV", finding, partial(_frontier, arms=arms))],
            arms,
            height=280,
        )
    ]


def _frontier(axes: Axes, arms: list[Arm]) -> None:
    means = [(arm.mean(BALANCE), arm.mean("eval/loss")) for arm in arms]
    best = sorted(p for p in means if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in means))
    axes.step(*zip(*best, strict=True), where="post", color=MUTED, linewidth=0.9)
    for arm, (x, y) in zip(arms, means, strict=True):
        pairs = [
            (r.final[BALANCE], r.final["eval/loss"])
            for r in arm.runs.values()
            if {BALANCE, "eval/loss"} <= r.final.keys()
        ]
        axes.plot(*zip(*pairs, strict=True), ".", color=colour(arm.index), markersize=3, alpha=0.55)
        for values, bar in ((arm.values(BALANCE), axes.hlines), (arm.values("eval/loss"), axes.vlines)):
            if found := interval(values):
                bar(y if bar == axes.hlines else x, *found, color=colour(arm.index), linewidth=0.9)
        axes.plot([x], [y], marker(arm.index), color=colour(arm.index), markersize=7)
    axes.set_xlabel("load CV of the worst layer, share of its ceiling")
    _around(axes.set_xlim, [run.final[BALANCE] for arm in arms for run in arm.runs.values() if BALANCE in run.final])
    _around(
        axes.set_ylim, [run.final["eval/loss"] for arm in arms for run in arm.runs.values() if "eval/loss" in run.final]
    )


def _around(limit: Callable[..., object], values: list[float]) -> None:
    """The axis that the seeds need: intervals of two seeds may be wider than all there is to see."""
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    limit(low - room, high + room)


def expert_loss(arms: list[Arm]) -> list[Figure]:
    """How unequal the experts' losses are: tokens have not tried the others."""
    there = [(arm, losses) for arm in arms if (losses := arm.typical[1].expert_loss_LE) is not None]
    if not there:
        return []
    spreads = {arm.name: arm.mean("expert loss spread") for arm, _ in there}
    names = [cut(arm.name, LONGEST_NAME) for arm, _ in there]
    gaps = [_gaps(losses_LE) for _, losses_LE in there]
    return [
        Figure(
            "expert-loss",
            "Loss of single experts",
            f"Standard deviation over a layer's experts, mean over layers: {spread(spreads)} nats.",
            EXPERTS,
            "eval/moe/expert_loss in the last row of metrics.jsonl that holds it",
            [Panel("expert's loss minus its layer's mean, nats", f"Spread: {spread(spreads)} nats",
                   partial(_ranges, names=names, gaps=gaps, indices=[arm.index for arm, _ in there]))],
            height=40 + 34 * len(there),
        )
    ]  # fmt: skip


def _gaps(loss_LE: np.ndarray) -> np.ndarray:
    gaps = loss_LE - np.nanmean(loss_LE, axis=1, keepdims=True)
    return gaps[np.isfinite(gaps)]


def _ranges(axes: Axes, names: list[str], gaps: list[np.ndarray], indices: list[int]) -> None:
    for row, (values, index) in enumerate(zip(gaps, indices, strict=True)):
        low, q1, middle, q3, high = np.percentile(values, [0, 25, 50, 75, 100])
        axes.hlines(row, low, high, color=colour(index), linewidth=1)
        axes.hlines(row, q1, q3, color=colour(index), linewidth=5)
        axes.plot([middle], [row], marker(index), color=INK, markersize=4)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.grid(False)
    names_as_rows(axes, names, [INK] * len(names))
