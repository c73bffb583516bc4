"""What observing takes of a training step, and what a row takes once it is spread over its steps.

Judged by CPU time inside the recorder over that of the step around it: a few tenths of a percent are lost in the noise
of a ratio of whole steps, which stands beside it. A row is everything from the last sum to the line on the terminal
(not a live screen): metrics, verdicts with a full history, JSON, writing. Evaluations are no part of it.
"""

import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

from benchmarks.harness import goal, interleave, single_thread, table
from benchmarks.step import MODEL, WARM_UP, config, loop
from moe_lab.assemble import assemble
from moe_lab.observe.thresholds import DEAD_WINDOW, SETTLED
from moe_lab.run import Run
from moe_lab.train import Training

P = ParamSpec("P")
ROUNDS = 9
CPU = ["device=cpu"]
CASES = {  # overrides; percent of the step that observing it, and that everything, may take
    "4 layers, d=256, float32": ([*MODEL, *CPU, "batch_size=8"], 0.3, 1.0),
    "4 layers, d=256, bfloat16": ([*MODEL, *CPU, "batch_size=8", "dtype=bfloat16"], 0.6, 1.0),
    "the default model and batch (nano), float32": (CPU, 3.0, 5.0),
}


def clocked(call: Callable[P, None], seconds: list[float]) -> Callable[P, None]:
    """The same call, which adds its CPU seconds to a list."""

    def timed(*args: P.args, **kwargs: P.kwargs) -> None:
        begin = time.process_time()
        call(*args, **kwargs)
        seconds.append(time.process_time() - begin)

    return timed


def trained(cfg: dict[str, Any]) -> tuple[float, float, float]:
    """Median seconds of a step, of the observing in it, and of a row, in a run that writes a row at every step."""
    steps, observed, rows = seconds = [], [], []
    with tempfile.TemporaryDirectory() as folder, Run(Path(folder), cfg, [], {}) as run:
        training = Training(run, assemble(cfg))
        training.loop.step = clocked(training.loop.step, steps)
        training.loop.recorder.see = clocked(training.loop.recorder.see, observed)
        write = clocked(training._row, rows)

        def row(done: int) -> None:
            write(done)
            if done == WARM_UP + 1:  # the first that a judge counts: give it a full history to look back on
                for _ in range(DEAD_WINDOW):
                    training.judge.see(training.last)

        training._row = row
        with contextlib.redirect_stdout(io.StringIO()):
            training.go()
        assert all(layer.evidence for layer in training.judge.layers)
    step, see, write_row = (statistics.median(x[WARM_UP + 1 : -1]) for x in seconds)  # the last row has an evaluation
    return step, see, write_row


def compare(title: str, overrides: list[str], most_each: float, most_all: float) -> None:
    assert WARM_UP >= SETTLED
    log_every = config(*overrides)["log_every"]
    steps = f"steps={WARM_UP + ROUNDS + 2}"
    step, observed, row = trained(config(*overrides, steps, "log_every=1", "eval_every=1000", "eval_tokens=1"))
    each, all_ = 100 * observed / step, 100 * (observed + row / log_every) / step
    blind, seeing = loop(*overrides), loop(*overrides)
    blind.recorder.see = lambda view: None
    calls = {"blind": lambda: blind.step(0), "observed": lambda: seeing.step(0)}
    table(title, interleave(calls, "blind", ROUNDS, clock=time.process_time))  # on the heap of the run before
    print(f"  observing  {observed * 1e3:.3f} ms in {step * 1e3:.2f} ms: {each:.3f} %" + goal(each, most_each, " %"))
    print(f"  a row      {row * 1e3:.3f} ms every {log_every} steps; all: {all_:.3f} %" + goal(all_, most_all, " %"))


def main() -> None:
    single_thread()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("MOE_LAB_CACHE", cache)
        for title, (overrides, most_each, most_all) in CASES.items():
            compare(title, overrides, most_each, most_all)


if __name__ == "__main__":
    main()
