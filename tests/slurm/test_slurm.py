"""Studies as job arrays on a real Slurm of one node, whatever meets their jobs there. MOE_LAB_SLURM=1 asks for it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import start

from moe_lab.run import read_rows, read_status
from moe_lab.study.results import load

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/tiny_study.yaml"
STUDY = ["sweep", str(TINY), "hydra/launcher=submitit_slurm"]
STEPS = 200
LONG = ["scale=cpu", "arm=switch", "fast=false", f"steps={STEPS}", "checkpoint.every=100000"]  # some seconds a job
WHY = "MOE_LAB_SLURM=1 asks for it" if os.environ.get("MOE_LAB_SLURM") != "1" else start.lacks()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(WHY is not None, reason=str(WHY))]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Mapping[str, str]]:
    with start.slurm() as env:
        yield env | {"PYTHONPATH": str(ROOT)}


class Here:
    """A folder of its own, and commands in it."""

    def __init__(self, folder: Path, env: Mapping[str, str]):
        self.folder, self.env = folder, env

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(["moe-lab", *words], cwd=self.folder, env=self.env, stdout=-1, stderr=-1, text=True)

    def say(self, *words: str) -> tuple[int, str, str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def ask(self, *words: str) -> str:
        return subprocess.run(words, env=self.env, capture_output=True, text=True, check=True).stdout

    def status(self, sweep: Path, seed: int) -> dict:
        found = [read_status(path.parent) for path in sweep.glob(f"*-seed_{seed}/status.json")]
        return (found[0] if found else None) or {}

    def runs(self, sweep: Path, seed: int) -> str:
        """The number of the Slurm job of a seed, once its run has begun."""
        wait(lambda: self.status(sweep, seed).get("status") == "running")
        return self.status(sweep, seed)["slurm"]


@pytest.fixture
def here(tmp_path: Path, slurm: Mapping[str, str]) -> Here:
    return Here(tmp_path, slurm)


def wait(what, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_study_runs_as_a_job_array(here: Here) -> None:
    code, _, err = here.say(*STUDY, "scale=quick", "hydra.launcher.name=tiny")
    assert code == 0, err
    sweep = here.folder / "outputs/sweeps/tiny_study-quick"
    results = load(sweep)
    assert [r.state for r in results.results] == ["completed"] * 4 and results.notes == []
    told = [json.loads((sweep / r.job.dir / "status.json").read_text()) for r in results.results]
    array = told[0]["slurm"].partition("_")[0]
    assert {t["slurm"] for t in told} == {f"{array}_{k}" for k in range(4)} and {t["host"] for t in told} == {
        "localhost"
    }
    assert set(here.ask("squeue", "--states=all", "--array", "-h", "-o%i %j %T", f"-j{array}").splitlines()) == {
        f"{array}_{k} tiny COMPLETED" for k in range(4)
    }
    assert "4 of 4 completed" in here.say("status", str(sweep))[1]
    assert here.say(*STUDY, "scale=quick")[1].startswith("4 of 4 jobs were completed before")


def test_what_meets_a_job_is_told_and_the_same_command_finishes_the_sweep(here: Here) -> None:
    """Before its time is up, Slurm sends SIGUSR2: the run saves, and its job is queued again and goes on. Killed, it is
    told as such, although it ran on another machine and wrote nothing."""
    words = (*STUDY, *LONG, "seed=range(3)")
    parent, sweep = here.start(*words), here.folder / "outputs/sweeps/tiny_study"
    here.ask("scancel", "--signal=USR2", here.runs(sweep, 0))
    here.runs(sweep, 1)
    os.kill(here.status(sweep, 1)["pid"], signal.SIGKILL)
    _, err = parent.communicate(timeout=120)
    assert [here.status(sweep, seed)["status"] for seed in range(3)] == ["completed", "running", "completed"]
    assert "2 of 3 completed, 1 preempted" in here.say("status", str(sweep))[1]
    assert parent.returncode == 75 and "preempted: switch seed=1: its process was killed" in err, err
    assert self_resumed(here, sweep)
    code, out, err = here.say(*words)
    assert code == 0 and "2 of 3 jobs were completed before" in out, err


def self_resumed(here: Here, sweep: Path) -> bool:
    """The job of seed 0 ran twice and lost no step."""
    (run,) = sweep.glob("*-seed_0")
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl")]
    return here.status(sweep, 0)["attempt"] == 2 and steps == sorted(set(steps)) and steps[-1] == STEPS


def test_jobs_go_on_without_the_command(here: Here) -> None:
    words = (*STUDY, *LONG, "steps=600", "seed=range(4)")
    parent, sweep = here.start(*words), here.folder / "outputs/sweeps/tiny_study"
    array = here.runs(sweep, 0).partition("_")[0]
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert " running" in here.say("status", str(sweep))[1]
    code, _, err = here.say(*words)
    assert code == 4 and f"Slurm still has jobs of this sweep: {array}_" in err
    assert here.say("watch", str(sweep))[1].splitlines()[-1] == "tiny_study: 4 of 4 completed"
