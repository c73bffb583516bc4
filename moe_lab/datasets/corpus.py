"""From documents to a token cache: spool, drop copies, split, tokenise. What every text dataset shares."""

import hashlib
import mmap
import tempfile
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lab.datasets import tokenizer as tokenizers
from moe_lab.datasets.base import Data, Dataset
from moe_lab.datasets.cache import TokenCache, Writer, open_or_build

SHORT = 64  # bytes; a repeated heading or "Thank you." is not a copied document
BATCH = 8 << 20


@dataclass(frozen=True)
class Document:
    """Valid UTF-8 text of one domain; `valid` where the source itself keeps it for validation."""

    domain: str
    text: bytes
    valid: bool = False


@dataclass
class Span:
    """A document in the spool: bytes [start, end); those from `cut` on are validation."""

    start: int
    end: int
    domain: str
    digest: bytes
    repeated: bool = False
    cut: int = field(default=-1)

    @property
    def size(self) -> int:
        return self.end - self.start


class Corpus(Dataset):
    """A dataset made of text documents; subclasses say where they come from."""

    tokenizer: tokenizers.Kind
    bpe_vocab: int
    valid_fraction: float

    @abstractmethod
    def identity(self) -> Any:
        """Plain JSON on which the documents depend, by content where they are local. ValueError on bad paths."""

    @abstractmethod
    def documents(self) -> Iterable[Document]:
        """Every document, in the order in which they are to stand."""

    @abstractmethod
    def domain_names(self, found: set[str]) -> list[str]:
        """The order of domains, given those that occurred."""

    def facts(self) -> dict[str, Any]:
        """For env.json; asked after `documents`, and kept in the cache."""
        return {}

    def prepare(self, cache_dir: Path, seq_len: int) -> Data:
        tokenizers.check(self.tokenizer)
        source = self.identity()

        def open_data(fraction: float) -> Data:
            bpe = self.bpe_vocab if self.tokenizer == "bpe" else None
            cache = open_or_build(
                cache_dir,
                self.name,
                [source, self.tokenizer, bpe, fraction],
                lambda to: self._build(to, fraction, seq_len + 1),
            )
            return Data(self.name, cache, _tokenizer_of(cache).decode)

        return self._split_or_all(open_data, self.valid_fraction, seq_len)

    def _build(self, folder: Path, fraction: float, block: int) -> None:
        with tempfile.TemporaryFile(dir=folder) as spool:
            spans, copies = _spool(self.documents(), spool, fraction > 0)
            own_validation = "valid_copies_dropped" in copies
            if not spans:
                raise ValueError(f"dataset {self.name}: there is no text in it: every file or row is empty or left out")
            spool.flush()
            with mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ) as text:
                if fraction and not own_validation:
                    split(spans, fraction, text)
                self._tokenise(folder, spans, text, copies, block)

    def _tokenise(self, folder: Path, spans: list[Span], text: mmap.mmap, copies: dict[str, int], block: int) -> None:
        if self.tokenizer == "bpe":
            sample = _sample([(s.start, s.cut) for s in spans if s.cut > s.start], text)
            coder = tokenizers.BPE.train(sample, self.bpe_vocab, folder / "tokenizer.json")
        else:
            coder = tokenizers.Bytes()
        domains = self.domain_names({span.domain for span in spans})
        writer = Writer(folder, coder.vocab_size, domains)
        index = {name: i for i, name in enumerate(domains)}
        for batch in _batches(spans, text):
            for (part, domain, _), ids in zip(batch, coder.encode([t for _, _, t in batch]), strict=True):
                writer.add(part, ids, index[domain])
        about = {
            **self.facts(),
            "documents": len(spans),
            "bytes": sum(span.size for span in spans),
            **copies,
        }
        self._must_hold(writer.total, block)  # before it is kept: what is refused leaves nothing behind
        writer.finish(coder.about, about)


