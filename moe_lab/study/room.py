"""How many jobs fit at a time: one per core, and on a GPU as many as its memory holds, which the first job shows."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHARE = 0.9  # of a GPU's memory; the rest is for what a job takes now and then
ROWS = 3  # of the first job, before its memory is taken for what a job needs


def cores() -> int:
    """Processes that run beside each other on the CPU, each with as many threads as OMP_NUM_THREADS says."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return max(1, mine // int(threads)) if threads.isdecimal() and int(threads) else mine


def gpu_memory() -> tuple[float, float] | None:
    """(used, total) MiB of the first GPU that jobs may see; None without one."""
    if not shutil.which("nvidia-smi") or (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) == "":
        return None
    first = (visible or "0").split(",")[0]
    words = ["nvidia-smi", "-i", first, "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
        used, total = map(float, done.stdout.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return used, total


class Room:
    """`jobs()` at a time; where none were asked for and jobs use a GPU, one until its memory has been seen."""

    def __init__(self, asked: int | None, cfgs: list[Mapping[str, Any]]):
        on_gpu = asked is None and any(cfg["device"] != "cpu" for cfg in cfgs)
        self.before = gpu_memory() if on_gpu else None
        self.most = asked or cores()
        self.known = 1 if self.before else self.most

    def jobs(self) -> int:
        return self.known

    def see(self, running: list[Path]) -> None:
        """Look at the GPU while the first job alone runs, once it has written a few rows."""
        if self.before is None or not running or _rows(running[0]) < ROWS or (now := gpu_memory()) is None:
            return
        used, total = self.before
        self.known = fitting(now[0] - used, SHARE * total - used, self.most)
        self.before = None


def _rows(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def fitting(each: float, free: float, most: int) -> int:
    """Jobs of `each` MiB that fit into `free` MiB, one at least."""
    return max(1, min(most, int(free // each) if each > 0 else most))
