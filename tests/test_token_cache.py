"""The token cache: verified, rebuilt when damaged, built once by however many processes."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moe_lab.datasets import cache as token_cache
from moe_lab.datasets.cache import Damaged, TokenCache, Writer, open_or_build


def write(folder: Path, tokens: int = 1000, vocab: int = 300, domains: int = 2) -> None:
    writer = Writer(folder, vocab, [f"d{i}" for i in range(domains)])
    ids = np.arange(tokens) % vocab
    writer.add("train", ids, ids % domains)
    writer.add("valid", ids[:10], 0)
    writer.finish({"name": "none"}, {})


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone"])
@pytest.mark.parametrize("name", ["train.bin", "valid.bin", "train.domain", "meta.json"])
def test_any_damage_is_seen_and_rebuilt_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
):
    first = open_or_build(tmp_path, "x", 0, write)
    damage(first.folder / name, how)
    with pytest.raises(Damaged, match=name):
        TokenCache(first.folder)
    with caplog.at_level(logging.WARNING):
        again = open_or_build(tmp_path, "x", 0, write)
    assert again.meta == first.meta
    assert np.array_equal(again.tokens["train"], np.arange(1000) % 300)
    assert len(caplog.records) == 1 and "is damaged" in caplog.text and name in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == [first.folder.name]


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_cache, "HASHED_WHOLE", 1000)
    monkeypatch.setattr(token_cache, "SLICE", 10)
    folder = open_or_build(tmp_path, "x", 0, lambda to: write(to, tokens=5000)).folder
    TokenCache(folder)
    for at in (0, 9_990):  # the ends are always looked at
        path = folder / "train.bin"
        content = bytearray(path.read_bytes())
        content[at : at + 8] = bytes(255 - b for b in content[at : at + 8])
        path.write_bytes(content)
        with pytest.raises(Damaged, match=r"train.bin: checksum"):
            TokenCache(folder)
        content[at : at + 8] = bytes(255 - b for b in content[at : at + 8])
        path.write_bytes(content)


@pytest.mark.parametrize("vocab, size", [(256, 1), (257, 2), (65536, 2), (65537, 4)])
def test_the_smallest_type_that_holds_the_vocabulary(tmp_path: Path, vocab: int, size: int):
    cache = open_or_build(tmp_path, "x", vocab, lambda to: write(to, tokens=vocab, vocab=vocab))
    assert cache.tokens["train"].dtype.itemsize == size
    assert cache.tokens["train"][-1] == vocab - 1


def test_a_failed_build_leaves_nothing(tmp_path: Path):
    def fail(folder: Path) -> None:
        (folder / "train.bin").write_bytes(b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        open_or_build(tmp_path, "x", 0, fail)
    assert not list(tmp_path.iterdir())
    assert open_or_build(tmp_path, "x", 0, write).meta["vocab_size"] == 300


def test_what_a_killed_build_left_is_cleared(tmp_path: Path):
    folder = open_or_build(tmp_path, "x", 0, write).folder
    (tmp_path / f"{folder.name}.new-abc").mkdir()
    damage(folder / "meta.json", "gone")
    open_or_build(tmp_path, "x", 0, write)
    assert list(tmp_path.iterdir()) == [folder]


BUILDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_token_cache import write
from moe_lab.datasets.cache import open_or_build
root = Path({root!r})

def slow(folder):
    with open(root / "builds", "a") as file:
        file.write("x")
    time.sleep(0.5)
    write(folder)

(root / f"ready-{{sys.argv[1]}}").touch()
while not (root / "go").exists():
    time.sleep(0.001)
print(open_or_build(root / "cache", "x", 0, slow).meta["files"])
"""


def test_two_processes_build_once(tmp_path: Path):
    code = BUILDER.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", code, str(i)], stdout=subprocess.PIPE, text=True) for i in range(2)]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (tmp_path / "go").touch()
    out = [process.communicate(timeout=60)[0] for process in both]
    assert all(process.returncode == 0 for process in both)
    assert out[0] == out[1] != ""
    assert (tmp_path / "builds").read_text() == "x"


def test_meta_is_plain_json(tmp_path: Path):
    folder = open_or_build(tmp_path, "x", 0, write).folder
    meta = json.loads((folder / "meta.json").read_text())["meta"]
    assert meta["about"]["train_tokens_per_domain"] == {"d0": 500, "d1": 500}
