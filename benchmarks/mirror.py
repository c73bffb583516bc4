"""What W&B takes from a run, well or in any way of failing: the training loop with it against `logger=[]`.

Waiting is the question, so: wall seconds of the loop; its CPU seconds; and, where the system tells (Linux), what it
worked and waited, wall seconds without those in which it was ready to run and another program had the processor. A run
of the default model with a row every step; its limits at the end are cut short, for the end is not timed here.
"""

import contextlib
import logging
import os
import resource
import shutil
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import AA, goal, single_thread, table, timing
from moe_lab import train
from moe_lab.sinks import mirror
from moe_lab.sinks import wandb as sink

ROUNDS, STEPS = 7, 32
RUN = [f"steps={STEPS}", "log_every=1", "eval_every=16", "eval_tokens=2048", "checkpoint.every=1000", "device=cpu"]
ALONE = "logger=[]"
TARGET = 1 / 0.95
SHORT = ["train", "fast=true", "device=cpu"]


@contextlib.contextmanager
def server(behaviour: str) -> Iterator[str]:
    """The address of a server that answers 500, a byte per second, or nothing at all."""
    over = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            if behaviour == "500":
                self.wfile.write(b"HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n")
            for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n" if behaviour == "slow" else b"":
                self.wfile.write(bytes([byte]))
                if over.wait(1.0):
                    return
            over.wait()

    class Quiet(socketserver.ThreadingTCPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """The client gave up."""

    with Quiet(("127.0.0.1", 0), Handler) as tcp:
        threading.Thread(target=tcp.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{tcp.server_address[1]}"
        over.set()
        tcp.shutdown()


@contextlib.contextmanager
def online(behaviour: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(server(behaviour)) if behaviour != "refuses" else "http://127.0.0.1:9"
        os.environ |= {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": url}
        yield
        os.environ["WANDB_MODE"] = "offline"


@contextlib.contextmanager
def harmed(signal_: signal.Signals) -> Iterator[None]:
    """wandb-core gets the signal at step 6; waiting for it to be there is not the loop's time."""
    row, cores = sink.Wandb.row, []

    def harm(self: sink.Wandb, values: dict[str, Any], told: dict[str, Any]) -> None:
        if values["step"] == 6:
            with counted(-1):
                cores.append(core_of(self))
                os.kill(cores[0], signal_)
        row(self, values, told)

    sink.Wandb.row = harm  # pyright: ignore[reportAttributeAccessIssue]
    yield
    sink.Wandb.row = row
    with contextlib.suppress(ProcessLookupError):
        os.kill(cores[0], signal.SIGKILL)


def core_of(wandb: sink.Wandb) -> int:
    assert wandb.child is not None
    while not list(wandb.run_dir.glob("wandb/*run-*/*.wandb")):
        time.sleep(0.02)
    return int(subprocess.run(["pgrep", "-P", str(wandb.child.pid)], capture_output=True, text=True).stdout)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    opened, disks = sink.Wandb.open, []

    def on_a_full_disk(self: sink.Wandb, run_dir: Path, *rest: Any) -> None:
        disks.append(run_dir / "wandb")
        disks[0].mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disks[0]], check=True)
        opened(self, run_dir, *rest)

    sink.Wandb.open = on_a_full_disk  # pyright: ignore[reportAttributeAccessIssue]
    yield
    sink.Wandb.open = opened
    subprocess.run(["umount", "--lazy", disks[0]], check=True)


def clocks() -> dict[str, float]:
    now = {"wall": time.perf_counter(), "CPU": time.process_time()}
    with contextlib.suppress(FileNotFoundError):
        queued = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
        now["work and waiting"] = now["wall"] - queued
    return now


spent = dict.fromkeys(clocks(), 0.0)


@contextlib.contextmanager
def counted(sign: int = 1) -> Iterator[None]:
    began = clocks()
    yield
    for name, now in clocks().items():
        spent[name] += sign * (now - began[name])


def config(*overrides: str) -> dict[str, Any]:
    from hydra import compose, initialize
    from omegaconf import OmegaConf

    with initialize("../conf", version_base="1.3"):
        cfg = OmegaConf.to_container(compose("train", overrides=[*RUN, *overrides]), resolve=True)
    assert isinstance(cfg, dict)
    return {str(key): value for key, value in cfg.items()}


def one_run(
    cfg: dict[str, Any], circumstances: Callable[[], contextlib.AbstractContextManager[None]]
) -> dict[str, float]:
    """What each clock says of the training loop of a run."""
    spent.update(dict.fromkeys(spent, 0.0))
    folder = Path(tempfile.mkdtemp())
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), circumstances():
            train.train(cfg, folder / "run", [], {})
    finally:
        shutil.rmtree(folder)
    return dict(spent)


def loop_times() -> None:
    """Every way of failing in each round, beside the run without a logger; ratios within a round."""
    mirror.DEADLINE, sink.INIT_TIMEOUT, sink.FINISH_TIMEOUT = 1.0, 60.0, 1.0
    alone, mirrored = config("logger=[]"), config("logger=[wandb]")
    ways: dict[str, tuple[dict[str, Any], Callable[[], contextlib.AbstractContextManager[None]]]] = {
        ALONE: (alone, contextlib.nullcontext),
        "offline": (mirrored, contextlib.nullcontext),
        **{f"server {how}": (mirrored, lambda how=how: online(how)) for how in ("refuses", "silent", "500", "slow")},
        "service killed": (mirrored, lambda: harmed(signal.SIGKILL)),
        "service stopped": (mirrored, lambda: harmed(signal.SIGSTOP)),
        **({"full disk": (mirrored, full_disk)} if os.geteuid() == 0 else {}),
        AA: (alone, contextlib.nullcontext),
    }
    names, found = list(ways), {name: [] for name in ways}
    for round_ in range(-1, ROUNDS):
        for i in range(len(names)):
            name = names[(round_ + i) % len(names)]
            times = one_run(*ways[name])
            if round_ >= 0:
                found[name].append(times)
    targets = {name: TARGET for name in names if name not in (ALONE, AA)}
    for clock in spent:
        seconds = {name: [times[clock] for times in found[name]] for name in names}
        timings = [timing(name, seconds[name], seconds[ALONE]) for name in names]
        table(f"the loop of {STEPS} steps, {clock}", timings, targets)


def cpu_of(*overrides: str) -> float:
    """CPU seconds of a short run from the shell, with every process that it starts."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, "-m", "moe_lab", *SHORT, f"hydra.run.dir={folder}/run", *overrides]
        subprocess.run(words, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def added_cpu() -> None:
    pairs = [(cpu_of("logger=[]"), cpu_of("logger=[wandb]")) for _ in range(ROUNDS)]
    added = sorted(with_ - without for without, with_ in pairs)
    middle = added[len(added) // 2]
    print(f"\nCPU seconds that W&B adds to a short run ({' '.join(SHORT)}), all processes")
    print(f"  {middle:.2f} s  [{added[0]:.2f}, {added[-1]:.2f}]" + goal(middle, 2.0, " s"))


def main() -> None:
    single_thread()
    logging.disable()
    train.Training._steps = counted()(train.Training._steps)
    os.environ |= {"WANDB_MODE": "offline"}
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("MOE_LAB_CACHE", cache)
        added_cpu()
        loop_times()


if __name__ == "__main__":
    main()
