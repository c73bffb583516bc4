"""Run directories and caches of somebody else: nothing in them is executed, and what no run wrote is refused."""

import contextlib
import json
import pickle
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Said, moe_lab
from hostile import CACHES, CANARY, CODE, PLACES, SHAPES, pickled

import moe_lab as package

TINY = "dataset=clusters dataset.tokens=5000 logger=[] fast=true model.dim=32 model.heads=2 experts.num=4"
MEMORY = 1 << 30  # bytes that any of these may take beyond what the process has
SECONDS = 60


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run with two checkpoints, as it lies there when it was killed before its last row."""
    folder = tmp_path_factory.mktemp("stopped")
    said = moe_lab("train", *TINY.split(), f"hydra.run.dir={folder / 'run'}")
    assert said.code == 0, said.err
    run = folder / "run"
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"status": "running"}))
    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run, with a file and a folder of the victim."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "house").mkdir()
    return tmp_path


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No more than MEMORY beyond what is mapped now, and SECONDS."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)

    def late(*_: object) -> None:
        raise AssertionError(f"took longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, old[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)  # again and again: logging swallows an exception
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, old)


def commands(run: Path, other: Path) -> Iterator[tuple[str, ...]]:
    yield "verify", str(run)
    yield "diff", str(run), str(other)
    yield "export", str(run), "--out", "-"
    yield "train", f"resume={run}"


def told(run: Path, other: Path) -> dict[str, Any]:
    """What each command answered; each in one line, without a traceback, and within bounds."""
    answers = {}
    for words in commands(run, other):
        with bounded():
            said = moe_lab(*words)
        answers[words[0]] = said.code
        assert said.code in (0, 2, 4), (words, said)
        assert "Traceback" not in said.err + said.out, (words, said.err)
        assert "MemoryError" not in said.err + said.out, (words, said.err)
        errors = [line for line in said.err.splitlines() if line.startswith("moe-lab: ")]
        assert len(errors) == (said.code != 0 and words[0] != "verify"), (words, said.err)
    with bounded():
        try:
            package.load(run).model  # noqa: B018 what it does is the question
            answers["load"] = 0
        except ValueError as error:
            assert "\n" not in str(error), error
            answers["load"] = 4
    return answers


# What is no part of what a run goes on from, or of no kind that could be told from a run's own.
MAY_GO_ON = {
    *("json with a class", "json of jsonpickle", "choices that name code", "pickle as status"),
    *("status of wrong types", "status with numbers beyond all", "clocks of wrong types", "temporary files lead in"),
    *("summary deep as a well", "summary of wrong types", "a row deep as a well", "a line of a gigabyte"),
}


def test_there_are_enough_and_they_would_work(here: Path) -> None:
    assert len(CODE | SHAPES | PLACES) + len(CACHES) > 100
    pickle.loads(pickled(2))
    assert CANARY.exists()


@pytest.mark.parametrize("name", [*CODE, *SHAPES, *PLACES])
def test_a_run_of_somebody_else_executes_nothing(name: str, stopped: Path, here: Path) -> None:
    run = shutil.copytree(stopped, here / "theirs/run")
    (CODE | SHAPES | PLACES)[name](run)
    answers = told(run, stopped)
    assert not CANARY.exists()
    assert answers["train"] != 0 or name in MAY_GO_ON
    assert (here / "victim").read_text() == "precious" and not any((here / "house").iterdir())


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token cache with everything in it: a tokenizer, domains, bigrams; and the text that it is of."""
    folder = tmp_path_factory.mktemp("cached")
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("".join(f"{name} {i % 37} and {i % 11}\n" for i in range(2000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_LAB_CACHE", str(folder / "cache"))
        assert train_on(folder).code == 0
    return folder


def train_on(folder: Path) -> Said:
    text = f"dataset=text dataset.paths=[{folder}/a.txt,{folder}/b.txt] dataset.tokenizer=bpe dataset.bpe_vocab=300"
    tiny = "logger=[] fast=true steps=2 model.dim=32 model.heads=2 experts.num=4"
    return moe_lab("train", *text.split(), *tiny.split(), f"output_dir={folder / 'outputs'}")


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_somebody_else_executes_nothing(
    name: str, cached: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_LAB_CACHE", str(shutil.copytree(cached / "cache", here / "cache")))
    (entry,) = (here / "cache").iterdir()
    CACHES[name](entry)
    with bounded():
        said = train_on(cached)
    assert not CANARY.exists() and (here / "victim").read_text() == "precious"
    assert said.code in (0, 4, 5) and "Traceback" not in said.err, said
    assert len(said.err.splitlines()) <= 1, said.err
