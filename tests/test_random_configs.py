"""Configs at random, from a seed: every problem is a clean line, and what has none trains to an end."""

import copy
import functools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import CONF, tiny

from moe_lab.config import check, registered, schema
from moe_lab.train import train
from moe_lab.verbs.train import guarded

# What stands in no config by intention, and what may.
WILD = [
    *(0, 1, -1, 2, 3, 7, 1.5, -0.0, 1e-9, 1e30, 1e300, math.nan, math.inf, -math.inf, 2**31, 2**63, 10**400, -(10**30)),
    *(
        None,
        True,
        False,
        "",
        " ",
        "x",
        "0",
        "1e3",
        "null",
        "topk",
        "a" * 1000,
        "\x00",
        "\x1b[2J",
        "é",
        "\ud800",
        "../..",
        "~",
    ),
    *([], [1], ["a"], [None], [[]], {}, {"a": 1}, {"name": "topk"}, {"start": 1}, {"_target_": "os.system"}, b"x"),
]
MODEST = [0, 1, 2, 3, 4, 8, 0.0, 0.1, 0.5, 0.99, 1.0, 2.5, 1e-6, 1e4, True, False, None]
GROUPS = ("router", "experts", "balance", "explore", "schedule", "dataset", "model", "objective", "optim")
LISTS = ("balance", "explore")
# Set by the test: where it writes, how long it takes, what it does not have.
KEPT = {"device", "compile", "dtype", "resume", "output_dir", "sweep", "fast", "steps", "checkpoint", "repo", "paths"}


@functools.cache
def presets(group: str) -> list[dict[str, Any]]:
    found = [yaml.safe_load(path.read_text()) for path in sorted(Path(CONF).glob(f"{group}/*.yaml"))]
    return [node for node in found if node["name"] not in ("hub", "text", "stdlib")]


@functools.cache
def base() -> dict[str, Any]:
    return tiny("steps=2", "eval_every=2", "eval_tokens=64", "dataset.tokens=3000", "seq_len=8")


def literals(field: Any) -> list[Any]:
    """The words that an option offers."""
    return [word for word in getattr(field.annotation, "__args__", ()) if isinstance(word, str)]


def draw(r: random.Random, pool: list[Any], changes: int) -> dict[str, Any]:
    """The base config with other options chosen, and some values from the pool."""
    cfg = copy.deepcopy(base())
    for group in r.sample(GROUPS[:-1], 3):
        node = copy.deepcopy(r.choice(presets(group)))
        if group in LISTS:
            cfg[group] = {n["name"]: copy.deepcopy(n) for n in r.sample(presets(group), r.randint(0, 3))}
        elif group not in ("model", "dataset"):
            cfg[group] = node
    cfg["experts"] |= {"num": 4, "width": 16}
    for _ in range(changes):
        change(r, cfg, pool)
    return cfg


def change(r: random.Random, cfg: dict[str, Any], pool: list[Any]) -> None:
    """One value of one option, now and then a whole option, its name, or a key that there is not."""
    group, wild = r.choice([*GROUPS, "root"]), pool is WILD
    if wild and r.random() < 0.05:
        cfg[group] = copy.deepcopy(r.choice(pool))
        return
    node = cfg if group == "root" else cfg[group]
    if group in LISTS and node and isinstance(node, dict):
        node = r.choice(list(node.values()))
    name = "train" if group == "root" else node.get("name") if isinstance(node, dict) else None
    if not isinstance(name, str) or name not in registered(group):
        return
    fields = schema(registered(group)[name]).model_fields
    keys = [*sorted(fields.keys() - (set() if wild else KEPT)), *(["name", "nope"] if wild and group != "root" else [])]
    if keys:
        key = r.choice(keys)
        node[key] = copy.deepcopy(r.choice([*pool, *(literals(fields[key]) if key in fields else [])]))


@pytest.mark.parametrize("seed", range(6))
def test_every_problem_is_a_line(seed: int) -> None:
    r, found = random.Random(seed), 0
    for _ in range(60):
        cfg = draw(r, WILD, r.randint(1, 4))
        before = copy.deepcopy(cfg)
        problems = check(cfg)
        assert problems == check(before), "the check changed the config"
        for line in problems:
            assert isinstance(line, str) and "\n" not in line and ":" in line and len(line) < 500, (line, cfg)
            assert not any(words in line for words in ("Traceback", "object at 0x", "Error(", "pydantic")), line
        found += bool(problems)
    assert found > 20


@pytest.mark.parametrize("seed", range(15))
def test_what_has_no_problem_trains_to_an_end(seed: int, tmp_path: Path) -> None:
    r = random.Random(100 + seed)
    cfg = next(cfg for _ in range(1000) if not check(cfg := draw(r, MODEST, 6)))
    summary = guarded(lambda: train(cfg, tmp_path / "run", [], {}), tmp_path / "run")
    assert summary.get("exit", 0) in (0, 3), (summary, cfg)
    if "exit" not in summary:
        assert summary["status"] == "completed" and math.isfinite(summary["loss"]), cfg
