"""Every dataset, model and logger preset composes and trains two steps; the hub's from local files with its columns."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tiny import CONF, tiny
from wandb_reader import read

from moe_lab import load
from moe_lab.train import train

STORIES = {"train": 60, "validation": 12}
SOURCES = ["book", "wiki"]


def presets(group: str) -> list[str]:
    return sorted(path.stem for path in Path(CONF, group).glob("*.yaml"))


def preset(group: str, name: str) -> dict[str, Any]:
    found = OmegaConf.to_container(OmegaConf.load(Path(CONF, group, f"{name}.yaml")))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """A folder as a repository on the hub is laid out, with all columns that a preset asks for."""
    folder = tmp_path / "stories"
    folder.mkdir()
    for split, number in STORIES.items():
        lines = [{"text": f"{split} {i} " * 30, "meta": {"redpajama_set_name": SOURCES[i % 2]}} for i in range(number)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def two_steps(folder: Path, *overrides: str) -> dict[str, Any]:
    """The summary of a run of two steps that trained and evaluated; what the run says of its data is in env.json."""
    summary = train(tiny("steps=2", "eval_every=2", *overrides), folder, list(overrides), {})
    assert summary["status"] == "completed" and summary["steps"] == 2
    assert summary["loss"] > 0 and summary["eval"]["loss"] > 0
    assert [row["step"] for row in load(folder).metrics] == [1, 2]
    return summary


@pytest.mark.parametrize("name", presets("dataset"))
def test_every_dataset_preset_trains_two_steps(
    name: str, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"dataset={name}"]
    node = preset("dataset", name)
    if node["name"] == "hub":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        overrides += [f"dataset.repo={stories}", "dataset.config=null"]
    if node["name"] == "text":
        overrides.append(f"dataset.paths=[{stories}]")
    two_steps(tmp_path / "run", *overrides)
    data = json.loads((tmp_path / "run/env.json").read_text())["dataset"]
    if node["name"] == "hub":
        assert data["domains"] == (SOURCES if node["domain_column"] else ["text"])
        # At most valid_fraction of the 60 rows come from a validation split.
        assert data["documents"] == 60 + (3 if node["valid_split"] else 0)


@pytest.mark.parametrize("name", presets("model"))
def test_every_model_preset_trains_two_steps(name: str, tmp_path: Path) -> None:
    node = preset("model", name)
    if name != "nano":
        node["dim"] = 8 * node["heads"]
    sizes = [f"model.{key}={node[key]}" for key in ("dim", "layers", "heads")]
    two_steps(tmp_path, f"model={name}", *sizes, "experts.num=2")
    blocks = load(tmp_path).model.blocks
    assert len(blocks) == node["layers"] and len(load(tmp_path).metrics[-1]["moe/load_cv"]) == node["layers"]


@pytest.mark.parametrize("name", presets("logger"))
def test_every_logger_preset_trains_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no key and no settings of whoever runs the tests
    summary = two_steps(tmp_path / "run", f"logger=[{name}]", f"{name}.mode=offline")
    (log,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    assert [row["loss"] for row in read(log).history][-1] == summary["loss"]
