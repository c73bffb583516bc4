"""Nothing in an update makes the host wait for the device, whatever the router or loss: seen without a GPU.

The update runs on PyTorch's meta device, whose tensors have no values: an operation that asks for one (`item`,
`tolist`, `nonzero`, `unique`, `bincount`, a mask as index) fails by itself, and so does one that mixes devices.
waiting.py adds the copies that wait. Only the optimiser's own kernel is left out, which knows no meta device;
tests/test_gpu.py runs whole updates.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import CONF, loop, tiny
from torch import Tensor
from waiting import NoCopies, NoLists

from moe_lab.assemble import assemble
from moe_lab.loop import Loop
from moe_lab.routing import Routing

ROUTERS = sorted(path.stem for path in Path(CONF, "router").glob("*.yaml"))
BALANCERS = sorted(path.stem for path in Path(CONF, "balance").glob("*.yaml"))
NEEDS = {
    "load": "router=noisy_topk",
    "loss_free": "router=sigmoid_topk",
    "quantile": "router=sigmoid_topk",
    "l1_adaptive": "router=relu",
}
OTHERS = [
    ("router=topk", "router.k=3", "explore=[gaussian]"),
    ("router=switch", "explore=[gumbel]", "schedule=anneal"),
    ("router=topk", "explore=[gaussian,jitter,dropout,reroute,expert_dropout,second_expert]", "optim.accumulate=2"),
    (
        "router=topk",
        "explore=[router_dropout]",
        "experts.capacity_factor=1.25",
        "experts.drop=probability",
        "objective=mlm",
    ),
    ("router=softmax_ste", "router.backward=dense"),
    ("experts=mlp", "experts.capacity_factor=1.25", "experts.shared_experts=1"),
    ("experts.widths=[16,32]", "experts.granularity=2"),
    ("experts.zero_experts=1", "experts.copy_experts=1", "experts.constant_experts=2", "experts.init=upcycled"),
    ("objective=mlm", "optim.accumulate=2"),
    ("balance=[switch]", "balance.switch.scope=sequence"),
    ("balance=[switch]", "balance.switch.scope=global_batch", "optim.accumulate=2"),
    ("balance=[entropy]", "balance.entropy.of=mutual_information", "balance.entropy.scope=running"),
    ("router=sigmoid_topk", "balance=[loss_free]", "balance.loss_free.recentre=true", "balance.loss_free.freeze=0.5"),
    ("router=soft_moe", "router.causal=blocks", "router.block=8", "router.slots=2"),
    ("router=soft_moe", "router.causal=prefix"),
    ("router=expert_choice", "router.group=micro_batch", "objective=mlm"),
    ("model.moe=false",),
    ("model.moe_every=2", "optim.clip=null"),
]


@pytest.fixture(autouse=True)
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast, which the routers switch off, does not know the meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())


def two_steps(*overrides: str) -> Loop:
    """Two updates on the meta device, but for the optimiser's own kernel."""
    parts = assemble(tiny("device=cpu", "dtype=bfloat16", *overrides))
    parts.model.to("meta")
    trained = loop(replace(parts, device=torch.device("meta")))
    trained.optimizer.step = lambda *args: None  # pyright: ignore[reportAttributeAccessIssue]
    with NoCopies(), NoLists():
        trained.step(0)
        trained.step(1)
    return trained


@pytest.mark.parametrize("router", ROUTERS)
def test_no_router_waits(router: str) -> None:
    two_steps(f"router={router}", "allow_leak=true")


@pytest.mark.parametrize("balance", BALANCERS)
def test_no_balancer_waits(balance: str) -> None:
    two_steps(f"balance=[{balance}]", NEEDS.get(balance, "router=topk"))


@pytest.mark.parametrize("overrides", OTHERS, ids=" ".join)
def test_nothing_else_waits(overrides: tuple[str, ...]) -> None:
    two_steps(*overrides)


@pytest.mark.parametrize("router", ["topk", "dense"])
def test_a_row_is_one_transfer(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its metrics are computed on the device, and cross to the host together."""
    crossed: list[dict[str, Tensor]] = []
    monkeypatch.setattr("moe_lab.observe.recorder.to_host", lambda found: crossed.append(found) or {})
    trained = two_steps(f"router={router}")
    trained.recorder.row()
    trained.step(2)
    trained.recorder.row(evaluation=True)
    assert len(crossed) == 2 and len(crossed[0]) > 30
    assert all(t.device.type == "meta" for found in crossed for t in found.values())


def test_the_reference_backend_waits() -> None:
    """A product per expert needs the counts on the host; conf/experts says so."""
    with pytest.raises(NotImplementedError, match="no data"):
        two_steps("experts.backend=loop")


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "condition": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assigned mask": lambda x: x.detach().clone().__setitem__(x > 0, 1.0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.abs().long().flatten().bincount(minlength=4),
    "repeat_interleave": lambda x: x.repeat_interleave(x.abs().long()[:, 0], 0),
    "a number sent": lambda x: x * torch.tensor(2.0, device=x.device),
    "a list sent": lambda x: x.new_tensor([1.0, 2.0]),
    "a blocking copy": lambda x: torch.ones(2).to(x.device),
    "a blocking copy into": lambda x: x.detach().clone()[0].copy_(torch.ones(x.shape[1])),
    "a CPU index": lambda x: x[torch.zeros(2, dtype=torch.int64)],
    "two devices": lambda x: x + torch.ones(x.shape),
}


@pytest.mark.parametrize("wait", WAITS)
def test_each_kind_of_wait_is_caught(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the same update with one such operation in the balance loss, which is right on a CPU."""
    WAITS[wait](torch.ones(6, 4))

    def loss(self: object, routing: Routing, layer: object) -> Tensor:
        WAITS[wait](routing.logits_TE)
        return routing.logits_TE.mean()

    monkeypatch.setattr("moe_lab.balance.switch.Switch.loss", loss)
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        two_steps("router=topk", "balance=[switch]")
