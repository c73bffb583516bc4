"""The hub dataset on local files, and what it says without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_lab.datasets.hub import Hub


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    path = tmp_path / "rows.jsonl"
    lines = [{"text": f"{'ab'[i % 2]}{i} " * 20, "meta": {"source": "ab"[i % 2]}} for i in range(200)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("streaming", [True, False])
def test_a_column_of_text_with_domains(rows: Path, tmp_path: Path, streaming: bool):
    hub = Hub(repo=str(rows), domain_column="meta.source", streaming=streaming)
    data = hub.prepare(tmp_path / "cache", 32)
    assert data.domains == ["a", "b"] and data.about["documents"] == 200
    batch = data.train_batch(0, 0, 20, 32)
    for letter, domain in ((ord("a"), 0), (ord("b"), 1)):
        assert set(batch.domain[batch.ids[:, :-1] == letter].tolist()) == {domain}
    assert {0, 1} == set(torch.cat([b.domain.flatten() for b in data.valid_batches(4, 32, 64)]).tolist())


def test_limits_and_a_folder(rows: Path, tmp_path: Path):
    folder = tmp_path / "repo"
    folder.mkdir()
    rows.rename(folder / "train.jsonl")
    (folder / "validation.jsonl").write_text('{"text": "%s"}\n' % ("held out " * 40))
    some = Hub(repo=str(folder), max_documents=30).prepare(tmp_path / "cache", 16)
    assert some.about["documents"] == 30
    few = Hub(repo=str(folder), max_bytes=1000).prepare(tmp_path / "cache", 16)
    assert 1000 <= few.about["bytes"] < 1200
    own = Hub(repo=str(folder), valid_split="validation").prepare(tmp_path / "cache", 16)
    assert own.about["documents"] == 201
    assert own.decode(own._cache.tokens["valid"].tolist()) == "held out " * 40 + "\n"
    assert "held" not in own.decode(own._cache.tokens["train"].tolist())


def test_a_validation_split_that_copies_train(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Rows too short to count as copies within train may still not stand in both parts."""
    folder = tmp_path / "repo"
    folder.mkdir()

    def write(split: str, texts: list[str]) -> None:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    train, fresh = [f"short row {i}" for i in range(400)], [f"fresh row {i}" for i in range(100)]
    write("train", [*train, *train[:5]])
    write("validation", [text for pair in zip(train, fresh, strict=False) for text in pair])
    hub = Hub(repo=str(folder), valid_split="validation", valid_fraction=0.5)
    data = hub.prepare(tmp_path / "cache", 32)
    lines = {part: data.decode(data._cache.tokens[part].tolist()).splitlines() for part in ("train", "valid")}
    assert lines == {"train": [*train, *train[:5]], "valid": fresh}
    assert data.about["valid_copies_dropped"] == 100 and not caplog.records
    write("validation", train[:100])
    without = hub.prepare(tmp_path / "cache", 32)
    assert without.num_valid == 0
    (said,) = [record.getMessage() for record in caplog.records]
    assert "validation is off, 100 documents of its validation split stand in train as well" in said


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"column": "txt"}, "no txt in the data; there are: text, meta"),
        ({"column": "meta"}, "holds dict, text is needed"),
        ({"domain_column": "meta.x"}, "no x in the data; there are: source"),
        ({"split": "test[:5%]", "streaming": False}, "rows.jsonl"),
        ({"repo": ""}, "dataset.repo is empty"),
        ({"repo": "./none"}, "there is no ./none"),
        ({"repo": "not a name!"}, "not a name!"),
    ],
)
def test_mistakes_are_one_line(rows: Path, tmp_path: Path, wrong: dict, says: str):
    with pytest.raises(ValueError) as caught:
        Hub(**{"repo": str(rows), **wrong}).prepare(tmp_path / "cache", 32)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_domain_column_with_too_many_values(rows: Path, tmp_path: Path):
    rows.write_text("".join(json.dumps({"text": f"row {i}", "url": i}) + "\n" for i in range(300)))
    with pytest.raises(ValueError, match=r"dataset.domain_column=url has 300 different values"):
        Hub(repo=str(rows), domain_column="url").prepare(tmp_path / "cache", 32)


@pytest.mark.parametrize("how", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network_it_says_what_to_do_at_once(tmp_path: Path, how: dict[str, str]):
    code = f"""
import time
from pathlib import Path
from moe_lab.datasets.base import DatasetUnavailable
from moe_lab.datasets.hub import Hub
import datasets
started = time.monotonic()
try:
    Hub(repo="roneneldan/TinyStories").prepare(Path({str(tmp_path)!r}), 32)
except DatasetUnavailable as error:
    print(round(time.monotonic() - started), error)
"""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9", **how}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seconds, line = done.stdout.strip().split(" ", 1)
    assert int(seconds) <= 10 and "\n" not in line
    assert "cannot be reached" in line
    offline = "HF_HUB_OFFLINE" in how
    last = "or unset HF_HUB_OFFLINE" if offline else "set HF_HUB_OFFLINE=1"
    for way_out in ("dataset=stdlib", "dataset.paths=", last):
        assert way_out in line
    assert not (offline and "set HF_HUB_OFFLINE=1" in line)
