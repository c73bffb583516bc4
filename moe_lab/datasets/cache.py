"""Token cache: flat little-endian token and domain files, memory-mapped, checksummed, built once.

An entry is a folder `<name>-<key>` with `train.bin`, `valid.bin` (tokens: uint8, uint16 or uint32, the smallest
that holds the vocabulary), `train.domain`, `valid.domain` (uint8 or uint16 per token, only where there are several
domains), and `meta.json`. It is written to a folder of its own, flushed to disk and then renamed, under a lock
that the operating system drops with the process, so that of several processes one builds and the others wait.

Every file's sha256 is recorded. On opening, files up to `HASHED_WHOLE` are hashed again in full. Of larger ones
the size and a second recorded hash over 64 evenly spaced slices of 1 MiB are checked, which finds truncation,
overwriting and lost pages in about a tenth of a second, though not a single flipped bit elsewhere.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from moe_lab import durable, reading

log = logging.getLogger(__name__)

FORMAT = 2  # part of every key: raise it when the same input would give other files
HASHED_WHOLE = 64 << 20
SLICES, SLICE = 64, 1 << 20
SPLITS = ("train", "valid")
NAMES = {f"{split}.{kind}" for split in SPLITS for kind in ("bin", "domain")} | {"tokenizer.json"}


class Damaged(Exception):
    """An entry that does not hold what its meta.json says."""


class Unusable(OSError):
    """There is no place for a token cache: the environment's fault."""


class TokenCache:
    """An open entry: `tokens[split]` and `domains[split]` (None where there is one domain) and `meta`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = _verified(folder)
        self.tokens = {split: self._map(f"{split}.bin", self.meta["dtype"]) for split in SPLITS}
        several = len(self.meta["domains"]) > 1
        kind = self.meta["domain_dtype"]
        self.domains = {split: self._map(f"{split}.domain", kind) if several else None for split in SPLITS}

    def derived(self, name: str, keys: set[str], compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """A small result kept in the entry as JSON; computed again where that is missing or something else."""
        path = self.folder / name
        with contextlib.suppress(OSError, ValueError):
            kept = reading.json_file(path)
            if kept.keys() == keys and all(type(value) is float for value in kept.values()):
                return kept
        value = compute()
        try:
            durable.write(path, json.dumps(value).encode())
        except OSError as error:  # a read-only cache still serves
            log.warning("%s is not kept: %s", path, error)
        return value

    def _map(self, name: str, dtype: str) -> np.ndarray:
        path = self.folder / name
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        try:
            found = np.memmap(path, dtype, mode="r")
        except ValueError as error:  # half a token
            raise Damaged(f"{name}: {error}") from None
        most = self.meta["vocab_size"] if name.endswith(".bin") else len(self.meta["domains"])
        if found.nbytes <= HASHED_WHOLE and most < 256**found.itemsize and found.max() >= most:
            raise Damaged(f"{name}: holds {found.max()}, {most - 1} is the largest there can be")
        return found


class Writer:
    """Writes an entry's files into `folder`: `add` streams in order, then `finish`."""

    def __init__(self, folder: Path, vocab_size: int, domains: list[str]):
        self.folder = folder
        self.dtype = _smallest(vocab_size)
        self.domain_dtype = _smallest(len(domains))
        self.meta: dict[str, Any] = {"format": FORMAT, "vocab_size": vocab_size, "domains": domains}
        self.files = {name: open(folder / name, "wb") for name in _names(self.meta)}  # noqa: SIM115 closed in finish
        self.counts = {split: np.zeros(len(domains), np.int64) for split in SPLITS}

    def add(self, split: str, tokens: np.ndarray, domain: int | np.ndarray) -> None:
        """Append tokens [n] of one domain, or of a domain each."""
        self.files[f"{split}.bin"].write(tokens.astype(self.dtype).tobytes())
        each = np.broadcast_to(np.asarray(domain), tokens.shape)
        self.counts[split] += np.bincount(each, minlength=len(self.counts[split]))
        if f"{split}.domain" in self.files:
            self.files[f"{split}.domain"].write(each.astype(self.domain_dtype).tobytes())

    @property
    def total(self) -> int:
        """Tokens written so far."""
        return int(sum(counts.sum() for counts in self.counts.values()))

    def finish(self, tokenizer: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Flush everything and write meta.json, last."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        per_domain = {
            f"{split}_tokens_per_domain": dict(zip(self.meta["domains"], counts.tolist(), strict=True))
            for split, counts in self.counts.items()
        }
        paths = sorted(self.folder.iterdir())  # a tokenizer may have put its file there too
        self.meta |= {
            "dtype": self.dtype,
            "domain_dtype": self.domain_dtype,
            "tokenizer": dict(tokenizer),
            "about": {**about, **per_domain, "tokenizer": tokenizer["name"]},
            "files": {path.name: sha256(path) for path in paths},
            "checks": {path.name: {"bytes": path.stat().st_size, "sample": _quick(path)} for path in paths},
        }
        sealed = {"sha256": _seal(self.meta), "meta": self.meta}
        durable.write(self.folder / "meta.json", json.dumps(sealed, indent=1).encode())


