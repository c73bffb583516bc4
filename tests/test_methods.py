"""Every method of conf/ trains: the small form of `make methods` (width 32, 10 steps, fp32), and its edges."""

import math
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_edge_cases import never
from tiny import CONF, tiny

from benchmarks.matrix import BASE, Case, cases, config, problems
from moe_lab import reading
from moe_lab.config import registered
from moe_lab.train import train

CASES = list(cases())
every = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
BRIEF = ("steps=4", "eval_every=4", "log_every=2")
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
    router = config(*case.words)["router"]
    untrained = registered("router")[router["name"]].traits(router, 4).live is None
    assert all((ratio is None) == untrained for ratio in rows[0]["moe/router_grad_ratio"])


ONCE = {case.name.rsplit(" k=", 1)[0]: case for case in reversed(CASES)}.values()  # k=1 where that is accepted


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in ONCE])
@pytest.mark.parametrize("edge", ["one expert", "fewer tokens than experts"])
def test_edges(case: Case, edge: str, tmp_path: Path) -> None:
    words = {
        "one expert": ("experts.num=1", "router.k=1"),
        "fewer tokens than experts": ("experts.num=16", "batch_size=1", "seq_len=4"),
    }[edge]
    if problems(*case.words, *words):
        pytest.skip("refused in one line")
    rows_of(tmp_path, *case.words, *words, *BRIEF)


CHOOSING = [case for case in ONCE if registered("router")[config(*case.words)["router"]["name"]].scored]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CHOOSING])
def test_an_expert_that_is_never_chosen(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it balances by: every number stays finite, and nobody counts a choice of it."""
    never(0, monkeypatch)
    rows = rows_of(tmp_path, *case.words, *BRIEF)
    overruled = "reroute" in case.name
    assert all(counts[0] == 0 for row in rows for counts in row["moe/selected"]) or overruled
