"""kill -9 at any moment, and file operations that fail: the run goes on with the numbers of one that was left alone."""

import errno
import itertools
import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from faults import Fault
from processes import Ended, Running, Shell, start
from runs import STATEFUL, assert_same_run, result

from moe_lab.checkpoint import damage

LONG = (*STATEFUL, "steps=240", "log_every=5", "eval_every=30", "checkpoint.every=7")
SEED, KILLS, THROUGH_THE_SHELL = 20, 20, (2, 3, 5)


def command(folder: Path, words: tuple[str, ...]) -> tuple[str, ...]:
    """What a user types next: resume once it has begun, before that the first command again."""
    begun = (folder / "env.json").exists()
    return ("train", f"resume={folder}") if begun else ("train", *words, f"hydra.run.dir={folder}")


def to_the_end(folder: Path, words: tuple[str, ...]) -> dict[str, bytes]:
    ended = start(folder.with_suffix(".out"), *command(folder, words)).end()
    assert ended.code == 0, ended.said
    return result(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return to_the_end(tmp_path_factory.mktemp("undisturbed") / "run", LONG)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoints/step-*"))


def due(moment: str, folder: Path, process: Running | Shell, before: list[str]) -> bool:
    """Whether it has started, is writing a checkpoint, or trains on behind one of its own."""
    if moment == "saving":
        return any(folder.glob(f"checkpoints/.*.tmp.{process.process.pid}"))
    return moment == "starting" or steps(folder)[-1:] > before[-1:]


def kill(process: Running | Shell, moment: str, delay: float, folder: Path) -> Ended:
    """Kill it `delay` seconds after the moment has come, if it has not ended by then."""
    deadline, before = time.monotonic() + 120, steps(folder)
    while process.alive() and not due(moment, folder, process, before) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    if process.alive():
        process.kill()
    return process.end()


def test_twenty_kills_at_random_moments(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    rng, folders, kills = random.Random(SEED), [tmp_path / "run0"], []
    while len(kills) < KILLS:
        folder = folders[-1]
        moment = rng.choice(["starting", "training", "training", "saving"]) if len(kills) > 1 else "starting"
        delay = rng.uniform(0, {"starting": 0.25, "training": 0.2, "saving": 0.005}[moment])
        out, words = tmp_path / "out", command(folder, LONG)
        process = Shell(out, *words) if len(kills) in THROUGH_THE_SHELL else start(out, *words)
        ended = kill(process, moment, delay, folder)
        if ended.code == 0:  # it was faster: the next run is killed
            folders.append(tmp_path / f"run{len(folders)}")
        else:
            kills.append((moment, round(delay, 3), steps(folder)[-1:], len(list(folder.glob("checkpoints/.*")))))
            assert ended.code == -9, (kills, ended.said)
    print(f"seed {SEED}:", *kills, sep="\n")
    assert {bool(done) for _, _, done, _ in kills} == {True, False}, "all before, or all after the first checkpoint"
    for folder in folders:
        to_the_end(folder, LONG)
        assert_same_run(folder, undisturbed)


# --- every file operation


SHORT = (*STATEFUL, "steps=4", "log_every=2", "eval_every=3", "checkpoint.every=2", "checkpoint.keep=1")
EVERY = int(os.environ.get("MOE_LAB_EVERY_FAULT", "12"))  # 1: each of them (minutes)
BEGINNING = 32  # operations until the run has begun


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "run"
    to_the_end(folder, SHORT)
    return folder


def begun(short: Path, folder: Path) -> Path:
    """The run as kill -9 leaves it before its first row."""
    shutil.copytree(short, folder, ignore=shutil.ignore_patterns("checkpoints", "summary.json", "*.jsonl", "train.log"))
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"status": "running", "step": 0}))
    return folder


def tried(fault: Fault, folder: Path, undisturbed: dict[str, bytes]) -> tuple[str, str]:
    """What the fault hit in a run in `folder`, and what was wrong with what came of it."""
    ended = start(folder.with_suffix(".out"), *command(folder, SHORT), fault=fault).end()
    if not ended.fault:
        return "", "" if ended.code == 0 else ended.said
    try:
        if "train.log" in ended.fault and fault.how != "kill":  # nothing depends on it
            assert ended.code == 0 and "train.log is incomplete" in ended.said
        else:
            assert ended.code == (-9 if fault.how == "kill" else 5)
            assert fault.how == "kill" or os.strerror(getattr(errno, fault.how)) in ended.said.splitlines()[-1]
        assert "Traceback" not in ended.said
        assert [path for path in folder.glob("checkpoints/step-*") if damage(path)] == []
        to_the_end(folder, SHORT)
        assert_same_run(folder, undisturbed, keep=1)
    except AssertionError as error:
        return ended.fault, f"{ended.fault}: {str(error)[:500]} {ended.said[-500:]}"
    return ended.fault, ""


@pytest.mark.parametrize("how, first", [("kill", 4), ("ENOSPC", 1), ("EIO", 8)])
def test_each_file_operation_may_fail_or_be_the_last(how: str, first: int, short: Path, tmp_path: Path) -> None:
    """Every EVERY-th operation of a new run until it has begun, then of one that has begun to its end."""
    undisturbed, first = result(short), 1 + first % EVERY
    found = [tried(Fault(at, how), tmp_path / f"new{at}", undisturbed) for at in range(first, BEGINNING, EVERY)]
    for at in itertools.count(first, EVERY):
        found.append(tried(Fault(at, how), begun(short, tmp_path / f"begun{at}"), undisturbed))
        if not found[-1][0]:
            break
    problems = [wrong for _, wrong in found if wrong]
    assert not problems, "\n".join(problems)
    assert len(found) > 100 / EVERY
