"""Runs a sweep's jobs, a process each, so many at a time; what one of them does ends that job alone.

Nothing here keeps a ledger: what became of a job stands in its directory, and where its process could not write that
any more (it was killed), the driver does.
"""

import fcntl
import multiprocessing.connection
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lab import durable
from moe_lab.cli import complain
from moe_lab.run import Stop, read_status
from moe_lab.slurm import SIGNALS
from moe_lab.study import folder as folders
from moe_lab.study import worker
from moe_lab.study.folder import Job, Sweep
from moe_lab.study.results import BAD
from moe_lab.study.room import Room
from moe_lab.study.show import span

TICK = 0.2  # seconds between looks at clocks and signals
GRACE = 30.0  # seconds between SIGTERM and SIGKILL for a job that took too long


@dataclass
class Task:
    """A job to run, and what its process is told beside its overrides."""

    job: Job
    cfg: Mapping[str, Any]
    child: Any = None  # worker.Child while it runs
    told: bool = False  # to stop
    late: float | None = None  # when it was told that it took too long
    killed_before: int = 0  # processes that the system had killed for their memory when it started


@dataclass
class Driver:
    sweep: Sweep
    tasks: list[Task]
    screen: Any  # a Screen, or what is told the same
    more: list[str] = field(default_factory=list)  # words of every job: flags, and what is meant for Hydra
    jobs: int | None = None
    timeout: float | None = None  # seconds
    before: Callable[[Job], None] = lambda job: None  # what is to be done before a job starts
    stopped: signal.Signals | None = None
    at_once: bool = False

    def go(self) -> int:
        """Run them all. 0 completed, 1 some failed, 75 stopped and resumable, 130 stopped at once."""
        room, waiting, running = Room(self.jobs, [task.cfg for task in self.tasks]), list(self.tasks), list[Task]()
        failed = interrupted = 0
        with self._heeding_signals():
            while running or (waiting and not self.stopped):
                while waiting and not self.stopped and len(running) < room.jobs():
                    running.append(self._start(waiting.pop(0)))
                    self.screen.started(running[-1].job)
                multiprocessing.connection.wait([task.child.sentinel for task in running], TICK)
                for task in [task for task in running if task.child.exitcode is not None]:
                    running.remove(task)
                    state, why = self._settle(task)
                    failed += state not in ("completed", "preempted")
                    interrupted += state == "preempted"
                    self.screen.ended(task.job, state, why, time.monotonic() - task.child.started)
                    task.child.close()
                self._end_what_takes_too_long(running)
                room.see([self.sweep.folder / task.job.dir for task in running])
                self.screen.tick({task.job.dir for task in running}, {t.job.dir for t in (*waiting, *running)})
        if self.stopped:
            complain([f"stopped by {self.stopped.name}; the same command goes on"])
            return 130 if self.at_once else 75
        return 1 if failed else 75 if interrupted else 0

    def _start(self, task: Task) -> Task:
        job, run_dir = task.job, self.sweep.folder / task.job.dir
        self.before(job)
        folders.mark(self.sweep, job)
        task.killed_before = kills()
        words = worker.words_of(job.overrides, run_dir, self.more)
        task.child = worker.Child(words, log_of(self.sweep, job), run_dir)
        return task

    def _settle(self, task: Task) -> tuple[str, str | None]:
        """What became of a job whose process ended. Written down where it could not do so itself."""
        run_dir, code = self.sweep.folder / task.job.dir, task.child.exitcode
        status = read_status(run_dir) or {}
        own = status.get("status")
        if code <= 0 and own == "completed":  # which a run writes last: a signal may still have met it
            return "completed", None
        state, why = self._cause(task, code)
        if state == "failed" and code in (1, 3) and own in BAD:
            return str(own), str(status.get("error"))
        if own != "completed":
            said = {"status": state, "step": status.get("step", 0), "error": why}
            durable.write_json(run_dir / "status.json", status | said | {"attempt": status.get("attempt", 1)})
        return state, why

    def _cause(self, task: Task, code: int) -> tuple[str, str | None]:
        if task.late is not None:
            return "timeout", f"took longer than {span(self.timeout or 0)}; the same command goes on with it"
        if code == 75 or (self.stopped and code < 0):
            return "preempted", f"stopped by {self.stopped.name}" if self.stopped else "stopped by a signal"
        if code == -signal.SIGKILL and kills() > task.killed_before:
            return "oom", "killed by the system, which had no memory left"
        if code < 0:
            return "failed", f"killed by {signal.Signals(-code).name}"
        said = worker.last_words(log_of(self.sweep, task.job))
        return "failed", said if code in (1, 2, 3, 4, 5) and said else f"ended with exit code {code}: {said}"

    def _end_what_takes_too_long(self, running: list[Task]) -> None:
        now = time.monotonic()
        for task in running:
            if self.at_once or (task.late is not None and now - task.late > GRACE):
                task.child.kill()
            elif task.late is None and self.timeout and now - task.child.started > self.timeout:
                task.late = now
                task.child.stop()
            elif self.stopped and not task.told:
                task.told = True
                task.child.stop()

    @contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        """The first signal stops the jobs at their next step, a second Ctrl-C at once."""

        def heed(number: int, frame: object) -> None:
            self.at_once = self.stopped is not None and number == signal.SIGINT
            self.stopped = self.stopped or signal.Signals(number)

        old = {number: signal.signal(number, heed) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def log_of(sweep: Sweep, job: Job) -> Path:
    return sweep.folder / "logs" / f"{job.dir}.log"


def kills() -> int:
    """Processes that the kernel has killed for their memory since the machine started."""
    try:
        words = Path("/proc/vmstat").read_text().split()
        return int(words[words.index("oom_kill") + 1])
    except (OSError, ValueError):
        return 0


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One driver per folder: the second is told."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(4, f"{folder}: another sweep is running here; moe-lab watch {folder} shows it") from None
        yield
