"""Secrets of the environment, of the user's files and of the command line reach no file of a run, W&B or a report."""

import gzip
import json
import os
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import pytest
from canaries import ENVIRONMENT, FILES, NEEDLES, SECRETS, found, leaks
from command import moe_lab, tree

from moe_lab.secrecy import hide, reason

ROOT = Path(__file__).parents[1]
HF, KEY, PIN = (ENVIRONMENT[name] for name in ("HF_TOKEN", "WANDB_API_KEY", "DOOR_PIN_TOKEN"))
TINY = "dataset=clusters dataset.tokens=5000 fast=true model.dim=32 model.heads=2 experts.num=4"
# Its third update fails with an error that tells everything, and so does a warning before.
PLUGIN = """
import json, logging, os, urllib.parse
from moe_lab.config import option
from moe_lab.routers.topk import TopK

def everything():
    for name, value in os.environ.items():
        if name in json.loads(os.environ["TOLD"]):
            yield from (f"{name}={value}", value, repr(value), json.dumps(value), urllib.parse.quote(value, ""))
    yield from ("https://x:pg-canary-4711@h/y", "{'Authorization': 'Bearer header-canary-42'}")
    yield from ("https://h/y?access_token=git-canary-9876", "--api-key dotenv-canary-0123456789")

@option("router", "leaky")
class Leaky(TopK):
    calls = 0
    def choose(self, rank_TE, gates_TE, ctx):
        Leaky.calls += 1
        if Leaky.calls == 4:
            logging.getLogger("moe_lab.leaky").warning("so far: %s", " ".join(everything()))
        if Leaky.calls > 8:
            raise RuntimeError("no access with\\n" + "\\n".join(everything()))
        return super().choose(rank_TE, gates_TE, ctx)
"""


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with a run that went well and one that failed, both with W&B, and what they said to the terminal."""
    here = tmp_path_factory.mktemp("leaky")
    for name, text in FILES.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
    (here / "plugin").mkdir()
    (here / "tmp").mkdir()
    (here / "plugin/leaky.py").write_text(PLUGIN)
    (here / "moe_lab_conf/router").mkdir(parents=True)
    (here / "moe_lab_conf/router/leaky.yaml").write_text("name: leaky\nk: 1\nrenormalise: false\n")
    said = []
    for words in ("", "router=leaky"):
        command = [
            sys.executable,
            "-m",
            "moe_lab",
            "train",
            *TINY.split(),
            *words.split(),
            "hydra.output_subdir=.hydra",
        ]
        done = subprocess.run(command, cwd=here, env=environment(here), capture_output=True, text=True, timeout=300)
        assert done.returncode == (1 if words else 0), done.stderr
        said += [done.stdout, done.stderr]
    return here, said


def environment(here: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "LD_LIBRARY_PATH") if name in os.environ}
    mine = {"HOME": str(here / "home"), "TMPDIR": str(here / "tmp"), "MOE_LAB_CACHE": str(here / "cache")}
    plugin = {"PYTHONPATH": f"{ROOT}:{here / 'plugin'}", "MOE_LAB_PLUGINS": "leaky", "TOLD": json.dumps([*ENVIRONMENT])}
    return kept | mine | plugin | ENVIRONMENT | {"WANDB_MODE": "offline", "PYTHONDONTWRITEBYTECODE": "1"}


def test_no_secret_is_in_any_file_of_a_run_or_of_wandb(leaky: tuple[Path, list[str]]) -> None:
    here, _ = leaky
    assert len(list(here.glob("outputs/*/*/wandb/offline-run-*/*.wandb"))) == 2
    assert len(list(here.glob("outputs/*/*/.hydra/overrides.yaml"))) == 2
    assert leaks(here) == {"plugin/leaky.py": {s for s in SECRETS if s in PLUGIN}}


def test_no_secret_is_said(leaky: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    here, said = leaky
    monkeypatch.chdir(here)
    for name, value in environment(here).items():
        monkeypatch.setenv(name, value)
    runs = sorted(str(path.parent) for path in here.glob("outputs/*/*/config.yaml"))
    shown = [("diff", *runs), ("diff", "--all", *runs), ("info",), ("verify", runs[0]), ("train", "--cfg", "all")]
    for words in (*shown, *(("export", run, "--out", "-") for run in runs)):
        answer = moe_lab(*words)
        assert answer.out or answer.err
        said = [*said, answer.out, answer.err]
    assert [found(text.encode()) for text in said] == [set()] * len(said)
    assert "no access with" in said[3] and "[redacted]" in said[3]  # the failure was told, without them


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    """However it is spelled or packed, and in the same kinds of files."""
    for needle, secret in NEEDLES.items():
        assert secret in found(b"...." + needle + b"....")
    (tmp_path / "a.gz").write_bytes(b"head" + gzip.compress(HF.encode()))
    (tmp_path / "a.png").write_bytes(b"\x89PNG" + zlib.compress(f"key {HF}".encode()))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", HF)
    (tmp_path / f"{HF}.txt").touch()
    assert leaks(tmp_path) == {name: {HF} for name in ("a.gz", "a.png", "a.zip", f"{HF}.txt")}


OWN = {
    "token.yaml": f"name: topk\nk: 1\nnote: {HF}\n",
    "named.yaml": "name: topk\nk: 1\nservice: {api_key: hunter2hunter2}\n",
    "url.yaml": "name: topk\nk: 1\nmirror: https://u:hunter2hunter2@host/x\n",
    "env.yaml": "name: topk\nk: ${oc.env:HF_TOKEN}\n",
    "hidden.yaml": "name: topk\nk: ${oc.env:HTTPS_PROXY}\n",
}
REFUSED = [
    *("+api_key=hunter2hunter2", "+wandb.api_key=hunter2hunter2", "+a={b:{password:hunter2hunter2}}"),
    *(f"wandb.tags=[{KEY}]", f"wandb.run_name={KEY}", f"sweep.name={HF}", f"+note={HF}", f"seed={PIN}", f"+{HF}=1"),
    *("wandb.entity=sk-ant-hunter2hunter2hunter2", "wandb.project=AKIAHUNTER2HUNTER234"),
    "dataset=text dataset.paths=[https://u:hunter2hunter2@host/x.txt]",
    *("dataset=hub dataset.repo=https://u:hunter2hunter2@host/x", "dataset=hub dataset.repo=a/b?token=hunter2hunter2"),
    *("sweep.name=${oc.env:HF_TOKEN}", "sweep.name=${oc.env:WANDB_API_KEY}", "sweep.name=${oc.env:HTTPS_PROXY}"),
    *(
        "sweep.name=${oc.env:DATABASE_URL}",
        "wandb.group=x${oc.env:PGPASSWORD}y",
        "sweep.name=${oc.env:HF_TOKEN} sweep.name=x",
    ),
    *(f"hydra.job.name={HF}", f"hydra.run.dir=outputs/{HF}", f"hydra.runtime.cwd={HF}", f"hydra.job.config_name={HF}"),
    *(
        f"-m sweep.name={HF},x",
        f"-m hydra.sweep.dir={HF}",
        f"sweep.name={HF} sweep.name=x",
        "+api_key=hunter2hunter2 ~api_key",
    ),
    *(f"--config-dir own router={name.removesuffix('.yaml')}" for name in OWN),
    *(f"resume={HF}", f"--config-dir {HF}", f"--config-name {HF}", f"--{HF}", HF, f"router={HF}"),
]


@pytest.mark.parametrize("words", REFUSED)
def test_a_config_with_a_secret_is_refused_and_not_repeated(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "own/router").mkdir(parents=True)
    for name, text in OWN.items():
        (tmp_path / "own/router" / name).write_text(text)
    before = tree(tmp_path)
    said = moe_lab("train", *words.split(), *TINY.split()[-2:])
    assert said.code == 2 and said.err.startswith("moe-lab: "), said
    assert not found((said.out + said.err).encode()) and "unter2hunter2" not in (said.out + said.err).lower()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("words", [f"export {HF}", f"verify {HF}", f"diff {HF} {HF}", f"info {HF}", f"list {HF}", HF])
def test_no_command_repeats_a_secret(words: str) -> None:
    said = moe_lab(*words.split())
    assert said.code == 2 and not found((said.out + said.err).encode())


@pytest.mark.parametrize(
    "text", ["sk-learn", "data/sk-learn-notes-of-2024-and-2025.txt", "task-sk-seeds-of-2024-v2-of-4"]
)
def test_names_with_hyphens_are_no_tokens(text: str) -> None:
    assert reason(text) is None and hide(text) == text


UNITS = ["a", "a.", "-", "://", "http://x:", "sk-", "eyJ-", "a@", "://a:b@", "authorization: ", "x='"]


@pytest.mark.parametrize("unit", UNITS)
def test_hiding_takes_no_longer_than_reading(unit: str) -> None:
    """A long text that a hostile file made is searched in a second; with the square of its length it takes minutes."""
    began = time.process_time()
    hide(unit * (100_000 // len(unit)))
    assert time.process_time() - began < 10
