"""`make methods`: every method trained for 100 steps of the default model, on clusters and on real text, in fp32 and
bf16, with one and two experts per token, with one expert in all, and with fewer tokens than experts.

Each run must end finite; the table says what it learned and how even the load was. What a method needs beside it (a
router that chooses by scores, noise, an objective without a future to leak) is found by asking the config's own check.
"""

import copy
import itertools
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import surroundings

CONF = Path(__file__).parents[1] / "conf"
BASE = ["logger=[]", "balance=[]", "steps=100", "log_every=50", "eval_every=100", "checkpoint.every=1000"]
SMALL_BATCH = ["batch_size=4", "seq_len=64", "eval_tokens=2048"]
DATA = {"clusters": "dataset=clusters", "text": "dataset=stdlib"}
DTYPES = {"fp32": "dtype=float32", "bf16": "dtype=bfloat16"}
# What may stand beside a method, the first that the check accepts.
HOSTS: dict[str, list[list[str]]] = {
    "router": [[], ["objective=mlm"]],
    "balance": [
        ["router=topk"],
        ["router=sigmoid_topk"],
        ["router=noisy_topk"],
        ["router=relu"],
        ["router=topk", "experts.num=4"],
    ],
    "explore": [["router=topk"], ["router=switch"]],
    "experts": [["router=topk"]],
}
# Options under which a method is another one.
VARIANTS: dict[str, dict[str, list[str]]] = {
    "router": {
        "softmax_ste": ["router.backward=dense"],
        "gumbel_ste": ["router.backward=dense"],
        "soft_moe": ["router.causal=blocks router.block=8", "router.causal=prefix"],
        "reinforce": ["router.baseline=none", "router.baseline=mean", "router.baseline=critic"],
        "random": ["router.draw=fresh"],
        "sparsemixer": ["router.version=v1"],
        "default_moe": ["router.renormalise=true"],
        "expert_choice": ["router.order=topk_first"],
        "topk": ["router.gate=sigmoid", "router.gate=normalised_sigmoid", "router.scoring=mlp"],
    },
    "balance": {
        "entropy": ["balance.entropy.of=token", "balance.entropy.of=mutual_information"],
        "loss_free": ["balance.loss_free.update=proportional"],
        "switch": [f"balance.switch.scope={scope}" for scope in ("sequence", "global_batch", "running")],
    },
    "experts": {
        "swiglu": [
            "experts.granularity=2",
            "experts.shared_experts=1",
            "experts.zero_experts=1 experts.copy_experts=1 experts.constant_experts=1",
            "experts.init=upcycled",
            "experts.capacity_factor=1.0",
        ]
    },
}


@dataclass(frozen=True)
class Case:
    """A method with what it needs, and the words that make it run."""

    group: str
    name: str
    words: tuple[str, ...]


def cases() -> Iterator[Case]:
    """Every preset of conf/ that is a method, and its variants, with k=1 and k=2 where both are accepted."""
    for group, hosts in HOSTS.items():
        for file in sorted((CONF / group).glob("*.yaml")):
            choice = f"{group}=[{file.stem}]" if group in ("balance", "explore") else f"{group}={file.stem}"
            for variant in ["", *VARIANTS.get(group, {}).get(file.stem, [])]:
                for k in (1, 2):
                    name = " ".join([choice, *variant.split()])
                    words = [*variant.split(), choice, f"router.k={k}"]
                    host = next((host for host in hosts if not problems(*host, *words)), None)
                    if host is not None:
                        beside = [word for word in host if not word.startswith("router=")]
                        yield Case(group, " ".join([name, *beside, f"k={k}"]), (*host, *words))


@cache
def base() -> dict[str, Any]:
    """The composed default config with BASE, plain."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = OmegaConf.to_container(compose("train", overrides=BASE), resolve=True)
    assert isinstance(cfg, dict)
    return {str(key): value for key, value in cfg.items()}


@cache
def preset(group: str, name: str) -> Any:
    """A preset's node. YAML alone would read 1e-8 as text."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))


def config(*words: str) -> dict[str, Any]:
    """BASE with these words, as Hydra composes it, in a thousandth of the time; KeyError where there is no such key."""
    cfg = copy.deepcopy(base())
    for word in sorted(words, key=lambda word: "." in word.split("=")[0]):  # groups first, as Hydra has it
        path, value = word.split("=", 1)
        *parents, last = path.split(".")
        if (CONF / path).is_dir():
            named = yaml.safe_load(value)
            one = isinstance(named, str)
            cfg[path] = copy.deepcopy(preset(path, named) if one else {name: preset(path, name) for name in named})
            continue
        node = cfg
        for parent in parents:
            node = node[parent]
        if last not in node:
            raise KeyError(path)
        node[last] = yaml.safe_load(value)
    return cfg


def problems(*words: str) -> list[str]:
    """What the check says of a config."""
    from moe_lab.config import check

    return check(config(*words))


def trained(words: tuple[str, ...]) -> dict[str, Any]:
    """First and last loss, evaluation and worst layer's load of a run; or the exit code and the line it ended with."""
    import logging

    import rich
    import torch
    from rich.console import Console

    from moe_lab import reading
    from moe_lab.run import Stop
    from moe_lab.train import train

    logging.disable()
    rich.get_console().__dict__.update(Console(quiet=True).__dict__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            summary = train(config(*words), Path(folder, "run"), list(words), {})
        except (Stop, ValueError) as stop:
            return {"error": str(stop)}
        first, *_, last = reading.rows(Path(folder, "run/metrics.jsonl"))
        return {
            "first": first["loss"],
            "last": last["loss"],
            "eval": summary["eval"].get("loss"),
            "load_cv": last.get("moe/load_cv/worst"),
            "grad_ratio": last.get("moe/router_grad_ratio/worst"),
        }


def line(case: Case, said: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"  {case.name:<58} {said:<14} FAILED: {found['error'][:80]}"
    numbers = "  ".join(f"{'-':>8}" if v is None else f"{v:8.4f}" for v in found.values())
    return f"  {case.name:<58} {said:<14} {numbers}"


def jobs() -> Iterator[tuple[Case, str, tuple[str, ...]]]:
    """The matrix: (case, what of it, all its words)."""
    for case in cases():
        for (data, data_word), (dtype, dtype_word) in itertools.product(DATA.items(), DTYPES.items()):
            yield case, f"{data} {dtype}", (*SMALL_BATCH, *case.words, data_word, dtype_word)
        few = ("batch_size=1", "seq_len=4", "eval_tokens=64", "dataset=clusters", "experts.num=16")
        if not problems(*case.words, *few):
            yield case, "4 tokens, E=16", (*few, *case.words)
        alone = ("experts.num=1", "router.k=1", "dataset=clusters")
        if not problems(*case.words, *alone):
            yield case, "E=1", (*SMALL_BATCH, *case.words, *alone)


def main() -> int:
    print(surroundings())
    print(f"\n  {'method':<58} {'run':<14} {'loss 1':>8}  {'loss 100':>8}  {'eval':>8}  {'load CV':>8}  {'grad':>8}")
    todo, failed = list(jobs()), 0
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), max_tasks_per_child=None) as pool:
        for (case, said, _), found in zip(todo, pool.map(trained, [words for *_, words in todo]), strict=True):
            print(line(case, said, found), flush=True)
            failed += "error" in found
    print(f"\n{len(todo)} runs, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
