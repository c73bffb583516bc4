"""The command line: what it prints, where runs land, and its exit codes."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import moe_lab.train
from moe_lab import __version__, naming
from moe_lab.cli import VERBS
from moe_lab.completion import complete
from moe_lab.datasets.base import DatasetUnavailable
from moe_lab.run import Stop
from tests.command import moe_lab as command
from tests.command import tree

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of train(), which returns at once."""
    calls: list[dict[str, Any]] = []

    def train(cfg: dict[str, Any], run_dir: Path, overrides: list[str], choices: dict[str, str]) -> dict[str, Any]:
        calls.append({"cfg": cfg, "run_dir": run_dir, "overrides": overrides, "choices": choices})
        completed(run_dir)
        return {"status": "completed"}

    monkeypatch.setattr(moe_lab.train, "train", train)
    return calls


def completed(run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "status.json").write_text('{"status": "completed", "step": 1, "attempt": 1}')


# --- help, list, info


def test_help_names_every_command_and_each_has_its_own() -> None:
    said = command("--help")
    assert said.code == 0 and all(f"  {verb} " in said.out for verb in VERBS)
    for verb in VERBS:
        told = command(verb, "--help")
        assert told.code == 0 and f"moe-lab {verb}" in told.out


def test_version_is_ours_behind_every_verb() -> None:
    for words in (["--version"], ["train", "--version"], ["list", "--version"]):
        assert command(*words).out == f"moe-lab {__version__}\n"


@pytest.mark.parametrize(
    "words, hint", [("trian", "did you mean train?"), ("router=topk", "moe-lab train router=topk")]
)
def test_an_unknown_command(words: str, hint: str) -> None:
    said = command(words)
    assert said.code == 2 and hint in said.err


def test_train_help_and_list_tell_every_preset_with_its_comment() -> None:
    told, listed = command("train", "--help").out, command("list").out
    for path in (ROOT / "conf").glob("*/*.yaml"):
        about = next(line for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line)
        assert re.search(rf"^ +\*? +{path.stem} +{re.escape(about[1:].strip())}$", told, re.MULTILINE), path
        assert path.stem in listed
    for key in yaml.safe_load((ROOT / "conf/train.yaml").read_text()).keys() - {
        "defaults",
        "hydra",
        "balance",
        "explore",
    }:
        assert re.search(rf"^  {key}[.=]", told, re.MULTILINE), key


def test_list_of_a_group_tells_every_key_with_its_default() -> None:
    told = command("list", "balance").out
    assert re.search(r"balance\.switch\.weight +0\.01 +of the loss", told)
    assert "*balance=[switch]" in told
    wrong = command("list", "rooter")
    assert wrong.code == 2 and "did you mean router?" in wrong.err


def test_list_sweeps_tells_what_each_study_asks(here: Path) -> None:
    (here / "sweeps").mkdir()
    (here / "sweeps/mine.yaml").write_text("# Mine asks this?\nstudy: {}\n")
    told = command("list", "sweeps").out
    assert re.search(r"^collapse +Does top-1 routing collapse", told, re.MULTILINE)
    assert re.search(r"^mine +Mine asks this", told, re.MULTILINE)


def test_own_presets_are_listed_completed_and_used(here: Path, trained: list[dict[str, Any]]) -> None:
    (here / "moe_lab_conf/router").mkdir(parents=True)
    (here / "moe_lab_conf/router/mine.yaml").write_text("# My own.\nname: topk\nk: 3\nrenormalise: false\n")
    assert "My own." in command("train", "--help").out
    assert complete("moe-lab train router=mi") == ["router=mine "]
    assert command("train", "router=mine").code == 0
    assert trained[0]["cfg"]["router"] == {"name": "topk", "k": 3, "renormalise": False}
    assert "k: 3" in command("train", "router=mine", "--cfg", "job", "--package", "router").out


def test_info_tells_versions_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    said = command("info")
    assert said.code == 0 and __version__ in said.out and "torch" in said.out and "canary" not in said.out


def test_a_reader_that_leaves_early_hears_nothing(here: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for words in ("train --help", "list dataset", "train --cfg job", "train --info config"):
        line = f"{sys.executable} -m moe_lab {words} | head -1"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=here, env=env)
        assert done.stdout.count("\n") == 1 and done.stderr == "", words


# --- completion


