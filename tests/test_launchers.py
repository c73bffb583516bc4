"""Hydra's launchers: the same study, to the same places; what is told of jobs that run where we cannot look."""

import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import moe_lab
from made_sweep import TINY, made_run, made_sweep

from moe_lab import hydra_app, hydra_jobs, slurm
from moe_lab.run import Run, read_status
from moe_lab.study import launched, worker
from moe_lab.study.folder import read
from moe_lab.study.results import load, state_of

FOLDER = Path("outputs/sweeps/tiny_study-quick")
STUDY = ("sweep", str(TINY), "scale=quick", "arm=switch")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "ask", lambda function, *args: function(*args))
    monkeypatch.setattr(slurm, "QUEUE", slurm.Queue())
    monkeypatch.setattr(launched, "LOOK", 0.01)
    return tmp_path


def test_a_study_runs_by_submitit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job is a process of submitit's, with the numbers of the same job typed by hand."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    said = moe_lab(*STUDY, "hydra/launcher=submitit_local")
    assert said.code == 0, said.err
    results = load(FOLDER)
    assert [r.state for r in results.results] == ["completed"] * 2 and results.notes == []
    pids = {json.loads((FOLDER / r.job.dir / "status.json").read_text())["pid"] for r in results.results}
    assert len(pids) == 2 and os.getpid() not in pids and len(list(FOLDER.glob(".submitit/*/*_result.pkl"))) == 2
    assert "2 of 2 completed" in moe_lab("status", str(FOLDER)).out
    job = results.sweep.jobs[0]
    assert moe_lab("train", *job.overrides, "hydra.run.dir=by_hand").code == 0
    assert Path("by_hand/metrics.jsonl").read_bytes() == (FOLDER / job.dir / "metrics.jsonl").read_bytes()


def test_output_dir_holds_for_a_launcher_too() -> None:
    assert moe_lab(*STUDY, "seed=0", "output_dir=elsewhere", "hydra/launcher=basic").code == 0
    assert [r.state for r in load(Path("elsewhere/sweeps/tiny_study-quick")).results] == ["completed"]
    assert not Path("outputs").exists()


@pytest.fixture
def heard() -> Iterator[list[Any]]:
    """What the status of `run` was whenever SIGUSR2 came to whoever handled it before the run did."""
    found: list[Any] = []
    before = signal.signal(signal.SIGUSR2, lambda *_: found.append((read_status(Path("run")) or {}).get("status")))
    yield found
    signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize("number, handed_on", [(signal.SIGUSR2, ["preempted"]), (signal.SIGTERM, [])])
