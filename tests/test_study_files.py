"""Study files: what may stand there, and one line for every mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from made_sweep import TINY

from moe_lab.study import files
from moe_lab.study.files import claims_sha256, read_study


def test_a_study_is_read_with_its_grid_as_it_would_be_typed() -> None:
    study, grid = read_study(TINY)
    assert list(study.arms) == ["switch", "switch_balanced"]
    assert study.arms["switch"] == ["router=switch", "balance=[]"]
    assert grid == {"arm": "*", "seed": "range(3)"}
    first, second = study.claims
    assert (first.arms(), first.reduce.layers, first.reduce.steps, first.at_least) == (
        ["switch"],
        "max",
        "last_20_percent",
        0.33,
    )
    assert (second.arms(), second.within, second.by) == (["switch_balanced", "switch"], 0.5, "difference")


MISTAKES: dict[str, tuple[str, Any, str]] = {
    "unknown key": ("question_", "x", "study.question_: no such key"),
    "no arm": ("arms", {}, "study.arms={}: "),
    "name of an arm": ("arms", {"A b": ["router=topk"]}, "must match"),
    "no override": ("settings", ["steps"], "study.settings.0=steps: must match"),
    "a sweep's own": ("settings", ["hydra.run.dir=x"], "hydra.run.dir=x: says where jobs run"),
    "a place": ("scales", {"cpu": ["output_dir=/tmp"]}, "output_dir=/tmp: says where jobs run"),
    "a seed in an arm": ("arms", {"a": ["seed=1"]}, "arm a sets a seed"),
    "unequal in what": ("unequal", {"params": "why not"}, "study.unequal.params"),
}


@pytest.mark.parametrize("key, value, told", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(key: str, value: Any, told: str, tmp_path: Path) -> None:
    content = yaml.safe_load(TINY.read_text())
    content["study"] |= {key: value, "claims": content["study"]["claims"] if key != "arms" else []}
    line = refused(tmp_path, content)
    assert told in line and line.startswith(str(tmp_path))


CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "of nothing": ({}, "either arm: NAME or compare"),
    "of both": ({"arm": "switch", "compare": ["switch", "switch_balanced"], "at_most": 1}, "either arm: NAME or"),
    "of one twice": ({"compare": ["switch", "switch"], "at_most": 0}, "two different arms"),
    "no bound": ({"arm": "switch"}, "exactly one of at_least, at_most and within"),
    "two bounds": ({"arm": "switch", "at_least": 0, "at_most": 1}, "exactly one of"),
    "within of one arm": ({"arm": "switch", "within": 0.1}, "within: holds two arms"),
    "ratio of one arm": ({"arm": "switch", "by": "ratio", "at_most": 0.1}, "by: ratio needs compare"),
    "ratio below 0": ({"compare": ["switch", "switch_balanced"], "by": "ratio", "at_most": 0}, "a bound above 0"),
    "an arm that is not there": ({"arm": "swich", "at_most": 1}, "arm=swich is not there; did you mean switch"),
    "a bound that is no number": ({"arm": "switch", "at_most": "x"}, "study.claims.0.at_most=x: must be a number"),
    "no such reduction": ({"arm": "switch", "at_most": 1, "reduce": {"steps": "lst"}}, "did you mean last"),
    "three arms": ({"compare": ["switch"] * 3, "at_most": 1}, "study.claims.0.compare"),
}


@pytest.mark.parametrize("claim, told", CLAIMS.values(), ids=CLAIMS.keys())
def test_claims_that_are_none(claim: dict[str, Any], told: str, tmp_path: Path) -> None:
    content = yaml.safe_load(TINY.read_text())
    content["study"]["claims"] = [{"says": "x", "source": "x", "metric": "loss", **claim}]
    assert told in refused(tmp_path, content)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    content = yaml.safe_load(TINY.read_text())
    content["study"] |= {"a": 1, "settings": ["steps"]}
    content["more"] = 1
    assert len(refused(tmp_path, content).splitlines()) == 3


@pytest.mark.parametrize(
    "text", ["", "[1]", "study: 5", "a: &a [1]\nb: *a", "study: {a: !!python/name:os.system ''}", "{"]
)
def test_files_that_are_no_study(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"/bad[.]yaml"):
        read_study(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="no such study"):
        read_study(tmp_path / "missing.yaml")


def refused(folder: Path, content: dict[str, Any]) -> str:
    (folder / "bad.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError) as told:
        read_study(folder / "bad.yaml")
    return str(told.value)


def test_the_hash_of_the_claims_is_of_the_claims_alone() -> None:
    study, _ = read_study(TINY)
    assert claims_sha256(study) == claims_sha256(study.model_copy(update={"question": "?", "settings": []}))
    changed = study.claims[0].model_copy(update={"at_least": 0.34})
    assert claims_sha256(study) != claims_sha256(study.model_copy(update={"claims": [changed, study.claims[1]]}))
    assert claims_sha256(study) == claims_sha256(files.Study.model_validate(files.dump(study)))


def test_studies_of_ones_own_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps/mine.yaml").write_text(TINY.read_text())
    assert files.find("mine") == Path("sweeps/mine.yaml")
    assert files.find("some/where.yaml") == Path("some/where.yaml")
    with pytest.raises(ValueError, match="did you mean mine"):
        files.find("min")


def test_every_study_that_comes_with_moe_lab_is_whole() -> None:
    for path in files.presets.sweeps_dir().glob("*.yaml"):
        study, grid = read_study(path)
        assert study.claims and {"cpu", "gpu", "quick"} <= set(study.scales) and "seed" in grid, path
