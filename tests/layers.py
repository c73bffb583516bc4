"""Routers from conf/router and MoE layers small enough to check by hand.

Shapes: T tokens, D width, E experts, F hidden.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from moe_lab import seeding
from moe_lab.config import build
from moe_lab.model.moe import MoE
from moe_lab.routing import Context, Knobs, Plan, Router

CONF = Path(__file__).parents[1] / "conf"
AXES: dict[str, list] = {
    "k": [1, 2],
    "backward": ["selected", "dense"],
    "renormalise": [True, False],
}


def preset(group: str, name: str, **changes: Any) -> dict[str, Any]:
    """A preset's node, as the file says it, with changes."""
    node = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    assert set(changes) <= set(node), f"{group}={name} has no {set(changes) - set(node)}"
    return node | changes


def router_cases() -> list[Any]:
    """Every preset in conf/router under every combination of the axes that it has: a new router is picked up."""
    cases = []
    for file in sorted((CONF / "router").glob("*.yaml")):
        node = preset("router", file.stem)
        axes = {name: values for name, values in AXES.items() if name in node}
        for values in itertools.product(*axes.values()):
            changes = dict(zip(axes, values, strict=True))
            label = "-".join([file.stem, *(f"{name}={value}" for name, value in changes.items())])
            cases.append(pytest.param(node | changes, id=label))
    return cases


def frozen(node: dict[str, Any]) -> bool:
    """Whether the weight is 1 whatever the logits: one expert, renormalised."""
    return node["k"] == 1 and (node.get("renormalise", False) or node["name"] == "noisy_topk")


def fill(module: nn.Module, *key: int | str) -> None:
    """Every parameter N(0, 1 / its fan-in), also those that start at zero in training."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            fan_in = p.shape[-1] if name.endswith("_ED") else p.shape[-2]
            p.copy_(randn(*p.shape, key=(*key, name)) * fan_in**-0.5)


def randn(*shape: int, key: tuple[int | str, ...] = ()) -> Tensor:
    return torch.randn(shape, generator=seeding.generator("test", *key), dtype=torch.float64)


def make_router(node: dict[str, Any], D: int, E: int, dtype: torch.dtype = torch.float64) -> Router:
    router: Router = build("router", node, D, E)
    fill(router, "router")
    router = router.to(dtype)
    if router.data_dependent_init:
        router.init_from(randn(4 * E, D, key=("start",)).to(dtype))
    return router


def make_moe(
    router: dict[str, Any], D: int, E: int, experts: str = "swiglu", dtype: torch.dtype = torch.float64, **changes: Any
) -> MoE:
    bank = build("experts", preset("experts", experts, num=E, **changes), D, 2)
    moe = MoE(make_router(router, D, E), bank, 2)
    fill(moe.experts, "experts")
    if moe.shared is not None:
        fill(moe.shared, "shared")
    return moe.to(dtype)


def context(
    noise_TE: Tensor | None = None,
    bias_E: Tensor | None = None,
    temperature: float = 1.0,
    noise: float = 1.0,
    hard: int | None = None,
    capacity: float | None = None,
    **more: Any,
) -> Context:
    limit = None if capacity is None else torch.tensor(capacity)
    return Context(Knobs(torch.tensor(temperature), torch.tensor(noise), limit), noise_TE, bias_E, hard, **more)


def draw(router: Router, T: int, *key: int | str) -> Tensor | None:
    """Noise as the loop draws it: of the router's own distribution, None where it has none."""
    return None if router.noise == "none" else seeding.noise(router.noise, (T, router.num_experts), "test", *key)


def dense_weights(plan: Plan) -> Tensor:
    """Combine weights as a matrix [T, E], 0 where a token does not use an expert."""
    like = plan.importance_E()
    rows_N1 = plan.gather(like.new_zeros(plan.selected_TK.shape[0], 1))
    number_N = torch.arange(len(rows_N1), device=like.device)
    expert_N = torch.searchsorted(plan.counts_E.cumsum(0), number_N, right=True)  # E: rows of no expert
    return plan.combine(F.one_hot(expert_N, plan.num_experts + 1)[:, :-1].to(like.dtype))


def norm(gradients: Any) -> float:
    """Euclidean norm of a group of gradients together."""
    return sum(float(g.double().square().sum()) for g in gradients) ** 0.5


def grad(p: Tensor) -> Tensor:
    """The gradient of a parameter that must have got one."""
    assert p.grad is not None
    return p.grad
