"""What came of a sweep's jobs, read back without torch: for whoever judges, reports or watches."""

import fcntl
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lab import reading, recorded, slurm
from moe_lab.recorded import Recorded, flat
from moe_lab.run import NOT_NUMBERS, read_status
from moe_lab.study import folder as folders
from moe_lab.study.folder import JOB, SWEEP, Job, Sweep

ENDED = ("completed", "diverged", "failed", "oom", "timeout", "preempted")
BAD = {"diverged": "diverged", "failed": "failed", "oom": "ran out of memory", "timeout": "took too long"}
KILLED = "its process was killed; it goes on from its last checkpoint"


@dataclass(frozen=True)
class Result:
    job: Job
    run: Recorded | None  # None: it has written no config yet, or what it wrote is damaged
    state: str  # completed | diverged | failed | oom | timeout | preempted | running | waiting
    why: str | None  # one line, where it ended in another way than completed
    claims: str | None  # the claims' hash when it ran
    sources: str | None  # of the code that it ran on


@dataclass(frozen=True)
class Results:
    sweep: Sweep
    results: list[Result]
    notes: list[str]  # to be said first by whoever shows them

    def by_arm(self) -> dict[str, dict[int, Recorded]]:
        """Completed runs: arm -> seed -> run, arms in the study's order."""
        order = list(self.sweep.study.arms) if self.sweep.study else []
        found: dict[str, dict[int, Recorded]] = {arm: {} for arm in order}
        for result in sorted(self.results, key=lambda result: result.job.seed):
            if result.state == "completed" and result.run is not None:
                found.setdefault(result.job.arm, {})[result.job.seed] = result.run
        return {arm: runs for arm, runs in found.items() if runs}


def load(folder: Path) -> Results:
    """A sweep's folder, a folder of run directories, or one run directory. ValueError where it is none of these."""
    if (folder / SWEEP).exists():
        sweep = folders.read(folder)
        return _results(sweep, [_result(job, folder / job.dir) for job in sweep.jobs])
    if (folder / "config.yaml").is_file():
        return of_runs([folder])
    below = sorted(path.parent for path in folder.glob("*/config.yaml")) if folder.is_dir() else []
    if not below:
        raise ValueError(f"{folder}: neither a sweep (it has no {SWEEP}) nor a run directory (it has no config.yaml)")
    return of_runs(below, folder)


def of_runs(runs: list[Path], folder: Path | None = None) -> Results:
    """Runs that no sweep asked for, with an arm for each config."""
    top = folder or Path(os.path.commonpath([path.absolute() for path in runs]))
    given, damaged = list[tuple[tuple[Job, str], dict[str, Any]]](), dict[Path, ValueError]()
    for path in runs:
        try:
            given.append(_given(path, recorded.read(path)))
        except ValueError as error:
            damaged[path] = error
    if damaged and not (folder and given):  # one that was named, or all there is
        raise next(iter(damaged.values()))
    runs, jobs = [path for path in runs if path not in damaged], list[Job]()
    for path, ((job, router), _), told in zip(runs, given, _told_apart([keys for _, keys in given]), strict=True):
        arm = router if told == "default" else told
        same = sum(other.seed == job.seed and other.arm.split(" (run ")[0] == arm for other in jobs)
        arm = f"{arm} (run {same + 1})" if same else arm
        jobs.append(Job(arm, job.seed, job.overrides, os.path.relpath(path, top)))
    name = top.name if folder or len(runs) == 1 else f"{len(runs)} runs"
    found = [_result(job, path) for job, path in zip(jobs, runs, strict=True)]
    found += [_unread(path, top, error) for path, error in damaged.items()]
    return _results(Sweep(top, name, None, None, [result.job for result in found], ""), found)


def _unread(path: Path, top: Path, error: ValueError) -> Result:
    """A directory that holds no run any more, listed under its name."""
    where = os.path.relpath(path, top)
    return Result(Job(where, 0, [], where), None, "failed", " ".join(str(error).split()), None, None)


