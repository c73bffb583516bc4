"""A run in which everything has state, and what must be the same after it was stopped and has gone on."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import moe_lab, tree

from moe_lab.loop import Loop

# Gumbel noise, a selection bias, micro-batches, dropped rows, annealed knobs; rows, evaluations and checkpoints that
# do not fall together.
STATEFUL = (
    *("dataset=clusters", "dataset.tokens=4000", "dataset.domains=2", "logger=[]", "model.dim=16", "model.heads=2"),
    *("model.layers=2", "experts.num=4", "experts.width=16", "experts.capacity_factor=1.0", "router=sigmoid_topk"),
    *("explore=[gumbel]", "balance=[switch,loss_free]", "schedule=anneal", "optim.accumulate=2", "batch_size=4"),
    *("seq_len=16", "eval_tokens=128"),
)
CLOCKS = ("wall_s",)


def result(folder: Path) -> dict[str, bytes]:
    """What a run leaves and no clock made: rows, summary, and every file of its last checkpoint, by name."""
    last = max((folder / "checkpoints").glob("step-*"))
    found = {f"{last.name}/{path.name}": path.read_bytes() for path in last.iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    found["summary.json"] = json.dumps({k: v for k, v in summary.items() if k not in CLOCKS}).encode()
    return found | {"metrics.jsonl": (folder / "metrics.jsonl").read_bytes()}


def differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def assert_same_run(folder: Path, undisturbed: dict[str, bytes], keep: int = 2) -> None:
    """Rows, summary and last checkpoint to the byte; nothing left lying about; clocks for each row; whole."""
    assert differences(result(folder), undisturbed) == []
    assert [path for path in tree(folder) if ".tmp." in path] == []
    assert len(list((folder / "checkpoints").iterdir())) == keep
    steps, clocks = ([row["step"] for row in rows(folder / f"{name}.jsonl")] for name in ("metrics", "timing"))
    elapsed = [row["elapsed"] for row in rows(folder / "timing.jsonl")]
    assert clocks == steps and elapsed == sorted(elapsed)
    said = moe_lab("verify", str(folder))
    assert said.code == 0, said.out


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def dying_before(update: int) -> Iterator[None]:
    """A run in here dies before it makes that update, counted from 1."""
    step = Loop.step

    def dying(self: Loop, at: int) -> None:
        if at + 1 == update:
            raise KeyboardInterrupt
        step(self, at)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "step", dying)
        yield
