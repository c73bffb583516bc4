"""`moe-lab ...` in a process of its own, for what ends a process: signals, and file operations that fail.

The processes are forked from one that has imported everything, so that each costs what the command itself does.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from faults import Fault

ROOT = Path(__file__).parents[1]
HEAVY = ["moe_lab.train", "moe_lab.hydra_app", "moe_lab.verbs.train", "moe_lab.verbs.resume"]


@dataclass(frozen=True)
class Ended:
    code: int  # -9: killed
    said: str  # to stdout and stderr
    fault: str  # what the fault hit, or nothing


@dataclass
class Running:
    """A process that was started; stop it or wait for it."""

    words: tuple[str, ...]
    out: Path
    fault: Fault | None = None
    env: dict[str, str] = field(default_factory=dict)
    process: ForkServerProcess = field(init=False)

    def __post_init__(self) -> None:
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(HEAVY)
        given = (self.words, self.out, self.fault, self.env)
        self.process = forks.Process(target=_child, args=given, daemon=True)  # a test that fails leaves none behind
        self.process.start()

    def alive(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        """SIGKILL to the process group."""
        assert self.process.pid is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # so early that it has no group of its own yet, or it has ended
            self.process.kill()

    def end(self) -> Ended:
        """Wait for its end."""
        self.process.join(timeout=120)
        code = self.process.exitcode
        assert code is not None, f"{self.words} hangs"
        hit = self.out.with_suffix(".fault")
        return Ended(code, self.out.read_text() if self.out.exists() else "", hit.read_text() if hit.exists() else "")


class Shell:
    """The same through the command line, with all that starting Python costs."""

    def __init__(self, out: Path, *words: str):
        self.out = out
        line, env = [sys.executable, "-m", "moe_lab", *words], os.environ | {"PYTHONPATH": str(ROOT)}
        with out.open("w") as file:
            self.process = subprocess.Popen(line, stdout=file, stderr=file, env=env, start_new_session=True)

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> Ended:
        return Ended(self.process.wait(timeout=120), self.out.read_text(), "")


def start(out: Path, *words: str, **more: Any) -> Running:
    """Start `moe-lab WORDS`; what it says goes to the file `out`. more: fault, env."""
    for old in (out, out.with_suffix(".fault")):
        old.unlink(missing_ok=True)
    return Running(words, out, **more)


def _child(words: tuple[str, ...], out: Path, fault: Fault | None, env: dict[str, str]) -> None:
    from moe_lab.cli import main

    os.setsid()
    to = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(to, 1)
    os.dup2(to, 2)
    os.environ.update(env)
    sys.argv = ["moe-lab", *words]
    if fault is not None:
        fault.install(out.with_suffix(".fault"))
    sys.exit(main())
