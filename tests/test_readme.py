"""What the README shows is run: its commands (cut short by fast=true), its router, its error."""

import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import moe_lab, tree
from tiny import CONF

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line.strip() for kind, text in BLOCKS if not kind for line in text.splitlines()]
TRAIN = [line.removeprefix("$ ") for line in LINES if re.match(r"(\$ )?moe-lab train [a-z-]", line)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a text of one's own."""
    monkeypatch.chdir(tmp_path)
    words = ["sir", "good", "the", "and", "speak", "then", "no", "lord"]
    r = random.Random(0)
    Path("plays.txt").write_text("\n".join(" ".join(r.choices(words, k=8)) for _ in range(500)))
    return tmp_path


@pytest.mark.parametrize("line", [line for line in TRAIN if "resume=" not in line and "+router.kk" not in line])
def test_a_train_command_runs(line: str, here: Path) -> None:
    said = moe_lab(*shlex.split(line)[1:], "fast=true", "logger=[]")
    assert said.code == 0, said.err
    runs = list(here.glob("outputs/**/summary.json"))
    assert len(runs) == (4 if "-m" in line else 1)


def test_the_verbs_run(here: Path) -> None:
    assert moe_lab("train", "fast=true", "logger=[]", "steps=2").code == 0
    (run,) = here.glob("outputs/*/*")
    shown = [shlex.split(line.split("   ")[0])[1:] for line in LINES if line.startswith("moe-lab ") and "RUN" in line]
    assert {words[0] for words in shown} == {"train", "diff", "export", "verify"}
    for words in shown:
        said = moe_lab(*(word.replace("RUN", str(run)) for word in words))
        assert said.code == 0, said.err


def test_the_shown_mistake_gives_the_shown_line(here: Path) -> None:
    at = LINES.index("$ moe-lab train +router.kk=2")
    before = tree(here)
    said = moe_lab(*shlex.split(LINES[at])[2:])
    assert said.code == 2 and said.err.strip() == LINES[at + 1]
    assert tree(here) == before


def test_the_shown_router_runs(here: Path) -> None:
    (python,) = (text for kind, text in BLOCKS if kind == "python")
    (preset,) = (text for kind, text in BLOCKS if kind == "yaml")
    (here / "threshold.py").write_text(python)
    (here / "moe_lab_conf/router").mkdir(parents=True)
    (here / "moe_lab_conf/router/threshold.yaml").write_text(preset)
    (line,) = (line for line in LINES if line.startswith("PYTHONPATH=. "))
    environment, command = line.split(" moe-lab ")
    env = os.environ | dict(word.split("=") for word in environment.split())
    words = [sys.executable, "-m", "moe_lab", *shlex.split(command), "fast=true", "logger=[]"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (config,) = here.glob("outputs/*/*/config.yaml")
    assert yaml.safe_load(config.read_text())["router"] == {"name": "threshold", "k": 2, "floor": 0.02}


def test_every_option_is_in_the_table() -> None:
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\| (.*) \|$", README, re.MULTILINE))
    for group in ("router", "experts", "balance", "explore", "schedule", "dataset", "model", "objective", "optim"):
        for preset in Path(CONF, group).glob("*.yaml"):
            assert f"`{preset.stem}`" in rows[group], (group, preset.stem)


def test_the_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets and all((Path(__file__).parents[1] / target).exists() for target in targets)
