"""The table of arms, the runs that are in no figure, and a row per run for summary.csv."""

import math
import shlex
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_lab.report.arms import Arm, Section, interval
from moe_lab.report.words import clean, number
from moe_lab.study.results import Result

# What an arm is measured by: heading, what it says, key of Digest.final, decimals.
COLUMNS = (
    ("validation loss", "nats per token, as trained", "eval/loss", 3),
    ("hard top-1 loss", "nats per token, the strongest expert alone", "eval/loss_top1", 3),
    ("load CV", "share of its ceiling, worst layer, validation, noise off", "eval/moe/load_cv_of_ceiling/worst", 3),
    ("load CV in training", "the same as trained, noise included, last row", "moe/load_cv_of_ceiling/worst", 3),
    ("MaxVio", "the fullest expert above its share, worst layer, validation", "eval/moe/max_vio/worst", 2),
    ("dead experts", "in the worst layer, last row", "moe/dead_experts/worst", 1),
    ("gate entropy", "share of ln E, mean over layers, validation", "eval/moe/token_entropy/mean", 3),
    ("domain told", "normalised information beyond chance, mean over layers", "domain beyond chance", 3),
    ("position told", "normalised information with the position, worst layer", "eval/moe/nmi_position/worst", 3),
    ("churn", "choices that changed since the evaluation before, worst layer", "eval/moe/churn/worst", 3),
    ("expert loss spread", "standard deviation over experts, nats, mean over layers", "expert loss spread", 3),
    ("router cosine", "mean over pairs of experts and layers", "eval/moe/router_cos/mean", 3),
    ("active parameters", "of a token", "active_params", 0),
    ("FLOPs per token", "forward", "flops_per_token", 0),
    ("tokens", "seen in training", "tokens", 0),
)
EXACT = ("active_params", "flops_per_token", "tokens")  # no estimates: without an interval


@dataclass(frozen=True)
class Cell:
    mean: str
    interval: str = ""


@dataclass(frozen=True)
class Table:
    """heads: heading and what it means. rows: arm, its colour's index, seeds, cells, the routers' states."""

    heads: list[tuple[str, str]]
    rows: list[tuple[str, int, int, list[Cell], str]]


def of_arms(section: Section) -> Table:
    used = [column for column in COLUMNS if any(arm.values(column[2]) for arm in section.arms)]
    rows = [
        (arm.name, arm.index, len(arm.runs), [_cell(arm, key, digits) for _, _, key, digits in used], states(arm))
        for arm in section.arms
    ]
    return Table([(title, meaning) for title, meaning, _, _ in used], rows)


def _cell(arm: Arm, key: str, digits: int) -> Cell:
    values = arm.values(key)
    if key in EXACT:
        low, high = (number(f(values, default=math.nan), 0) for f in (min, max))
        return Cell(low if low == high else f"{low} – {high}")
    if not values:
        return Cell("–")
    found = interval(values)
    told = f"[{number(found[0], digits)}, {number(found[1], digits)}]" if found else ""
    return Cell(number(float(np.mean(values)), digits), told)


def states(arm: Arm) -> str:
    """How often each verdict on a layer's routing was the last: `4 collapsed, 2 healthy`."""
    counts = Counter(clean(verdict, 60) for run in arm.runs.values() for verdict in run.layer_verdicts)
    return ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()) or "–"


@dataclass(frozen=True)
class Unfit:
    arm: str
    seed: int
    state: str
    why: str
    where: str


def unfit(section: Section) -> list[Unfit]:
    return [
        Unfit(clean(r.job.arm), r.job.seed, clean(r.state, 40), why or "no reason was recorded", where(section, r))
        for r, why in section.unfit
    ]


def where(section: Section, result: Result) -> str:
    return clean(str(section.results.sweep.folder / result.job.dir))


def commands(section: Section) -> list[str]:
    """A line for each job, to copy and paste."""
    return [
        f"moe-lab train {' '.join(shlex.quote(clean(o, 2000)) for o in r.job.overrides)} "
        f"{shlex.quote(f'hydra.run.dir={where(section, r)}')}"
        for r in section.results.results
    ]


def of_runs(sections: list[Section]) -> list[dict[str, Any]]:
    """A row per run, finished or not."""
    rows = []
    for section in sections:
        digests = {id(run.run): run for arm in section.arms for run in arm.runs.values()}
        for r in section.results.results:
            run = digests.get(id(r.run))
            told = {"study": section.title, "arm": clean(r.job.arm), "seed": r.job.seed, "state": clean(r.state, 40)}
            told |= {"why": clean(r.why or ""), "directory": where(section, r), "sources": clean(r.sources or "", 64)}
            rows.append(told | {key: run.final.get(key) if run else None for _, _, key, _ in COLUMNS})
    return rows
