"""Every method of conf/ trains: the small form of `make methods` (width 32, 10 steps, fp32), and its edges."""

import math
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny import CONF, tiny

from benchmarks.matrix import BASE, Case, cases, config, problems
from moe_lab import reading
from moe_lab.train import train

CASES = list(cases())
every = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
SMALL = ("steps=10", "eval_every=10", "log_every=5", "batch_size=2", "eval_tokens=128", "balance=[]")


def rows_of(folder: Path, *words: str) -> list[dict[str, Any]]:
    """The rows of a run to its end, all of whose numbers are finite."""
    summary = train(tiny(*SMALL, *words), folder, [], {})
    assert summary["status"] == "completed" and math.isfinite(summary["loss"])
    rows = reading.rows(folder / "metrics.jsonl")
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    return rows


def test_every_preset_is_a_case() -> None:
    """None is left out because nothing was found that it goes with."""
    for group in ("router", "balance", "explore", "experts"):
        named = {
            part.strip("[]") for case in CASES if case.group == group for part in [case.name.split()[0].split("=")[1]]
        }
        assert named == {file.stem for file in Path("conf", group).resolve().glob("*.yaml")}


@pytest.mark.parametrize("case", CASES[::20], ids=lambda case: case.name)
def test_a_case_is_composed_as_hydra_does(case: Case) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        composed = OmegaConf.to_container(compose("train", overrides=[*BASE, *case.words]), resolve=True)
    assert config(*case.words) == composed


@every
def test_trains(case: Case, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, *case.words)
    assert rows[-1]["loss"] < rows[0]["loss"] + 0.1


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if "router.k=1" in case.words])
@pytest.mark.parametrize("edge", ["one expert", "fewer tokens than experts"])
def test_edges(case: Case, edge: str, tmp_path: Path) -> None:
    words = {
        "one expert": ("experts.num=1", "router.k=1"),
        "fewer tokens than experts": ("experts.num=16", "batch_size=1", "seq_len=4"),
    }[edge]
    if problems(*case.words, *words):
        pytest.skip("refused in one line")
    rows_of(tmp_path, *case.words, *words)
