"""A whole update of a model with MoE layers against the same model with dense layers of the same active size.

The training loop as `moe-lab train` runs it: batch, forward, losses, backward, AdamW, observers, no row. 4 layers,
d=256, E=8, k=1, byte vocabulary, 4096 tokens; and the default model with its own batch.
"""

import os
import tempfile

from benchmarks.harness import interleave, single_thread, table
from moe_lab.loop import Loop, Parts
from moe_lab.observe.recorder import Recorder

MODEL = ["model.dim=256", "model.layers=4", "experts.num=8", "experts.width=512", "batch_size=8", "seq_len=512"]
COMMON = ["logger=[]", "router=switch", "balance=[switch]", "device=cpu"]
TARGETS = {"float32": 1.06, "bfloat16": 1.25}
WARM_UP = 20  # steps in which the heap finds its size: page faults that a run pays once, in its first seconds


def parts(*overrides: str) -> Parts:
    """A run's objects, composed by Hydra as a user's would be."""
    from hydra import compose, initialize
    from omegaconf import OmegaConf

    from moe_lab.assemble import assemble
    from moe_lab.config import check

    with initialize("../conf", version_base="1.3"):
        cfg = OmegaConf.to_container(compose("train", overrides=[*COMMON, *overrides]), resolve=True)
    assert isinstance(cfg, dict)
    plain = {str(key): value for key, value in cfg.items()}
    assert check(plain) == [], check(plain)
    return assemble(plain)


def loop(*overrides: str) -> Loop:
    p = parts(*overrides)
    vocabulary = p.data.vocab_size + p.objective.extra_tokens
    return Loop(p, Recorder(p.model.moes, vocabulary, len(p.data.domains), p.settings.seq_len, p.device))


def main() -> None:
    single_thread()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("MOE_LAB_CACHE", cache)
        for dtype, target in TARGETS.items():
            compare(f"4 layers, d=256, {dtype}", {"moe": target}, *MODEL, f"dtype={dtype}")
        compare("the default model and batch (nano), float32", {})


def compare(title: str, targets: dict[str, float], *overrides: str) -> None:
    dense, moe = loop(*overrides, "model.moe=false"), loop(*overrides)
    calls = {"dense": lambda: dense.step(0), "moe": lambda: moe.step(0)}
    table(title, interleave(calls, "dense", warm_up=WARM_UP), targets)


if __name__ == "__main__":
    main()
