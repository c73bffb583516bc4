"""A whole update of a model with MoE layers against the same model with dense layers of the same active size.

The training loop as `moe-lab train` runs it: batch, forward, losses, backward, AdamW, observers, no row. 4 layers,
d=256, E=8, k=1, byte vocabulary, 4096 tokens; and the default model with its own batch. On a GPU: bf16 and 16,384
tokens, no targets.
"""

import os
import tempfile
from typing import Any

from benchmarks.harness import device, interleave, single_thread, table, throughput
from moe_lab.assemble import assemble
from moe_lab.cost import cost
from moe_lab.loop import Loop
from moe_lab.observe.recorder import Recorder

MODEL = ["model.dim=256", "model.layers=4", "experts.num=8", "experts.width=512", "seq_len=512"]
COMMON = ["logger=[]", "router=switch", "balance=[switch]"]
REPEATS = {"cpu": 1, "cuda": 10}  # updates per round
TARGETS = {"float32": 1.06, "bfloat16": 1.25}
WARM_UP = 20  # steps in which the heap finds its size: page faults that a run pays once, in its first seconds


def config(*overrides: str) -> dict[str, Any]:
    """A run's checked config, composed by Hydra as a user's would be."""
    from hydra import compose, initialize
    from omegaconf import OmegaConf

    from moe_lab.config import check

    with initialize("../conf", version_base="1.3"):
        cfg = OmegaConf.to_container(compose("train", overrides=[*COMMON, *overrides]), resolve=True)
    assert isinstance(cfg, dict)
    plain = {str(key): value for key, value in cfg.items()}
    assert check(plain) == [], check(plain)
    return plain


def loop(*overrides: str) -> Loop:
    p = assemble(config(*overrides))
    vocabulary = p.data.vocab_size + p.objective.extra_tokens
    return Loop(p, Recorder(p.model.moes, vocabulary, len(p.data.domains), p.settings.seq_len, p.device))


def main() -> None:
    single_thread()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("MOE_LAB_CACHE", cache)
        if device().type == "cuda":
            compare("4 layers, d=256, bfloat16", {}, *MODEL, "batch_size=32", "dtype=bfloat16")
            compare("the default model and batch (nano), bfloat16", {})
            return
        for dtype, target in TARGETS.items():
            compare(f"4 layers, d=256, {dtype}", {"moe": target}, *MODEL, "batch_size=8", f"dtype={dtype}")
        compare("the default model and batch (nano), float32", {})


def compare(title: str, targets: dict[str, float], *overrides: str) -> None:
    loops = {"dense": loop(*overrides, "model.moe=false"), "moe": loop(*overrides)}
    calls = {name: lambda each=each: each.step(0) for name, each in loops.items()}
    timings = interleave(calls, "dense", repeats=REPEATS[device().type], warm_up=WARM_UP)
    table(title, timings, targets)
    for timing in timings:
        if timing.name in loops:
            p = loops[timing.name].parts
            tokens = p.settings.batch_size * p.settings.seq_len
            print(throughput(timing.name, tokens, timing.seconds, cost(p)["flops_per_token"]), flush=True)


if __name__ == "__main__":
    main()
