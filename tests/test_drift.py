"""What may change between two attempts at a run: every key of the config, the machine, another process."""

import hashlib
import json
import logging
import shutil
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import moe_lab
from processes import start
from runs import STATEFUL
from tiny import tiny

from moe_lab.recorded import flat
from moe_lab.run import Stop
from moe_lab.train import train

WORDS = (*STATEFUL, "steps=4", "checkpoint.every=2", "eval_every=2")
ALL = [word for word in WORDS if not word.startswith("logger")]  # with the keys of wandb
SAFE = ("checkpoint.every", "checkpoint.keep", "wandb.mode")  # what it changes is not in any row
CHOICES = {
    "router": "sigmoid_topk",
    "experts": "swiglu",
    "balance": "[switch, loss_free]",
    "explore": "[gumbel]",
    "schedule": "anneal",
    "dataset": "clusters",
    "model": "nano",
    "objective": "clm",
    "optim": "adamw",
    "logger": "[wandb]",
}


@cache
def composed() -> dict[str, Any]:
    return tiny(*ALL, "logger=[wandb]")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that W&B was told of, as far as its record says."""
    folder = tmp_path_factory.mktemp("finished")
    cfg = composed()
    train({key: node for key, node in cfg.items() if key != "wandb"}, folder, [], CHOICES)
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    return folder


def content(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder" for p in folder.rglob("*")}


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, "more"] if isinstance(value, list) else f"{value}x" if value else 3


KEYS = sorted(key for key in flat(composed()) if key != "resume")  # that one says which run


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_either_safe_or_refused_by_name(key: str, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed: list[dict[str, Any]] = []
    monkeypatch.setattr("moe_lab.train.resume", lambda folder, cfg: resumed.append(cfg) or {})
    old = flat(composed())[key]
    new = "offline" if key == "wandb.mode" else other(old)
    typed = json.dumps(new).replace('"', "").replace(" ", "")
    before = content(finished)
    said = moe_lab("train", f"resume={finished}", f"{key}={typed}")
    if key in SAFE:
        assert said.code == 0 and flat(resumed[0])[key] == new, said.err
        return
    assert said.code == 4 and not resumed, said.err
    (line,) = said.err.splitlines()
    shown = json.dumps(old).replace('"', "").replace(" ", "")
    assert line.startswith(f"moe-lab: {key}={typed}: this run has {key}={shown}; only "), line
    assert content(finished) == before


@pytest.mark.parametrize("group", CHOICES)
def test_every_group_is_refused_by_name(group: str, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lab.train.resume", lambda folder, cfg: pytest.fail("went on"))
    before = content(finished)
    said = moe_lab("train", f"resume={finished}", f"{group}=another")
    assert (said.code, content(finished)) == (4, before)
    assert said.err.startswith(f"moe-lab: {group}=another: this run has {group}={CHOICES[group]}; only ")


@pytest.mark.parametrize("what", ["threads", "torch", "cpu"])
def test_other_surroundings_are_warned_of_by_name(
    what: str, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "status.json").unlink()
    env = json.loads((run / "env.json").read_text())
    then, now = {
        "threads": (1, torch.get_num_threads() + 1),
        "torch": ("1.0", env["versions"]["torch"]),
        "cpu": ({"count": 640, "capability": "none"}, env["cpu"]),
    }[what]
    if what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: now)
    elif what == "torch":
        env["versions"]["torch"] = then
    else:
        env["cpu"] = then
    (run / "env.json").write_text(json.dumps(env))
    train({key: node for key, node in composed().items() if key != "wandb"}, run, [], CHOICES)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert said == f"{what} was {then} and is now {now}: the numbers may differ in their last digits"


def test_a_run_goes_on_on_the_device_and_dtype_it_began_with(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "status.json").unlink()
    env = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(env | {"dtype": "bfloat16"}))
    with (run / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 5}\n')  # beyond the checkpoint: going on would forget it
    before = content(run)
    with pytest.raises(Stop, match="began with dtype=bfloat16") as stop:
        train({key: node for key, node in composed().items() if key != "wandb"}, run, [], CHOICES)
    assert stop.value.code == 4 and content(run).items() >= before.items()


def test_two_processes_in_one_directory(tmp_path: Path) -> None:
    """The second is refused in one line and touches nothing; kill -9 of the first leaves no lock behind."""
    run = tmp_path / "run"
    first = start(tmp_path / "first", "train", *STATEFUL, "steps=100000", "checkpoint.every=5", f"hydra.run.dir={run}")
    while first.alive() and not any(run.glob("checkpoints/step-*")):
        time.sleep(0.01)
    again = start(tmp_path / "again", "train", f"resume={run}").end()
    same = start(tmp_path / "same", "train", *STATEFUL, "steps=100000", "checkpoint.every=5", f"hydra.run.dir={run}")
    for refused in (again, same.end()):
        assert (refused.code, refused.said) == (4, f"moe-lab: {run}: another process is running here\n")
    assert first.alive()
    first.kill()
    assert first.end().code == -9
    before = json.loads((run / "status.json").read_text())["attempt"]
    second = start(tmp_path / "second", "train", f"resume={run}")
    while second.alive() and json.loads((run / "status.json").read_text())["attempt"] == before:
        time.sleep(0.01)
    assert second.alive()
    second.kill()
    assert second.end().code == -9
