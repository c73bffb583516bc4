"""Routers from conf/router and MoE layers small enough to check by hand.

Shapes: T tokens, D width, E experts, F hidden.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from moe_lab import seeding
from moe_lab.config import build, registered, schema
from moe_lab.model.moe import MoE
from moe_lab.routing import Context, Knobs, Plan, Router, Traits

CONF = Path(__file__).parents[1] / "conf"
AXES: dict[str, list] = {
    "k": [1, 2],
    "backward": ["selected", "dense"],
    "renormalise": [True, False],
    "gate": ["softmax", "sigmoid", "normalised_sigmoid"],
    "draw": ["fixed", "fresh"],
    "p": [0.9],  # top_p: more than one expert for most tokens
    "r": [2.0],  # sparsemixer: most experts are near the best one
}


def preset(group: str, name: str, **changes: Any) -> dict[str, Any]:
    """A preset's node, as the file says it, with changes."""
    node = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    assert set(changes) <= set(node), f"{group}={name} has no {set(changes) - set(node)}"
    return node | changes


def router_cases(more: Mapping[str, list[Any]] = MappingProxyType({})) -> list[Any]:
    """Every preset in conf/router with k=1 and 2, and each other axis that it has moved by itself (AXES and more of a
    test's own); `topk` under every combination, for all that share its options. A new router is picked up."""
    cases = []
    for file in sorted((CONF / "router").glob("*.yaml")):
        node = preset("router", file.stem)
        axes = {name: values for name, values in {**AXES, **more}.items() if name in node}
        for changes in combinations(axes, whole=file.stem == "topk"):
            if not fits("router", node | changes):
                continue
            label = "-".join([file.stem, *(f"{name}={value}" for name, value in changes.items())])
            cases.append(pytest.param(node | changes, id=label))
    return cases


def combinations(axes: dict[str, list[Any]], whole: bool) -> list[dict[str, Any]]:
    """Of values of the axes: all, or all of k with the first of each other, and with one other moved."""
    every = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    first = {name: values[0] for name, values in axes.items()}
    return [c for c in every if whole or sum(c[name] != first[name] for name in axes if name != "k") <= 1]


def traits(node: dict[str, Any], E: int) -> Traits:
    """What the router of a node promises."""
    return registered("router")[node["name"]].traits(node, E)


def fits(group: str, node: dict[str, Any]) -> bool:
    """Whether the option takes these values: BASE has no k=2."""
    try:
        schema(registered(group)[node["name"]]).model_validate({k: v for k, v in node.items() if k != "name"})
    except ValidationError:
        return False
    return True


def fill(module: nn.Module, *key: int | str) -> None:
    """Every parameter N(0, 1 / its fan-in), also those that start at zero in training."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim < 2:  # gains and temperatures
                p.fill_(1.0)
                continue
            inputs_last = name.endswith(("_ED", "_XD", "_LD", "_EL", "_PD", "_KD"))
            fan_in = p.shape[-1 if inputs_last else -2]
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


def underway(moe: MoE) -> MoE:
    """The layer as after some updates: before the first, what its router keeps of the experts' outputs is zero."""
    if moe.router.wants_outputs:
        mean_ED = moe.router.get_buffer("mean_ED")
        mean_ED.copy_(randn(*mean_ED.shape, key=("means",)))
    return moe


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


def told(router: Router, T: int, *key: int | str, training: bool = True) -> dict[str, Any]:
    """What the loop tells a router beside its tokens: noise and draws (in evaluation only what asks for it), ids."""
    E = router.num_experts
    shapes = {"TE": (T, E), "TD": (T, router.dim), "T": (T,), "E": (E,)}
    draws = {
        name: seeding.noise(wanted.kind, shapes[wanted.shape], "test", *key, name)
        for name, wanted in router.draws.items()
        if training or wanted.evaluate
    }
    noise_TE = draw(router, T, *key) if training else None
    return {"noise_TE": noise_TE, "draws": draws, "ids_T": torch.arange(T), "seq_len": T, "training": training}


def dense_weights(plan: Plan) -> Tensor:
    """Combine weights as a matrix [T, E], 0 where a token does not use an expert."""
    like = plan.importance_E()
    rows_N1 = plan.gather(like.new_zeros(plan.selected_TK.shape[0], 1))
    number_N = torch.arange(len(rows_N1), device=like.device)
    expert_N = torch.searchsorted(plan.counts_E.cumsum(0), number_N, right=True)  # E: rows of no expert
    return plan.combine(F.one_hot(expert_N, plan.num_experts + 1)[:, :-1].to(like.dtype))


def each_expert(moe: MoE) -> list[Callable[[Tensor], Tensor]]:
    """Its swiglu experts as functions of one row [D]."""

    def run(w_ID: Tensor, w_FD: Tensor) -> Callable[[Tensor], Tensor]:
        gate_FD, up_FD = w_ID.chunk(2)
        return lambda x_D: (F.silu(gate_FD @ x_D) * (up_FD @ x_D)) @ w_FD

    return [run(w_ID, w_FD) for w_ID, w_FD in zip(moe.experts.w_in_EID, moe.experts.w_out_EFD, strict=True)]


def same_gradients(moe: MoE, x_TD: Tensor, y_TD: Tensor, oracle_TD: Tensor) -> None:
    """Two outputs made of the same parameters and tokens: their values and all gradients of a random projection."""
    torch.testing.assert_close(y_TD, oracle_TD, rtol=1e-9, atol=1e-11)
    c_TD, leaves = randn(*y_TD.shape, key=("c",)), [x_TD, *moe.parameters()]
    got, expected = (torch.autograd.grad((out * c_TD).sum(), leaves, allow_unused=True) for out in (y_TD, oracle_TD))
    for mine, other in zip(got, expected, strict=True):
        assert other is not None and other.any(), "nothing to compare"
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


def norm(gradients: Any) -> float:
    """Euclidean norm of a group of gradients together."""
    return sum(float(g.double().square().sum()) for g in gradients) ** 0.5


def grad(p: Tensor) -> Tensor:
    """The gradient of a parameter that must have got one."""
    assert p.grad is not None
    return p.grad
