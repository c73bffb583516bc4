"""The studies that come with moe-lab: whole, of the promised size, and every arm a config that would run."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_lab import assemble, hydra_app, hydra_jobs, presets
from moe_lab.hydra_jobs import Asked
from moe_lab.observe.document import METRICS
from moe_lab.study import costs, grid
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
def asked() -> Iterator[Asked]:
    with hydra_app.open_hydra(None) as app:
        yield hydra_jobs.ask(app, "train", ["hydra.mode=MULTIRUN"])


def jobs(asked: Asked, path: Path, scale: str, *words: str) -> dict[str, dict[str, Any]]:
    """By arm, the checked config of its first seed, as `moe-lab sweep` makes it."""
    of, params = study(path)
    points = grid.points(asked, of, scale, params, ["seed=0", *words])
    checked = hydra_jobs.check(asked, [point.words for point in points], [point.name for point in points])
    return {point.arm: job.cfg for point, job in zip(points, checked, strict=True)}


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
def test_every_arm_would_run_at_the_cost_of_the_others(path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch):
    of, _ = study(path)
    arms = jobs(asked, path, "cpu")
    assert list(arms) == list(of.arms)
    for scale in ("quick", "gpu"):  # they change sizes and data alone
        jobs(asked, path, scale, f"arm={next(iter(arms))}")
    monkeypatch.setattr(assemble, "prepare", lambda cfg: SimpleNamespace(vocab_size=256))
    found = {arm: costs.of_config(cfg) for arm, cfg in arms.items()}
    assert list(costs.mismatches(found, of.unequal)) == []


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_sizes_are_those_that_were_promised(path: Path):
    of, params = study(path)
    assert set(of.scales) == {"quick", "cpu", "gpu"} and params == {"arm": "*", "seed": "range(5)"}
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
