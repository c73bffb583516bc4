"""Explorers in the loop: by position, in training alone, on their schedule, and in every row.

Shapes: T tokens, E experts.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from exploring import EXPLORERS
from tiny import tiny

from moe_lab import load
from moe_lab.assemble import assemble
from moe_lab.drawing import contexts, draw, strength
from moe_lab.evaluate import Evaluator
from moe_lab.loop import forward, knobs
from moe_lab.parts import examples
from moe_lab.schedules import Values
from moe_lab.train import train

LOUD = {"jitter": 0.9, "gaussian": 3, "gumbel": 3, "second_expert": 3}
each_explorer = pytest.mark.parametrize("name", EXPLORERS)


def at_work(name: str, *overrides: str) -> dict[str, Any]:
    """A run of a live top-2 router with one explorer, loud."""
    loud = f"explore.{name}.strength={LOUD.get(name, 0.6)}"
    return tiny("router=topk", "balance=[]", f"explore=[{name}]", loud, *overrides)


def rows(cfg: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    train(cfg, folder, [], {})
    return load(folder).metrics


@each_explorer
def test_evaluation_is_free_of_it_and_training_is_not(name: str):
    parts, plain = assemble(at_work(name)), assemble(tiny("router=topk", "balance=[]"))
    values = parts.schedules.at(0, 40)
    first, again, without = (Evaluator(p)(values) for p in (parts, parts, plain))
    evaluated = [key for key in first if key.startswith("eval/")]
    assert len(evaluated) > 20 and all(first[key] == again[key] == without[key] for key in evaluated)
    raw = parts.data.train_batch(0, 0, 4, 32)
    batch = examples(parts, raw.ids, raw.domain, torch.Generator())
    outs = []
    for training in (True, False):
        drawn = draw(parts, batch.inputs.numel(), 0, "noise", 0, training=training)
        with torch.no_grad():
            layers = contexts(parts, values, batch, drawn, training=training)
            outs.append(forward(parts, batch, layers)[0].logits_BSV)
        assert all(bool(d.explorers) == training for d in drawn)
    assert not torch.equal(*outs)


@pytest.mark.parametrize("experts", [4, 256])
@each_explorer
def test_micro_batches_add_up(name: str, experts: int, tmp_path: Path):
    """One update split in four: the same choices, loss and gradient norm, also where as many experts as tokens make a
    draw per expert look like one per token."""
    narrow = ("steps=3", "batch_size=8", f"experts.num={experts}", "experts.width=8")
    cfgs = [at_work(name, *narrow, f"optim.accumulate={n}") for n in (1, 4)]
    for one, four in zip(*(rows(cfg, tmp_path / str(i)) for i, cfg in enumerate(cfgs)), strict=True):
        assert one["moe/selected"] == four["moe/selected"]
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(four[key], rel=1e-4)


def test_each_update_and_layer_draws_its_own_and_runs_share_them():
    """Layers, updates, seeds and explorers differ; a run with other explorers beside draws the same."""
    one = assemble(tiny("router=topk", "explore=[expert_dropout,reroute]"))
    other = assemble(tiny("router=switch", "explore=[reroute,jitter]"))
    drawn = [draw(one, 128, seed, "noise", step, training=True) for seed, step in ((0, 0), (0, 1), (1, 0))]
    reroutes = [d.explorers[1]["experts"] for layers in drawn for d in layers]
    assert len({tuple(t.flatten().tolist()) for t in reroutes}) == len(reroutes) == 6
    shapes = {name: tuple(t.shape) for name, t in drawn[0][0].explorers[1].items()}
    assert shapes == {"tokens": (128,), "experts": (128, 4)} and drawn[0][0].explorers[0]["experts"].shape == (4,)
    again = draw(other, 128, 0, "noise", 0, training=True)
    assert all(torch.equal(again[i].explorers[0]["experts"], drawn[0][i].explorers[1]["experts"]) for i in range(2))


def test_strengths_and_capacity_follow_their_curves_and_stand_in_the_rows(tmp_path: Path):
    """Reroute fades from 1 to 0 over five updates and schedule.noise multiplies it; the capacity grows from 0.5 to 2.
    With all tokens at random and few places, many are dropped at first and none at the end."""
    cfg = tiny(
        *("router=topk", "balance=[]", "steps=5", "log_every=1", "eval_every=5", "explore=[reroute,jitter]"),
        *("explore.reroute.strength={curve: linear, start: 1, end: 0}", "schedule.noise=0.5"),
        "experts.capacity_factor={curve: linear, start: 0.5, end: 4}",
    )
    found = rows(cfg, tmp_path)
    assert [row["knob/reroute"] for row in found] == pytest.approx([0.5, 0.375, 0.25, 0.125, 0])
    assert [row["knob/jitter"] for row in found] == pytest.approx([0.005] * 5)
    assert [row["knob/capacity_factor"] for row in found] == pytest.approx([0.5, 1.375, 2.25, 3.125, 4])
    dropped = [row["moe/dropped_fraction/mean"] for row in found]
    assert dropped[0] >= 0.5 and dropped[-1] == 0 and found[-1]["eval/moe/dropped_fraction/mean"] == 0
    assert not any("progress" in key for key in found[0])


def test_no_explorers_no_knobs():
    parts = assemble(tiny("router=topk"))
    values = Values(temperature=0.7, noise=2.0, balance=1.0, bias_rate=1.0, progress=0.5)
    assert knobs(parts, values) == {"temperature": 0.7, "noise": 2.0, "balance": 1.0, "bias_rate": 1.0}
    parts = assemble(tiny("router=topk", "explore=[dropout]", "experts.capacity_factor=1.25"))
    assert knobs(parts, values).keys() >= {"dropout", "capacity_factor"}
    assert strength(parts.explorers["dropout"], values) == pytest.approx(0.2)


@each_explorer
def test_bf16_and_a_selection_bias(name: str, tmp_path: Path):
    cfg = at_work(name, "dtype=bfloat16", "steps=4", "eval_every=4", "router=sigmoid_topk")
    cfg["balance"] = {"loss_free": {"name": "loss_free", "rate": 0.01, "update": "sign"}}
    last = rows(cfg, tmp_path)[-1]
    assert last["loss"] < 5 and last["grad_norm"] > 0 and last["eval/loss"] > 0
