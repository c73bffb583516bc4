"""Every router as a MoE layer, forward and backward, against what its own FLOPs cost through the grouped backend.

The reference runs the same experts on as many rows, by expert as the router chose, already sorted: no router, no
gather, no combine. `router alone` is scores, choice, plan and their gradient, as a share of the whole layer. T=4096,
d=256, E=8, SwiGLU of 512, one thread; random numbers are drawn beforehand, as the loop does. Score-based routers have
targets; what looks across tokens, solves an assignment or depends on the data is labelled.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import device, goal, interleave, single_thread
from benchmarks.matrix import preset
from moe_lab import seeding
from moe_lab.config import build, registered
from moe_lab.model.moe import MoE
from moe_lab.routing import Context, Knobs, Router
from moe_lab.seeding import initialise

CONF = Path(__file__).parents[1] / "conf"
T, S, D, E, F = 4096, 512, 256, 8, 512
DTYPES = {"fp32": (torch.float32, 0.08), "bf16": (torch.bfloat16, 0.15)}  # and the most that the router's share may be
MOST = 1.15
ROUNDS = 7
VARIANTS = {
    "softmax_ste": [{}, {"backward": "dense"}],
    "gumbel_ste": [{}, {"backward": "dense"}],
    "soft_moe": [{}, {"causal": "blocks"}, {"causal": "prefix"}],
    "sparsemixer": [{}, {"version": "v1"}],
    "random": [{}, {"draw": "fresh"}],
    "topk": [{}, {"gate": "sigmoid"}, {"scoring": "mlp"}],
}


def nodes() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted((CONF / "router").glob("*.yaml")):
        node = preset("router", file.stem)
        for changes in VARIANTS.get(file.stem, [{}]):
            yield " ".join([file.stem, *(f"{k}={v}" for k, v in changes.items())]), node | changes


def layer_of(node: Mapping[str, Any]) -> MoE:
    experts = preset("experts", "swiglu") | {"num": E, "width": F}
    layer = MoE(build("router", node, D, E), build("experts", experts, D, 1), 1)
    initialise(layer, 0)
    return layer.to(device())


def context_of(router: Router) -> Context:
    """As in training, everything drawn."""
    one = torch.ones((), device=device())
    sizes = {"TE": (T, E), "TD": (T, D), "T": (T,), "E": (E,)}
    draws = {n: seeding.noise(d.kind, sizes[d.shape], "draw", n).to(device()) for n, d in router.draws.items()}
    noise_TE = None if router.noise == "none" else seeding.noise(router.noise, (T, E), "noise").to(device())
    ids_T = torch.randint(256, (T,), generator=seeding.generator("ids")).to(device())
    strengths = {name: one * curve.at(0.0) for name, curve in router.curves.items()}
    known = {"seq_len": S, "ids_T": ids_T, "draws": draws, "strengths": strengths, "training": True}
    return Context(Knobs(one, one), noise_TE=noise_TE, **known)


def calls(layer: MoE, x_TD: Tensor, dy_TD: Tensor) -> dict[str, Any]:
    """The layer, its experts alone on as many sorted rows, and its router alone; each forward and backward."""
    ctx = context_of(layer.router)
    if layer.router.data_dependent_init:
        layer.router.init_from(x_TD.float())
    plan = layer.router(x_TD, ctx).plan
    rows_ND, counts_E = plan.gather(x_TD).detach(), plan.counts_E
    rows_ND = rows_ND[: int(counts_E.sum())]  # those that are computed
    dy_ND = torch.randn(rows_ND.shape, generator=seeding.generator("dy")).to(rows_ND)

    def whole() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x_TD.detach().requires_grad_(), ctx)[0].backward(dy_TD)

    def experts() -> None:
        layer.zero_grad(set_to_none=True)
        layer.experts(rows_ND.detach().requires_grad_(), counts_E).backward(dy_ND)

    def router() -> None:
        layer.zero_grad(set_to_none=True)
        found = layer.router(x_TD.detach().requires_grad_(), ctx).plan
        mass = found.importance_E().square().sum() + found.counts_E.sum()
        if mass.requires_grad:
            mass.backward()

    return {"experts": experts, "layer": whole, "router": router}


def label(node: Mapping[str, Any]) -> str:
    """Why a router has no target, or nothing."""
    cls = registered("router")[node["name"]]
    traits = cls.traits(node, E)
    by = "by the data" if cls.ragged else "by the sequence's length"
    across = [] if traits.causal and traits.batch_independent else ["looks across tokens"]
    return ", ".join(across + [by] * (traits.flops is None) + ["every expert runs"] * bool((traits.flops or 0) > 1))


def main() -> None:
    single_thread()
    width = max(len(name) for name, _ in nodes())
    for dtype_name, (dtype, most_share) in DTYPES.items():
        if device().type == "cuda" and dtype_name == "fp32":
            continue
        g = torch.Generator().manual_seed(0)
        x_TD, dy_TD = (torch.randn(T, D, generator=g).to(device(), dtype) for _ in range(2))
        print(
            f"\n{dtype_name}, {T} tokens, E={E}: layer over its experts alone [quartiles], router alone over the layer"
        )
        for name, node in nodes():
            found = {t.name: t for t in interleave(calls(layer_of(node), x_TD, dy_TD), "experts", ROUNDS)}
            whole, router = found["layer"], found["router"]
            share = router.seconds / whole.seconds
            line = f"  {name:<{width}}  {whole.seconds * 1e3:8.2f} ms  {whole.ratio:6.3f}  "
            line += f"[{whole.low:.3f}, {whole.high:.3f}]  {share:5.1%}  A/A {found['A/A'].ratio:.3f}"
            why = label(node)
            own = goal(share, most_share).replace(f"{most_share:g}", f"{most_share:.0%}")
            print(line + (f"  ({why})" if why else f"{goal(whole.ratio, MOST)},{own.replace('  ', ' ')}"), flush=True)


if __name__ == "__main__":
    main()
