"""A run directory and its life: created -> running -> completed | diverged | failed | oom | preempted.

metrics.jsonl is the truth and holds nothing that a clock made; everything a clock made is in timing.jsonl.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import platform
import signal
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import yaml

from moe_lab import __version__, durable, places, reading, slurm
from moe_lab.secrecy import hide, redact, redacted
from moe_lab.sources import sources

log = logging.getLogger(__name__)
Config = Mapping[str, Any]
# Keys that say where a run lives or whom it tells, and nothing about its numbers.
NOT_NUMBERS = ("output_dir", "sweep", "resume", "checkpoint", "wandb", "fast")
VERSIONS = ("torch", "numpy", "hydra-core", "omegaconf", "pydantic", "safetensors", "wandb", "datasets", "rich")


class Stop(Exception):
    """Ends the program with one line and an exit code: 1 failed, 2 usage, 3 diverged, 4 refused, 75 resumable."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code, self.message = code, message


class Run:
    """`with Run(dir, cfg, ...) as run:` holds the directory's lock and status from opening to the end."""

    def __init__(self, folder: Path, cfg: Config, overrides: list[str], choices: Mapping[str, str]):
        self.folder, self.cfg, self.overrides, self.choices = folder, cfg, overrides, choices
        self.checkpoints = folder / "checkpoints"
        self.stop_signal: str | None = None
        self.step = 0

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        if problem := places.leads_out(self.folder):
            raise Stop(4, problem)
        self._lock = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(4, f"{self.folder}: another process is running here") from None
        before = read_status(self.folder)
        self.attempt, self.step = (before["attempt"] + 1, before["step"]) if before else (1, 0)
        self.began = False
        if self._holds_results() and not same_run(self.folder, self.cfg):
            self._lock.close()
            raise Stop(4, f"{self.folder}: holds a run of another config; choose another directory")
        durable.sweep(self.folder)
        if before is None:
            self._status("created")
        self._metrics = open(self.folder / "metrics.jsonl", "ab", buffering=0)
        self._timing = open(self.folder / "timing.jsonl", "ab", buffering=0)
        self._handlers = {s: signal.signal(s, self._on_signal) for s in slurm.SIGNALS}
        self.started = time.monotonic()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            for s, handler in self._handlers.items():
                signal.signal(s, handler)
            for handle in (self._metrics, self._timing):
                handle.close()
            # An attempt that was refused before it began leaves what an earlier one said.
            if self.began or self.attempt == 1:
                self._status(*outcome(error))
        except OSError:
            if error is None:
                raise
            log.warning("status.json could not be written")  # what came first is what must be told
        finally:
            self._lock.close()

    def _holds_results(self) -> bool:
        metrics = self.folder / "metrics.jsonl"
        return self.checkpoints.exists() or (metrics.exists() and metrics.stat().st_size > 0)

    def start(self, facts: Mapping[str, Any], step: int) -> dict[str, Any]:
        """Record config, machine and what was built, and return the latter; the run counts as running from here."""
        env = environment() | {"config_hash": config_hash(self.cfg), "choices": dict(self.choices)} | redacted(facts)
        with reading.of_a_run(self.folder):
            changed = moved(self.folder, env)
        for name, then, now in changed:
            log.warning("%s was %s and is now %s: the numbers may differ in their last digits", name, then, now)
        self.began, self.step = True, step
        durable.write(self.folder / "config.yaml", yaml.safe_dump(redacted(self.cfg), sort_keys=False).encode())
        durable.write(self.folder / "overrides.txt", "".join(f"{redact(o)}\n" for o in self.overrides).encode())
        durable.write_json(self.folder / "env.json", env)
        self._status("running")
        return env

    def row(self, row: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl and its clocks to timing.jsonl."""
        write_whole(self._metrics, encode(row))
        write_whole(self._timing, encode(timing))

    def goes_on_with(self, **arithmetic: str) -> None:
        """Stop(4) where an earlier attempt ran in other arithmetic (device, dtype), before any of it is touched."""
        if not (self.folder / "env.json").exists():
            return
        old = reading.json_file(self.folder / "env.json")
        for key, now in arithmetic.items():
            if old[key] != now:
                begun = f"this run began with {key}={old[key]} and would go on with {key}={now}"
                raise Stop(4, f"{self.folder}: {begun}; say {key}={old[key]}")

    def rows(self) -> list[dict[str, Any]]:
        """The rows written so far."""
        return read_rows(self.folder / "metrics.jsonl")

    def elapsed(self) -> float:
        """Seconds of training that earlier attempts took."""
        timing = [row.get("elapsed") for row in lenient_rows(self.folder / "timing.jsonl")]
        return max((e for e in timing if isinstance(e, int | float)), default=0.0)

    def sync(self) -> tuple[int, str]:
        """Make the rows durable and return the length and the sha256 of metrics.jsonl."""
        for file in (self._metrics, self._timing):
            with durable.naming(file.name):
                os.fsync(file.fileno())
        content = (self.folder / "metrics.jsonl").read_bytes()
        return len(content), hashlib.sha256(content).hexdigest()

    def lacks(self, size: int, digest: str) -> str | None:
        """What is wrong with the rows that a checkpoint of that size and sha256 of metrics.jsonl counts on, or None."""
        if not 0 <= size <= os.fstat(self._metrics.fileno()).st_size:
            return "rows are missing in metrics.jsonl"
        with (self.folder / "metrics.jsonl").open("rb") as rows:
            content = rows.read(size)
        same = hashlib.sha256(content).hexdigest() == digest
        return None if same else "its rows in metrics.jsonl are not what they were"

    def rewind(self, size: int) -> None:
        """Forget rows beyond a checkpoint: a resumed run writes them again."""
        os.truncate(self._metrics.fileno(), size)
        known = {row["step"] for row in self.rows()}
        kept = [encode(row) for row in lenient_rows(self.folder / "timing.jsonl") if row["step"] in known]
        self._timing.close()
        durable.write(self.folder / "timing.jsonl", b"".join(kept))
        self._timing = open(self.folder / "timing.jsonl", "ab", buffering=0)  # noqa: SIM115

    def summarise(self, summary: Mapping[str, Any]) -> None:
        durable.write_json(self.folder / "summary.json", finite(summary))

    def _status(self, status: str, error: str | None = None) -> None:
        state = {"status": status, "step": self.step, "error": error, "attempt": self.attempt}
        durable.write_json(self.folder / "status.json", state | slurm.this_process())

    def _on_signal(self, number: int, frame: object) -> None:
        """Once training has begun only a flag: the update is finished first. Before, there is nothing to save."""
        if not self.began:
            raise Stop(75, f"stopped by {signal.Signals(number).name} before it began; start it again")
        if self.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_signal = signal.Signals(number).name


OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def outcome(error: BaseException | None) -> tuple[str, str | None]:
    """The status that a run ends with, and the error in one line."""
    if error is None:
        return "completed", None
    if isinstance(error, Stop):
        return {3: "diverged", 75: "preempted"}.get(error.code, "failed"), hide(error.message)
    text = hide(f"{type(error).__name__}: {error}".rstrip(": "))
    if isinstance(error, KeyboardInterrupt):
        return "preempted", text
    full = isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)
    return "oom" if full else "failed", text


def same_run(folder: Path, cfg: Config) -> bool:
    """Whether the run recorded in a directory has the numbers of `cfg`; a directory without a record has not."""
    try:
        return config_hash(reading.yaml_file(folder / "config.yaml")) == config_hash(cfg)
    except (FileNotFoundError, ValueError):
        return False


def moved(folder: Path, env: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(what, then, now) for surroundings on which the last digits depend and which changed since the last attempt."""
    try:
        old = reading.json_file(folder / "env.json")
    except FileNotFoundError:
        return []
    then, now = ({"threads": e["threads"], "torch": e["versions"]["torch"], "cpu": e["cpu"]} for e in (old, env))
    return [(key, then[key], now[key]) for key in then if then[key] != now[key]]


def write_whole(file: io.FileIO, content: bytes) -> None:
    """One write for all of it: a disk that takes a part is full, and a torn row must not be built upon."""
    with durable.naming(file.name):
        if file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def encode(row: Mapping[str, Any]) -> bytes:
    """One line of JSON; a number that is not finite is no JSON and stands as null."""
    return (json.dumps(finite(row), allow_nan=False, separators=(",", ":")) + "\n").encode()


def finite(value: Any) -> Any:
    """The same value with None for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list) else value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl file; a torn last line is left out."""
    return reading.rows(path)


def lenient_rows(path: Path) -> list[dict[str, Any]]:
    """The readable rows of a file that nothing depends on."""
    found = []
    with contextlib.suppress(ValueError, FileNotFoundError):
        for line in reading.lines(path):
            with contextlib.suppress(ValueError):
                found.append(reading.row(line, path.name))
    return found


def read_status(folder: Path) -> dict[str, Any] | None:
    try:
        found = reading.json_file(folder / "status.json")
        return found if type(found.get("attempt")) is int and type(found.get("step")) is int else None
    except (FileNotFoundError, ValueError):
        return None


def config_hash(cfg: Config) -> str:
    """sha256 (16 hex digits) of the part of a config that decides a run's numbers."""
    numbers = redacted({key: value for key, value in cfg.items() if key not in NOT_NUMBERS})
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Versions, machine, threads and git state: what a number may depend on beside the config."""
    import torch

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "moe_lab": __version__,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "platform": platform.platform(),
        "cpu": {"count": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()},
        "cuda": device,
        "threads": torch.get_num_threads(),
        "sources": sources(),
        "git": git_state(Path(__file__).parent),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether the work tree differs from it; None outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD") if git("ls-files", "--", __file__) else ""
        return (
            {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))} if commit else None
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
