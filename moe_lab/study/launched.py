"""The jobs of a sweep by one of Hydra's launchers: it decides where and when they run, and this process waits.

What became of a job stands in its directory, as ever. A launcher hears no more than that a process ended: Slurm calls a
job COMPLETED whose run diverged. It ends with the first job that was killed, and others may still run then.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn

from moe_lab import hydra_jobs, slurm
from moe_lab.cli import complain
from moe_lab.hydra_jobs import Asked, Checked
from moe_lab.study import folder as folders
from moe_lab.study.folder import Job, Sweep
from moe_lab.study.results import BAD, state_of
from moe_lab.study.show import name

LOOK = 2.0  # seconds between looks at jobs that outlive their launcher


def go(sweep: Sweep, asked: Asked, jobs: list[Job], checked: Mapping[str, Checked], task: Any) -> int:
    """Run them. 0 completed, 1 some failed, 75 some were stopped and go on with the same command, 130 Ctrl-C."""
    if not jobs:
        return 0
    for job in jobs:
        folders.mark(sweep, job)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the driver's jobs: threads decide last digits
    print(f"{len(jobs)} jobs go to {asked.launcher}; moe-lab watch {sweep.folder} shows them", flush=True)
    try:
        returns = hydra_jobs.launch(asked, [checked[job.dir] for job in jobs], task)
        found = [_returned(sweep, job, one) for job, one in zip(jobs, returns, strict=True)]
    except KeyboardInterrupt:
        return complain([f"stopped waiting; jobs in a queue go on: see moe-lab watch {sweep.folder}"], 130)
    except Exception as error:  # each launcher has its own, for a job that was killed or that it could not submit
        complain([f"{asked.launcher}: {_first_line(error)}"])
        _wait_for_the_others(sweep, jobs)
        found = [state_of(sweep.folder / job.dir) for job in jobs]
    return _tell(jobs, found)


def _returned(sweep: Sweep, job: Job, returned: JobReturn) -> tuple[str, str | None]:
    """What became of a job whose process came to its end."""
    try:
        value = returned.return_value
    except Exception as error:  # what the job raised
        return "failed", _first_line(error)
    if not value.get("exit"):
        return "completed", None
    state, _ = state_of(sweep.folder / job.dir)
    return state if state in (*BAD, "preempted") else "failed", value["message"]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _wait_for_the_others(sweep: Sweep, jobs: list[Job]) -> None:
    while slurm.submitted(sweep.folder) or any(_runs(sweep.folder / job.dir) for job in jobs):
        time.sleep(LOOK)


def _runs(run_dir: Path) -> bool:
    return state_of(run_dir)[0] == "running"


def _tell(jobs: list[Job], found: list[tuple[str, str | None]]) -> int:
    ended = list(zip(jobs, found, strict=True))
    complain([f"{state}: {name(job)}: {why}" for job, (state, why) in ended if state in (*BAD, "preempted")])
    states = [state for state, _ in found]
    if never := states.count("waiting"):
        complain([f"{never} of {len(jobs)} runs never began"])
    failed = sum(state in BAD for state in states)
    complain([f"{failed} of {len(jobs)} runs failed"] if failed else [])
    return 1 if failed or never else 75 if "preempted" in states else 0
