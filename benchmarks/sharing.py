"""How many runs share one machine: N processes that train at once, each its own model, and their total speed.

Each is the training loop with its rows at the usual interval, on one CPU thread. Wall seconds of a common window; what
one process takes of the GPU's memory is beside it, its CUDA context apart.
"""

import multiprocessing
import os
import tempfile
import time
from multiprocessing.synchronize import Barrier
from typing import Any

from benchmarks.harness import device

MODELS = {"nano": ["model=nano"], "small": ["model=small"]}
COUNTS = {"cpu": (1, 2), "cuda": (1, 2, 4, 8)}
SECONDS = 10.0
WARM_UP = 3  # updates
PATIENCE = 300.0  # seconds for all to get ready


def train_for(seconds: float, overrides: list[str], begin: Barrier, done: Any) -> None:
    """Train in this process, from when all are ready; put (tokens/s, bytes of GPU memory) into `done`."""
    import torch

    from benchmarks.step import loop

    torch.set_num_threads(1)
    trained = loop(*overrides)
    s = trained.parts.settings

    def update(step: int) -> None:
        trained.step(step)
        if (step + 1) % s.log_every == 0:
            trained.row(step + 1, s.log_every)

    for step in range(WARM_UP):
        update(step)
    trained.diverged_at()  # waits for the device
    begin.wait(PATIENCE)
    step, began = WARM_UP, time.perf_counter()
    while step == WARM_UP or time.perf_counter() < began + seconds:
        update(step)
        step += 1
    trained.diverged_at()
    rate = (step - WARM_UP) * s.batch_size * s.seq_len / (time.perf_counter() - began)
    done.put((rate, torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0))


def together(n: int, seconds: float, overrides: list[str]) -> list[tuple[float, int]]:
    """What each of n processes reached."""
    spawn = multiprocessing.get_context("spawn")
    begin, done = spawn.Barrier(n), spawn.Queue()
    processes = [spawn.Process(target=train_for, args=(seconds, overrides, begin, done), daemon=True) for _ in range(n)]
    for process in processes:
        process.start()
    found = [done.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join()
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("MOE_LAB_CACHE", cache)
        for name, overrides in MODELS.items():
            print(f"\n{name}")
            alone = 0.0
            for n in COUNTS[device().type]:
                rates, memory = zip(*together(n, SECONDS, overrides), strict=True)
                alone = alone or sum(rates)
                print(
                    f"  {n} at once: {sum(rates):>10,.0f} tokens/s in all, {sum(rates) / alone:5.2f} of one alone, "
                    f"slowest {min(rates):,.0f}, GPU memory of each {max(memory) / 2**20:,.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