@pytest.mark.parametrize(
    "line, expected",
    [
        ("moe-lab tr", ["train "]),
        ("moe-lab train router=gumbel_s", ["router=gumbel_softmax ", "router=gumbel_ste "]),
        ("moe-lab train rou", ["router.", "router="]),
        ("moe-lab train router=topk router.r", ["router.renormalise="]),
        ("moe-lab train balance=", ["balance=["]),
        ("moe-lab train balance=[sw", ["balance=[switch"]),
        ("moe-lab train balance=[switch,im", ["balance=[switch,importance"]),
        ("moe-lab train balance=[switch,sw", []),
        ("moe-lab train explore=[gumbel,ji", ["explore=[gumbel,jitter"]),
        ("moe-lab train router=switch explore=[jitter] explore.ji", ["explore.jitter."]),
        ("moe-lab train -m router=topk,sw", ["router=topk,switch"]),
        ("moe-lab train schedule.temp", ["schedule.temperature."]),
        ("moe-lab train dev", ["device="]),
        ("moe-lab train device=c", ["device=cpu ", "device=cuda "]),
        ("moe-lab train fast=", ["fast=false ", "fast=true "]),
        ("moe-lab train --cf", ["--cfg "]),
        ("moe-lab train --cfg j", ["job "]),
        ("moe-lab list opt", ["optim "]),
        ("moe-lab sweep col", ["collapse "]),
        ("moe-lab verify out", []),  # bash completes the path
    ],
)
def test_completion(line: str, expected: list[str]) -> None:
    assert complete(line) == expected


