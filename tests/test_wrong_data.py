"""Data and places that cannot serve, beside the config mistakes of test_config_errors: one line that helps, the exit
code of its kind, nothing written."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.command import moe_lab, tree
from tests.refusals import CLUSTERS, OTHER, lay_out, refused


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lay_out(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# --- text

TEXTS = {
    "nowhere.txt": ["there is no nowhere.txt (relative paths start at "],
    "'*.txt'": ["there is no *.txt"],
    "good.txt/x": ["there is no good.txt/x"],
    "''": ["dataset.paths: an empty name stands in it"],
    "empty.txt": ["empty.txt is empty: name a file with text in it"],
    "one.txt": ["one.txt: at most 2 tokens are fewer than one block of seq_len+1 = 9", "set seq_len to at most 1"],
    "short.txt": ["short.txt: at most 8 tokens are fewer", "give it more text or set seq_len to at most 7"],
    "mark.txt": ["dataset text: 6 tokens are fewer than one block of seq_len+1 = 9"],
    "latin.txt": ["latin.txt: byte 442 (0xef) is not valid UTF-8", "iconv"],
    "utf16.txt": ["utf16.txt: byte 0 (0xff) is not valid UTF-8"],
    "folder": ["there is no text in it: every file or row is empty or left out"],
    "empty": ["no file in empty"],
    "pipe": ["pipe is neither a file nor a folder"],
    "/dev/zero": ["/dev/zero is neither a file nor a folder"],
    "loop": ["loop: Too many levels of symbolic links"],
    "good.txt,good.txt": ["good.txt is named twice"],
    "x" * 300: ["xxx...: File name too long"],
    "/".join(["x" * 200] * 30): ["...: File name too long"],
    "1": ["dataset.paths.0=1: must be text"],
    "[good.txt]": ["dataset.paths.0=[good.txt]: must be text"],
    "null": ["dataset.paths.0=null: must be text"],
}


@pytest.mark.parametrize("paths", TEXTS, ids=lambda paths: paths[:20])
def test_text_that_cannot_serve(paths: str, here: Path) -> None:
    refused(2, here, "train", *OTHER, "dataset=text", f"dataset.paths=[{paths}]", told=TEXTS[paths])


HUBS = {
    "dataset.repo=rows.jsonl dataset.column=txt": ["dataset.column=txt: no txt in the data; there are: text"],
    "dataset.repo=rows.xyz": ["no reader for .xyz files"],
    "dataset.repo=./nowhere": ["dataset.repo: there is no ./nowhere"],
    "dataset.repo=''": ["dataset.repo is empty"],
    "dataset.repo='not a name!'": ["not a name!"],
}


@pytest.mark.parametrize("words", HUBS)
def test_hub_data_that_cannot_serve(words: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", here.parent / "hf")
    split = [words] if "'" in words else words.split()
    refused(2, here, "train", *OTHER, "dataset=hub", *split, told=HUBS[words])


def test_a_hub_without_a_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    told = ["dataset roneneldan/TinyStories cannot be reached", "use dataset=stdlib", "set HF_HUB_OFFLINE=1"]
    refused(5, here, "train", *OTHER, "dataset=tinystories", told=told)


# --- places

PLACES = {
    "output_dir=afile": (5, ["afile", "Not a directory; output_dir= names another place for runs"]),
    "output_dir=afile/below": (5, ["Not a directory"]),
    "output_dir=loop": (5, ["Too many levels of symbolic links"]),
    "output_dir=/proc/nowhere": (5, ["/proc/nowhere: No such file"]),
    "hydra.run.dir=afile": (5, ["afile: File exists"]),
    "output_dir=''": (2, ['output_dir="": must not be empty']),
    "output_dir=null": (2, ["output_dir=null: must be text"]),
    "output_dir=" + "y" * 300: (2, ["longer than 255 bytes"]),
    "output_dir=" + "/".join(["y" * 100] * 60): (2, ["bytes long, 3,800 at most"]),
}


@pytest.mark.parametrize("words", PLACES, ids=lambda words: words[:30])
def test_places_for_runs_that_cannot_be(words: str, here: Path) -> None:
    code, told = PLACES[words]
    refused(code, here, "train", *OTHER, *CLUSTERS, words, told=told)


@pytest.mark.parametrize(
    "words", [words for words in PLACES if words.startswith("output_dir") and PLACES[words][0] == 5]
)
def test_places_for_sweeps_that_cannot_be(words: str, here: Path) -> None:
    code, told = PLACES[words]
    refused(code, here, "train", "-m", *OTHER, *CLUSTERS, words, "seed=1,2", told=told)


@pytest.mark.parametrize("cache", ["afile", "afile/below", "loop", "/proc/nowhere", "z" * 300], ids=lambda c: c[:20])
def test_a_token_cache_that_cannot_be(cache: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_LAB_CACHE", cache)
    refused(5, here, "train", *OTHER, *CLUSTERS, told=[cache[:20], "; set MOE_LAB_CACHE to"])


@pytest.fixture
def read_only(tmp_path: Path):
    """A folder that nobody can write into, and a way in: root may mount one, others may take the permission away."""
    folder = tmp_path / "fixed"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("root may write anywhere, and may not mount here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_disk(here: Path, read_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(5, here, "train", *OTHER, *CLUSTERS, f"output_dir={read_only}/runs", told=["fixed/runs", "output_dir="])
    monkeypatch.setenv("MOE_LAB_CACHE", f"{read_only}/cache")
    refused(5, here, "train", *OTHER, *CLUSTERS, told=["fixed/cache", "MOE_LAB_CACHE"])


@pytest.fixture
def nobody(here: Path):
    """Files that the user may not read; the tests of root go on as another user."""
    for name in ("secret.txt", "shut/inside.txt"):
        (here / name).parent.mkdir(exist_ok=True)
        shutil.copy(here / "good.txt", here / name)
    assert moe_lab("train", *OTHER, "dataset=text", "dataset.paths=[good.txt]", "output_dir=../runs").code == 0
    (here / "open").mkdir()
    for name, mode in {"secret.txt": 0, "shut": 0, "open": 0o777}.items():
        (here / name).chmod(mode)
    user = os.geteuid()
    if not user:  # what is imported late may lie where only root reads, hence the run above
        for folder in (here, *here.parents):
            if "pytest-" in str(folder):  # pytest's own, each shut to others
                folder.chmod(0o755)
        os.seteuid(65534)
    yield
    os.seteuid(user)
    (here / "shut").chmod(0o700)


@pytest.mark.parametrize("names", ["secret.txt", "shut/inside.txt", "shut"])
def test_text_that_may_not_be_read(names: str, here: Path, nobody: None) -> None:
    said = moe_lab("train", *OTHER, "dataset=text", f"dataset.paths=[{names}]", "output_dir=open/runs")
    assert said.code == 5 and said.err == f"moe-lab: {names}: Permission denied\n", said
    assert not tree(here / "open")
