"""A MoE layer, forward and backward, against a dense feed-forward network of the same active FLOPs.

Dropless, top-k of a softmax, SwiGLU; weights fp32, cast to the compute dtype inside the timed region unless a row says
otherwise. Peers: transformers' Mixtral block (the same maths: outputs and gradients are compared before anything is
timed) and st-moe-pytorch (GEGLU, a capacity that drops: not the same maths, told with the share of rows it computes).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import interleave, single_thread, table
from moe_lab.config import build
from moe_lab.model.experts import FeedForward, SwiGLU
from moe_lab.model.moe import MoE
from moe_lab.routing import Context, Knobs
from moe_lab.seeding import initialise

T, D, F = 4096, 256, 512
CASES = {  # E, k, and the most that the ratio to dense may be
    ("fp32", 8, 1): 1.10,
    ("fp32", 32, 2): 1.18,
    ("fp32", 64, 1): 1.35,
    ("bf16", 8, 1): 1.35,
    ("bf16", 32, 2): 1.55,
    ("bf16", 64, 1): 2.3,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def our_layer(E: int, k: int, backend: str = "auto") -> MoE:
    router = build("router", {"name": "topk", "k": k, "renormalise": k > 1, "noise": "none", "noise_std": 1.0}, D, E)
    experts = {"name": "swiglu", "num": E, "width": F, "shared_experts": 0, "capacity_factor": None, "backend": backend}
    layer = MoE(router, build("experts", experts, D, 1), 1)
    initialise(layer, 0)
    return layer


def plain_context() -> Context:
    return Context(Knobs(torch.ones(()), torch.ones(())))


def trained(module: torch.nn.Module, forward: Callable[[Tensor], Tensor], x_TD: Tensor, dy_TD: Tensor):
    """One forward and backward with fresh gradients, as in training."""

    def call() -> Tensor:
        module.zero_grad(set_to_none=True)
        x = x_TD.detach().requires_grad_()
        y = forward(x)
        y.backward(dy_TD)
        assert x.grad is not None
        return x.grad

    return call


def main() -> None:
    single_thread()
    for (name, E, k), target in CASES.items():
        dtype = DTYPES[name]
        g = torch.Generator().manual_seed(0)
        x_TD, dy_TD = (torch.randn(T, D, generator=g).to(dtype) for _ in range(2))
        dense = FeedForward(D, k * F, SwiGLU, 1)
        initialise(dense, 0)
        moe, ctx = our_layer(E, k), plain_context()
        calls = {
            "dense": trained(dense, dense, x_TD, dy_TD),
            "moe": trained(moe, lambda x, m=moe, c=ctx: m(x, c)[0], x_TD, dy_TD),
        }
        table(f"{name} E={E} k={k}", interleave(calls, "dense"), {"moe": target})


if __name__ == "__main__":
    main()