def check_utf8(text: bytes, where: str) -> bytes:
    """`text` without a byte order mark. ValueError naming the first byte that is not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start} (0x{text[error.start]:02x}) is not valid UTF-8: "
            "save it as UTF-8 (for example: iconv -f LATIN1 -t UTF-8) or leave it out"
        ) from None
    return text.removeprefix(b"\xef\xbb\xbf")


def split(spans: list[Span], fraction: float, text: mmap.mmap | bytes) -> None:
    """Choose each domain's validation part: `fraction` of its bytes, in whole documents picked by their hash.

    Where the documents are too large for that (one book, one table), the end of the largest is taken, cut after
    a newline. A text that occurs more than once is never picked.
    """
    by_domain: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_domain[span.domain].append(span)
    for members in by_domain.values():
        wanted = int(fraction * sum(span.size for span in members))
        taken = 0
        for span in sorted(members, key=lambda s: s.digest):
            if not span.repeated and taken + span.size <= wanted:
                span.cut = span.start
                taken += span.size
        if taken < wanted / 2:
            largest = max(members, key=lambda s: (s.cut - s.start) * (not s.repeated))
            if not largest.repeated and largest.cut > largest.start:
                _cut_end(largest, wanted - taken, text)


def _cut_end(span: Span, size: int, text: mmap.mmap | bytes) -> None:
    at = max(span.start, span.cut - size)
    line = text.find(b"\n", at, span.end - 1) + 1
    span.cut = line or tokenizers.character(text, at)  # pyright: ignore[reportArgumentType]


def _spool(documents: Iterable[Document], spool: Any, splitting: bool) -> tuple[list[Span], dict[str, int]]:
    """Write every document once, closed by a newline; returns the spans and how many copies were dropped.

    Where the source keeps documents for validation (they come last), those that stand in train are dropped too,
    however short; `valid_copies_dropped` counts them.
    """
    spans: list[Span] = []
    first: dict[bytes, Span] = {}
    copies, at = {"copies_dropped": 0}, 0
    for document in documents:
        text = document.text if document.text.endswith(b"\n") else document.text + b"\n"
        digest = hashlib.blake2b(text, digest_size=16).digest()
        valid = splitting and document.valid
        if valid:
            copies.setdefault("valid_copies_dropped", 0)
        if digest in first:
            first[digest].repeated = True
            in_train = valid and first[digest].cut > first[digest].start
            if in_train or len(text) >= SHORT:
                copies["copies_dropped"] += 1
                if in_train:
                    copies["valid_copies_dropped"] += 1
                continue
        span = Span(at, at + len(text), document.domain, digest, repeated=digest in first)
        span.cut = span.start if valid else span.end
        first.setdefault(digest, span)
        spans.append(span)
        at = span.end
        spool.write(text)
    return spans, copies


def _batches(spans: list[Span], text: mmap.mmap) -> Iterator[list[tuple[str, str, bytes]]]:
    """(split, domain, piece of text) in order, in lists of a few megabytes."""
    batch: list[tuple[str, str, bytes]] = []
    held = 0
    for span in spans:
        for part, start, end in (("train", span.start, span.cut), ("valid", span.cut, span.end)):
            for piece in tokenizers.pieces(text[start:end]) if start < end else ():
                batch.append((part, span.domain, piece))
                held += len(piece)
            if held >= BATCH:
                yield batch
                batch, held = [], 0
    yield batch


def _sample(parts: list[tuple[int, int]], text: mmap.mmap) -> Iterator[bytes]:
    """The train text, or every n-th piece of it where it is longer than a BPE needs to learn from."""
    every = -(-sum(end - start for start, end in parts) // tokenizers.TRAINED_ON)
    number = 0
    for start, end in parts:
        for piece in tokenizers.pieces(text[start:end]):
            if number % every == 0:
                yield piece
            number += 1


def _tokenizer_of(cache: TokenCache) -> tokenizers.Bytes | tokenizers.BPE:
    path = cache.folder / "tokenizer.json"
    return tokenizers.BPE(path) if path.exists() else tokenizers.Bytes()
