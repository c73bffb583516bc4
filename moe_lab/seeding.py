"""Randomness by position: every random number is a function of a key such as (seed, "noise", step, layer).

No generator is carried along, so nothing has to be saved for a run to resume exactly, and two runs that differ
in one part share every number of the others.
"""

import hashlib
import math

import torch
from torch import nn


def generator(*key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator seeded by a hash of `key`; equal keys give equal streams on the same device type."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))


def parameter(*shape: int, std: float | torch.Tensor, alike: float | None = None) -> nn.Parameter:
    """A parameter that `initialise` will fill with N(0, std^2); infinite std stands for ones (norm gains).

    alike: the slices of the first dimension start from one draw, plus independent ones of `alike` times the size.
    """
    p = nn.Parameter(torch.empty(shape))
    p.init_std, p.init_alike = std, alike  # pyright: ignore[reportAttributeAccessIssue]
    return p


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Fill every parameter from (seed, its name): equal names start equal, whatever else the model holds."""
    for name, p in module.named_parameters():
        std: float | torch.Tensor = p.init_std  # pyright: ignore[reportAttributeAccessIssue]
        alike: float | None = p.init_alike  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(std, float) and not 0 < std < math.inf:
            p.fill_(1.0 if std else 0.0)
            continue
        draw = torch.randn(p.shape, generator=generator(seed, "init", name))
        if alike is not None:
            draw = torch.randn(p.shape[1:], generator=generator(seed, "init", name, "alike")) + alike * draw
        p.copy_(draw * std)


def noise(kind: str, shape: tuple[int, ...], *key: int | str) -> torch.Tensor:
    """Standard draws, fp32 on the CPU (so that devices agree): `gaussian` N(0, 1), `gumbel` -log(Exp(1)) or `uniform`
    in [0, 1)."""
    g = generator(*key)
    if kind == "uniform":
        return torch.rand(shape, generator=g)
    if kind == "gaussian":
        return torch.randn(shape, generator=g)
    assert kind == "gumbel", kind
    # Some builds draw an exact 0 now and then, whose Gumbel would be infinite.
    return -torch.empty(shape).exponential_(generator=g).clamp_min_(torch.finfo(torch.float32).tiny).log()
