"""What a metric is: a number with its formula, its range, and what it says at balance, at collapse and by chance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

When = Literal["row", "training", "evaluation", "liveness", "balancer"]
Shape = Literal["L", "LE", "LEE", "LEC"]
Number = float | int | None

MOST_EXPERTS = 64  # in a matrix of a row: with more, a row would be megabytes and a picture of it unreadable

METRICS: dict[str, "Metric"] = {}


@dataclass(frozen=True)
class Metric:
    """A declaration. T tokens, E experts, k chosen per token; entropies in nats before they are normalised.

    shape: "L" one number per MoE layer, "LE" one per layer and expert, "LEE" one per layer and pair of experts, "LEC"
    one per layer, expert and domain.
    low, high: the range. balanced, collapsed: the value where all experts get the same, and where the same k of them
    get every token. floor: what a router that picks k of E at random, independently of everything, shows on T tokens
    on average; nothing nearer to balance than this is signal. floor_at(T, E, k) computes it where a formula exists.
    worst: which direction over layers is the bad one, None where neither is.
    """

    name: str
    topic: str
    shape: Shape
    formula: str
    low: str
    high: str
    balanced: str
    collapsed: str
    floor: str
    reads: str
    source: str = ""
    worst: Literal["max", "min"] | None = None
    floor_at: Callable[[int, int, int], float] | None = None
    when: When = "row"


def declare(
    name: str,
    topic: str,
    formula: str,
    *,
    span: tuple[str, str],
    balanced: str,
    collapsed: str,
    reads: str,
    floor: str = "-",
    shape: Shape = "L",
    worst: Literal["max", "min"] | None = None,
    source: str = "",
    floor_at: Callable[[int, int, int], float] | None = None,
    when: When = "row",
) -> Metric:
    """Put a metric on record, next to its formula."""
    assert name not in METRICS, name
    low, high = span
    METRICS[name] = Metric(
        name, topic, shape, formula, low, high, balanced, collapsed, floor, reads, source, worst, floor_at, when
    )
    return METRICS[name]


def over_layers(metric: Metric, values_L: list[Number]) -> dict[str, Number]:
    """`mean` and, where one direction is bad, `worst` over the layers on which the metric is defined."""
    defined = [v for v in values_L if v is not None]
    found: dict[str, Number] = {"mean": sum(defined) / len(defined) if defined else None}
    if metric.worst is not None:
        pick = max if metric.worst == "max" else min
        found["worst"] = pick(defined) if defined else None
    return found
