"""The optimiser against torch.optim.AdamW, to the bit, and its learning rate against torch's schedulers."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from moe_lab.optim import AdamW
from moe_lab.seeding import generator

NAMES = ("matrix", "stack", "gain", "late")


def model() -> nn.ParameterDict:
    g = generator(0, "model")
    shapes = {"matrix": (7, 5), "stack": (3, 5, 2), "gain": (5,), "late": (4, 4)}
    return nn.ParameterDict({name: nn.Parameter(torch.randn(shape, generator=g)) for name, shape in shapes.items()})


def gradients(module: nn.ParameterDict, step: int) -> None:
    """`late` has none before update 2."""
    for name in NAMES:
        g = generator(step, "gradient", name)
        module[name].grad = None if name == "late" and step < 2 else torch.randn(module[name].shape, generator=g)


def skipped(step: int) -> Tensor:
    return torch.tensor(float(step == 3))


def theirs(options: AdamW, steps: int) -> tuple[nn.ParameterDict, torch.optim.AdamW]:
    module = model()
    groups = [
        {"params": [p for p in module.values() if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in module.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=options.betas, fused=True)
    for step in range(steps):
        gradients(module, step)
        for group in optimizer.param_groups:
            group["lr"] = options.rate(step, steps)
        optimizer.found_inf = skipped(step)  # pyright: ignore[reportAttributeAccessIssue] (read by fused AdamW)
        optimizer.step()
    return module, optimizer


@pytest.mark.parametrize("resumed_at", [None, 2, 5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_updates_and_moments_are_those_of_torch(weight_decay: float, resumed_at: int | None) -> None:
    options, steps = AdamW(lr=0.1, beta2=0.99, weight_decay=weight_decay), 8
    module = model()
    optimizer = options.build(module)
    for step in range(steps):
        if step == resumed_at:
            state = {name: t.clone() for name, t in optimizer.state().items()}
            optimizer = options.build(module)
            optimizer.load_state(state)
        gradients(module, step)
        optimizer.step(options.rate(step, steps), skipped(step))
        optimizer.zero_grad()
        assert all(p.grad is None for p in module.values())
    other, expected = theirs(options, steps)
    mine = optimizer.state()
    assert len(mine) == 3 * len(NAMES) and mine["gain.step"] == 7 and mine["late.step"] == 5
    for name in NAMES:
        assert torch.equal(module[name], other[name]) and not torch.equal(module[name], model()[name]), name
        for key, t in expected.state[other[name]].items():
            assert torch.equal(mine[f"{name}.{key}"], t), (name, key)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.05), (2, 0.9), (10, 0.0), (400, 0.05), (33, 0.5)])
def test_the_rate_is_that_of_torchs_schedulers(steps: int, warmup: float) -> None:
    options = AdamW(lr=0.02, warmup=warmup, final_lr=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=options.lr)
    warm = max(1, round(warmup * steps))
    rise = LinearLR(optimizer, start_factor=1 / (warm + 1), total_iters=warm)
    fall = CosineAnnealingLR(optimizer, T_max=max(1, steps - warm), eta_min=options.lr * options.final_lr)
    scheduler = SequentialLR(optimizer, [rise, fall], milestones=[warm])
    for step in range(steps):
        assert options.rate(step, steps) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12), step
        optimizer.step()
        scheduler.step()
