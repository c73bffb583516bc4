"""A MoE layer, forward and backward, against a dense feed-forward network of the same active FLOPs.

Top-k of a softmax with renormalised weights (Mixtral), dropless, SwiGLU. Weights are fp32 and cast to the compute dtype
inside the timed region, unless a row says bf16 weights. Beside it transformers' Mixtral block, whose output and
gradients are compared with ours before anything is timed, and st-moe-pytorch: no parity there, it drops tokens beyond
its capacity and its experts are GEGLU, so that its time is for less work. On a GPU: bf16 and 16,384 tokens, no targets.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import device, interleave, single_thread, table
from moe_lab.config import build
from moe_lab.model.experts import FeedForward, SwiGLU
from moe_lab.model.moe import MoE
from moe_lab.routing import Context, Knobs
from moe_lab.seeding import initialise

T, GPU_T, D, F = 4096, 16_384, 256, 512
CASES = {  # dtype, E, k: the most that the ratio to dense may be
    ("fp32", 8, 1): 1.10,
    ("fp32", 32, 2): 1.18,
    ("fp32", 64, 1): 1.35,
    ("bf16", 8, 1): 1.35,
    ("bf16", 32, 2): 1.55,
    ("bf16", 64, 1): 2.3,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 7
REPEATS = {"cpu": 1, "cuda": 20}  # calls per round
Call = Callable[[], Tensor]


def our_layer(E: int, k: int) -> MoE:
    router = {"name": "topk", "k": k, "renormalise": True}
    experts = {"name": "swiglu", "num": E, "width": F, "shared_experts": 0, "capacity_factor": None, "backend": "auto"}
    layer = MoE(build("router", router, D, E), build("experts", experts, D, 1), 1)
    initialise(layer, 0)
    return layer.to(device())


def step(module: nn.Module, forward: Callable[[Tensor], Tensor], x_TD: Tensor, dy_TD: Tensor) -> Call:
    """One forward and backward with fresh gradients, as in training; gives the gradient of x."""

    def call() -> Tensor:
        module.zero_grad(set_to_none=True)
        x = x_TD.detach().requires_grad_()
        forward(x).backward(dy_TD)
        assert x.grad is not None
        return x.grad

    return call


def our_forward(layer: MoE) -> Callable[[Tensor], Tensor]:
    one = torch.ones((), device=device())
    context = Context(Knobs(one, one))
    return lambda x_TD: layer(x_TD, context)[0]


def ours(layer: MoE, x_TD: Tensor, dy_TD: Tensor) -> Call:
    return step(layer, our_forward(layer), x_TD, dy_TD)


def mixtral(layer: MoE, k: int, way: str) -> Any:
    """transformers' block with our weights; `way` is how it runs its experts."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=layer.experts.num, num_experts_per_tok=k
    )
    config._experts_implementation = way
    block: Any = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight_ED)
        block.experts.gate_up_proj.copy_(layer.experts.w_in_EID)
        block.experts.down_proj.copy_(layer.experts.w_out_EFD.transpose(1, 2))
    return block.to(device())


def peers(layer: MoE, k: int, dtype: torch.dtype, x_TD: Tensor, dy_TD: Tensor) -> dict[str, Call]:
    """Other implementations on the same input, by name."""
    found = {}
    for way in ("grouped_mm", "eager"):
        block = mixtral(layer, k, way)
        if dtype == torch.float32:
            found[f"Mixtral {way}"] = step(block, lambda x, b=block: b(x[None])[0], x_TD, dy_TD)
            continue
        found[f"Mixtral {way}, autocast"] = step(block, autocast(lambda x, b=block: b(x[None])[0]), x_TD, dy_TD)
        cast = mixtral(layer, k, way).to(dtype)
        found[f"Mixtral {way}, bf16 weights"] = step(cast, lambda x, b=cast: b(x[None])[0], x_TD, dy_TD)
    if k > 1:  # its gate takes two experts at least
        found["st-moe (drops)"] = st_moe(layer.experts.num, k, x_TD, dy_TD)
    return found


def st_moe(E: int, k: int, x_TD: Tensor, dy_TD: Tensor) -> Call:
    from st_moe_pytorch.st_moe_pytorch import MoE as StMoE

    # Its hidden width is 2/3 of dim * mult: the same parameters per expert as ours.
    block = StMoE(D, num_experts=E, expert_hidden_mult=3 * F // (2 * D), gating_top_n=k).to(device())

    def run(x_TD: Tensor) -> Tensor:
        return block(x_TD.view(8, -1, D)).outputs.view(-1, D)

    return step(block, autocast(run) if x_TD.dtype == torch.bfloat16 else run, x_TD, dy_TD)


def autocast(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return forward(x).to(x.dtype)

    return call


def check_parity(layer: MoE, k: int, x_TD: Tensor, dy_TD: Tensor) -> None:
    """Our gradients of x and of the input weights are the Mixtral block's; in fp32, before any of both is timed."""
    x_TD, dy_TD = x_TD.float(), dy_TD.float()
    block = mixtral(layer, k, "eager")
    grad_x, theirs_x = ours(layer, x_TD, dy_TD)(), step(block, lambda x: block(x[None])[0], x_TD, dy_TD)()
    pairs = {
        "x": (grad_x, theirs_x),
        "w_in": (layer.experts.w_in_EID.grad, block.experts.gate_up_proj.grad),
        "y": (our_forward(layer)(x_TD), block(x_TD[None])[0]),
    }
    for name, (mine, theirs) in pairs.items():
        assert mine is not None
        error = (mine - theirs).abs().max() / theirs.abs().max()
        if error > 1e-4:
            raise SystemExit(f"not the same maths: {name} is off by {error:.1e}")


def main() -> None:
    single_thread()
    gpu = device().type == "cuda"
    for (name, E, k), target in CASES.items():
        if not gpu or name == "bf16":
            compare(name, E, k, GPU_T if gpu else T, {} if gpu else {"moe-lab": target})


def compare(name: str, E: int, k: int, tokens: int, targets: dict[str, float]) -> None:
    dtype = DTYPES[name]
    g = torch.Generator().manual_seed(0)
    x_TD, dy_TD = (torch.randn(tokens, D, generator=g).to(device(), dtype) for _ in range(2))
    layer, dense = our_layer(E, k), FeedForward(D, k * F, SwiGLU, 1)
    initialise(dense, 0)
    dense.to(device())
    check_parity(layer, k, x_TD, dy_TD)
    calls = {"dense": step(dense, dense, x_TD, dy_TD), "moe-lab": ours(layer, x_TD, dy_TD)}
    if dtype == torch.bfloat16:
        cast = our_layer(E, k)
        cast.experts.to(dtype)
        calls["moe-lab, bf16 weights"] = ours(cast, x_TD, dy_TD)
    timings = interleave(calls | peers(layer, k, dtype, x_TD, dy_TD), "dense", ROUNDS, REPEATS[device().type])
    table(f"{name} E={E} k={k}, {tokens:,} tokens", timings, targets)


if __name__ == "__main__":
    main()
