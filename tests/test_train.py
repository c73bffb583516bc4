"""Whole runs: what is shared between two runs, stopping and going on, divergence, every option for two steps."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONF, tiny

from moe_lab import load
from moe_lab.assemble import assemble
from moe_lab.checkpoint import Checkpoint
from moe_lab.checkpoint import newest as find_newest
from moe_lab.cost import cost
from moe_lab.evaluate import Evaluator
from moe_lab.loop import Loop
from moe_lab.run import Stop
from moe_lab.train import train


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return train(tiny(*overrides), folder, list(overrides), {})


def newest(folder: Path) -> Checkpoint:
    found = find_newest(folder / "checkpoints")
    assert found is not None
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return newest(folder).model


def stop_after(update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send ourselves a SIGTERM in the middle of that update."""
    step = Loop.step

    def step_and_stop(self: Loop, at: int) -> None:
        if at + 1 == update:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, at)

    monkeypatch.setattr(Loop, "step", step_and_stop)


OTHERS = [
    f"{group}={path.stem}"
    for group in ("schedule", "objective", "optim")
    for path in sorted(Path(CONF, group).glob("*.yaml"))
]


@pytest.mark.parametrize("choice", OTHERS)
def test_every_preset_trains_two_steps(choice: str, tmp_path: Path) -> None:
    """Those of the methods: tests/test_methods.py."""
    summary = run(tmp_path, choice, "steps=2", "eval_every=2")
    assert summary["status"] == "completed"
    assert summary["loss"] > 0 and summary["eval"]["loss"] > 0
    rows = load(tmp_path).metrics
    assert [row["step"] for row in rows] == [1, 2]
    assert None not in rows[0]["moe/router_grad_ratio"]


@pytest.mark.parametrize("every", [1, 2])
def test_runs_that_differ_in_the_router_share_weights_and_batches(every: int) -> None:
    a, b = (
        assemble(tiny(f"router={name}", f"balance=[{balance}]"))
        for name, balance in [("topk", ""), ("gumbel_ste", "switch")]
    )
    theirs = dict(b.model.named_parameters())
    for name, p in a.model.named_parameters():
        assert torch.equal(p, theirs[name]), name
    for step in (0, 7, 1000):
        x, y = (parts.data.train_batch(parts.settings.seed, step, 4, 32) for parts in (a, b))
        assert torch.equal(x.ids, y.ids) and torch.equal(x.domain, y.domain)


DENSE_BACKWARD = ["router=gumbel_ste", "router.backward=dense"]


@pytest.mark.parametrize("router", [["router=topk"], ["router=dense"], DENSE_BACKWARD])
def test_dense_baseline_has_the_active_size_of_the_moe(router: list[str]) -> None:
    moe, dense = (
        cost(assemble(tiny(*router, "experts.shared_experts=1", f"model.moe={moe}"))) for moe in (True, False)
    )
    rows = 2 * 4 * 32  # of the routers: two layers, four rows of width 32
    assert dense["params"] == dense["active_params"] == moe["active_params"] - rows


def test_the_record_says_what_running_every_expert_costs(tmp_path: Path) -> None:
    selected, every = (cost(assemble(tiny(*router))) for router in (["router=gumbel_ste"], DENSE_BACKWARD))
    assert selected["executed_over_chosen"] == 1 and every["executed_over_chosen"] == 4
    for same in ("params", "active_params", "useful_flops_per_token"):
        assert every[same] == selected[same]
    expert = 3 * 32 * 32
    assert every["flops_per_token"] - selected["flops_per_token"] == 2 * 2 * 3 * expert  # two layers, three more each
    run(tmp_path, *DENSE_BACKWARD, "steps=2")
    for name in ("env.json", "summary.json"):
        assert json.loads((tmp_path / name).read_text())["cost"] == every


def test_dense_baseline_trains_and_has_no_moe_metrics(tmp_path: Path) -> None:
    summary = run(tmp_path, "model.moe=false", "steps=4")
    assert summary["verdicts"] == []
    assert not [key for row in load(tmp_path).metrics for key in row if key.startswith("moe/") and row[key]]


MOVING = [
    "router=sigmoid_topk",
    "explore=[gumbel]",
    "balance=[switch,loss_free]",
    "schedule=anneal",
    "optim.accumulate=2",
    "experts.capacity_factor=1.0",
]


TRYING = [
    "router=topk",
    "explore=[gaussian,jitter,dropout,reroute,expert_dropout,second_expert]",
    "explore.reroute.strength={curve: cosine, start: 0.5, end: 0}",
    "experts.capacity_factor={curve: linear, start: 0.5, end: 2}",
    *("experts.drop=probability", "allow_leak=true"),
    "optim.accumulate=2",
]


