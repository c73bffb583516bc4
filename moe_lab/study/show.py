"""A sweep as it stands, for whoever watches: which jobs wait, run, ended and how, and how long the rest will take."""

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_lab import reading
from moe_lab.cli import printable
from moe_lab.study.folder import Job, Sweep
from moe_lab.study.results import BAD, state_of

TAIL = 4096  # bytes that hold the last row of timing.jsonl
MOST_ROWS = 20  # of jobs in a table; the rest are counted
STYLES = {"completed": "green", "running": "cyan", "waiting": "dim", "preempted": "yellow"}


@dataclass(frozen=True)
class Seen:
    job: Job
    state: str
    why: str | None
    share: float  # of its steps that are done
    left: float | None  # seconds that it says it has left
    loss: float | None


def name(job: Job) -> str:
    """A job for people: its arm, if it is not the only one, and its seed."""
    return printable(f"seed={job.seed}" if job.arm == "default" else f"{job.arm} seed={job.seed}")


class View:
    """Looks at a sweep's jobs; what has ended is read once."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep
        self.ended: dict[str, Seen] = {}

    def look(self, started: set[str] | None = None) -> list[Seen]:
        """started: the jobs that a driver runs now; others that ended are remembered."""
        return [self._one(job, job.dir in (started or ())) for job in self.sweep.jobs]

    def forget(self, job: Job) -> None:
        self.ended.pop(job.dir, None)

    def _one(self, job: Job, started: bool) -> Seen:
        if job.dir in self.ended and not started:
            return self.ended[job.dir]
        run_dir = self.sweep.folder / job.dir
        state, why = state_of(run_dir)
        if started and state in ("waiting", *BAD, "preempted", "completed"):
            state = "running"  # its process is up and has not said so yet
        row = _last_row(run_dir / "timing.jsonl")
        steps, eta = row.get("step", 0), row.get("eta")
        seen = Seen(job, state, why, _share(steps, row, run_dir), eta if state == "running" else None, _loss(run_dir))
        if state not in ("running", "waiting") and not started:
            self.ended[job.dir] = seen
        return seen


def _share(step: int, row: dict[str, Any], run_dir: Path) -> float:
    steps = _summary(run_dir / "env.json").get("steps")
    return min(1.0, step / steps) if isinstance(steps, int) and steps > 0 and isinstance(step, int) else 0.0


def _loss(run_dir: Path) -> float | None:
    found = _summary(run_dir / "summary.json")
    held = found.get("eval")
    loss = held.get("loss") if isinstance(held, dict) else None
    loss = found.get("loss") if loss is None else loss
    return loss if isinstance(loss, float) else None


def _summary(path: Path) -> dict[str, Any]:
    try:
        return reading.json_file(path)
    except (OSError, ValueError):
        return {}


def _last_row(path: Path) -> dict[str, Any]:
    """The last whole row of a file that may be growing."""
    try:
        reading.must_be_regular(path)
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            whole = [line for line in file.read(TAIL).split(b"\n")[:-1] if line]
        return reading.row(whole[-1], path.name) if whole else {}
    except (OSError, ValueError):
        return {}


def counts(seen: list[Seen]) -> str:
    """`3 of 10 completed, 1 failed, 2 running`."""
    states = Counter(one.state for one in seen)
    first = [f"{states.pop('completed', 0)} of {len(seen)} completed"]
    return ", ".join(first + [f"{many} {state}" for state, many in sorted(states.items())])


def span(seconds: float) -> str:
    """`45 s`, `3 min`, `2 h 10 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def screen(sweep: Sweep, seen: list[Seen], eta: float | None = None, every: bool = False) -> RenderableType:
    """Counts, a table of the jobs that run, ended badly or came last, and the time left."""
    done = sum(one.share if one.state == "running" else one.state == "completed" for one in seen)
    left = f", about {span(eta)} left" if eta is not None else ""
    head = Text(printable(f"{sweep.name}: {counts(seen)}{left}"), style="bold")
    bar = Table.grid()  # a bar alone ends without a new line
    bar.add_row(ProgressBar(total=max(1, len(seen)), completed=done, width=60))
    return Group(head, bar, _table(seen, every))


def _table(seen: list[Seen], every: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("job", "state", "steps", "loss", ""):
        table.add_column(title, overflow="fold")
    rows = seen if every else _worth_showing(seen)
    for one in rows:
        style = STYLES.get(one.state, "red")
        loss = "" if one.loss is None else f"{one.loss:.4f}"
        words = (name(one.job), one.state, f"{one.share:.0%}", loss, _note(one))
        table.add_row(*(Text(printable(word), style=style if i == 1 else "") for i, word in enumerate(words)))
    if len(seen) > len(rows):
        table.add_row(Text(f"and {len(seen) - len(rows)} more", style="dim"))
    return table


def _note(one: Seen) -> str:
    if one.why and one.state != "completed":
        return one.why
    return f"{span(one.left)} left" if one.left is not None else ""


def _worth_showing(seen: list[Seen]) -> list[Seen]:
    order = {"running": 0, **dict.fromkeys(BAD, 1), "preempted": 2, "waiting": 3}
    chosen = sorted(range(len(seen)), key=lambda i: (order.get(seen[i].state, 4), i))[:MOST_ROWS]
    return [seen[i] for i in sorted(chosen)]


class Pace:
    """The time that is left, from the work that was done since the beginning."""

    def __init__(self, seen: list[Seen]):
        self.began, self.work = time.monotonic(), _work(seen)

    def left(self, seen: list[Seen], todo: set[str]) -> float | None:
        """Seconds for those of `todo`; None before anything was done."""
        done = _work(seen) - self.work
        rest = sum(1 - one.share for one in seen if one.job.dir in todo)
        return (time.monotonic() - self.began) * rest / done if done > 0 else None


def _work(seen: list[Seen]) -> float:
    return sum(one.share for one in seen)
