"""How everything here is timed: variants interleaved round by round, ratios within a round, medians over rounds.

One thread and its CPU seconds, so that other work on the machine shifts all variants alike; on CUDA, wall seconds
up to the end of the device's work. Every table has an A/A row, the reference against itself: the noise floor.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROUNDS = 9
AA = "A/A"
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # dense bf16 FLOP/s, by NVIDIA's data sheets


@dataclass(frozen=True)
class Timing:
    """Median seconds of a variant, and the median and quartiles of its ratio to the reference of the same round."""

    name: str
    seconds: float
    ratio: float
    low: float
    high: float


def single_thread() -> None:
    """One thread, and the allocator as training sets it: the same for every variant of this process."""
    import torch

    from moe_lab.allocator import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()


def device() -> "torch.device":
    """The GPU where there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock() -> float:
    """CPU seconds of this process; with a GPU, wall seconds up to the end of its work."""
    if device().type == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def interleave(
    variants: Mapping[str, Callable[[], object]],
    reference: str,
    rounds: int = ROUNDS,
    repeats: int = 1,
    clock: Callable[[], float] = clock,
    warm_up: int = 1,
) -> list[Timing]:
    """Time `repeats` calls of every variant in each round, in an order that rotates, after `warm_up` rounds."""
    calls = dict(variants) | {AA: variants[reference]}
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-warm_up, rounds):
        for i in range(len(names)):
            name = names[(round_ + i) % len(names)]
            begin = clock()
            for _ in range(repeats):
                calls[name]()
            if round_ >= 0:
                seconds[name].append((clock() - begin) / repeats)
    return [timing(name, seconds[name], seconds[reference]) for name in names]


def timing(name: str, seconds: Sequence[float], reference: Sequence[float]) -> Timing:
    ratios = sorted(a / b for a, b in zip(seconds, reference, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Timing(name, statistics.median(seconds), middle, low, high)


def table(title: str, timings: Sequence[Timing], targets: Mapping[str, float] | None = None) -> None:
    """Print one block: milliseconds, ratio, quartiles, and the target with whether it was reached."""
    print(f"\n{title}")
    width = max(len(t.name) for t in timings)
    for t in timings:
        line = f"  {t.name:<{width}}  {t.seconds * 1e3:9.2f} ms  {t.ratio:7.3f}  [{t.low:.3f}, {t.high:.3f}]"
        if targets and t.name in targets:
            line += goal(t.ratio, targets[t.name])
        print(line, flush=True)


def goal(value: float, most: float, unit: str = "") -> str:
    return f"  target {most:g}{unit}: {'reached' if value <= most else 'NOT REACHED'}"


def throughput(name: str, tokens: float, seconds: float, flops_per_token: float) -> str:
    """Tokens and FLOPs per second, and their share of the GPU's peak where that is known.

    Analytic FLOPs (moe_lab/cost.py): forward and twice that backward, weights that a token does not use left out.
    """
    import torch

    rate = tokens / seconds
    flops = 3 * flops_per_token * rate
    peak = PEAK.get(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    share = f", {flops / peak:.2%} of {peak / 1e12:.0f} TFLOP/s (MFU)" if peak else ""
    return f"  {name}: {rate:,.0f} tokens/s, {flops / 1e12:.3f} TFLOP/s{share}"


def surroundings() -> str:
    """The machine, the versions and the commit, one line each."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    changes = _git("status", "--porcelain", "--untracked-files=no")
    lines = {
        "date": str(date.today()),
        "commit": _git("rev-parse", "--short", "HEAD") + (" with changes" if changes else ""),
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}; {device}",
        "load": f"{os.getloadavg()[0]:.1f} when it began",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
    return "\n".join(f"{key}: {value}" for key, value in lines.items())


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip()
