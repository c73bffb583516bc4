"""What Slurm knows of our jobs: its queue, which is asked seldom, since all users of a cluster share it."""

import os
import platform
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

# What ends a run at its next step; submitit has Slurm send SIGUSR2 before a job's time is up.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
EVERY = 20.0  # seconds that an answer is good for
SUBMITTED = ".submitit"  # below a sweep's folder: a folder for each job of submitit's, named by its number


def this_process() -> dict[str, Any]:
    """Where it is, for a run's status: process, machine, and the number of its Slurm job as squeue writes it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
    return {"pid": os.getpid(), "host": platform.node(), **({"slurm": job} if job else {})}


class Queue:
    """The numbers of the user's jobs that wait or run in Slurm."""

    def __init__(self) -> None:
        self.asked = 0.0
        self.jobs: frozenset[str] | None = None  # None: Slurm does not answer, or is not here

    def at(self, moment: float = 0.0) -> frozenset[str] | None:
        """As it was at that moment or later."""
        if self.asked < moment or time.time() - self.asked > EVERY:
            self.asked, self.jobs = time.time(), _ask()
        return self.jobs


QUEUE = Queue()


def _ask() -> frozenset[str] | None:
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return frozenset(done.stdout.split()) if done.returncode == 0 else None


def submitted(sweep: Path) -> list[str]:
    """Jobs of a sweep that submitit handed to Slurm and that wait or run there."""
    numbers = {path.name for path in (sweep / SUBMITTED).glob("*")}
    return sorted(numbers & (QUEUE.at() or frozenset())) if numbers else []
