"""What a run directory survives, and what it refuses rather than mixing two runs."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import moe_lab
from tiny import tiny

from moe_lab import load
from moe_lab.loop import Loop
from moe_lab.run import Run, Stop
from moe_lab.train import train

SMALL = ["steps=40", "checkpoint.every=10", "log_every=10"]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return train(tiny(*SMALL, *overrides), folder, list(overrides), {})


def fail_at(update: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Loop.step

    def failing(self: Loop, at: int) -> None:
        if at + 1 == update:
            raise error
        step(self, at)

    monkeypatch.setattr(Loop, "step", failing)


@pytest.fixture
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that died after update 24, with checkpoints at 10 and 20."""
    with monkeypatch.context() as patch:
        fail_at(25, RuntimeError("power cut"), patch)
        with pytest.raises(RuntimeError):
            run(tmp_path / "half")
    return tmp_path / "half"


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


@pytest.mark.parametrize("claimed", [0, 24])
def test_a_dead_run_is_not_continued_under_another_config(half: Path, claimed: int) -> None:
    """kill -9 leaves whatever step the status last said; what counts is what lies in the directory."""
    (half / "status.json").write_text(json.dumps(status(half) | {"status": "running", "step": claimed}))
    before = (half / "config.yaml").read_bytes(), (half / "metrics.jsonl").read_bytes(), status(half)
    with pytest.raises(Stop, match="another config") as stop:
        run(half, "optim.lr=0.0001")
    assert stop.value.code == 4
    assert before == ((half / "config.yaml").read_bytes(), (half / "metrics.jsonl").read_bytes(), status(half))


def test_damaged_checkpoints_fall_back_and_then_refuse(half: Path, tmp_path: Path) -> None:
    def flip(step: int) -> None:
        path = half / f"checkpoints/step-{step:08d}/model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    whole = tmp_path / "whole"
    run(whole)
    both = shutil.copytree(half, tmp_path / "both")
    flip(20)
    run(half)
    assert (half / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    half = both
    flip(10)
    flip(20)
    rows, said = (both / "metrics.jsonl").read_bytes(), status(both)
    with pytest.raises(Stop, match="every checkpoint is damaged") as stop:
        run(both)
    assert stop.value.code == 4
    assert (both / "metrics.jsonl").read_bytes() == rows and status(both) == said


def test_missing_rows_are_refused_not_padded(half: Path) -> None:
    (half / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(Stop, match="rows are missing"):
        run(half)
    assert (half / "metrics.jsonl").read_bytes() == b""


def test_torn_clocks_do_not_stop_a_resume(half: Path, tmp_path: Path) -> None:
    lines = (half / "timing.jsonl").read_bytes().split(b"\n")
    (half / "timing.jsonl").write_bytes(b"\n".join([*lines[:3], lines[3][:7], *lines[4:]]))
    run(half)
    run(tmp_path / "whole")
    assert (half / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_folder_of_ones_own_beside_the_checkpoints_stays(half: Path) -> None:
    own = half / "checkpoints/step-00000010-before-collapse"
    shutil.copytree(half / "checkpoints/step-00000010", own)
    run(half)
    assert own.exists()


def test_loading_a_live_run_leaves_its_temporary_files(half: Path) -> None:
    writing = half / "checkpoints/.step-00000030.tmp.1"
    writing.mkdir()
    assert load(half).model is not None
    assert writing.exists()
    run(half)  # who holds the lock sweeps
    assert not writing.exists()


@pytest.mark.parametrize(
    "error, said",
    [
        (MemoryError("no more"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes"), "oom"),
        (RuntimeError("CUDA out of memory"), "oom"),
        (RuntimeError("a bug"), "failed"),
        (KeyboardInterrupt(), "preempted"),
    ],
)
def test_status_summary_and_sinks_tell_the_same_end(
    error: BaseException, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_at(17, error, monkeypatch)
    with pytest.raises(type(error)):
        run(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert status(tmp_path)["status"] == summary["status"] == said
    assert status(tmp_path)["step"] == summary["steps"] == 16
    assert summary["tokens"] == 16 * 4 * 32
    assert f"{said} after 16 steps" in capsys.readouterr().out


def test_a_full_disk_ends_the_run_and_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is written by half is an error at once; lock and sinks are released although nothing can be said."""
    fail_at(17, OSError(28, "No space left on device"), monkeypatch)

    def full(self: Run, summary: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "summarise", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    monkeypatch.undo()
    run(tmp_path)
    assert status(tmp_path)["status"] == "completed" and status(tmp_path)["attempt"] == 2


def test_a_short_write_is_an_error() -> None:
    from moe_lab.run import write_whole

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "wb", buffering=0) as pipe, pytest.raises(OSError, match="No space left"):
        write_whole(pipe, b"x" * 10_000_000)
    os.close(reader)


def test_finished_on_other_data_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("one two three four five six seven\n" * 400)
    mine = ["dataset=text", f"dataset.paths=[{text}]", "steps=2"]
    run(tmp_path / "run", *mine)
    assert run(tmp_path / "run", *mine)["steps"] == 2
    text.write_text("seven six five four three two one\n" * 400)
    with pytest.raises(Stop, match="other data"):
        run(tmp_path / "run", *mine)


def test_clocks_go_on_after_a_resume(half: Path) -> None:
    before = json.loads((half / "timing.jsonl").read_text().splitlines()[-1])["elapsed"]
    run(half)
    clocks = [json.loads(line) for line in (half / "timing.jsonl").read_text().splitlines()]
    elapsed = [row["elapsed"] for row in clocks]
    assert elapsed == sorted(elapsed) and elapsed[-1] > before * 0.5
    assert json.loads((half / "summary.json").read_text())["wall_s"] >= elapsed[-1]


def test_a_signal_while_data_is_prepared_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_lab.datasets.clusters import Clusters

    after = []

    def slow(self: Any, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        after.append("went on")

    monkeypatch.setattr(Clusters, "prepare", slow)
    with pytest.raises(Stop, match="before it began") as stop:
        run(tmp_path)
    assert stop.value.code == 75 and not after
    monkeypatch.undo()
    assert run(tmp_path)["status"] == "completed"


def test_a_model_loads_without_its_data_and_device(tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("one two three four five six seven\n" * 400)
    run(tmp_path / "run", "dataset=text", f"dataset.paths=[{text}]", "steps=2")
    expected = load(tmp_path / "run").predict(torch.arange(8)[None]).logits_BSV
    text.unlink()
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config | {"device": "cuda", "compile": True}))
    loaded = load(tmp_path / "run")
    assert torch.equal(loaded.predict(torch.arange(8)[None]).logits_BSV, expected)
    with pytest.raises(ValueError, match=r"there is no .*own\.txt"):
        _ = loaded.data
    text.write_text("seven six five four three two one\n" * 400)
    with pytest.raises(ValueError, match="fingerprint"):
        _ = load(tmp_path / "run").data


@pytest.mark.parametrize("file", ["metrics.jsonl", "summary.json"])
def test_verify_sees_an_edited_digit(file: str, tmp_path: Path) -> None:
    run(tmp_path, "steps=4")
    assert moe_lab("verify", str(tmp_path)).code == 0
    content = (tmp_path / file).read_text()
    at = content.rindex('"moe/load_cv/worst":') + len('"moe/load_cv/worst":')
    digit = next(i for i in range(at, len(content)) if content[i] in "123456789")
    (tmp_path / file).write_text(content[:digit] + str(int(content[digit]) % 9 + 1) + content[digit + 1 :])
    said = moe_lab("verify", str(tmp_path))
    assert said.code == 4 and "BAD" in said.out
