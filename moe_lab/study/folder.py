"""A sweep's folder: sweep.json says what was asked, and a directory for each job says what came of it.

A job is a command line, `moe-lab train OVERRIDES hydra.run.dir=FOLDER/DIR`. job.json in its directory is written before
it starts: of which arm it is, and under which claims and sources it ran.
"""

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from moe_lab import durable, places, reading
from moe_lab.reading import Damaged
from moe_lab.secrecy import redact
from moe_lab.sources import sources
from moe_lab.study.files import Study, claims_sha256, dump, key_of

SWEEP, JOB = "sweep.json", "job.json"
FORMAT = 1


@dataclass(frozen=True)
class Job:
    arm: str  # the study's, and what of the grid goes beyond it: `switch`, or `switch optim.lr=0.1`
    seed: int
    overrides: list[str]
    dir: str  # below the sweep's folder


@dataclass(frozen=True)
class Sweep:
    folder: Path
    name: str
    scale: str | None  # of a study
    study: Study | None  # None: an ad-hoc grid
    jobs: list[Job]
    command: str  # that asked for it last

    @property
    def claims(self) -> str | None:
        """Their hash as they stand in sweep.json."""
        return claims_sha256(self.study) if self.study else None


def command_line(verb: str, words: list[str]) -> str:
    """What was typed, to be typed again."""
    return shlex.join(["moe-lab", verb, *map(redact, words)])


def labelled(jobs: list[Job]) -> list[Job]:
    """Jobs of an ad-hoc grid: an arm is what sets it apart from the others, but for the seed."""
    told = [_last(job.overrides) for job in jobs]
    common = set.intersection(*(set(o) for o in told)) if told else set()
    apart = [" ".join(o for o in overrides if o not in common and key_of(o) != "seed") for overrides in told]
    return [replace(job, arm=arm or "default") for job, arm in zip(jobs, apart, strict=True)]


def _last(overrides: list[str]) -> list[str]:
    """Of overrides of one key only the last."""
    return list({key_of(o): o for o in overrides}.values())


def unite(old: list[Job], new: list[Job]) -> list[Job]:
    """The jobs of both. A job that is asked for again, by its place or by arm and seed, is the new one; but one of a
    study's arms stays that where a wider grid comes upon the same run: claims look for it under that name."""
    before = {(job.dir, job.arm): job for job in old}
    new = [before.get((job.dir, job.arm.split(" ")[0]), job) if " " in job.arm else job for job in new]
    places, names = {job.dir for job in new}, {(job.arm, job.seed) for job in new}
    return [job for job in old if job.dir not in places and (job.arm, job.seed) not in names] + new


def write(sweep: Sweep) -> Sweep:
    """Put it into its folder and return it, with the jobs that were there before."""
    there = read(sweep.folder).jobs if (sweep.folder / SWEEP).exists() else []
    if sweep.study is None:  # labels depend on all of them
        new = {job.dir for job in sweep.jobs}
        jobs = labelled([job for job in there if job.dir not in new] + sweep.jobs)
        jobs = list({(job.arm, job.seed): job for job in jobs}.values())
    else:
        jobs = unite(there, sweep.jobs)
    sweep = replace(sweep, jobs=jobs)
    durable.write_json(sweep.folder / SWEEP, _encoded(sweep))
    return sweep


def _encoded(sweep: Sweep) -> dict[str, Any]:
    told = {"format": FORMAT, "name": sweep.name, "scale": sweep.scale, "command": sweep.command}
    told |= {"claims_sha256": sweep.claims, "study": dump(sweep.study) if sweep.study else None}
    return told | {"jobs": [asdict(job) | {"overrides": [redact(o) for o in job.overrides]} for job in sweep.jobs]}


class _Job(BaseModel, strict=True):
    arm: str
    seed: int
    overrides: list[str]
    dir: str


class _Sweep(BaseModel, strict=True):
    format: int
    name: str
    scale: str | None
    command: str
    study: Study | None
    jobs: list[_Job]


def read(folder: Path) -> Sweep:
    """ValueError where the folder holds no sweep, Damaged in one line where sweep.json is not what a sweep writes."""
    try:
        found = _Sweep.model_validate(reading.json_file(folder / SWEEP))
    except FileNotFoundError:
        raise ValueError(f"{folder}: no sweep (it has no {SWEEP})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Damaged(f"{folder}/{SWEEP}: is not what a sweep writes ({where}: {first['msg']})") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{folder}/{SWEEP}: damaged ({' '.join(str(error).split())})") from None
    if found.format != FORMAT:
        raise Damaged(f"{folder}/{SWEEP}: format {found.format}; this moe-lab reads {FORMAT}")
    if problems := [line for job in found.jobs for line in places.below("dir", job.dir)]:
        raise Damaged(f"{folder}/{SWEEP}: {problems[0]}")
    jobs = [Job(job.arm, job.seed, job.overrides, job.dir) for job in found.jobs]
    return Sweep(folder, found.name, found.scale, found.study, jobs, found.command)


def mark(sweep: Sweep, job: Job) -> None:
    """Write job.json before the job starts. One that has rows may have begun under other claims: it keeps its own."""
    where = sweep.folder / job.dir
    metrics = where / "metrics.jsonl"
    if (where / JOB).exists() and metrics.exists() and metrics.stat().st_size:
        return
    where.mkdir(parents=True, exist_ok=True)
    told = {"arm": job.arm, "seed": job.seed, "claims_sha256": sweep.claims, "sources_sha256": sources()}
    durable.write_json(where / JOB, told | {"overrides": [redact(o) for o in job.overrides]})
