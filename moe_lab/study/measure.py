"""One number of a run: a metric of its rows, reduced over steps, layers and experts; and how near balance it can see.

Shapes: L layers, E experts, k chosen per token, T tokens of a row.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from moe_lab.recorded import Recorded
from moe_lab.study.files import Reduce
from moe_lab.wording import nearest

Number = float | int | None

OVER: dict[str, Callable[[list[float]], float]] = {
    "max": max,
    "mean": statistics.fmean,
    "min": min,
    "std": statistics.pstdev,  # as in load_cv: these experts are all there are
}
LARGEST = 1e150  # its square is a number
BALANCED = {"0": 0.0, "1": 1.0}  # what a declaration says of balance, where that is one number

RUN = {"loss", "loss_total", "ppl", "grad_norm", "lr"}
RUN |= {
    "eval/" + name for name in ("loss", "ppl", "loss_top1", "loss_topk", "ppl_top1", "ppl_topk", "unigram", "bigram")
}
NO_METRICS = {"step", "tokens", "window", "eval/tokens", "moe/verdict"}  # they stand in the rows
OF_THE_CONFIG = ("term/", "knob/")  # which of these there are depends on what was chosen


def value(run: Recorded, metric: str, reduce: Reduce) -> float | None:
    """Mean of the metric over those rows that hold it in the range of steps; None where it is undefined in all.

    A layer, an expert or a row on which a metric is undefined is left out.
    """
    found = _over("mean", [one(row[metric], reduce) for row in rows_in(run, metric, reduce.steps)])
    if found is not None and abs(found) > LARGEST:
        raise ValueError(f"{metric} is {found:.3g}")
    return found


@dataclass(frozen=True)
class Floor:
    """What a router that chooses at random shows: so far from the value at balance, in the metric's own units."""

    balanced: float
    size: float


def floor(run: Recorded, metric: str, reduce: Reduce) -> Floor | None:
    """The metric's sampling floor at the tokens, experts and choices of those rows; None where it is not known.

    From the metric's declaration, of the layer where it is largest, mean over the rows. Where the rows hold a floor of
    their own (nmi_domain_floor), it is that. Floors of [L][E] values are unknown.
    """
    prefix, moe, name = metric.rpartition("moe/")
    name, prefix = name.split("/")[0], prefix + moe
    if not moe or name not in _metrics():
        return None
    found = [_measured(row, prefix, name) or _declared(row, prefix, name) for row in rows_in(run, metric, reduce.steps)]
    there = [f for f in found if f is not None]
    return Floor(there[-1].balanced, statistics.fmean(f.size for f in there)) if there else None


def _measured(row: dict[str, Any], prefix: str, name: str) -> Floor | None:
    size = one(row.get(f"{prefix}{name}_floor"), Reduce(layers="max"))
    return None if size is None else Floor(0.0, size)


def _declared(row: dict[str, Any], prefix: str, name: str) -> Floor | None:
    """From floor_at, with the row's own T, E and k; k is rounded down where it varies, which makes the floor larger."""
    metric, counts_LE, k_L = _metrics()[name], row.get(f"{prefix}selected"), row.get(f"{prefix}experts_per_token")
    if metric.floor_at is None or not counts_LE or not k_L or len(counts_LE[0]) == 1:
        return None
    E = len(counts_LE[0])
    balanced = E if metric.balanced == "E" else BALANCED.get(metric.balanced, 0.0)
    shown = [
        metric.floor_at(round(sum(c_E) / k), E, max(1, int(k))) for c_E, k in zip(counts_LE, k_L, strict=True) if k
    ]
    return Floor(balanced, max(abs(x - balanced) for x in shown)) if shown else None


def rows_in(run: Recorded, metric: str, steps: str) -> Iterator[dict[str, Any]]:
    """The rows that hold the metric: the last, those of the last fifth of the steps, of the first 100, or all."""
    rows = [row for row in run.rows if metric in row]
    if steps == "last":
        yield from rows[-1:]
    first = 0.8 * run.rows[-1]["step"] if steps == "last_20_percent" and rows else 0
    last = 100 if steps == "first_100" else float("inf")
    yield from (row for row in rows if steps != "last" and first < row["step"] <= last)


def one(found: Any, reduce: Reduce) -> float | None:
    """A scalar, [L] or [L][E] as one number: experts first, then layers."""
    if not isinstance(found, list):
        return found
    return _over(reduce.layers, [_over(reduce.experts, v) if isinstance(v, list) else v for v in found])


def _over(how: str, numbers: list[Number]) -> float | None:
    defined = [number for number in numbers if number is not None]
    return OVER[how](defined) if defined else None


def holds(run: Recorded) -> set[str]:
    """The metrics in a run's rows."""
    return {key for row in run.rows for key in row} - NO_METRICS


def known(metric: str) -> bool:
    """Whether a run can hold it, as far as that can be said before one has."""
    return metric in names() or metric.startswith(OF_THE_CONFIG)


def refused(metrics: list[str]) -> list[str]:
    """Why no claim can be made of some of these: a line for each that no run holds, or that is no number."""
    return [line for m in dict.fromkeys(metrics) if (line := matrix(m) if known(m) else unknown(m))]


def matrix(metric: str) -> str | None:
    """The line that says that a metric is one of pairs, which reduces to no number."""
    declared = _metrics().get(metric.rpartition("moe/")[2])
    if declared is None or declared.shape not in ("LEE", "LEC"):
        return None
    return f"{metric}: a matrix per layer; a claim is about a metric of layers or of experts (docs/metrics.md)"


def unknown(metric: str, there: set[str] | None = None) -> str:
    """The line that says so, with the nearest name."""
    return f"{metric}: no such metric{nearest(metric, there or names())}; docs/metrics.md tells what there is"


def names() -> set[str]:
    """Every metric that some run holds, but for those that depend on what was chosen."""
    found = set(RUN)
    for name, metric in _metrics().items():
        prefixes = {"row": ("moe/", "eval/moe/"), "evaluation": ("eval/moe/",)}.get(metric.when, ("moe/",))
        ends = [""] + (["/mean"] if metric.shape == "L" else []) + (["/worst"] if metric.worst else [])
        found |= {f"{prefix}{name}{end}" for prefix in prefixes for end in ends}
    return found


def _metrics() -> dict[str, Any]:
    """The declarations; they stand beside their formulas, so that torch comes with them."""
    from moe_lab.observe import confidence, dynamics, geometry, load, specialisation  # noqa: F401 (they declare)
    from moe_lab.observe.metric import METRICS

    return METRICS
