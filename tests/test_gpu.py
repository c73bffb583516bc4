"""The same code on a CUDA device. Skipped, and counted as skipped, where there is none."""

from pathlib import Path

import pytest
import torch
from tiny import CONF, tiny

from moe_lab import load
from moe_lab.assemble import assemble
from moe_lab.loop import contexts, draw_noise, examples, forward
from moe_lab.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROUTERS = sorted(path.stem for path in Path(CONF, "router").glob("*.yaml"))


@pytest.mark.parametrize("router", ROUTERS)
def test_cpu_and_gpu_agree_in_fp32(router: str) -> None:
    """Same weights, batch and noise: same choices, same loss, same gradient of the router."""
    losses, gradients, choices = [], [], []
    for device in ("cpu", "cuda"):
        parts = assemble(tiny(f"router={router}", f"device={device}", "dtype=float32"))
        raw = parts.data.train_batch(0, 0, 4, 32)
        batch = examples(parts, raw.ids, raw.domain, torch.Generator())
        noise = draw_noise(parts, 4 * 32, 0, "noise", 0)
        out, loss_T = forward(parts, batch, contexts(parts, parts.schedules.at(0, 10), noise))
        loss_T.mean().backward()
        losses.append(loss_T.mean().item())
        grad = next(parts.model.moes[0].router.parameters()).grad
        assert grad is not None
        gradients.append(grad.cpu())
        choices.append(torch.stack([r.plan.selected_E for r in out.routings]).cpu())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert torch.equal(*choices)
    torch.testing.assert_close(*gradients, rtol=2e-3, atol=1e-6)


def test_a_run_in_bfloat16(tmp_path: Path) -> None:
    summary = train(tiny("device=cuda", "steps=20"), tmp_path, [], {})
    assert summary["status"] == "completed"
    assert load(tmp_path).metrics[-1]["loss"] < load(tmp_path).metrics[0]["loss"]
