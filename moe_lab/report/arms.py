"""The runs of one arm, and a study's arms as a report shows them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from moe_lab.reading import Damaged
from moe_lab.report.digest import Array, Digest, digest
from moe_lab.report.words import clean, slug
from moe_lab.study import statistics
from moe_lab.study.judge import Verdict
from moe_lab.study.results import Result, Results

LEVEL = 0.95  # of the intervals in the table of arms
MOST_POINTS = 80  # of a curve
BALANCE = "eval/moe/load_cv_of_ceiling/worst"


@dataclass(frozen=True, eq=False)
class Arm:
    name: str
    index: int  # among the study's arms: decides its colour
    runs: dict[int, Digest]  # by seed

    def values(self, key: str) -> list[float]:
        """The last value of each seed that has one."""
        return [run.final[key] for run in self.runs.values() if key in run.final]

    def mean(self, key: str) -> float:
        return float(np.mean(self.values(key))) if self.values(key) else math.nan

    @property
    def typical(self) -> tuple[int, Digest]:
        """Seed and run whose final balance is the median: what cannot be averaged is shown of this one."""
        ranked = sorted(self.runs.items(), key=lambda item: item[1].final.get(BALANCE, -1.0))
        return ranked[(len(ranked) - 1) // 2]

    def band(self, key: str) -> tuple[Array, Array, Array, Array]:
        """Steps, mean, lowest and highest over the seeds; on the steps of the seed that has the fewest."""
        curves = [run.curves[key] for run in self.runs.values() if len(run.curves[key][0])]
        if not curves:
            none = np.zeros(0)
            return none, none, none, none
        steps = min((steps for steps, _ in curves), key=len)
        if len(steps) > MOST_POINTS:
            steps = steps[np.unique(np.geomspace(1, len(steps), MOST_POINTS).round().astype(int) - 1)]
        values = np.array([np.interp(steps, *curve) for curve in curves])
        return steps, values.mean(0), values.min(0), values.max(0)


def interval(values: list[float]) -> tuple[float, float] | None:
    """Student's t interval of the mean; None for fewer than two values."""
    return statistics.interval(values, LEVEL) if len(values) > 1 else None


@dataclass(frozen=True, eq=False)
class Section:
    """One study of a report. unfit: results that are in no figure, each with the reason."""

    results: Results
    verdicts: list[Verdict]
    title: str
    slug: str
    notes: list[str]
    arms: list[Arm]
    unfit: list[tuple[Result, str]] = field(default_factory=list)


def section(results: Results, verdicts: list[Verdict], taken: Iterable[str] = ()) -> Section:
    """A study with its runs digested. `taken`: slugs of the sections before it."""
    notes = [clean(note) for note in results.notes]
    shown = [r for r in results.results if r.state == "completed"]
    if not shown:
        shown = [r for r in results.results if r.run is not None and r.run.rows]
        notes += (
            ["no run is completed: shown is what they wrote so far"] if shown else ["no run has written anything yet"]
        )
    unfit = [(r, clean(r.why or "")) for r in results.results if r.state != "completed"]
    named = [*(results.sweep.study.arms if results.sweep.study else ()), *(r.job.arm for r in results.results)]
    arms: dict[str, dict[int, Digest]] = {arm: {} for arm in named}
    for result in sorted(shown, key=lambda r: r.job.seed):
        try:
            if result.run is not None:
                arms[result.job.arm][result.job.seed] = digest(result.run)
        except Damaged as error:
            unfit.append((result, clean(str(error))))
    there = [(clean(name), runs) for name, runs in arms.items() if runs]
    leaking = [name for name, runs in there if any(run.run.env.get("leaks") for run in runs.values())]
    notes += [f"{name} sees later tokens: its losses compare with no causal model's" for name in leaking]
    title = clean(results.sweep.name) or "runs"
    found = [Arm(name, index, runs) for index, (name, runs) in enumerate(there)]
    return Section(results, verdicts, title, slug(title, taken), notes, found, unfit)