def open_or_build(cache_dir: Path, name: str, identity: Any, build: Callable[[Path], None]) -> TokenCache:
    """The entry for `identity` (plain JSON: everything that its tokens depend on), built by `build(folder)`.

    A damaged entry is built anew, with one line of log. Unusable where the cache cannot be written.
    """
    key = hashlib.sha256(json.dumps([FORMAT, name, identity], sort_keys=True).encode()).hexdigest()
    folder = cache_dir / f"{name}-{key[:16]}"
    try:
        return TokenCache(folder)
    except (FileNotFoundError, Damaged):
        pass
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_dir).close()
    except OSError as error:
        raise Unusable(f"{cache_dir}: {error.strerror}; set MOE_LAB_CACHE to a folder that can be written") from None
    with _locked(cache_dir / f"{folder.name}.lock"):
        try:
            return TokenCache(folder)  # another process was first
        except FileNotFoundError:
            log.info("building the token cache %s", folder)
        except Damaged as error:
            log.warning("the token cache %s is damaged (%s): building it anew", folder, error)
        for remains in cache_dir.glob(f"{folder.name}.*-*"):  # of a process that was killed while building
            shutil.rmtree(remains, ignore_errors=True)
        fresh = cache_dir / f"{folder.name}.new-{os.getpid()}"  # with the mode that the umask gives
        fresh.mkdir()
        try:
            with durable.naming(fresh):
                build(fresh)
            _replace(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return TokenCache(folder)


def sha256(path: Path) -> str:
    """Of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(fresh: Path, folder: Path) -> None:
    """Put `fresh` in the place of `folder`; whoever has the old files open keeps them."""
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f"{folder.name}.old-", dir=folder.parent))
        folder.rename(old / folder.name)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        fresh.rename(folder)
    durable.sync_folder(folder.parent)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The holder removes the file; who waited for it sees that its file is no longer the one there, and tries again."""
    while True:
        # Never through a link: opening for writing empties what it leads to.
        with open(path, "w", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process is building %s: waiting for it", path.with_suffix(""))
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _verified(folder: Path) -> dict[str, Any]:
    """meta.json, once the files match it. FileNotFoundError: no entry; Damaged: says which file and how."""
    try:
        there = folder.is_dir()
    except OSError as error:
        raise Unusable(f"{folder}: {error.strerror}; set MOE_LAB_CACHE to another folder") from None
    if not there:
        raise FileNotFoundError(folder)
    try:
        sealed = reading.json_file(folder / "meta.json")
        meta = sealed["meta"]
        if _seal(meta) != sealed["sha256"]:
            raise Damaged("meta.json: checksum")
        dtypes = _smallest(meta["vocab_size"]), _smallest(len(meta["domains"]))
        if (meta["dtype"], meta["domain_dtype"]) != dtypes or not NAMES >= set(meta["checks"]) >= set(_names(meta)):
            raise Damaged("meta.json: is not that of a token cache")
        for name, check in meta["checks"].items():
            path = folder / name
            if not path.is_file() and path.exists():
                raise Damaged(f"{name}: is no regular file")
            if path.stat().st_size != check["bytes"]:
                raise Damaged(f"{name}: {path.stat().st_size} bytes instead of {check['bytes']}")
            small = check["bytes"] <= HASHED_WHOLE
            if (sha256(path) != meta["files"][name]) if small else (_quick(path) != check["sample"]):
                raise Damaged(f"{name}: checksum")
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name}: missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise Damaged("meta.json: unreadable") from None
    return meta


def _quick(path: Path) -> str:
    """sha256 over evenly spaced slices, the first and the last among them."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(SLICES):
            file.seek(max(0, size - SLICE) * i // (SLICES - 1))
            digest.update(file.read(SLICE))
    return digest.hexdigest()


def _seal(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _names(meta: Mapping[str, Any]) -> list[str]:
    """The files of tokens and, where there are several domains, of domains."""
    kinds = ("bin", "domain") if len(meta["domains"]) > 1 else ("bin",)
    return [f"{split}.{kind}" for kind in kinds for split in SPLITS]


def _smallest(values: int) -> str:
    """The little-endian unsigned dtype that holds 0 .. values-1."""
    return next(f"<u{size}" for size in (1, 2, 4) if values <= 256**size)
