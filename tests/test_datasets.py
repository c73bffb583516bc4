"""Reading by position, splits, domains, tokenizers, n-gram lines and the lines for mistakes."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_lab.datasets import ngram
from moe_lab.datasets.base import Data
from moe_lab.datasets.clusters import Clusters, draw
from moe_lab.datasets.stdlib import DOMAINS, Stdlib
from moe_lab.datasets.text import Text

SMALL = {"domains": 3, "vocab_size": 16, "branching": 2, "segment": 16, "tokens": 5000, "seed": 1}


def prose(words: int, seed: int) -> str:
    """Lines that do not repeat."""
    r = random.Random(seed)
    text = "".join(f"w{r.randrange(10**9)}" + (" " if i % 9 else "\n") for i in range(1, words))
    return text + "\n"


@pytest.fixture
def clusters(tmp_path: Path) -> Data:
    return Clusters(**SMALL).prepare(tmp_path / "cache", 8)


# --- positions ---


def test_a_train_batch_is_a_function_of_its_position(clusters: Data, tmp_path: Path):
    again = Clusters(**SMALL).prepare(tmp_path / "cache", 8)
    for step in (0, 3, 400):  # the last one epochs later
        a, b = clusters.train_batch(7, step, 4, 8), again.train_batch(7, step, 4, 8)
        assert torch.equal(a.ids, b.ids) and torch.equal(a.domain, b.domain)
        assert a.ids.shape == (4, 9) and a.domain.shape == (4, 8)
        assert a.ids.dtype == a.domain.dtype == torch.int64
    assert not torch.equal(clusters.train_batch(7, 0, 4, 8).ids, clusters.train_batch(8, 0, 4, 8).ids)


def test_the_order_of_sequences_does_not_depend_on_the_batch_size(clusters: Data):
    small = torch.cat([clusters.train_batch(0, step, 2, 8).ids for step in range(6)])
    large = torch.cat([clusters.train_batch(0, step, 4, 8).ids for step in range(3)])
    assert torch.equal(small, large)


def starts_of_epoch(data: Data, epoch: int, seq_len: int) -> list[int]:
    """Where the blocks of an epoch begin, read back from data whose tokens are their own positions."""
    blocks = max(1, (data.num_train - seq_len) // seq_len)
    return [data.train_batch(5, epoch * blocks + i, 1, seq_len).ids[0, 0].item() for i in range(blocks)]  # pyright: ignore[reportReturnType]


class Counting(Clusters):
    """Token n stands at position n."""

    def _build(self, folder: Path, fraction: float) -> None:
        from moe_lab.datasets.cache import Writer

        writer = Writer(folder, 70_000, ["a"])
        writer.add("train", np.arange(1003), 0)
        writer.finish({"name": "none"}, {})

    def prepare(self, cache_dir: Path, seq_len: int) -> Data:
        from moe_lab.datasets.cache import open_or_build

        cache = open_or_build(cache_dir, "counting", 0, lambda to: self._build(to, 0))
        return Data("counting", cache, str)


def test_every_block_once_an_epoch_and_moving_edges(tmp_path: Path):
    data = Counting().prepare(tmp_path, 10)
    seen = [starts_of_epoch(data, epoch, 10) for epoch in range(4)]
    for starts in seen:
        assert len(set(starts)) == len(starts) == 99
        assert {b - a for a, b in zip(sorted(starts), sorted(starts)[1:], strict=False)} == {10}
        assert starts != sorted(starts)
        assert min(starts) < 10 and max(starts) + 10 <= 1002
    assert len({min(starts) for starts in seen}) > 1  # the phase
    batch = data.train_batch(5, 0, 99, 10)
    assert torch.equal(batch.ids, batch.ids[:, :1] + torch.arange(11)), "a block is contiguous"


def test_a_batch_may_be_larger_than_an_epoch(tmp_path: Path):
    data = Counting().prepare(tmp_path, 500)  # one block and a slack
    batch = data.train_batch(0, 0, 8, 500)
    assert batch.ids.shape == (8, 501) and len(set(batch.ids[:, 0].tolist())) > 1


def test_validation_is_fixed_spread_and_covers_each_domain(clusters: Data):
    few = list(clusters.valid_batches(4, 8, 40))
    again = list(clusters.valid_batches(4, 8, 40))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(few, again, strict=True))
    assert 40 <= sum(b.domain.numel() for b in few) < 100
    whole = list(clusters.valid_batches(4, 8, 10**9))
    targets = torch.cat([b.ids[:, 1:].flatten() for b in whole])
    assert targets.numel() == (clusters.num_valid - 1) // 8 * 8
    assert set(torch.cat([b.domain.flatten() for b in whole]).tolist()) == {0, 1, 2}
    assert whole[-1].ids.shape[0] <= 4


def test_a_rare_domain_is_never_missing_from_validation(tmp_path: Path):
    (tmp_path / "big.txt").write_text(prose(20_000, 1))
    (tmp_path / "rare.txt").write_text(prose(100, 2))
    data = Text(paths=[str(tmp_path / "big.txt"), str(tmp_path / "rare.txt")]).prepare(tmp_path / "cache", 32)
    seen = torch.cat([b.domain.flatten() for b in data.valid_batches(8, 32, 320)])
    assert set(seen.tolist()) == {0, 1} and seen.numel() < 500


# --- documents, splits, domains ---


def windows(data: Data, split: str, length: int = 33) -> set[bytes]:
    stream = np.asarray(data._cache.tokens[split]).tobytes()
    return {stream[i : i + length] for i in range(len(stream) - length)}


def test_train_and_validation_share_no_block(tmp_path: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text(prose(150, i % 40))  # every third file is an exact copy
    for paths in ([str(folder)], [str(folder / "0.txt")]):
        data = Text(paths=paths).prepare(tmp_path / "cache", 32)
        train, valid = windows(data, "train"), windows(data, "valid")
        assert valid and not train & valid
        share = data.num_valid / (data.num_train + data.num_valid)
        assert 0.05 < share <= 0.11
    copies = Text(paths=[str(folder)]).prepare(tmp_path / "cache", 32).about
    assert copies["copies_dropped"] == 20 and copies["documents"] == 40


def test_one_file_is_split_at_a_line_near_its_end(tmp_path: Path):
    text = prose(5000, 3)
    path = tmp_path / "book.txt"
    path.write_text(text)
    data = Text(paths=[str(path)], valid_fraction=0.2).prepare(tmp_path / "cache", 32)
    train = data.decode(data._cache.tokens["train"].tolist())
    valid = data.decode(data._cache.tokens["valid"].tolist())
    assert train + valid == text and train.endswith("\n")
    assert abs(len(valid) / len(text) - 0.2) < 0.01


def test_short_repeated_rows_stay_but_never_in_validation(tmp_path: Path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i:03}.txt").write_text("= History =\n" if i % 2 else f"{i} " + prose(20, i))
    data = Text(paths=[str(folder)]).prepare(tmp_path / "cache", 32)
    valid = data.decode(data._cache.tokens["valid"].tolist())
    train = data.decode(data._cache.tokens["train"].tolist())
    assert train.count("= History =") == 50 and "History" not in valid and len(valid) > 33


def test_nothing_but_repeated_rows_leaves_no_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "rows"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i:03}.txt").write_text("= History of the place =\nin two lines\n")
    data = Text(paths=[str(folder)], valid_fraction=0.5).prepare(tmp_path / "cache", 4)
    assert data.num_valid == 0 and "validation is off" in caplog.text


def test_the_domain_of_every_token_is_that_of_its_file(tmp_path: Path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name}{name}\n" * 400)
    data = Text(paths=[str(tmp_path / f"{n}.txt") for n in "abc"]).prepare(tmp_path / "cache", 16)
    assert data.domains == ["a", "b", "c"]
    for batch in [data.train_batch(0, 0, 100, 16), *data.valid_batches(8, 16, 10**6)]:
        letters = batch.ids[:, :-1]
        told = letters != ord("\n")
        assert torch.equal((letters - ord("a"))[told], batch.domain[told])
    one = Text(paths=[str(tmp_path / "a.txt")], domain_per_path=False).prepare(tmp_path / "cache", 16)
    assert one.domains == ["text"] and not one.train_batch(0, 0, 4, 16).domain.any()


def test_folders_hidden_files_binaries_and_endings(tmp_path: Path):
    root = tmp_path / "docs"
    (root / "deep" / ".git").mkdir(parents=True)
    (root / "deep" / "x.md").write_text("markdown\n" * 20)
    (root / "deep" / ".git" / "config").write_text("hidden\n" * 20)
    (root / "y.txt").write_text("plain\n" * 20)
    (root / "z.bin").write_bytes(b"\xff\xfe\x00" * 20)
    (root / "n.bin").write_bytes(b"a\0b")
    (root / "empty.txt").touch()
    data = Text(paths=[str(root)], valid_fraction=0).prepare(tmp_path / "cache", 8)
    text = data.decode(data._cache.tokens["train"].tolist())
    assert "markdown" in text and "plain" in text and "hidden" not in text
    assert data.about["files_left_out"] == 2
    only = Text(paths=[str(root)], extensions=[".md"], valid_fraction=0).prepare(tmp_path / "cache", 8)
    assert set(only.decode(only._cache.tokens["train"].tolist()).split()) == {"markdown"}


def test_the_fingerprint_follows_content_and_tokenizer(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text(prose(500, 0))
    first = Text(paths=[str(path)]).prepare(tmp_path / "one", 16)
    assert first.fingerprint == Text(paths=[str(path)]).prepare(tmp_path / "two", 16).fingerprint
    assert first.fingerprint != Text(paths=[str(path)], tokenizer="bpe", bpe_vocab=300).prepare(
        tmp_path / "two", 16
    ).fingerprint  # fmt: skip
    path.write_text(prose(500, 0).replace("w", "v", 1))
    assert first.fingerprint != Text(paths=[str(path)]).prepare(tmp_path / "one", 16).fingerprint
    json.dumps(first.about)


# --- the standard library ---


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Stdlib().prepare(tmp_path_factory.mktemp("stdlib"), 128)


def test_stdlib_has_its_domains_and_no_tests(stdlib: Data):
    assert stdlib.domains == [*DOMAINS, "other"]
    assert stdlib.num_train > 5_000_000 and 0.04 < stdlib.num_valid / stdlib.num_train < 0.06
    for split in ("train", "valid"):
        assert min(stdlib.about[f"{split}_tokens_per_domain"].values()) > 1000
    names = [source.name for source in Stdlib()._sources()]
    assert "json/decoder.py" in names and "ast.py" in names and all(name.endswith(".py") for name in names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "lib2to3", "site-packages", "__pycache__"}
    assert not any(name.startswith("_sysconfigdata") for name in names), "the build of this machine is not text"
    valid = list(stdlib.valid_batches(16, 128, 20_000))
    assert set(torch.cat([b.domain.flatten() for b in valid]).tolist()) == set(range(len(stdlib.domains)))


def test_stdlib_lines_are_those_of_source_code(stdlib: Data):
    lines = stdlib.ngram()
    assert 3.0 < lines["unigram"] < 3.6 and 2.2 < lines["bigram"] < 2.7


# --- clusters ---


def test_clusters_are_the_same_everywhere(tmp_path: Path):
    data = Clusters().prepare(tmp_path, 128)
    assert data.fingerprint == "caf677853874cb5fe5a6340a48da6f0d0f9f4be4ed86b2fd05846d8adcd07d75"


def test_clusters_entropy_within_a_source_is_the_log_of_branching():
    options = {"domains": 4, "vocab_size": 16, "branching": 4, "segment": 40, "tokens": 200_000, "seed": 0}
    ids, domain, segments = draw(**options)
    assert len(ids) == len(domain) == 200_000
    inside = domain[1:] == domain[:-1]  # neighbouring segments have different sources
    assert segments == (~inside).sum() + 1
    for d in range(4):
        here = inside & (domain[:-1] == d)
        table = np.zeros((16, 16))
        np.add.at(table, (ids[:-1][here], ids[1:][here]), 1)
        assert ((table > 0).sum(1) == 4).all(), "each token has exactly `branching` successors"
        p = table / table.sum(1, keepdims=True)
        entropy = -(table * np.log(np.where(p > 0, p, 1))).sum() / table.sum()
        assert entropy == pytest.approx(math.log(4), abs=0.01)
        # A token by itself says nothing about its source.
        assert np.bincount(ids[domain == d], minlength=16) / (domain == d).sum() == pytest.approx(1 / 16, abs=0.01)


def test_knowing_the_source_beats_the_bigram_line(tmp_path: Path):
    data = Clusters().prepare(tmp_path, 128)
    lines = data.ngram()
    assert lines["unigram"] == pytest.approx(math.log(64), abs=0.01)
    assert data.about["entropy_given_domain"] < 0.8 < 2.5 < lines["bigram"] < lines["unigram"]


def test_one_source_is_a_plain_chain(tmp_path: Path):
    data = Clusters(domains=1, tokens=20_000).prepare(tmp_path, 16)
    assert data.domains == ["source 0"] and not data.train_batch(0, 0, 8, 16).domain.any()


# --- n-gram lines ---


def test_ngram_lines_by_hand():
    train, valid = np.array([0, 1, 0, 1, 1, 0]), np.array([0, 1, 2, 0])
    # c = (3, 3, 0), n = 6, V = 3: P1 = (4/9, 4/9, 1/9). Pairs: 01 twice, 10 twice, 11 once; t = (1, 2, 0).
    p1 = [4 / 9, 4 / 9, 1 / 9]
    p_01 = (2 + 1 * p1[1]) / (2 + 1)
    p_12 = (0 + 2 * p1[2]) / (3 + 2)
    p_20 = p1[0]  # nothing was seen after 2
    lines = ngram.lines({"train": train, "valid": valid}, 3)
    assert lines["bigram"] == pytest.approx(-np.mean(np.log([p_01, p_12, p_20])))
    assert lines["unigram"] == pytest.approx(-np.mean(np.log([p1[1], p1[2], p1[0]])))


def test_ngram_counts_by_table_and_by_sorting_agree(monkeypatch: pytest.MonkeyPatch):
    r = np.random.default_rng(0)
    tokens = {"train": r.integers(0, 50, 5000), "valid": r.integers(0, 50, 500)}
    table = ngram.lines(tokens, 50)
    monkeypatch.setattr(ngram, "DENSE", 0)
    assert ngram.lines(tokens, 50) == pytest.approx(table)
    monkeypatch.setattr(ngram, "COUNTED", 64 * 40)  # pieces of a longer stream
    assert ngram.lines(tokens, 50)["unigram"] == pytest.approx(table["unigram"], abs=0.1)


def test_ngram_is_kept_and_absent_without_validation(clusters: Data, tmp_path: Path):
    lines = clusters.ngram()
    kept = clusters._cache.folder / "ngram.json"
    assert json.loads(kept.read_text()) == lines
    kept.write_text("{")
    assert clusters.ngram() == lines and json.loads(kept.read_text()) == lines
    path = tmp_path / "a.txt"
    path.write_text("0123456\n")
    assert Text(paths=[str(path)]).prepare(tmp_path / "cache", 7).ngram() == {}


# --- tokenizers ---


def test_bpe_is_lossless_and_learns_from_the_train_part_only(tmp_path: Path):
    path = tmp_path / "a.txt"
    text = "naïve café, the cat sat on the mat. 日本語\n" * 300 + "zqzqzqzq\n" * 160
    path.write_text(text)
    data = Text(paths=[str(path)], tokenizer="bpe", bpe_vocab=320, valid_fraction=0.1).prepare(tmp_path / "cache", 16)
    assert 256 < data.vocab_size <= 320 and data.num_train < len(text) / 3
    train = data.decode(data._cache.tokens["train"].tolist())
    valid = data.decode(data._cache.tokens["valid"].tolist())
    assert train + valid == text and "zqzq" in valid
    assert any("the" in data.decode([i]) for i in range(data.vocab_size))
    if "zq" not in train:
        assert not any("zq" in data.decode([i]) for i in range(data.vocab_size))
    else:
        pytest.fail("the train part was to end before the made-up word")


def test_bytes_decode_with_half_characters_at_the_edges(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("é" * 100)
    data = Text(paths=[str(path)]).prepare(tmp_path / "cache", 8)
    assert data.decode(torch.tensor([0xA9, 0xC3, 0xA9])) == "\ufffdé"


def test_a_missing_tokenizers_package_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'moe-lab\[bpe\]'"):
        Stdlib(tokenizer="bpe").prepare(tmp_path, 16)
    assert not list(tmp_path.iterdir())


def test_the_options_import_neither_datasets_nor_tokenizers():
    code = (
        "import sys, moe_lab.datasets.hub, moe_lab.datasets.text, moe_lab.datasets.stdlib\n"
        "assert not {'datasets', 'tokenizers', 'huggingface_hub', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- mistakes ---


def refused(tmp_path: Path, seq_len: int = 16, **options) -> str:
    with pytest.raises(ValueError) as caught:
        Text(**options).prepare(tmp_path / "cache", seq_len)
    line = str(caught.value)
    assert "\n" not in line
    assert not list((tmp_path / "cache").glob("*.new-*")), "no half-built entry stays"
    return line


def test_paths_that_cannot_be_read(tmp_path: Path):
    empty, latin, short = tmp_path / "empty.txt", tmp_path / "latin.txt", tmp_path / "short.txt"
    empty.touch()
    latin.write_bytes(b"plain\nna\xefve\n")
    short.write_text("123456789\n")
    assert "dataset.paths is empty" in refused(tmp_path, paths=[])
    assert f"there is no {tmp_path}/none.txt" in refused(tmp_path, paths=[f"{tmp_path}/none.txt"])
    assert "empty.txt is empty" in refused(tmp_path, paths=[str(empty)])
    line = refused(tmp_path, paths=[str(latin)])
    assert "latin.txt: byte 8 (0xef) is not valid UTF-8" in line and "iconv" in line
    assert "is named twice" in refused(tmp_path, paths=[str(short), str(short)])
    bare = tmp_path / "bare"
    bare.mkdir()
    assert "no file in" in refused(tmp_path, paths=[str(bare)])
    (bare / "x.txt").touch()
    assert "no file that ends in .md in" in refused(tmp_path, paths=[str(bare)], extensions=[".md"])
    assert "there is no text" in refused(tmp_path, paths=[str(bare)])
    line = refused(tmp_path, paths=[str(short)])
    assert "10 tokens" in line and "seq_len+1 = 17" in line and "at most 9" in line
    assert Text.conflicts({"paths": []}, {"seq_len": 9}) and not Text.conflicts({"paths": [str(short)]}, {"seq_len": 9})


def test_exactly_one_block_trains_without_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "a.txt"
    path.write_text("123456789\n")
    data = Text(paths=[str(path)]).prepare(tmp_path / "cache", 9)
    assert (data.num_train, data.num_valid) == (10, 0)
    assert data.decode(data.train_batch(0, 5, 2, 9).ids[1]) == "123456789\n"
    assert list(data.valid_batches(2, 9, 100)) == []
    assert "validation is off" in caplog.text


def test_clusters_refuse_more_successors_than_tokens(tmp_path: Path):
    with pytest.raises(ValueError, match=r"dataset.branching=9 is more than dataset.vocab_size=8"):
        Clusters(vocab_size=8, branching=9).prepare(tmp_path, 8)
    with pytest.raises(ValueError, match=r"fewer than one block of seq_len\+1 = 65"):
        Clusters(tokens=20).prepare(tmp_path, 64)
