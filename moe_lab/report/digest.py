"""A run as the numbers that a report shows; what is not what a run writes is told here, once, and nowhere later.

Shapes: R rows, L MoE layers, E experts, C domains.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_lab import reading
from moe_lab.recorded import Recorded
from moe_lab.report.words import clean

Array = np.ndarray[Any, Any]
Series = tuple[Array, Array]  # steps, values; only where they are defined

CURVES = (
    *("loss", "eval/loss", "moe/load_cv_of_ceiling/worst", "moe/token_entropy/mean", "moe/max_vio/worst"),
    *("moe/dead_experts/worst", "eval/moe/churn/worst", "eval/moe/load_cv_of_ceiling/worst"),
)
FINAL = (
    *("loss", "eval/loss", "eval/loss_top1", "eval/moe/load_cv_of_ceiling/worst", "eval/moe/max_vio/worst"),
    *("moe/load_cv_of_ceiling/worst", "moe/dead_experts/worst", "eval/moe/token_entropy/mean"),
    *("eval/moe/nmi_domain/mean", "eval/moe/nmi_domain_floor/mean", "eval/moe/nmi_position/worst"),
    *("eval/moe/churn/worst", "eval/moe/router_cos/mean", "tokens"),
)
COST = ("params", "active_params", "flops_per_token")


@dataclass(frozen=True, eq=False)
class Digest:
    """load_RLE: tokens that chose an expert, 1 = its fair share. The matrices are those of the last evaluation, None
    where it holds none. final: the last value of each, where there is one."""

    run: Recorded
    k: int
    steps_R: Array
    load_RLE: Array
    curves: dict[str, Series]
    final: dict[str, float]
    expert_loss_LE: Array | None
    cosine_LEE: Array | None
    counts_LEC: Array | None
    domains: list[str]
    layer_verdicts: list[str]  # of the routers, as the run itself told them; "too early" where it told none

    @property
    def layers(self) -> int:
        return self.load_RLE.shape[1]

    @property
    def experts(self) -> int:
        return self.load_RLE.shape[2]


def digest(run: Recorded) -> Digest:
    """Damaged, in one line, where what stands in the directory is nothing that a run writes."""
    with reading.of_a_run(run.folder), np.errstate(all="ignore"):
        steps_R, load_RLE = _load(run.rows)
        matrices = (
            _matrix(run.rows, f"eval/moe/{name}") for name in ("expert_loss", "router_cos_matrix", "domain_counts")
        )
        expert_loss_LE, cosine_LEE, counts_LEC = matrices
        final = {key: values[-1] for key in FINAL if len(values := _series(run.rows, key)[1])}
        final |= {key: float(run.env["cost"][key]) for key in COST if run.env.get("cost")}
        if "eval/moe/nmi_domain/mean" in final:
            floor = final.get("eval/moe/nmi_domain_floor/mean", 0.0)
            final["domain beyond chance"] = max(0.0, final["eval/moe/nmi_domain/mean"] - floor)
        if expert_loss_LE is not None and np.isfinite(expert_loss_LE).any():
            final["expert loss spread"] = float(np.nanmean(_spread(expert_loss_LE)))
        return Digest(
            run,
            int(run.env.get("k", 1)),
            steps_R,
            load_RLE,
            {key: _series(run.rows, key) for key in CURVES},
            {key: float(value) for key, value in final.items() if math.isfinite(value)},
            expert_loss_LE,
            cosine_LEE,
            counts_LEC,
            _domains(run.env, 0 if counts_LEC is None else counts_LEC.shape[2]),
            _layer_verdicts(run.rows),
        )


def _load(rows: list[dict[str, Any]]) -> tuple[Array, Array]:
    there = [row for row in rows if row.get("moe/selected")]
    if not there:
        return np.zeros(0), np.zeros((0, 0, 0))
    counts_RLE = np.array([row["moe/selected"] for row in there], dtype=float)
    if counts_RLE.ndim != 3:
        raise ValueError("moe/selected is no count per layer and expert")
    mean_RL1 = counts_RLE.mean(-1, keepdims=True)
    return np.array([row["step"] for row in there], dtype=float), counts_RLE / np.where(mean_RL1 > 0, mean_RL1, np.nan)


def _series(rows: list[dict[str, Any]], key: str) -> Series:
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    known = np.isfinite(steps) & np.isfinite(values)
    return steps[known], values[known]


def _matrix(rows: list[dict[str, Any]], key: str) -> Array | None:
    """The last one, [L, E] or [L, E, n]; NaN where it is undefined, None where it is all undefined."""
    last = next((row[key] for row in reversed(rows) if row.get(key)), None)
    if last is None:
        return None
    matrix = np.array(last, dtype=float)
    if matrix.ndim not in (2, 3):
        raise ValueError(f"{key} is no matrix per layer")
    return matrix if np.isfinite(matrix).any() else None


def _spread(loss_LE: Array) -> Array:
    """Standard deviation over the experts that have tokens, [L]."""
    with np.errstate(all="ignore"):
        return np.array([np.std(e[np.isfinite(e)]) if np.isfinite(e).any() else np.nan for e in loss_LE])


def _domains(env: Mapping[str, Any], count: int) -> list[str]:
    names = [clean(str(name), 60) for name in (env.get("dataset") or {}).get("train_tokens_per_domain", {})]
    return names if len(names) == count else [f"domain {i}" for i in range(count)]


def _layer_verdicts(rows: list[dict[str, Any]]) -> list[str]:
    told = next((row["moe/verdict"] for row in reversed(rows) if row.get("moe/verdict")), [])
    return ["too early" if verdict is None else str(verdict) for verdict in told]
