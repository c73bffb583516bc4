"""`moe-lab dashboard`: every panel shows something that runs really log, and it is saved only when asked for."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import moe_lab, tree
from tiny import tiny
from wandb_reader import Recorded, read
from wandb_server import Server

from moe_lab.observe.metric import METRICS
from moe_lab.sinks import account
from moe_lab.sinks.wandb import GLOBAL, PER_LAYER
from moe_lab.train import train

KEY = "a" * 40


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """What a real run sent to W&B."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny("logger=[wandb]", "steps=12", "eval_every=6", "dataset.domains=2"), folder, [], {})
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return read(path)


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    said = moe_lab("dashboard", "me/p", "--dry-run")
    assert said.code == 0 and said.err == "", said
    told = json.loads(said.out)
    assert (told["entity"], told["project"], told["name"]) == ("me", "p", "Router collapse")
    return told["spec"]["section"]


def panels(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for section in spec["panelBankConfig"]["sections"] for panel in section["panels"]]


def asked_for(panel: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(keys, patterns) of a panel."""
    config = panel["config"]
    axes = [config[name].removeprefix("summary:") for name in ("xAxis", "yAxis") if name in config]
    keys = [*config.get("metrics", []), *config.get("mediaKeys", []), *axes]
    return keys, [config["metricRegex"]] if "metricRegex" in config else []


def test_every_key_and_pattern_is_one_that_a_run_logs(spec: dict[str, Any], offline: Recorded):
    logged = {key for row in offline.history for key in row} | set(offline.summary)
    logged |= {key.removesuffix("/_type") for key in logged}  # a picture's key
    used = set()
    for panel in panels(spec):
        keys, patterns = asked_for(panel)
        assert set(keys) <= logged, (panel["config"].get("chartTitle"), set(keys) - logged)
        for pattern in patterns:
            found = {key for key in logged if re.search(pattern, key)}
            assert len(found) == 2, (pattern, found)  # of two layers
            used |= found
        used |= set(keys)
        assert keys or patterns or panel["viewType"] == "Markdown Panel"
    curves = {key for row in offline.history for key, value in row.items() if isinstance(value, int | float)}
    left = {key for key in curves - used if not key.startswith(("_", "moe/load_heatmap/"))}
    assert left == {"ppl"}  # nothing is left out but the loss in other words


def test_every_metric_that_the_mirror_sends_per_layer_exists():
    assert set(PER_LAYER) <= set(METRICS) and "eval/loss" in GLOBAL


def test_runs_are_grouped_by_sweep_and_router_and_leaks_are_shown(spec: dict[str, Any], offline: Recorded):
    (runs,) = spec["runSets"]
    assert [(key["section"], key["name"]) for key in runs["grouping"]] == [
        ("run", "group"),
        ("config", "router.value.name"),
    ]
    assert offline.config["router"]["name"] == "gumbel_ste"
    pinned = {name for name, on in runs["runFeed"]["columnPinned"].items() if on}
    assert {"run:tags", "summary:status", "summary:leaks"} <= pinned and {"status", "leaks"} <= set(offline.summary)
    assert [p["viewType"] for p in panels(spec) if p["config"].get("metrics") == ["leaks"]] == ["Bar Chart"]
    assert any("`leaks the future`" in p["config"].get("value", "") for p in panels(spec))
    assert spec["settings"]["xAxis"] == "tokens"


def test_sections_panels_and_places_are_each_their_own(spec: dict[str, Any]):
    names = [section["name"] for section in spec["panelBankConfig"]["sections"]]
    assert names == ["Collapse", "Confidence", "Specialisation", "Cost of balance"]
    assert len({panel["__id__"] for panel in panels(spec)}) == len(panels(spec))
    for section in spec["panelBankConfig"]["sections"]:
        corners = [(panel["layout"]["x"], panel["layout"]["y"]) for panel in section["panels"]]
        assert len(set(corners)) == len(corners)
    page = (Path(__file__).parents[1] / "docs/dashboards.md").read_text()
    assert all(name in page for name in names)


def test_dry_run_is_the_same_each_time_needs_no_key_and_meets_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with Server("well") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.chdir(tmp_path)
        words = [sys.executable, "-m", "moe_lab", "dashboard", "me/p", "--dry-run"]
        others = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        assert others.stdout == moe_lab("dashboard", "me/p", "--dry-run").out and others.stderr == ""
        assert server.connections == 0 and tree(tmp_path) == set()


def save(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> subprocess.CompletedProcess[str]:
    """In a process of its own: wandb keeps the server that it met first."""
    for name, value in {"WANDB_API_KEY": KEY, **env}.items():
        monkeypatch.setenv(name, value)
    words = [sys.executable, "-m", "moe_lab", "dashboard", "me/p"]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])


def test_what_is_saved_is_what_dry_run_printed(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    with Server("well") as server:
        done = save({"WANDB_BASE_URL": server.url}, monkeypatch)
    assert done.returncode == 0 and done.stderr == "", done
    assert done.stdout.startswith(f"saved: {server.url}/me/p?nw=")
    (view,) = server.views
    assert json.loads(view["spec"])["section"] == spec
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "p", "Router collapse")


@pytest.mark.parametrize("behaviour", ["refuses", "silent", "500"])
def test_a_dead_server_is_told_in_one_line(behaviour: str, monkeypatch: pytest.MonkeyPatch):
    with Server(behaviour) as server:
        if behaviour == "refuses":
            server.close()
        quick = {name: "1" for name in account.PATIENCE if "TIMEOUT" in name}
        began = time.monotonic()
        done = save({"WANDB_BASE_URL": server.url, **quick}, monkeypatch)
    assert time.monotonic() - began < 20
    assert done.returncode == 5 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("moe-lab: W&B did not save it: ") and KEY not in line


def test_mistakes_cost_a_line(monkeypatch: pytest.MonkeyPatch):
    for wrong in ("me", "me/", "a/b/c", "me/p?x=1"):
        said = moe_lab("dashboard", wrong)
        assert said.code == 2 and "ENTITY/PROJECT" in said.err and len(said.err.splitlines()) == 1
    said = moe_lab("dashboard", "me/p")
    assert said.code == 5 and "no W&B key" in said.err and len(said.err.splitlines()) == 1
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)  # as where it is not installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = moe_lab("dashboard", "me/p", "--dry-run")
    assert said.code == 5 and "pip install 'wandb-workspaces" in said.err and len(said.err.splitlines()) == 1
