"""A sweep from its checked jobs to its last result: one driver per folder, what is finished stays, the rest runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lab import durable, slurm
from moe_lab.cli import complain, printable
from moe_lab.hydra_jobs import Asked, Checked
from moe_lab.reading import json_file
from moe_lab.run import Stop, config_hash
from moe_lab.settings import quick
from moe_lab.sources import sources
from moe_lab.study import costs, dry, launched, measure, worker
from moe_lab.study import folder as folders
from moe_lab.study.driver import Driver, Task, alone, log_of
from moe_lab.study.files import Study, key_of
from moe_lab.study.folder import SWEEP, Job, Sweep
from moe_lab.study.room import cores
from moe_lab.study.screen import Screen


@dataclass(frozen=True)
class Wishes:
    """How the jobs are to run."""

    jobs: int | None = None  # at a time
    timeout: float | None = None  # minutes
    fresh: bool = False  # run again what other sources have finished
    flags: tuple[str, ...] = ()  # of every job's command line
    task: Callable[..., Any] | None = None  # a job, for a launcher of Hydra's


def carry_out(sweep: Sweep, asked: Asked, checked: list[Checked], wishes: Wishes) -> int:
    """Run what is not finished, and return the exit code. Stop where another sweeper is here or arms are unequal."""
    if asked.through_hydra and (wishes.jobs or wishes.timeout):
        raise Stop(2, "--jobs and --timeout are for moe-lab's own processes; submitit has hydra.launcher.timeout_min=")
    cfgs = {job.dir: job.cfg for job in checked}
    if (sweep.folder / SWEEP).exists():
        _must_be_the_same(folders.read(sweep.folder), sweep)
    if sweep.study and _unfinished(sweep, cfgs, wishes):
        guard(sweep.study, arm_costs(sweep.jobs, cfgs))
    with alone(sweep.folder):
        todo = {job.dir for job in _unfinished(sweep, cfgs, wishes)}
        ours = [job.dir for job in sweep.jobs]
        _tell_what_stays([sweep.folder / name for name in ours if name not in todo], len(ours))
        if todo and (queued := slurm.submitted(sweep.folder)):
            told = f"Slurm still has jobs of this sweep: {', '.join(queued[:3])}{', ...' * (len(queued) > 3)}"
            raise Stop(4, f"{sweep.folder}: {told}; moe-lab watch {sweep.folder} shows them, scancel ends them")
        sweep = folders.write(sweep)
        jobs = [job for job in sweep.jobs if job.dir in todo]
        if asked.through_hydra:
            for job in jobs:
                _make_way(sweep, job)
            return launched.go(sweep, asked, jobs, {job.dir: job for job in checked}, wishes.task)
        return _drive(sweep, asked, [Task(job, cfgs[job.dir]) for job in jobs], wishes)


def dry_run(sweep: Sweep, asked: Asked, checked: list[Checked], wishes: Wishes) -> int:
    """Say what the sweep will take. It is written nowhere."""
    cfgs = {job.dir: job.cfg for job in checked}
    todo = _unfinished(sweep, cfgs, wishes)
    if sweep.study and todo:
        guard(sweep.study, arm_costs(sweep.jobs, cfgs))
    at_once = min(wishes.jobs or cores(), max(1, len(todo)))
    labelled = todo if sweep.study else folders.labelled(todo)
    needed = dry.needs(labelled, cfgs, [*wishes.flags, *asked.hydra_words], at_once) if todo else {}
    for line in dry.told(labelled, len(sweep.jobs) - len(todo), needed, cfgs, at_once) if todo else ["nothing to run"]:
        print(printable(line), flush=True)
    return 0


def _unfinished(sweep: Sweep, cfgs: Mapping[str, dict[str, Any]], wishes: Wishes) -> list[Job]:
    done = {job.dir: finished(sweep.folder / job.dir, cfgs[job.dir]) for job in sweep.jobs}
    stays = {name for name, by in done.items() if by and (by == sources() or not wishes.fresh)}
    return [job for job in sweep.jobs if job.dir not in stays]


def _tell_what_stays(run_dirs: list[Path], many: int) -> None:
    if others := sum(finished(run_dir, None) != sources() for run_dir in run_dirs):
        told = f"{others} of {many} jobs were run by other sources of moe-lab, so that their results may not compare"
        complain([f"{told}; --fresh runs them again"])
    if run_dirs:
        print(f"{len(run_dirs)} of {many} jobs were completed before", flush=True)


def _drive(sweep: Sweep, asked: Asked, tasks: list[Task], wishes: Wishes) -> int:
    timeout = wishes.timeout * 60 if wishes.timeout else None
    more = [*wishes.flags, *asked.hydra_words]
    with Screen(sweep, lambda job: log_of(sweep, job)) as screen:
        code = Driver(sweep, tasks, screen, more, wishes.jobs, timeout, lambda job: _make_way(sweep, job)).go()
    if screen.failed:
        complain([f"{screen.failed} of {len(tasks)} runs failed"])
    return code


def _make_way(sweep: Sweep, job: Job) -> None:
    """A finished job that runs again, since other sources made it, starts from nothing."""
    if finished(sweep.folder / job.dir, None):
        durable.remove(sweep.folder / job.dir)


def finished(run_dir: Path, cfg: Mapping[str, Any] | None) -> str | None:
    """The sources that completed a job of this config; None where it is not finished. Without a config: of any."""
    try:
        status, env = (json_file(run_dir / name) for name in ("status.json", "env.json"))
    except (OSError, ValueError):
        return None
    ours = cfg is None or env.get("config_hash") == config_hash(quick(dict(cfg)) if cfg["fast"] else cfg)
    return str(env.get("sources")) if status.get("status") == "completed" and ours else None


def arm_costs(jobs: list[Job], cfgs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What each arm costs, of its first job."""
    first = {job.arm: cfgs[job.dir] for job in reversed(jobs)}
    order = list(dict.fromkeys(job.arm for job in jobs))
    return dict(zip(order, worker.ask(costs.of_configs, [first[arm] for arm in order]), strict=True))


