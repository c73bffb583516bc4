"""A mirror is played in another process: in order, as things were when they were said, and without anyone waiting."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from player import Notes

from moe_lab.sinks import mirror


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    sink = Notes()
    sink.start()
    return sink


def written(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def opened(path: Path) -> None:
    """Wait until the player has written its first line."""
    for _ in range(3000):
        if path.exists() and path.read_bytes().endswith(b"\n"):
            return
        time.sleep(0.02)
    pytest.fail("the mirror's process does not start")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("moe_lab")]


def test_calls_are_played_in_order_and_as_they_were(
    notes: Notes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    value = {"loads": [1.5, 0.1]}
    notes.send("open", str(tmp_path / "n"))
    for i in range(100):
        value["loads"][0] = i / 3
        notes.send("row", value)
    value["loads"][0] = -1.0
    notes.end("close", "all written")
    notes.wait()
    assert written(tmp_path / "n") == ["open", *({"loads": [i / 3, 0.1]} for i in range(100)), "close"]
    assert notes.describe() == "notes: all written" and not warnings(caplog)


@pytest.mark.parametrize(
    "how, said",
    [
        ("raise", "ConnectionResetError: the service is gone"),
        ("exit", "its process ended with code 0"),
        ("leave", "its process ended with code 0"),
        ("crash", "its process ended with code -11"),
        ("hang", "it did not end within 1 s of the run"),
    ],
)
def test_a_failure_is_said_once_and_the_rest_is_skipped(
    how: str, said: str, notes: Notes, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "DEADLINE", 1.0)
    notes.send("open", str(tmp_path / "n"))
    opened(tmp_path / "n")  # it may start slowly, and the end comes soon
    notes.send("fail", how)
    if how != "hang":
        assert notes.ended.wait(20.0)
    for i in range(10):
        notes.send("row", i)
    notes.end("close", "never said")
    notes.wait()
    assert warnings(caplog) == [f"notes: switched off, the run goes on: {said}; metrics.jsonl has every row"]
    assert notes.ended.is_set() and notes.describe() == "notes: switched off"
    assert written(tmp_path / "n") == ["open", "let go"][: 2 if how == "raise" else 1]


def test_a_full_queue_loses_rows_and_counts_them(
    notes: Notes, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "QUEUE", 5)
    notes.send("open", str(tmp_path / "n"), 0.02)
    pages = "x" * 30_000  # more than a pipe holds, three times over
    for i in range(50):
        notes.send("row", [i, pages])
    notes.end("close", "")
    notes.wait()
    rows = [row[0] for row in written(tmp_path / "n")[1:-1]]
    assert rows == sorted(rows) and 0 < notes.lost == 50 - len(rows)
    assert warnings(caplog) == [f"notes: it was too slow for {notes.lost} rows; metrics.jsonl has every row"]


def test_what_follows_from_a_failure_is_no_second_warning(
    notes: Notes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "QUEUE", 5)
    monkeypatch.setattr(mirror, "DEADLINE", 0.5)
    assert notes.child is not None
    notes.child.send_signal(signal.SIGSTOP)
    for _ in range(50):
        notes.send("row", "x" * 30_000)
    notes.end("close", "")
    with caplog.at_level(logging.INFO):
        notes.wait()
    (said,) = warnings(caplog)
    assert "did not end within 0.5 s" in said
    assert f"too slow for {notes.lost} rows" in caplog.text and notes.lost > 30


def test_no_process_to_be_had_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-such-python"))
    sink = Notes()
    sink.start()
    sink.send("row", 1)
    sink.end("close", "")
    sink.wait()
    (said,) = warnings(caplog)
    assert "no-such-python" in said and sink.describe() == "notes: switched off"


def test_when_the_run_is_killed_the_mirror_saves_what_it_has(tmp_path: Path) -> None:
    program = f"""
        import os, signal
        from player import Notes
        sink = Notes()
        sink.start()
        sink.send("open", {str(tmp_path / "n")!r})
        sink.send("row", 1)
        while sink.calls.qsize():
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    """
    path = ":".join(filter(None, sys.path))
    command = [sys.executable, "-c", textwrap.dedent(program)]
    assert subprocess.run(command, env={"PYTHONPATH": path}, timeout=60).returncode == -9
    for _ in range(500):
        if (tmp_path / "n").exists() and written(tmp_path / "n")[-1] == "let go":
            break
        time.sleep(0.02)
    assert written(tmp_path / "n") in (["open", 1, "let go"], ["open", "let go"])  # the last line may be in the queue


def test_whoever_is_in_a_hurry_leaves_a_stuck_mirror_behind(tmp_path: Path) -> None:
    program = f"""
        import os, signal, sys
        from player import Notes
        sink = Notes()
        sink.start()
        sink.child.send_signal(signal.SIGSTOP)
        sink.send("open", {str(tmp_path / "n")!r})
        for i in range(20):
            sink.send("row", "x" * 30_000)  # more than a pipe holds: the thread that feeds it is stuck
        sink.end("close", "")
        print(sink.child.pid)
        sys.exit(7)
    """
    path = ":".join(filter(None, sys.path))
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    os.kill(int(done.stdout), signal.SIGKILL)
    assert (done.returncode, done.stderr) == (7, "")


def test_a_signal_to_the_mirror_does_not_end_it(notes: Notes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes.send("open", str(tmp_path / "n"))
    opened(tmp_path / "n")
    assert notes.child is not None
    notes.child.terminate()
    notes.send("row", 1)
    notes.end("close", "")
    notes.wait()
    assert written(tmp_path / "n") == ["open", 1, "close"] and not warnings(caplog)
