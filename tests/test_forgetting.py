"""The negative controls of exact resume: forget any one piece of the state, and it becomes another run."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import STATEFUL, differences, dying_before, result
from tiny import tiny

import moe_lab.state
from moe_lab.checkpoint import Checkpoint, newest
from moe_lab.observe.verdict import Judge
from moe_lab.run import Run, Stop
from moe_lab.state import State
from moe_lab.train import train

# It dies after update 27: behind a checkpoint (21), a row (25) and an evaluation (20).
MOVING = (*STATEFUL, "steps=30", "log_every=5", "eval_every=10", "checkpoint.every=7")
# A router that never learns (a verdict from the first row) and leaves experts without tokens for a while.
DYING = (
    "router=topk",
    "router.k=1",
    "explore=[]",
    "balance=[]",
    "experts.num=64",
    "experts.capacity_factor=null",
)
FROZEN = (*MOVING, *DYING, "steps=140", "log_every=10", "eval_every=70", "checkpoint.every=61")
DIES = {MOVING: 28, FROZEN: 125}


@cache
def composed(words: tuple[str, ...]) -> dict[str, Any]:
    return tiny(*words)


def run(words: tuple[str, ...], folder: Path) -> dict[str, bytes]:
    train(copy.deepcopy(composed(words)), folder, [], {})
    return result(folder)


def die(words: tuple[str, ...], folder: Path) -> Path:
    with dying_before(DIES[words]):
        run(words, folder)
    return folder


Half = dict[tuple[str, ...], tuple[dict[str, bytes], Path]]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Half:
    """By config: what the whole run gives, and one that died half-way."""
    home = tmp_path_factory.mktemp("half")
    return {
        words: (run(words, home / f"whole{i}"), die(words, home / f"half{i}"))
        for i, words in enumerate([MOVING, FROZEN])
    }


def gone_on(words: tuple[str, ...], half: Half, to: Path) -> list[str]:
    """What differs from the whole run after going on."""
    whole, dead = half[words]
    return differences(run(words, shutil.copytree(dead, to / "run")), whole)


@pytest.mark.parametrize("words", [MOVING, FROZEN], ids=["moving", "frozen"])
def test_nothing_forgotten_nothing_changed(words: tuple[str, ...], half: Half, tmp_path: Path) -> None:
    assert gone_on(words, half, tmp_path) == []


def tensors(kind: str, ends: str) -> Callable[[Checkpoint], Checkpoint]:
    """Zeros in the place of the tensors of one kind whose name ends so."""

    def forget(found: Checkpoint) -> Checkpoint:
        held = getattr(found, kind)
        assert any(name.endswith(ends) and t.any() for name, t in held.items()), "nothing there to forget"
        return replace(found, **{kind: {n: torch.zeros_like(t) if n.endswith(ends) else t for n, t in held.items()}})

    return forget


def value(key: str, new: Callable[[Any], Any]) -> Callable[[Checkpoint], Checkpoint]:
    return lambda found: replace(found, values=found.values | {key: new(copy.deepcopy(found.values[key]))})


SUMS = ("counted", "domain", "kept", "position", "selected", "token", "top1", "by_sequence", "by_update", "entropy")
SUMS = (*SUMS, "flutter", "gate_mass", "importance", "logit_norm", "logsumexp", "loss", "pairs")
RUNNING = ("before", "centroid_count", "centroid_sum")
RECORDED = ["before", "recent.counts", "size", *(f"running.{n}" for n in RUNNING), *(f"sums.{n}" for n in SUMS)]
PIECES: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    **{f"model {name}": tensors("model", name) for name in ("weight", "w_in_EID", "gain_D", "embed", "bias_E")},
    **{f"optimizer {name}": tensors("optimizer", f".{name}") for name in ("exp_avg", "exp_avg_sq", "step")},
    **{f"recorder.{name}": tensors("state", f"recorder.{name}") for name in [*RECORDED, "recent.updates"]},
    "evaluator.choices": tensors("state", "evaluator.choices"),
    "sums": tensors("state", "sums"),
    "tokens": value("tokens", lambda n: 0),
    "last row": value("last_row", lambda n: 0),
}
IN_THE_FROZEN = ("recorder.recent.counts", "recorder.recent.updates")


@pytest.mark.parametrize("piece", PIECES)
def test_forgetting_one_piece_is_seen(piece: str, half: Half, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check that what was put comes back as it was; with it, see below."""
    put = State._put
    monkeypatch.setattr(State, "_put", lambda self, found: put(self, PIECES[piece](found)))
    monkeypatch.setattr(moe_lab.state, "difference", lambda one, other: None)
    words = FROZEN if piece in IN_THE_FROZEN else MOVING
    assert "metrics.jsonl" in gone_on(words, half, tmp_path)


def test_every_piece_has_its_control(half: Half) -> None:
    found = newest(half[MOVING][1] / "checkpoints")
    assert found is not None
    names = {f"recorder.{name}" for name in [*RECORDED, "recent.updates"]} | {"evaluator.choices", "sums"}
    assert set(found.state) == names
    assert {name.split(".")[-1] for name in found.optimizer} == {"exp_avg", "exp_avg_sq", "step"}


@pytest.mark.parametrize("piece", ["model bias_E", "optimizer step", "recorder.sums.loss", "tokens"])
def test_what_does_not_come_back_as_it_was_is_refused(
    piece: str, half: Half, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = State._put
    monkeypatch.setattr(State, "_put", lambda self, found: put(self, PIECES[piece](found)))
    with pytest.raises(Stop, match="does not fit this run") as stop:
        gone_on(MOVING, half, tmp_path)
    assert stop.value.code == 4


def test_forgetting_the_rows_of_the_judge_is_seen(half: Half, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    see = Judge.see
    replayed = [row["step"] for row in Run.rows(Run(half[FROZEN][1], {}, [], {}))]

    def forgetful(self: Judge, row: Any) -> list[str | None]:
        return see(self, row) if row["step"] not in replayed or row["step"] > 122 else []

    monkeypatch.setattr(Judge, "see", forgetful)
    assert {"metrics.jsonl", "summary.json"} <= set(gone_on(FROZEN, half, tmp_path))


def test_keeping_the_rows_beyond_the_checkpoint_is_seen(
    half: Half, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "rewind", lambda self, size: None)
    assert "metrics.jsonl" in gone_on(MOVING, half, tmp_path)
