"""What a driver shows: a live table on a terminal, else a line for each job that ends; failures as they happen."""

import time
from collections.abc import Callable

import rich
from rich.live import Live

from moe_lab.cli import complain, printable
from moe_lab.secrecy import hide
from moe_lab.study.folder import Job, Sweep
from moe_lab.study.show import Pace, View, name, screen, span

REFRESH = 1.0  # seconds between redraws; they read the directories of the jobs that run


class Screen:
    def __init__(self, sweep: Sweep, log_of: Callable[[Job], object]):
        self.sweep, self.log_of, self.view = sweep, log_of, View(sweep)
        self.console = rich.get_console()
        self.lively = self.console.is_interactive and self.console.file.isatty()
        self.live: Live | None = None
        self.seen = self.view.look()
        self.pace, self.drawn = Pace(self.seen), time.monotonic()
        self.todo: set[str] = set()
        self.failed = 0

    def __enter__(self) -> "Screen":
        if self.lively:
            self.live = Live(screen(self.sweep, self.seen), console=self.console, auto_refresh=False)
            self.live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.update(screen(self.sweep, self.view.look()), refresh=True)
            self.live.stop()

    def started(self, job: Job) -> None:
        self.view.forget(job)

    def ended(self, job: Job, state: str, why: str | None, seconds: float) -> None:
        """Tell how a job ended: a failure with its cause and its log."""
        self.view.forget(job)
        self.seen = self.view.look()
        self.todo.discard(job.dir)
        if state not in ("completed", "preempted"):
            self.failed += 1
            cause = (why or "").removeprefix(f"{state}: ")
            complain([f"{state}: {name(job)}: {cause}; its log is {self.log_of(job)}"])
        elif self.live is None:
            self._line(job, state, seconds)

    def _line(self, job: Job, state: str, seconds: float) -> None:
        done = sum(one.state == "completed" for one in self.seen)
        (own,) = (one for one in self.seen if one.job.dir == job.dir)
        left = self.pace.left(self.seen, self.todo)
        more = [f", loss {own.loss:.4f}" if own.loss is not None else ""]
        more += [f"; about {span(left)} left" if left and self.todo else ""]
        text = f"[{done}/{len(self.seen)}] {state}: {name(job)} in {span(seconds)}{''.join(more)}"
        print(printable(hide(text)), flush=True)

    def tick(self, running: set[str], todo: set[str]) -> None:
        self.todo = todo
        if self.live is None or time.monotonic() - self.drawn < REFRESH:
            return
        self.seen, self.drawn = self.view.look(running), time.monotonic()
        self.live.update(screen(self.sweep, self.seen, self.pace.left(self.seen, todo)), refresh=True)