def test_the_signal_before_the_end_saves_and_is_handed_on(
    number: signal.Signals, handed_on: list[str], heard: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit asks Slurm for another try when it hears SIGUSR2: after the run has saved, not in place of it."""
    words = ["train", "fast=true", "dataset=clusters", "dataset.tokens=4000", "logger=[]", "hydra.run.dir=run"]
    row = Run.row
    with monkeypatch.context() as patch:
        patch.setattr(Run, "row", lambda self, *what: (row(self, *what), signal.raise_signal(number)))
        said = moe_lab(*words)
    assert said.code == 75 and f"stopped by {number.name} after step 1" in said.err
    assert heard == handed_on and list(Path("run/checkpoints").glob("step-*1"))
    assert moe_lab(*words).code == 0


REFUSED = {
    "commands": "hydra.launcher.setup=['rm x']",
    "commands at the end": "+hydra.launcher.teardown=['rm x']",
    "commands of srun's": "+hydra.launcher.srun_args=['--task-prolog=x']",
    "environment": "+hydra.launcher.additional_parameters.export=LD_PRELOAD",
    "another folder's modules": "+hydra.launcher.additional_parameters.chdir=x",
    "a second line of the batch file": 'hydra.launcher.comment="a\nrm x"',
    "minutes": "--timeout=1",
    "jobs": "--jobs=1",
}


@pytest.mark.parametrize("word", REFUSED.values(), ids=REFUSED.keys())
def test_a_config_cannot_make_a_launcher_run_commands(word: str, here: Path) -> None:
    said = moe_lab(*STUDY, "hydra/launcher=submitit_slurm", word)
    assert said.code == 2 and len(said.err.splitlines()) == 1, said
    assert not list(here.glob("outputs/sweeps/*/sweep.json"))


def test_ray_may_not_install_packages() -> None:
    node = {"launcher": {"_target_": "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher", "ray": {}}}
    assert list(hydra_app.forbidden(node)) == []
    node["launcher"]["ray"] = {"init": {"runtime_env": {"pip": ["x"]}}}  # type: ignore[index]
    assert [line.partition(":")[0] for line in hydra_app.forbidden(node)] == ["hydra.launcher.ray.init.runtime_env"]


def queued(monkeypatch: pytest.MonkeyPatch, jobs: set[str] | None) -> None:
    monkeypatch.setattr(slurm, "_ask", lambda: None if jobs is None else frozenset(jobs))


@pytest.mark.parametrize("jobs, state", [({"7_0"}, "running"), ({"7_1"}, "preempted"), (None, "running")])
def test_slurm_is_asked_about_a_job_on_another_machine(
    jobs: set[str] | None, state: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = {"status": "running", "step": 3, "attempt": 1, "pid": 1, "host": f"not-{platform.node()}", "slurm": "7_0"}
    Path("status.json").write_text(json.dumps(status))
    queued(monkeypatch, jobs)
    assert state_of(here)[0] == state


def test_the_queue_is_asked_again_only_for_what_is_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, asked = slurm.Queue(), []
    monkeypatch.setattr(slurm, "_ask", lambda: asked.append(1))
    for moment in (0.0, 0.0, time.time() + 1, 0.0):
        queue.at(moment)
    assert len(asked) == 2


def test_squeue_answers_or_there_is_no_answer(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(here))
    assert slurm._ask() is None
    for script, answer in (("echo 7_0; echo 8", {"7_0", "8"}), ("echo 7_0; exit 1", None)):
        (here / "squeue").write_text(f"#!/bin/sh\n{script}\n")
        (here / "squeue").chmod(0o755)
        assert slurm._ask() == answer


def test_jobs_in_the_queue_are_not_submitted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert moe_lab(*STUDY, "seed=0").code == 0
    (FOLDER / ".submitit/7_1").mkdir(parents=True)
    queued(monkeypatch, {"7_1"})
    assert moe_lab(*STUDY, "seed=0").code == 0  # nothing to do
    said = moe_lab(*STUDY)
    assert said.code == 4 and "Slurm still has jobs of this sweep: 7_1; moe-lab watch" in said.err
    assert [job.seed for job in read(FOLDER).jobs] == [0]
    queued(monkeypatch, set())
    monkeypatch.setattr(slurm, "QUEUE", slurm.Queue())
    assert moe_lab(*STUDY).code == 0


def test_a_launcher_that_gives_up_is_not_the_end_of_the_others(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises for the first job that was killed; the states of all are told once the last has ended."""
    sweep = made_sweep(here / "sweep")
    done, killed, bad, _ = sweep.jobs
    made_run(sweep, done)
    made_run(sweep, killed, "running")
    made_run(sweep, bad, "diverged", "loss is not finite")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    queued(monkeypatch, set())

    def launch(*_: Any) -> None:
        raise RuntimeError("Job 9 has not produced any output\n---\nlog")

    monkeypatch.setattr(hydra_jobs, "launch", launch)
    asked: Any = type("Asked", (), {"launcher": "submitit_slurm"})
    assert launched.go(sweep, asked, sweep.jobs, dict.fromkeys((j.dir for j in sweep.jobs), None), None) == 1  # type: ignore[arg-type]
    assert capsys.readouterr().err.splitlines() == [
        "moe-lab: submitit_slurm: Job 9 has not produced any output",
        "moe-lab: preempted: switch seed=1: its process was killed; it goes on from its last checkpoint",
        "moe-lab: diverged: switch_balanced seed=0: loss is not finite",
        "moe-lab: 1 of 4 runs never began",
        "moe-lab: 1 of 4 runs failed",
    ]
