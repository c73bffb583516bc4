"""What each arm of a study costs, so that arms are compared at equal cost, or a difference is labelled with its reason.

And what a sweep will take, from a few measured steps of each arm (--dry-run).
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from moe_lab.settings import quick

QUANTITIES = {"active_params": "active parameters", "flops_per_token": "FLOPs per token", "tokens": "tokens"}
TOLERANCE = 0.02  # of the largest arm


def of_config(cfg: dict[str, Any]) -> dict[str, float]:
    """What a job costs. It builds the model without its weights, and needs torch: for a process of its own."""
    import torch

    from moe_lab.assemble import bare_model, prepare
    from moe_lab.config import build
    from moe_lab.cost import cost_of_model

    cfg = quick(cfg) if cfg["fast"] else cfg
    data, objective = prepare(cfg), build("objective", cfg["objective"])
    with torch.device("meta"):
        model = bare_model(cfg, data.vocab_size, objective)
    found = cost_of_model(model, cfg["seq_len"])
    told = {name: float(found[name]) for name in ("active_params", "flops_per_token")}
    return told | {"tokens": float(cfg["steps"] * cfg["batch_size"] * cfg["seq_len"])}


def of_configs(cfgs: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [of_config(cfg) for cfg in cfgs]


def lines(costs: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """A line for each arm."""
    width = max(len(arm) for arm in costs)
    for arm, cost in costs.items():
        told = ", ".join(f"{cost[name]:,.0f} {words}" for name, words in QUANTITIES.items())
        yield f"{arm:<{width}}  {told}"


def mismatches(costs: Mapping[str, Mapping[str, float]], labelled: Collection[str]) -> Iterator[str]:
    """A line for each quantity in which arms differ by more than the tolerance and that no label explains. What a
    wider grid makes of the arms is held together point by point: `steps=5,6` was asked to differ."""
    points: dict[str, dict[str, Mapping[str, float]]] = {}
    for arm, cost in costs.items():
        points.setdefault(arm.partition(" ")[2], {})[arm] = cost
    for name, words in QUANTITIES.items():
        for at_point in points.values():
            by_arm = {arm: cost[name] for arm, cost in at_point.items()}
            least, most = min(by_arm, key=by_arm.__getitem__), max(by_arm, key=by_arm.__getitem__)
            if name not in labelled and by_arm[least] < (1 - TOLERANCE) * by_arm[most]:
                differ = f"{least} has {by_arm[least]:,.0f}, {most} has {by_arm[most]:,.0f}"
                yield f"the arms differ in {words}: {differ}; make them equal, or say why in study.unequal.{name}"