def guard(study: Study, found: Mapping[str, Mapping[str, float]]) -> None:
    """Show what the arms cost. Stop(2) where they differ without a label, or a claim is about what is no number."""
    if unjudgeable := worker.ask(measure.refused, [claim.metric for claim in study.claims]):
        raise Stop(2, "\n".join(f"study.claims: {line}" for line in unjudgeable))
    for line in costs.lines(found):
        print(printable(line))
    for quantity, why in study.unequal.items():
        print(printable(f"unequal {costs.QUANTITIES[quantity]}: {why}"), flush=True)
    if wrong := list(costs.mismatches(found, study.unequal)):
        raise Stop(2, "\n".join(wrong))


def _must_be_the_same(there: Sweep, new: Sweep) -> None:
    """Stop(4) where the folder's jobs would be compared with ones that were asked for with other settings."""
    if there.study is None and new.study is None:
        return
    if (there.study is None) != (new.study is None) or there.name != new.name or there.scale != new.scale:
        raise Stop(4, f"{new.folder}: holds another sweep ({there.command}); sweep.name= names another folder")
    known = {job.arm: _settings(job) for job in there.jobs}
    for job in new.jobs:
        before, now = known.get(job.arm, {}), _settings(job)
        if before and before != now:
            key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
            differ = f"{before.get(key, f'no {key}')}, this asks for {now.get(key, f'no {key}')}"
            raise Stop(4, f"{new.folder}: its arm {job.arm} has {differ}; sweep.name= names another folder")


def _settings(job: Job) -> dict[str, str]:
    return {key_of(o): o for o in job.overrides if key_of(o) != "seed" and not key_of(o).startswith("sweep.")}
