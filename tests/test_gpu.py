"""The same code on a CUDA device. Skipped, and counted as skipped, where there is none.

fp32 is compared with the CPU number by number. In bf16 a token near a tie may be sent elsewhere, so that there only
losses and the direction of the gradient are compared.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_train import newest, stop_after
from tiny import CONF, loop, tiny
from torch import Tensor
from torch._dynamo import config as dynamo
from waiting import NoCopies, NoLists

from moe_lab import load
from moe_lab.assemble import assemble
from moe_lab.balance.base import Layer, mean_over_layers
from moe_lab.drawing import contexts, draw
from moe_lab.evaluate import Evaluator
from moe_lab.loop import Loop, forward
from moe_lab.model.transformer import Output
from moe_lab.parts import Parts, examples
from moe_lab.run import Stop
from moe_lab.train import train
from moe_lab.upkeep import Upkeep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product; for deterministic runs
DEVICE = "cuda"
ROUTERS = [(f"router={path.stem}", "allow_leak=true") for path in sorted(Path(CONF, "router").glob("*.yaml"))]
ROUTERS += [
    (f"router={name}", f"explore=[{noise}]")
    for name in ("topk", "switch", "sigmoid_topk")
    for noise in ("gaussian", "gumbel")
]
ROUTERS += [("router=soft_moe", "router.causal=blocks", "router.block=8"), ("router=soft_moe", "router.causal=prefix")]
ROUTERS += [("router=softmax_ste", "router.backward=dense"), ("experts=mlp", "experts.capacity_factor=1.0")]
ROUTERS += [
    ("router=topk", "experts.widths=[16,32]", "experts.granularity=2"),
    ("router=topk", "experts.zero_experts=1", "experts.copy_experts=1", "experts.constant_experts=2"),
]
BALANCERS = sorted(path.stem for path in Path(CONF, "balance").glob("*.yaml"))
NEEDS = {
    "load": "router=noisy_topk",
    "loss_free": "router=sigmoid_topk",
    "quantile": "router=sigmoid_topk",
    "l1_adaptive": "router=relu",
}
routers = pytest.mark.parametrize("router", ROUTERS, ids=" ".join)


def forward_of(*overrides: str) -> tuple[Parts, Output, Tensor]:
    """The first update's forward pass, with its noise, and its task loss."""
    parts = assemble(tiny(*overrides))
    raw = parts.data.train_batch(0, 0, 4, 32)
    batch = examples(parts, raw.ids, raw.domain, torch.Generator())
    drawn = draw(parts, 4 * 32, 0, "noise", 0, training=True)
    out, loss_T = forward(parts, batch, contexts(parts, parts.schedules.at(0, 10), batch, drawn, training=True))
    return parts, out, loss_T.mean()


def on_both(*overrides: str) -> Iterator[tuple[Parts, Output, Tensor]]:
    return (forward_of(f"device={device}", "dtype=float32", *overrides) for device in ("cpu", DEVICE))


