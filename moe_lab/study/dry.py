"""What a sweep will take, from a few measured steps of each arm in a folder that is taken away again (--dry-run)."""

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_lab import reading
from moe_lab.config import build
from moe_lab.run import Stop
from moe_lab.settings import Settings, quick
from moe_lab.study.driver import Driver, Task, log_of
from moe_lab.study.files import key_of
from moe_lab.study.folder import Job, Sweep
from moe_lab.study.show import name, span
from moe_lab.study.worker import last_words

STEPS = 10  # of each arm; each of the first ten ends a row
WARM = 3  # of them that count as starting up


@dataclass(frozen=True)
class Need:
    """What a job takes."""

    start: float  # seconds before the first step and after the last
    step: float  # seconds
    evaluation: float  # seconds
    seconds: float
    size: int  # bytes on the disk


class Clock:
    """In the place of a driver's screen: how long each job took."""

    def __init__(self, sweep: Sweep):
        self.sweep, self.seconds = sweep, dict[str, float]()

    def started(self, job: Job) -> None: ...

    def tick(self, running: set[str], todo: set[str]) -> None: ...

    def ended(self, job: Job, state: str, why: str | None, seconds: float) -> None:
        if state != "completed":
            raise Stop(1, f"{state}: {name(job)}: {why or last_words(log_of(self.sweep, job))}")
        self.seconds[job.dir] = seconds


def needs(jobs: list[Job], cfgs: Mapping[str, dict[str, Any]], more: list[str], at_once: int) -> dict[str, Need]:
    """By arm. Stop(1) where a job of one cannot even begin."""
    arms: dict[str, Job] = {}
    for job in jobs:
        arms.setdefault(job.arm, job)
    with tempfile.TemporaryDirectory(prefix="moe-lab-dry-run-") as folder:
        few = {arm: replace(job, overrides=_few(job, cfgs[job.dir])) for arm, job in arms.items()}
        sweep = Sweep(Path(folder), "dry-run", None, None, list(few.values()), "")
        clock = Clock(sweep)
        Driver(sweep, [Task(job, cfgs[job.dir]) for job in sweep.jobs], clock, more, at_once).go()
        return {arm: _need(Path(folder) / job.dir, cfgs[job.dir], clock.seconds[job.dir]) for arm, job in few.items()}


def _few(job: Job, cfg: Mapping[str, Any]) -> list[str]:
    """The overrides of a job of a few steps, with one evaluation and one checkpoint, that uploads nothing."""
    ours = {"steps": STEPS, "eval_every": STEPS, "checkpoint.every": STEPS, "log_every": 1}
    ours |= {"wandb.mode": "disabled"} if "wandb" in cfg else {}
    return [o for o in job.overrides if key_of(o) not in ours] + [f"{key}={value}" for key, value in ours.items()]


def _need(run_dir: Path, cfg: dict[str, Any], wall: float) -> Need:
    cfg = quick(cfg) if cfg["fast"] else cfg
    settings: Settings = build("root", {"name": "train"} | {key: cfg[key] for key in Settings.__dataclass_fields__})
    elapsed = [row["elapsed"] for row in reading.rows(run_dir / "timing.jsonl")]
    warm = min(WARM, len(elapsed) - 2)
    step = (elapsed[-2] - elapsed[warm - 1]) / (len(elapsed) - 1 - warm) if warm > 0 else elapsed[-1] / len(elapsed)
    evaluation = max(0.0, elapsed[-1] - elapsed[-2] - step) if len(elapsed) > 1 else 0.0
    start = max(0.0, wall - elapsed[-1])
    evaluations = math.ceil(settings.steps / settings.eval_every)
    seconds = start + settings.steps * step + evaluations * evaluation
    checkpoints = min(settings.checkpoint.keep, math.ceil(settings.steps / settings.checkpoint.every))
    rows = sum(map(settings.logs_at, range(1, settings.steps + 1)))
    per_row = sum((run_dir / f"{name}.jsonl").stat().st_size for name in ("metrics", "timing")) / len(elapsed)
    saved = max(_size(path) for path in (run_dir / "checkpoints").iterdir())
    return Need(start, step, evaluation, seconds, round(rows * per_row + checkpoints * saved))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def told(
    jobs: list[Job], finished: int, needed: Mapping[str, Need], cfgs: Mapping[str, Any], at_once: int
) -> Iterator[str]:
    """jobs: those that would run."""
    yield f"{len(jobs) + finished} jobs, {finished} of them completed before; {at_once} at a time"
    width = max(map(len, needed))
    for arm, need in needed.items():
        steps = next(cfgs[job.dir]["steps"] for job in jobs if job.arm == arm)
        parts = f"{need.start:.1f} s to start, {steps} steps of {need.step * 1000:.0f} ms, evaluations of "
        yield f"{arm:<{width}}  {span(need.seconds)} a job: {parts}{need.evaluation:.1f} s; {_bytes(need.size)}"
    seconds, size = (sum(getattr(needed[job.arm], what) for job in jobs) for what in ("seconds", "size"))
    yield f"about {span(max(seconds / at_once, max(n.seconds for n in needed.values())))} and {_bytes(size)} in all"


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