@pytest.mark.parametrize("overrides", [["router=gumbel_ste"], MOVING, TRYING, ["objective=mlm", "router=noisy_topk"]])
def test_stop_and_resume_equals_no_stop(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole", *overrides)
    stop_after(17, monkeypatch)  # between two rows, and at no checkpoint of its own
    with pytest.raises(Stop) as stop:
        run(tmp_path / "halves", *overrides)
    assert stop.value.code == 75 and "resume=" in stop.value.message
    assert load(tmp_path / "halves").status == "preempted"
    monkeypatch.undo()
    run(tmp_path / "halves", *overrides)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "halves/metrics.jsonl").read_bytes()
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_micro_batches_add_up(tmp_path: Path) -> None:
    """One update split in four has the same loss, gradient norm and counts, noise included."""
    rows = []
    for n in (1, 4):
        run(tmp_path / str(n), "router=gumbel_ste", "balance=[]", f"optim.accumulate={n}", "steps=5", "batch_size=8")
        rows.append(load(tmp_path / str(n)).metrics)
    for one, four in zip(*rows, strict=True):
        assert one["moe/selected"] == four["moe/selected"]
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(four[key], rel=1e-4)
        assert one["moe/load_cv"] == pytest.approx(four["moe/load_cv"], rel=1e-6)


def test_importance_loss_is_the_square_of_its_metric(tmp_path: Path) -> None:
    """Over a window of one update of one micro-batch: what is pushed is what is shown."""
    run(tmp_path, "router=topk", "balance=[importance]", "balance.importance.weight=1", "steps=3")
    for row in load(tmp_path).metrics:
        expected = sum(cv**2 for cv in row["moe/gate_mass_cv"]) / 2
        assert row["term/importance"] == pytest.approx(expected, rel=1e-4)


def test_liveness_looks_at_a_whole_batch() -> None:
    parts = assemble(tiny("batch_size=16", "eval_tokens=16"))
    assert Evaluator(parts)._probe().inputs.shape == (16, 32)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Loop._update
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}

    def poisoned(self: Loop, step: int) -> None:
        parameters = dict(self.parts.model.named_parameters())
        if step == 11:
            before.update({name: p.detach().clone() for name, p in parameters.items()})
            grad = parameters["embed"].grad
            assert grad is not None
            grad[0, 0] = float("nan")
        update(self, step)
        after.update(parameters)

    monkeypatch.setattr(Loop, "_update", poisoned)
    with pytest.raises(Stop) as stop:
        run(tmp_path, "checkpoint.every=5")
    assert stop.value.code == 3 and "update 12" in stop.value.message
    assert before and all(torch.equal(after[name], p) for name, p in before.items())
    assert load(tmp_path).status == "diverged"
    assert newest(tmp_path).step == 10
    assert json.loads((tmp_path / "status.json").read_text())["error"]


def test_a_finished_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, "steps=2")
    monkeypatch.setattr(Loop, "step", lambda *a: pytest.fail("trained again"))
    assert run(tmp_path, "steps=2") == first


def test_another_config_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    run(tmp_path, "steps=2")
    with pytest.raises(Stop) as stop:
        run(tmp_path, "steps=3")
    assert stop.value.code == 4


def test_fast_goes_through_every_path(tmp_path: Path) -> None:
    summary = run(tmp_path, "fast=true", "checkpoint.every=1")
    assert summary["steps"] == 6 and summary["eval"]["loss"] > 0
    assert [row["step"] for row in load(tmp_path).metrics if "eval/loss" in row] == [3, 6]
    assert newest(tmp_path).step == 6


def test_load_gives_model_config_and_metrics(tmp_path: Path) -> None:
    run(tmp_path, "steps=4", "eval_every=2")
    loaded = load(tmp_path)
    assert loaded.config["router"]["name"] == "gumbel_ste" and loaded.status == "completed"
    assert loaded.metrics[-1]["step"] == 4
    trained = weights(tmp_path)
    assert all(torch.equal(p, trained[name]) for name, p in loaded.model.named_parameters())
    out = loaded.predict(torch.zeros(2, 8, dtype=torch.int64))
    assert out.logits_BSV.shape == (2, 8, 64) and out.routings[0].probs_TE.shape == (16, 4)
    assert torch.equal(out.logits_BSV[0], out.logits_BSV[1])
    with pytest.raises(ValueError, match="no run directory"):
        load(tmp_path / "nothing")
