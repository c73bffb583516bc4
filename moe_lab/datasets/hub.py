"""Hugging Face datasets: any repository with a column of text, or local files that `datasets` reads.

Only building the token cache imports `datasets` and touches the network. What is cached stays as it is, even where
`revision` names a branch that moves on; `about["revision"]` is the commit that was read.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from moe_lab.config import Config, option
from moe_lab.datasets import files
from moe_lab.datasets.base import DatasetUnavailable
from moe_lab.datasets.corpus import Corpus, Document
from moe_lab.datasets.tokenizer import Kind

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
MOST_DOMAINS = 256
TIMEOUT = 10  # seconds; the first question to the hub, so that no network is found out at once


@option("dataset", "hub")
class Hub(Corpus):
    """Rows of a Hugging Face dataset; each is a document."""

    name = "hub"

    def __init__(
        self,
        *,
        repo: str,
        config: str | None = None,
        split: str = "train",
        valid_split: str | None = None,
        column: str = "text",
        domain_column: str | None = None,
        revision: str | None = None,
        streaming: bool = True,
        max_documents: Annotated[int, Field(ge=1)] | None = None,
        max_bytes: Annotated[int, Field(ge=1)] | None = None,
        tokenizer: Kind = "byte",
        bpe_vocab: Annotated[int, Field(ge=257)] = 2048,
        valid_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.05,
    ):
        self.repo, self.config, self.revision = repo, config, revision
        self.split, self.valid_split = split, valid_split
        self.column, self.domain_column = column, domain_column
        self.streaming, self.max_documents, self.max_bytes = streaming, max_documents, max_bytes
        self.tokenizer: Kind = tokenizer
        self.bpe_vocab = bpe_vocab
        self.valid_fraction = valid_fraction
        self._commit: str | None = None

    @staticmethod
    def conflicts(node: Config, cfg: Config) -> list[str]:
        """A repository there must be, and a path must lead somewhere."""
        repo = node["repo"]
        if not repo:
            return ["dataset.repo is empty: name one on the hub, for example dataset.repo=roneneldan/TinyStories"]
        if repo.startswith(("/", ".")) and not Path(repo).exists():
            return [f"dataset.repo: there is no {repo} (relative paths start at {Path.cwd()})"]
        return []

    def identity(self) -> Any:
        for problem in self.conflicts({"repo": self.repo}, {}):
            raise ValueError(problem)
        options = [self.config, self.split, self.valid_split, self.column, self.domain_column]
        local = Path(self.repo)
        if local.is_dir():
            names = files.walk(local, lambda name: not name.startswith("."))
            content = files.content_hash(files.Source(local / name, "", name) for name in names)
        elif local.is_file():
            content = files.content_hash([files.Source(local, "", local.name)])
        else:
            content = None
        return [content or [self.repo, self.revision], *options, self.max_documents, self.max_bytes]

    def documents(self) -> Iterator[Document]:
        with _explained(self.repo):
            self._commit = None if Path(self.repo).exists() else _commit(self.repo, self.revision)
            size, number = 0, 0
            for document in self._rows(self.split, self.max_documents, self.max_bytes, valid=False):
                size, number = size + len(document.text), number + 1
                yield document
            if self.valid_split is not None:
                # As much as a fraction of the train part would be: some validation splits are larger than a run.
                share = max(1, int(self.valid_fraction * number)), max(1, int(self.valid_fraction * size))
                yield from self._rows(self.valid_split, *share, valid=True)

    def domain_names(self, found: set[str]) -> list[str]:
        if len(found) > MOST_DOMAINS:
            raise ValueError(
                f"dataset.domain_column={self.domain_column} has {len(found)} different values, at most "
                f"{MOST_DOMAINS} can be domains: choose a coarser column, or null for none"
            )
        return sorted(found)

    def facts(self) -> dict[str, Any]:
        return {"source": self.repo, "config": self.config, "split": self.split, "revision": self._commit}

    def _rows(self, split: str, max_documents: int | None, max_bytes: int | None, *, valid: bool) -> Iterator[Document]:
        """Rows from the start of `split` until a limit is reached."""
        size = 0
        for number, row in enumerate(self._load(split)):
            if number == max_documents or (max_bytes is not None and size >= max_bytes):
                return
            text = _field(row, self.column, "column")
            if not isinstance(text, str):
                raise ValueError(f"dataset.column={self.column} holds {type(text).__name__}, text is needed")
            domain = _field(row, self.domain_column, "domain_column") if self.domain_column else "text"
            encoded = text.encode(errors="replace")
            size += len(encoded)
            if encoded:
                yield Document(str(domain), encoded, valid)

    def _load(self, split: str) -> Any:
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        where = {"name": self.config, "split": split, "streaming": self.streaming}
        local = Path(self.repo)
        if local.is_file():
            if local.suffix not in READERS:
                raise ValueError(f"no reader for {local.suffix} files, only {', '.join(READERS)}")
            return datasets.load_dataset(READERS[local.suffix], data_files={split: str(local)}, **where)
        return datasets.load_dataset(self.repo, revision=self._commit or self.revision, **where)


def _field(row: Mapping[str, Any], path: str, key: str) -> Any:
    """A value by dotted path."""
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = ", ".join(value) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise ValueError(f"dataset.{key}={path}: no {part} in the data; there are: {there}")
        value = value[part]
    return value


def _commit(repo: str, revision: str | None) -> str | None:
    """The commit that `revision` stands for; None where HF_HUB_OFFLINE leaves it to the local copy."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().dataset_info(repo, revision=revision, timeout=TIMEOUT).sha
    except (RepositoryNotFoundError, RevisionNotFoundError):
        at = f" at revision {revision}" if revision else ""
        raise ValueError(f"the hub has no such dataset{at}, or it needs a login (hf auth login)") from None


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """One line for what `datasets` and the HTTP client below it raise: the network's fault or the user's mistake."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
        told = cause if isinstance(cause, Exception) else error
        line = (str(told).strip() or type(told).__name__).splitlines()[0]
        if _is_network(told):
            from huggingface_hub import constants

            last = (
                "unset HF_HUB_OFFLINE, which keeps it from being downloaded"
                if constants.HF_HUB_OFFLINE
                else "where it has been downloaded before, set HF_HUB_OFFLINE=1"
            )
            raise DatasetUnavailable(
                f"dataset {repo} cannot be reached ({line}): use dataset=stdlib, text of your own "
                f"(dataset=text dataset.paths=[my.txt]), or {last}"
            ) from None
        if isinstance(told, ValueError | LookupError | FileNotFoundError | RuntimeError):
            raise ValueError(f"dataset {repo}: {line}") from None
        raise


def _is_network(error: Exception) -> bool:
    if isinstance(error, ValueError):  # a malformed repository name, say
        return False
    clients = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp", "huggingface_hub"}
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in clients
