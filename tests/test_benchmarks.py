"""The benchmarks run, on small sizes: what they print is nobody's measurement."""

from pathlib import Path

import pytest
import torch

from benchmarks import diagnostics, graph, harness, layer, memory, reinforce, sharing, startup, step

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="measures the GPU where there is one: make bench")
SMALL = ["model.dim=32", "model.layers=1", "experts.num=4", "seq_len=32", "dataset=clusters"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows and rounds; threads and the allocator are left as the tests have them."""
    for module in (layer, memory):
        monkeypatch.setattr(module, "T", 64)
        monkeypatch.setattr(module, "CASES", {("fp32", 4, 1): 1.0, ("bf16", 4, 2): None})
    for module in (layer, memory, step):
        monkeypatch.setattr(module, "single_thread", lambda: None)
    monkeypatch.setattr(layer, "ROUNDS", 2)
    monkeypatch.setattr(step, "WARM_UP", 1)
    monkeypatch.setattr(step, "MODEL", SMALL)
    monkeypatch.setattr(step, "COMMON", [*step.COMMON, *SMALL])


def test_layer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "CASES", {("fp32", 4, 1): 1.0, ("bf16", 4, 2): 1.0})
    layer.main()
    said = capsys.readouterr().out
    for row in (
        "dense",
        "moe-lab, bf16 weights",
        "Mixtral grouped_mm, autocast",
        "Mixtral eager",
        "st-moe",
        harness.AA,
    ):
        assert row in said


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    memory.main()
    assert "bf16 E=4 k=2" in capsys.readouterr().out


def test_step(capsys: pytest.CaptureFixture[str]) -> None:
    step.compare("small", {"moe": 1.0})
    said = capsys.readouterr().out
    assert "target 1:" in said and "moe: " in said and "tokens/s" in said and "MFU" not in said


def test_the_share_of_the_peak_is_told_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """989e12 / 1000 / 3 FLOPs per token at 100 tokens/s, three times for training, are a tenth of the peak."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    said = harness.throughput("moe", 200.0, 2.0, 989e12 / 1000 / 3)
    assert said == "  moe: 100 tokens/s, 98.900 TFLOP/s, 10.00% of 989 TFLOP/s (MFU)"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another card")
    assert "MFU" not in harness.throughput("moe", 200.0, 2.0, 1.0)


def test_diagnostics(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "ROUNDS", 2)
    diagnostics.compare("small", [], 100.0, 0.0)
    said = capsys.readouterr().out
    assert "blind" in said and "target 100 %: reached" in said and "target 0 %: NOT REACHED" in said


def test_startup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "ROUNDS", 2)
    monkeypatch.setattr(startup, "STEP", "moe-lab list")
    monkeypatch.setattr(startup, "WANDB", "moe-lab train --help")
    monkeypatch.setattr(startup, "COMMANDS", {"moe-lab list": 60.0, "moe-lab train --help": None})
    startup.main()
    assert "target 60 s: reached" in capsys.readouterr().out


def test_a_command_that_fails_is_not_timed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such command"):
        startup.command("moe-lab lst", str(tmp_path))


def test_sharing() -> None:
    overrides = [*SMALL, "logger=[]", "log_every=2"]
    assert all(rate > 0 and memory == 0 for rate, memory in sharing.together(2, 0.2, overrides))


def test_graph_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    graph.main()
    assert "needs a CUDA device" in capsys.readouterr().out


def test_reinforce(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few draws, but enough to see that no baseline biases the gradient, and that each saves variance."""
    monkeypatch.setattr(reinforce, "single_thread", lambda: None)
    monkeypatch.setattr(reinforce, "MODEL", [*reinforce.MODEL, "model.dim=16", "experts.num=4", "batch_size=4"])
    monkeypatch.setattr(reinforce, "DATA", ["dataset=clusters"])
    monkeypatch.setattr(reinforce, "AFTER", (5,))
    monkeypatch.setattr(reinforce, "DRAWS", 100)
    reinforce.main()
    rows = [line.rsplit(maxsplit=5) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")][1:]
    assert [row[0].strip() for row in rows] == ["none", "mean", "critic", "each token's expected loss"]
    shares = [float(row[2]) for row in rows]
    assert shares[0] == 1 and max(shares[1:3]) < 0.1 and shares[3] < min(shares[:3])
    assert all(float(bias) < 2 * float(error) for *_, bias, error in rows)
