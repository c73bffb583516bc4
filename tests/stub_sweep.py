"""`python stub_sweep.py train -m ...`: the command line, with a stub in the place of training in each job's process.

The environment says how it behaves. SECONDS: how long a job takes. HARM: by seed, what it does instead. LEAKS: the
driver writes down what it holds after each job.
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from moe_lab import cli, durable
from moe_lab.run import read_status
from moe_lab.sources import sources
from moe_lab.study import driver, screen, worker


def job(words: list[str], log: Path, run_dir: Path, cwd: str, env: dict[str, str]) -> None:
    """In the place of worker._job: a process that is set up, stopped and locked like any job's, and trains nothing."""
    worker.set_up(log, run_dir, cwd, env)
    seed = next(word for word in words if word.startswith("seed=")).removeprefix("seed=")
    attempt = (read_status(run_dir) or {"attempt": 0})["attempt"] + 1
    state: dict[str, Any] = {"step": 0, "error": None, "attempt": attempt, "pid": os.getpid()}

    def write(status: str, error: str | None = None) -> None:
        durable.write_json(run_dir / "status.json", state | {"status": status, "error": error})

    def stop(number: int, frame: object) -> None:
        write("preempted")
        sys.exit(75)

    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        signal.signal(signal.SIGTERM, stop)
        write("running")
        if harm := json.loads(os.environ.get("HARM", "{}")).get(seed):
            try:
                misbehave(harm)
            except Exception as error:
                write("oom" if harm == "oom" else "failed", f"{type(error).__name__}: {error}")
                sys.exit(1)
        time.sleep(float(os.environ.get("SECONDS", "0")))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        durable.write(run_dir / "config.yaml", b"{}")
        facts = {"config_hash": run_dir.name.partition("-")[0], "sources": sources(), "steps": 1}
        durable.write_json(run_dir / "env.json", facts)
        durable.write_json(run_dir / "summary.json", {"loss": 1.0})
        with open("ran.txt", "a") as ran:
            ran.write(f"{seed}\n")
        write("completed")


def misbehave(harm: str) -> None:
    if harm == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if harm == "exit":
        sys.exit(7)
    if harm == "raise":
        raise RuntimeError("on purpose")
    if harm == "oom":
        raise MemoryError
    if harm == "refuse":
        print("moe-lab: on purpose")
        sys.exit(4)
    if harm == "deaf":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1)


def held() -> dict[str, int]:
    """What this process holds: open files, children that ended and were not waited for, memory."""
    status = Path("/proc/self/status").read_text().split()
    zombies = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        zombies += words[0] == "Z" and words[1] == str(os.getpid())
    files = len(os.listdir("/proc/self/fd"))
    return {"files": files, "zombies": zombies, "kib": int(status[status.index("VmRSS:") + 1])}


class Watched(screen.Screen):
    def ended(self, *given: Any) -> None:
        super().ended(*given)
        with open("leaks.jsonl", "a") as log:
            log.write(json.dumps(held()) + "\n")


class Child(worker.Child):
    target = staticmethod(job)


if __name__ == "__main__":
    from moe_lab.study import sweeping

    worker.Child, worker.HEAVY = Child, ["moe_lab.study.worker"]
    driver.GRACE = 0.5
    if os.environ.get("LEAKS"):
        sweeping.Screen = Watched
    sys.exit(cli.main())
