"""A sweep's folder with made-up runs in it, for tests of what reads one: no process is started."""

from pathlib import Path
from typing import Any

import yaml
from made_rows import made_rows, made_summary

from moe_lab import durable
from moe_lab.run import encode
from moe_lab.sources import sources
from moe_lab.study.files import read_study
from moe_lab.study.folder import Job, Sweep, mark, write

TINY = Path(__file__).with_name("tiny_study.yaml")


def made_sweep(folder: Path, seeds: int = 2) -> Sweep:
    """The tiny study, asked for but not run."""
    study, _ = read_study(TINY)
    jobs = [
        Job(arm, seed, [*study.settings, *overrides, f"seed={seed}"], f"{arm}-{seed}")
        for arm, overrides in study.arms.items()
        for seed in range(seeds)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    return write(Sweep(folder, "tiny", "quick", study, jobs, "moe-lab sweep tiny scale=quick"))


def made_run(sweep: Sweep, job: Job, status: str = "completed", error: str | None = None, **env: Any) -> Path:
    """A job's directory as a run of this status leaves it."""
    mark(sweep, job)
    run, rows = sweep.folder / job.dir, made_rows()
    config = {"seed": job.seed, "router": {"name": "switch"}, "balance": {}, "steps": 6}
    durable.write(run / "config.yaml", yaml.safe_dump(config).encode())
    durable.write(run / "overrides.txt", "".join(f"{o}\n" for o in job.overrides).encode())
    durable.write_json(run / "env.json", {"sources": sources(), "choices": {}, **env})
    durable.write_json(run / "status.json", {"status": status, "step": 6, "error": error, "attempt": 1, "pid": 0})
    durable.write(run / "metrics.jsonl", b"".join(encode(row) for row, _ in rows))
    durable.write(run / "timing.jsonl", b"".join(encode(clocks) for _, clocks in rows))
    durable.write_json(run / "summary.json", made_summary(status=status))
    return run
