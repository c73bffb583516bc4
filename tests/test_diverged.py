"""A loss that is not finite ends the run before the update, with exit code 3, and never becomes a checkpoint."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Said, moe_lab
from runs import STATEFUL, rows

from moe_lab.checkpoint import load_checkpoint, unsound
from moe_lab.evaluate import Evaluator
from moe_lab.loop import Loop

SHAPE = ("steps=12", "log_every=4", "eval_every=6", "checkpoint.every=2")


def run(folder: Path, *words: str) -> Said:
    return moe_lab("train", *STATEFUL, *SHAPE, *words, f"hydra.run.dir={folder}")


def checkpoints(folder: Path) -> Iterator[int]:
    """Their steps, once each was seen to be finite."""
    for path in sorted(folder.glob("checkpoints/step-*")):
        found = load_checkpoint(path)
        assert unsound(found) is None
        yield found.step


def diverged(folder: Path, said: Said, why: str) -> list[int]:
    """The steps of the checkpoints of a run that ended as it should."""
    assert said.code == 3
    (line,) = [line for line in said.err.splitlines() if not line.startswith("WARNING: ")]
    assert line.startswith("moe-lab: diverged: ") and why in line and line.endswith("Try a smaller optim.lr"), line
    status, summary = (json.loads((folder / name).read_text()) for name in ("status.json", "summary.json"))
    assert status["status"] == summary["status"] == "diverged"
    assert line == f"moe-lab: {status['error']}" == f"moe-lab: {summary['error']}"
    assert None not in [row["loss"] for row in rows(folder / "metrics.jsonl")]
    assert moe_lab("verify", str(folder)).code == 0
    found = list(checkpoints(folder))
    assert all(step <= status["step"] for step in found)
    return found


def poison(monkeypatch: pytest.MonkeyPatch, update: int, value: float) -> None:
    """The loss of one update, and nothing of its gradient."""
    import moe_lab.loop as loop

    step, forward, now = Loop.step, loop.forward, [0]

    def counted(self: Loop, at: int) -> None:
        now[0] = at + 1
        step(self, at)
        now[0] = 0

    def poisoned(*args: Any) -> Any:
        out, loss_T = forward(*args)
        return out, loss_T + value if now[0] == update else loss_T

    monkeypatch.setattr(Loop, "step", counted)
    monkeypatch.setattr(loop, "forward", poisoned)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_learning_rate_that_explodes(accumulate: int, tmp_path: Path) -> None:
    words = ("optim.lr=1e30", f"optim.accumulate={accumulate}")
    said = run(tmp_path / "run", *words)
    diverged(tmp_path / "run", said, "that update was not applied")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_though_its_gradient_is(
    value: float, accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}
    update = Loop._update

    def watched(self: Loop, step: int) -> None:
        if step + 1 == 7:
            before.update({name: p.detach().clone() for name, p in self.parts.model.named_parameters()})
        update(self, step)
        after.update(self.parts.model.named_parameters())

    monkeypatch.setattr(Loop, "_update", watched)
    poison(monkeypatch, 7, value)
    said = run(tmp_path / "run", f"optim.accumulate={accumulate}")
    assert diverged(tmp_path / "run", said, "update 7 ") == [4, 6]
    assert before and all(torch.equal(after[name], p) for name, p in before.items())


def test_resume_goes_on_and_diverges_again_at_the_same_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a config may change at resume, so it can help only where the cause lay outside."""
    with monkeypatch.context() as patch:
        poison(patch, 7, float("nan"))
        first = run(tmp_path / "run")
        written = (tmp_path / "run/metrics.jsonl").read_bytes()
        again = moe_lab("train", f"resume={tmp_path / 'run'}")
        assert again.err == first.err and diverged(tmp_path / "run", again, "update 7 ") == [4, 6]
        assert (tmp_path / "run/metrics.jsonl").read_bytes() == written
    assert moe_lab("train", f"resume={tmp_path / 'run'}").code == 0
    assert run(tmp_path / "whole").code == 0
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("at, kept", [(6, [2, 4]), (12, [8, 10])])
def test_an_evaluation_that_is_not_finite(
    at: int, kept: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Evaluator.__call__
    monkeypatch.setattr(
        Evaluator,
        "__call__",
        lambda self, values: evaluate(self, values) | ({"eval/loss": float("nan")} if next(calls) == at else {}),
    )
    calls = iter([6, 12])
    said = run(tmp_path / "run")
    assert diverged(tmp_path / "run", said, f"after update {at}, the loss of the evaluation is not finite") == kept


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path: Path) -> None:
    """The last update breaks them, and there is no validation that would see it."""
    said = run(
        tmp_path / "run", "optim.lr=1e39", "optim.clip=null", "steps=1", "dataset.tokens=20", "dataset.domains=1"
    )
    assert diverged(tmp_path / "run", said, "after update 1, model.safetensors: ") == []
