"""A run whose routing shows a causal model its future: refused unless asked for, and labelled wherever it is told."""

import csv
import io
import json
from pathlib import Path

import pytest
import yaml
from command import moe_lab, tree

from moe_lab.sinks.wandb import run_tags
from tests.edges import SMALL

LABEL, WARNING = "leaks the future", "these losses compare with no causal model's"
LEAKING = ["router=expert_choice", "allow_leak=true"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def labels(*words: str) -> dict[str, bool]:
    """Where a run is said to leak."""
    said = moe_lab("train", *SMALL, *words)
    assert said.code == 0, said.err
    (folder,) = Path("outputs").glob("*/*")
    env, summary = (json.loads((folder / name).read_text()) for name in ("env.json", "summary.json"))
    (headline,) = (line for line in said.out.splitlines() if "MoE layers of" in line)
    return {
        "headline": headline.endswith(LABEL),
        "last words": WARNING in said.out,
        "summary.json": summary["leaks"],
        "env.json": env["leaks"],
        "W&B": LABEL in run_tags(env, yaml.safe_load((folder / "config.yaml").read_text()), []),
    }


RUNS = {
    "router": (LEAKING, True),
    "capacity": (["router=topk", "experts.capacity_factor=1", "experts.drop=probability", "allow_leak=true"], True),
    "causal": (["router=topk"], False),
    "causal, and allowed": (["router=topk", "allow_leak=true"], False),
    "mlm": (["router=expert_choice", "objective=mlm"], False),
    "prefix": (["router=soft_moe", "router.causal=prefix"], False),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_says_whether_it_leaks_and_where(case: str, here: Path) -> None:
    words, leaks = RUNS[case]
    found = labels(*words)
    assert set(found.values()) == {leaks}, found


@pytest.mark.parametrize("form", [[], ["--long"]], ids=["wide", "long"])
@pytest.mark.parametrize("case", ["router", "causal"])
def test_an_exported_table_says_so_in_every_row(case: str, form: list[str], here: Path) -> None:
    words, leaks = RUNS[case]
    assert moe_lab("train", *SMALL, *words).code == 0
    (run,) = Path("outputs").glob("*/*")
    table = list(csv.DictReader(io.StringIO(moe_lab("export", str(run), *form, "--out", "-").out)))
    assert table and {row.get("leaks") for row in table} == ({"True"} if leaks else {None})


def test_diff_says_which_run_leaks(here: Path) -> None:
    for name, words in {"causal": ["router=topk"], "leaking": LEAKING}.items():
        assert moe_lab("train", *SMALL, *words, f"output_dir={name}").code == 0
    folders = [str(folder) for name in ("causal", "leaking") for folder in Path(name).glob("*/*")]
    said = moe_lab("diff", *folders)
    assert said.code == 0
    (line,) = (line for line in said.out.splitlines() if LABEL in line)
    assert line.split() == [*LABEL.split(), "false", "true"]


@pytest.mark.parametrize("router", ["expert_choice", "sinkhorn", "base", "soft_moe"])
def test_without_leave_it_is_refused_in_one_line(router: str, here: Path) -> None:
    said = moe_lab("train", *SMALL, f"router={router}")
    assert said.code == 2 and len(said.err.splitlines()) == 1
    assert all(part in said.err for part in (f"router={router}", "objective=mlm", "allow_leak=true"))
    assert tree(here) == set()
