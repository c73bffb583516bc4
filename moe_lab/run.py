"""A run directory and its life: created -> running -> completed | diverged | failed | oom | preempted.

metrics.jsonl is the truth and holds nothing that a clock made; everything a clock made is in timing.jsonl.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import yaml

from moe_lab import __version__, durable

Config = Mapping[str, Any]
SECRET = re.compile(r"(?i)(^|[_.-])(api_?key|key|token|secret|password|passwd|credentials?)$")
USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
# Keys that say where a run lives or whom it tells, and nothing about its numbers.
NOT_NUMBERS = ("output_dir", "study", "resume", "checkpoint", "wandb", "fast")
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
        self._lock = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(4, f"{self.folder}: another process is running here") from None
        self.attempt = (read_status(self.folder) or {}).get("attempt", 0) + 1
        self._status("created")
        durable.write(self.folder / "config.yaml", yaml.safe_dump(redacted(self.cfg), sort_keys=False).encode())
        durable.write(self.folder / "overrides.txt", "".join(f"{redact(o)}\n" for o in self.overrides).encode())
        self._metrics = open(self.folder / "metrics.jsonl", "ab", buffering=0)
        self._timing = open(self.folder / "timing.jsonl", "ab", buffering=0)
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self.started = time.monotonic()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        for s, handler in self._handlers.items():
            signal.signal(s, handler)
        for handle in (self._metrics, self._timing):
            handle.close()
        self._status(_status_of(error), None if error is None else f"{type(error).__name__}: {error}".rstrip(": "))
        self._lock.close()

    def start(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Record the machine and what was built, and return it; the run counts as running from here."""
        env = environment() | {"config_hash": config_hash(self.cfg), "choices": dict(self.choices)} | dict(facts)
        durable.write_json(self.folder / "env.json", env)
        self._status("running")
        return env

    def row(self, row: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl and its clocks to timing.jsonl."""
        self.step = row["step"]
        self._metrics.write(encode(row))
        self._timing.write(encode(timing))

    def rows(self) -> list[dict[str, Any]]:
        """The rows written so far."""
        return read_rows(self.folder / "metrics.jsonl")

    def sync(self) -> int:
        """Make the rows durable and return the length of metrics.jsonl."""
        os.fsync(self._metrics.fileno())
        return os.fstat(self._metrics.fileno()).st_size

    def rewind(self, size: int) -> None:
        """Forget rows beyond a checkpoint: a resumed run writes them again."""
        os.truncate(self._metrics.fileno(), size)
        known = {row["step"] for row in self.rows()}
        kept = [row for row in read_rows(self.folder / "timing.jsonl") if row["step"] in known]
        self._timing.truncate(0)
        for row in kept:
            self._timing.write(encode(row))

    def summarise(self, summary: Mapping[str, Any]) -> None:
        durable.write_json(self.folder / "summary.json", finite(summary))

    def _status(self, status: str, error: str | None = None) -> None:
        state = {"status": status, "step": self.step, "error": error, "attempt": self.attempt, "pid": os.getpid()}
        durable.write_json(self.folder / "status.json", state)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_signal = signal.Signals(number).name


def _status_of(error: BaseException | None) -> str:
    if error is None:
        return "completed"
    if isinstance(error, Stop):
        return {3: "diverged", 75: "preempted"}.get(error.code, "failed")
    if isinstance(error, KeyboardInterrupt):
        return "preempted"
    return "oom" if isinstance(error, MemoryError) or "out of memory" in str(error).lower() else "failed"


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
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]


def read_status(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "status.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def config_hash(cfg: Config) -> str:
    """sha256 (16 hex digits) of the part of a config that decides a run's numbers."""
    numbers = {key: value for key, value in cfg.items() if key not in NOT_NUMBERS}
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]


def redact(text: str) -> str:
    """An override without its secret."""
    key, equals, _ = text.partition("=")
    return f"{key}=[redacted]" if equals and SECRET.search(key) else USER_INFO.sub("[redacted]@", text)


def redacted(node: Any) -> Any:
    """A config without values of secret-looking keys or user names and passwords in URLs."""
    if isinstance(node, Mapping):
        return {k: "[redacted]" if SECRET.search(str(k)) and v is not None else redacted(v) for k, v in node.items()}
    if isinstance(node, list):
        return [redacted(v) for v in node]
    return USER_INFO.sub("[redacted]@", node) if isinstance(node, str) else node


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
