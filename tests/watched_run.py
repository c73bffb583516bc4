"""`python watched_run.py REPORT JSON train ...`: the command line, with W&B's mirror watched and hurt on the way.

REPORT gets, as JSON, the seconds of training, those of it that the mirror took from the loop, and those from the last
step to the end. The second argument sets the mirror's limits and names what happens at step 20: see `HARM`.

What the mirror took from the loop is the whole time of a call that waited for something, that is, gave the processor
up by itself, and else the processor time that the call used: where other programs keep the machine busy, a thread is
sent to the back of the queue now and then, wherever it stands, and that says nothing about the mirror.
"""

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_lab import cli, train
from moe_lab.sinks import mirror
from moe_lab.sinks import wandb as sink

spent: dict[str, float] = {"training": 0.0, "mirror": 0.0, "end": 0.0}


@contextlib.contextmanager
def counted(what: str, sign: int = 1) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        spent[what] += sign * (time.monotonic() - began)


def core_of(wandb: sink.Wandb) -> int:
    """The process id of wandb-core, once the mirror has opened its run."""
    assert wandb.child is not None
    diary = wandb.run_dir / "wandb/debug.log"
    while not diary.exists() or "run started, returning control" not in diary.read_text():
        time.sleep(0.02)
    found = subprocess.run(["pgrep", "-P", str(wandb.child.pid)], capture_output=True, text=True, check=True)
    return int(found.stdout)


def kill(wandb: sink.Wandb) -> None:
    os.kill(core_of(wandb), signal.SIGKILL)


def stop(wandb: sink.Wandb) -> None:
    core = core_of(wandb)
    os.kill(core, signal.SIGSTOP)
    atexit.register(os.kill, core, signal.SIGKILL)  # nobody else would wake it up


def fill(wandb: sink.Wandb) -> None:
    """Leave no byte on the disk of wandb's folder."""
    core_of(wandb)
    with contextlib.suppress(OSError), open(wandb.run_dir / "wandb/filler", "wb", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass


def stop_and_leave(wandb: sink.Wandb) -> None:
    stop(wandb)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


HARM = {"kill": kill, "stop": stop, "fill": fill, "stop and Ctrl-C twice": stop_and_leave}


def watch(harm: str | None, at: int) -> None:
    """Time the run; do harm once, however many runs there are."""
    steps, end, told = train.Training._steps, train.Training._end, sink.Wandb.row

    def timed_steps(self: train.Training) -> None:
        with counted("training"):
            steps(self)

    def timed_end(self: train.Training, error: BaseException | None) -> dict[str, Any]:
        with counted("end"):
            return end(self, error)

    def timed_row(self: sink.Wandb, row: dict[str, Any], timing: dict[str, Any]) -> None:
        nonlocal harm
        if harm and row["step"] == at:
            asked, harm = harm, None
            with counted("training", -1):
                HARM[asked](self)
        waits, began, used = _waits(), time.monotonic(), time.thread_time()
        told(self, row, timing)
        waited = _waits() > waits
        spent["mirror"] += time.monotonic() - began if waited else time.thread_time() - used

    train.Training._steps, train.Training._end, sink.Wandb.row = timed_steps, timed_end, timed_row


def _waits() -> int:
    """How often this thread gave the processor up by itself."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def on_a_disk_of_its_own(size: str) -> None:
    """wandb's folder on a small disk, which the caller unmounts."""
    opened = sink.Wandb.open

    def open_(self: sink.Wandb, run_dir: Path, cfg: dict[str, Any], facts: dict[str, Any]) -> None:
        (run_dir / "wandb").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", run_dir / "wandb"], check=True)
        opened(self, run_dir, cfg, facts)

    sink.Wandb.open = open_


def main() -> int:
    report, told, *sys.argv[1:] = sys.argv[1:]
    given = json.loads(told)
    sink.INIT_TIMEOUT = sink.FINISH_TIMEOUT = given.get("limit", sink.INIT_TIMEOUT)
    mirror.DEADLINE = given.get("deadline", mirror.DEADLINE)
    if given.get("disk"):
        on_a_disk_of_its_own(given["disk"])
    if given.get("without_wandb"):
        sys.modules["wandb"] = None  # pyright: ignore[reportArgumentType]
    watch(given.get("harm"), 20)
    try:
        return cli.main()
    finally:
        Path(report).write_text(json.dumps(spent))


if __name__ == "__main__":
    sys.exit(main())
