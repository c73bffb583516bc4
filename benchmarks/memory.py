"""Bytes that the expert layer keeps for its backward pass, parameters apart, against the dense layer."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import device, goal, single_thread
from benchmarks.layer import DTYPES, D, F, T, our_forward, our_layer
from moe_lab.model.experts import FeedForward, SwiGLU
from moe_lab.seeding import initialise

CASES = {("fp32", 8, 1): 1.25, ("bf16", 8, 1): 1.4, ("fp32", 64, 1): None, ("bf16", 64, 1): None,
         ("fp32", 32, 2): None, ("bf16", 32, 2): None}  # fmt: skip


def kept(module: torch.nn.Module, forward: Callable[[Tensor], Tensor], x_TD: Tensor) -> int:
    """Bytes of the distinct storages that autograd saves during `forward`, without those of parameters."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward(x_TD.detach().requires_grad_())
    del y
    return sum(saved.values())


def main() -> None:
    single_thread()
    for (name, E, k), target in CASES.items():
        x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(0)).to(device(), DTYPES[name])
        layer, dense = our_layer(E, k), FeedForward(D, k * F, SwiGLU, 1)
        initialise(dense, 0)
        dense.to(device())
        moe_bytes, dense_bytes = kept(layer, our_forward(layer), x_TD), kept(dense, dense, x_TD)
        ratio = moe_bytes / dense_bytes
        line = f"  {name} E={E} k={k}: {moe_bytes / 2**20:.1f} MiB, dense {dense_bytes / 2**20:.1f} MiB, {ratio:.3f}"
        print(line + (goal(ratio, target) if target else ""))


if __name__ == "__main__":
    main()