@pytest.mark.parametrize(
    "words, expected",
    [
        (["moe-lab", "train", "router", "=", "gumbel_ste"], ["gumbel_ste "]),  # bash breaks words at =
        (["moe-lab", "ver"], ["verify "]),
        (["moe-lab", "train", "balance", "=", "[z"], ["[z_loss"]),
    ],
)
def test_completion_in_a_real_bash(words: list[str], expected: list[str], here: Path) -> None:
    (here / "moe-lab").write_text(f'#!/bin/sh\nexec {sys.executable} -m moe_lab "$@"\n')
    (here / "moe-lab").chmod(0o755)
    line = " ".join(words).replace(" = ", "=")
    script = f"""
    eval "$(moe-lab -sc install=bash)"
    COMP_WORDS=({" ".join(f"'{w}'" for w in words)}) COMP_LINE='{line}' COMP_POINT={len(line)}
    _moe_lab
    printf '%s|' "${{COMPREPLY[@]}}"
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{here}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env)
    assert done.stderr == "" and done.stdout.split("|")[:-1] == expected


# --- where runs land


def test_train_gets_the_resolved_config_and_a_new_folder(here: Path, trained: list[dict[str, Any]]) -> None:
    for _ in range(2):
        assert command("train", "router=switch", "optim.lr=1e-2", "+hydra.launcher={}").code == 0
    first, second = trained
    assert first["cfg"]["optim"]["lr"] == 0.01 and "hydra" not in first["cfg"]
    assert first["overrides"] == ["router=switch", "optim.lr=1e-2"]
    assert first["choices"]["router"] == "switch" and first["choices"]["model"] == "nano"
    assert first["run_dir"] != second["run_dir"] and first["run_dir"].is_dir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-switch-lr_1e-2-[0-9a-f]{6}", _below(first["run_dir"], here))
    assert Path.cwd() == here


def _below(run_dir: Path, here: Path) -> str:
    return str(run_dir.relative_to(here / "outputs"))


@pytest.mark.parametrize(
    "override", ["x=../../../../evil", "a/b=c d", "x=\x1b[31mred", "<script>=é", "n=" + "x" * 300, "=cmd", "x=\n"]
)
def test_a_slug_is_harmless_whatever_was_overridden(override: str) -> None:
    assert re.fullmatch(r"[a-z0-9._-]{1,40}", naming.slug("topk", [override, "seed=3"]))
    assert naming.slug("topk", [override, "seed=3"]).startswith("topk")
    assert ".." not in naming.slug("topk", [override])


@pytest.mark.parametrize("yes", ["true", "True"])
def test_a_slug_names_the_key_of_a_plain_value(yes: str) -> None:
    assert naming.slug("topk", ["seed=0", f"fast={yes}", "dataset=clusters"]) == "topk-seed_0-fast_true-clusters"


def test_a_sweep_job_lands_in_the_same_place_every_time(here: Path, trained: list[dict[str, Any]]) -> None:
    assert command("train", "-m", "router=topk,switch", "seed=range(2)").code == 0
    assert command("train", "-m", "seed=1,0", "router=switch,topk", "steps=300,600").code == 0
    ours = yaml.safe_load((ROOT / "conf/train.yaml").read_text())["steps"]
    again = {
        (c["cfg"]["router"]["name"], c["cfg"]["seed"]): c["run_dir"] for c in trained[4:] if c["cfg"]["steps"] == ours
    }
    assert len(again) == 4
    for call in trained[:4]:
        assert again[call["cfg"]["router"]["name"], call["cfg"]["seed"]] == call["run_dir"]
    folders = sorted(path.name for path in (here / "outputs/sweeps/multirun").glob("*-*"))
    assert len(folders) == 8 and all(re.fullmatch(r"[0-9a-f]{16}-(topk|switch)-.*", name) for name in folders)


def test_a_fast_job_and_a_real_one_do_not_share_a_folder(here: Path, trained: list[dict[str, Any]]) -> None:
    assert command("train", "-m", "fast=true,false").code == 0
    assert trained[0]["run_dir"] != trained[1]["run_dir"]


def test_keys_that_only_swept_options_have(here: Path, trained: list[dict[str, Any]]) -> None:
    """Hydra alone sets router.renormalise in the default router, which has none, and gives up."""
    assert command("train", "-m", "router=topk,sigmoid_topk", "router.renormalise=false").code == 0
    assert [call["cfg"]["router"]["renormalise"] for call in trained] == [False, False]


def test_flags_may_stand_anywhere(here: Path, trained: list[dict[str, Any]]) -> None:
    assert command("train", "router=topk", "-m", "seed=1,2", "steps=5").code == 0
    assert [call["cfg"]["seed"] for call in trained] == [1, 2]
    shown = command("train", "router=topk", "--cfg", "job", "seed=3").out
    assert "name: topk" in shown and "seed: 3" in shown


# --- exit codes


@pytest.mark.parametrize(
    "error, code, told",
    [
        (Stop(3, "diverged at 7"), 3, "moe-lab: diverged at 7"),
        (Stop(4, "locked"), 4, "moe-lab: locked"),
        (Stop(75, "stopped"), 75, "moe-lab: stopped"),
        (ValueError("no such file: x"), 2, "moe-lab: no such file: x"),
        (PermissionError(13, "Permission denied", "/data"), 5, "/data"),
        (OSError(28, "No space left on device"), 5, "No space left"),
        (DatasetUnavailable("dataset x cannot be reached"), 5, "moe-lab: dataset x cannot be reached"),
        (KeyboardInterrupt(), 130, "stopped at once"),
        (RuntimeError("a bug"), 1, "RuntimeError: a bug"),
        (ZeroDivisionError("deep"), 1, "ZeroDivisionError: deep"),
    ],
)
def test_exit_codes(error: BaseException, code: int, told: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_lab.train, "train", _raising(error))
    said = command("train")
    assert said.code == code
    assert said.err.splitlines()[-1].startswith("moe-lab: ") and told in said.err.splitlines()[-1]
    assert ("Traceback" in said.err) == (code == 1)
    if code == 1:
        (text,) = (path.read_text() for path in here.rglob("train.log"))
        assert "Traceback" in text and "in _raise" in text
    if code in (2, 5):
        assert tree(here) == set()


def _raising(error: BaseException) -> Callable[..., dict[str, Any]]:
    def _raise(*args: Any) -> dict[str, Any]:
        raise error

    return _raise


def test_an_output_dir_that_cannot_be_made(here: Path, trained: list[dict[str, Any]]) -> None:
    (here / "file").write_text("")
    said = command("train", "output_dir=file")
    assert said.code == 5 and "file" in said.err and len(said.err.splitlines()) == 1
    assert trained == []


def test_a_failed_run_does_not_end_the_sweep(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def train(cfg: dict[str, Any], run_dir: Path, *_: Any) -> dict[str, Any]:
        seen.append(cfg["seed"])
        if cfg["seed"] == 1:
            raise Stop(3, "diverged")
        if cfg["seed"] == 2:
            raise RuntimeError("a bug")
        completed(run_dir)
        return {}

    monkeypatch.setattr(moe_lab.train, "train", train)
    said = command("train", "-m", "seed=0,1,2,3", "steps=10")
    assert (said.code, seen) == (1, [0, 1, 2, 3])
    told = [line.split("; its log is ") for line in said.err.splitlines()]
    assert [first for first, *_ in told] == [
        "moe-lab: failed: seed=1: diverged",
        "moe-lab: failed: seed=2: RuntimeError: a bug",
        "moe-lab: 2 of 4 runs failed",
    ]
    assert "Traceback" in Path(told[1][1]).read_text()


def test_a_run_that_somebody_stops_goes_on_with_the_same_command(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def train(cfg: dict[str, Any], run_dir: Path, *_: Any) -> dict[str, Any]:
        seen.append(cfg["seed"])
        if len(seen) == 2:
            raise Stop(75, "stopped by SIGTERM")
        completed(run_dir)
        return {}

    monkeypatch.setattr(moe_lab.train, "train", train)
    assert command("train", "-m", "seed=0,1,2").code == 75
    assert command("train", "-m", "seed=0,1,2").code == 0
    assert seen[:3] == [0, 1, 2] and 1 in seen[3:]
