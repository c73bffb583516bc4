"""The studies that come with moe-lab: whole, of the promised size, and every arm a config that would run."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra.types import RunMode

from moe_lab import hydra_app, presets
from moe_lab.observe.document import METRICS
from moe_lab.study.files import Claim, Study, key_of, read_study

STUDIES = sorted(presets.sweeps_dir().glob("*.yaml"))
ALL = {
    *("collapse", "gumbel_vs_balance", "balancing", "coupling", "annealing", "shazeer_table6", "loss_free"),
    *("soft_moe", "leak", "estimators", "capacity", "renormalised_top1", "scope", "equifinality"),
}
DOCS = Path(__file__).parents[1] / "docs" / "studies.md"


@cache
def study(path: Path) -> tuple[Study, dict[str, str]]:
    return read_study(path)


CLAIMS = [(path.stem, claim) for path in STUDIES for claim in study(path)[0].claims]


@pytest.fixture(scope="module")
def composed() -> Iterator[hydra_app.Composed]:
    with hydra_app.open_hydra(None) as app:
        master = hydra_app.compose(app, "train", [], RunMode.MULTIRUN)
        yield hydra_app.Composed(app, "train", master)


def job(of: Study, scale: str, arm: str) -> dict[str, str]:
    """Overrides by key; settings, scale, arm, and of one key the last."""
    return {key_of(o): o for o in (*of.settings, *of.scales[scale], *of.arms[arm])}


def value(words: dict[str, str], key: str) -> int:
    return int(words[key].partition("=")[2])


def test_all_are_there_and_told():
    assert {path.stem for path in STUDIES} == ALL
    page = DOCS.read_text(encoding="utf-8")
    assert [name for name in sorted(ALL) if f"\n## {name}\n" not in page] == []
    assert [claim.says for _, claim in CLAIMS if f"- {claim.says} (" not in page] == []


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_arm_would_run(path: Path, composed: hydra_app.Composed):
    of, _ = study(path)
    first = next(iter(of.arms))  # of the other scales, which change sizes and data alone
    asked = [*(("cpu", arm) for arm in of.arms), ("quick", first), ("gpu", first)]
    problems = {
        (scale, arm): found
        for scale, arm in asked
        if (found := composed.problems([o for o in job(of, scale, arm).values() if key_of(o) != "seed"]))
    }
    assert problems == {}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_sizes_are_those_that_were_promised(path: Path):
    of, grid = study(path)
    assert set(of.scales) == {"quick", "cpu", "gpu"} and grid == {"arm": "*", "seed": "range(5)"}
    assert path.read_text(encoding="utf-8").startswith("# ")
    for arm in of.arms:
        assert value(job(of, "cpu", arm), "eval_tokens") >= 100_000
        assert "logger=[]" in job(of, "cpu", arm).values()
    gpu = {key_of(o): o for o in (*of.settings, *of.scales["gpu"])}
    assert value(gpu, "steps") * value(gpu, "batch_size") * value(gpu, "seq_len") >= 20_000_000


def test_every_study_claims_something():
    assert {name for name, _ in CLAIMS} == ALL


@pytest.mark.parametrize(("name", "claim"), CLAIMS, ids=[f"{name}-{claim.metric}" for name, claim in CLAIMS])
def test_every_claim_is_of_a_metric_that_its_rows_hold(name: str, claim: Claim):
    if claim.metric in ("loss", "eval/loss"):
        return
    where, _, metric = claim.metric.rpartition("moe/")
    declared = METRICS[metric]
    assert (
        where in {"row": ("", "eval/"), "training": ("",), "evaluation": ("eval/",), "liveness": ("",)}[declared.when]
    )
    assert claim.reduce.experts == "mean" or declared.shape == "LE"
    assert len(set(claim.arms())) == len(claim.arms())