def _given(path: Path, run: Recorded) -> tuple[tuple[Job, str], dict[str, Any]]:
    """Of a run: its job and router, and its config with dotted keys."""
    with reading.of_a_run(path):
        keys = flat({key: value for key, value in run.config.items() if key not in (*NOT_NUMBERS, "seed")})
        router, seed = str(run.config["router"]["name"]), run.config["seed"]
        if type(seed) is not int:
            raise ValueError("seed is no whole number")
        overrides = reading.content(path / "overrides.txt", reading.LARGEST_YAML).decode().splitlines()
    return (Job("", seed, overrides, ""), router), keys


def _told_apart(configs: list[dict[str, Any]]) -> list[str]:
    """An arm for each config: what was chosen, and what differs of the options that all of them have."""
    everywhere = set.intersection(*map(set, configs))
    kept = [{k: v for k, v in keys.items() if k.endswith(".name") or k in everywhere} for keys in configs]
    spelled = [Job("", 0, [f"{k.removesuffix('.name')}={v}" for k, v in keys.items()], "") for keys in kept]
    return [job.arm for job in folders.labelled(spelled)]


def state_of(run_dir: Path) -> tuple[str, str | None]:
    """What state a job is in, and why where it ended badly; from its status.json, whatever else is there."""
    status = read_status(run_dir)
    if status is None:
        damaged = (run_dir / "status.json").exists()
        return ("failed", "status.json is damaged") if damaged else ("waiting", None)
    state, why = status.get("status"), status.get("error")
    if state in ENDED:
        return str(state), str(why) if why else None
    if state not in ("created", "running"):
        return "failed", "status.json is not what a run writes"
    return ("running", None) if _alive(run_dir, status) else ("preempted", KILLED)


def _alive(run_dir: Path, status: dict[str, Any]) -> bool:
    """Whether the process that wrote a status still works; another machine's is believed, unless Slurm knows better."""
    pid = status.get("pid")
    if status.get("host", platform.node()) != platform.node():
        written = (run_dir / "status.json").stat().st_mtime
        queue = slurm.QUEUE.at(written) if "slurm" in status else None
        return queue is None or status["slurm"] in queue
    if type(pid) is not int or not _exists(pid):
        return False
    try:
        with (run_dir / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _result(job: Job, run_dir: Path) -> Result:
    state, why = state_of(run_dir)
    claims, sources, run = None, None, None
    try:
        marked = reading.json_file(run_dir / JOB) if (run_dir / JOB).exists() else {}
        claims, sources = (_text(marked.get(key)) for key in ("claims_sha256", "sources_sha256"))
        run = recorded.read(run_dir) if (run_dir / "config.yaml").is_file() else None
        sources = _text(run.env.get("sources")) or sources if run else sources
    except (OSError, ValueError) as error:
        state, why = "failed", " ".join(str(error).split())
    return Result(job, run, state, why, claims, sources)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _results(sweep: Sweep, results: list[Result]) -> Results:
    return Results(sweep, results, list(_notes(sweep, results)))


def _notes(sweep: Sweep, results: list[Result]) -> Iterator[str]:
    ran = [result for result in results if result.run is not None]
    versions = sorted({str(result.sources or "unknown")[:8] for result in ran})
    if len(versions) > 1:
        told = f"{len(versions)} versions of moe-lab's sources ({', '.join(versions)})"
        yield f"these runs come from {told}; --fresh runs the older ones again"
    if sweep.study and (edited := sum(result.claims not in (None, sweep.claims) for result in ran)):
        yield f"the claims were changed after {edited} of {len(ran)} runs began"
    for state, words in BAD.items():
        if bad := [f"{result.job.arm} seed {result.job.seed}" for result in results if result.state == state]:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            yield f"{len(bad)} of {len(results)} runs {words}: {', '.join(bad[:3])}{more}"
    if unfinished := sum(result.state in ("preempted", "running", "waiting") for result in results):
        yield f"{unfinished} of {len(results)} runs are not finished"