def gradients(parts: Parts, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter, on the CPU; those that the loss does not reach are left out."""
    names, parameters = zip(*parts.model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {name: g.float().cpu() for name, g in zip(names, found, strict=True) if g is not None}


def on_gpu(*overrides: str) -> Loop:
    return loop(assemble(tiny(f"device={DEVICE}", *overrides)))


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error at whatever makes the host wait for the device, as far as torch knows; waiting.py knows more copies."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@routers
def test_cpu_and_gpu_agree_in_fp32(router: tuple[str, ...]) -> None:
    """Same weights, batch and noise: same choices, same loss, same gradient of every parameter."""
    (cpu, cpu_out, cpu_loss), (gpu, gpu_out, gpu_loss) = on_both(*router)
    for a, b in zip(cpu_out.routings, gpu_out.routings, strict=True):
        assert torch.equal(a.plan.selected_TK, b.plan.selected_TK.cpu())
        torch.testing.assert_close(a.probs_TE, b.probs_TE.cpu(), rtol=1e-4, atol=1e-6)
    assert cpu_loss.item() == pytest.approx(gpu_loss.item(), rel=1e-5)
    theirs = gradients(gpu, gpu_loss)
    for name, mine in gradients(cpu, cpu_loss).items():
        torch.testing.assert_close(mine, theirs[name], rtol=2e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@routers
def test_bf16_is_fp32_to_rounding(router: tuple[str, ...]) -> None:
    (cpu, _, cpu_loss), (gpu, gpu_out, gpu_loss) = (
        forward_of(*router, f"device={device}", f"dtype={dtype}")
        for device, dtype in (("cpu", "float32"), (DEVICE, "bfloat16"))
    )
    assert gpu_out.logits_BSV.dtype == torch.bfloat16
    assert all(r.logits_TE.dtype == r.probs_TE.dtype == torch.float32 for r in gpu_out.routings)
    assert cpu_loss.item() == pytest.approx(gpu_loss.item(), rel=2e-3)
    mine, theirs = (
        torch.cat([g.flatten() for g in gradients(*of).values()]) for of in ((cpu, cpu_loss), (gpu, gpu_loss))
    )
    assert F.cosine_similarity(mine, theirs, 0) > 0.95  # bf16 on a CPU: 0.986 and more


@pytest.mark.parametrize("name", BALANCERS)
def test_balancers_agree(name: str) -> None:
    """Each loss and its gradient, or the bias that is moved."""
    found: list[dict[str, Tensor]] = []
    for parts, out, _ in on_both(f"balance=[{name}]", NEEDS.get(name, "router=topk")):
        (balancer,) = parts.balancers.values()
        if balancer.weight is not None:
            drawn = draw(parts, 4 * 32, 0, "noise", 0, training=True)
            upkeep = Upkeep(parts.model.moes, parts.balancers)
            layers = upkeep.layers(name, 32, [d.balancers[name] for d in drawn])
            loss = mean_over_layers(balancer, out.routings, layers)
            found.append({"loss": loss.detach().cpu()} | gradients(parts, loss))
            continue
        for moe, routing in zip(parts.model.moes, out.routings, strict=True):
            layer = Layer(moe, 32)
            balancer.after_step(layer, balancer.statistics(routing, layer), 1.0, 0.0)
        found.append({str(i): moe.bias_E.cpu() for i, moe in enumerate(parts.model.moes)})
    assert found[0] and any(t.any() for t in found[0].values())
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=1e-6)


def test_a_row_agrees() -> None:
    """Every metric of the first update."""
    rows = []
    for device in ("cpu", DEVICE):
        trained = loop(assemble(tiny(f"device={device}", "dtype=float32", "optim.accumulate=2")))
        trained.step(0)
        rows.append(trained.row(1, 1))
    assert_alike(*rows)


@pytest.mark.parametrize("router", ["topk", "gumbel_ste", "dense"])
def test_evaluation_agrees(router: str) -> None:
    rows = []
    for device in ("cpu", DEVICE):
        parts = assemble(tiny(f"device={device}", "dtype=float32", f"router={router}"))
        rows.append(Evaluator(parts)(parts.schedules.at(0, 10)))
    assert_alike(*rows)


def assert_alike(mine: Any, theirs: Any, name: str = "row") -> None:
    """Nested rows, to the rounding of fp32."""
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert_alike(value, theirs[key], key)
    elif isinstance(mine, list):
        for a, b in zip(mine, theirs, strict=True):
            assert_alike(a, b, name)
    elif isinstance(mine, float):
        assert mine == pytest.approx(theirs, rel=2e-3, abs=1e-5), name
    else:
        assert mine == theirs, name


def test_waiting_is_an_error() -> None:
    """The negative control of the next one."""
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        torch.ones(1, device=DEVICE).item()
    with pytest.raises(AssertionError, match="page-locked"), NoCopies(pinned=True):
        torch.ones(1).to(DEVICE, non_blocking=True)


@routers
@pytest.mark.parametrize(
    "balance", ["switch,importance,z_loss,entropy,gshard,squared_load,kl_uniform,variance,seq_aux"]
)
def test_a_step_never_waits(router: tuple[str, ...], balance: str) -> None:
    """In bf16, where products of all experts are one call (SM90 and newer); after one step that warms up."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("grouped products wait for the counts on this device: needs SM90")
    trained = on_gpu(f"balance=[{balance}]", *router)
    trained.step(0)
    with no_waiting(), NoCopies(pinned=True), NoLists():
        trained.step(1)
        trained.step(2)


@pytest.mark.parametrize("balance", ["load", "loss_free", "quantile", "simbal", "erc", "orthogonal_experts"])
def test_the_other_balancers_never_wait(balance: str) -> None:
    test_a_step_never_waits((NEEDS.get(balance, "router=topk"), "objective=mlm", "optim.accumulate=2"), balance)


def test_a_run_in_bfloat16(tmp_path: Path) -> None:
    summary = train(tiny(f"device={DEVICE}", "steps=60", "optim.lr=1e-2"), tmp_path, [], {})
    assert summary["status"] == "completed"
    assert load(tmp_path).metrics[-1]["loss"] < load(tmp_path).metrics[0]["loss"]


def stopped_and_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run stopped after update 17 and resumed, and one that was never stopped."""
    cfg = tiny(f"device={DEVICE}", "router=noisy_topk", "balance=[importance,load]", "schedule=anneal")
    train(cfg, folder / "whole", [], {})
    stop_after(17, monkeypatch)
    with pytest.raises(Stop, match="resume="):
        train(cfg, folder / "halves", [], {})
    monkeypatch.undo()
    train(cfg, folder / "halves", [], {})
    return folder / "halves", folder / "whole"


@pytest.mark.usefixtures("deterministic")
def test_resume_is_exact_with_deterministic_algorithms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves, whole = stopped_and_whole(tmp_path, monkeypatch)
    assert (halves / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    mine, theirs = newest(halves).model, newest(whole).model
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_resume_is_close_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves, whole = (load(folder).metrics for folder in stopped_and_whole(tmp_path, monkeypatch))
    for a, b in zip(halves, whole, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)


def test_a_gradient_that_is_not_finite_is_never_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host hears of it at the next row; until then the device applies nothing more."""
    update, before, after = Loop._update, {}, {}

    def poisoned(self: Loop, step: int) -> None:
        parameters = dict(self.parts.model.named_parameters())
        if step == 11:
            before.update({name: p.detach().clone() for name, p in parameters.items()})
            parameters["embed"].grad[0, 0] = float("nan")  # pyright: ignore[reportOptionalSubscript]
        update(self, step)
        after.update(parameters)

    monkeypatch.setattr(Loop, "_update", poisoned)
    with pytest.raises(Stop, match="update 12") as stop:
        train(tiny(f"device={DEVICE}", "checkpoint.every=5"), tmp_path, [], {})
    assert stop.value.code == 3 and load(tmp_path).status == "diverged"
    assert before and all(torch.equal(after[name], p) for name, p in before.items())
    assert newest(tmp_path).step == 10


def test_no_memory_left_is_its_own_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Loop.step

    def starved(self: Loop, at: int) -> None:
        if at == 3:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1e-6)
        step(self, at)

    monkeypatch.setattr(Loop, "step", starved)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            train(tiny(f"device={DEVICE}", "batch_size=256"), tmp_path, [], {})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert load(tmp_path).status == "oom"


@pytest.mark.parametrize("router", ["topk", "gumbel_ste", "dense"])
def test_compiled_to_machine_code(router: str) -> None:
    """bf16: near the numbers of the plain model, one graph for all steps, and no waiting in it."""
    torch._dynamo.reset()
    overrides = (f"router={router}", "schedule=anneal")
    eager, compiled = on_gpu(*overrides), on_gpu(*overrides, "compile=true")
    with dynamo.patch(error_on_recompile=True):
        for each in (eager, compiled):
            each.step(0)
            with no_waiting():
                each.step(1)
                each.step(2)
    mine, theirs = (each.row(3, 3) for each in (compiled, eager))
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
    values = compiled.parts.schedules.at(2, 40)
    assert Evaluator(compiled.parts)(values)["eval/loss"] == pytest.approx(
        Evaluator(eager.parts)(values)["eval/loss"], rel=1e-2
    )
