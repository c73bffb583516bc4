"""Files and folders of one's own."""

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from moe_lab.config import Config, option, shown
from moe_lab.datasets import files
from moe_lab.datasets.corpus import Corpus, Document, check_utf8
from moe_lab.datasets.tokenizer import Kind

log = logging.getLogger(__name__)


@option("dataset", "text")
class Text(Corpus):
    """Text files, and folders with everything below them; each file is a document.

    A file named in `paths` must be UTF-8. In a folder, hidden files and folders are passed over, and so are files
    that are no UTF-8 text; `extensions` restricts it to some endings, and then a file that is no text is an error.
    """

    name = "text"

    def __init__(
        self,
        *,
        paths: list[str],
        domain_per_path: bool = True,
        extensions: list[str] | None = None,
        tokenizer: Kind = "byte",
        bpe_vocab: Annotated[int, Field(ge=257)] = 2048,
        valid_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.1,
    ):
        self.paths = paths
        self.domain_per_path = domain_per_path
        self.extensions = extensions
        self.tokenizer: Kind = tokenizer
        self.bpe_vocab = bpe_vocab
        self.valid_fraction = valid_fraction
        self._skipped = 0

    @staticmethod
    def conflicts(node: Config, cfg: Config) -> list[str]:
        """What is wrong with the paths, before anything is written."""
        return _problems(list(node["paths"])) or _too_little(list(node["paths"]), cfg["seq_len"])

    def identity(self) -> Any:
        problems = _problems(self.paths)
        if problems:
            raise ValueError("; ".join(problems))
        sources = self._sources()
        if not sources:
            ending = f" that ends in {' or '.join(self.extensions)}" if self.extensions else ""
            raise ValueError(f"dataset.paths: no file{ending} in {', '.join(self.paths)}")
        return files.content_hash(sources)

    def documents(self) -> Iterator[Document]:
        self._skipped, some = 0, False
        named = {Path(path) for path in self.paths}
        for source in self._sources():
            text = source.path.read_bytes()
            if source.path in named or self.extensions is not None:
                text = check_utf8(text, source.name)
            elif not _is_text(text):
                self._skipped += 1
                continue
            if text:
                some = True
                yield Document(source.domain, text)
        if self._skipped and some:
            log.warning("dataset text: %d files that are no UTF-8 text are left out", self._skipped)

    def domain_names(self, found: set[str]) -> list[str]:
        return self._domains()

    def facts(self) -> dict[str, Any]:
        return {"source": list(self.paths), "files": len(self._sources()), "files_left_out": self._skipped}

    def _domains(self) -> list[str]:
        """A path's last part without its ending; the path as given where two would be called the same."""
        if not self.domain_per_path:
            return ["text"]
        stems = [Path(path).resolve().stem for path in self.paths]
        return stems if len(set(stems)) == len(stems) else list(self.paths)

    def _sources(self) -> list[files.Source]:
        domains = self._domains()
        found = []
        for i, path in enumerate(self.paths):
            domain = domains[i] if self.domain_per_path else domains[0]
            if Path(path).is_dir():
                names = [f"{path.rstrip('/')}/{name}" for name in files.walk(Path(path), _visible)]
                found += [files.Source(Path(name), domain, name) for name in names if self._wanted(name)]
            else:
                found.append(files.Source(Path(path), domain, path))
        return found

    def _wanted(self, name: str) -> bool:
        return self.extensions is None or name.endswith(tuple(self.extensions))


def _problems(paths: list[str]) -> list[str]:
    if not paths:
        return ["dataset.paths is empty: name text files or folders, for example dataset.paths=[my.txt]"]
    problems = []
    for path in paths:
        try:
            found = os.stat(path)
        except PermissionError:  # the environment's fault
            raise
        except (FileNotFoundError, NotADirectoryError):
            where = f"there is no {path} (relative paths start at {Path.cwd()})"
            problems.append(f"dataset.paths: {where if path else 'an empty name stands in it'}")
        except (OSError, ValueError) as error:
            problems.append(f"dataset.paths: {shown(path)}: {getattr(error, 'strerror', None) or error}")
        else:
            if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
                problems.append(f"dataset.paths: {path} is neither a file nor a folder")
            elif stat.S_ISREG(found.st_mode) and found.st_size == 0:
                problems.append(f"dataset.paths: {path} is empty: name a file with text in it")
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        problems.append(f"dataset.paths: {path} is named twice")
    return problems


def _too_little(paths: list[str], seq_len: int) -> list[str]:
    """Files that cannot hold a block, whatever the tokenizer: a token is at least a byte, and each file may get
    a closing newline. Found before anything is built from them."""
    if any(Path(path).is_dir() for path in paths):
        return []
    most = sum(Path(path).stat().st_size + 1 for path in paths)
    if most >= seq_len + 1:
        return []
    return [
        f"dataset.paths: {', '.join(paths)}: at most {most} tokens are fewer than one block of "
        f"seq_len+1 = {seq_len + 1}: give it more text or set seq_len to at most {max(most - 1, 1)}"
    ]


def _visible(name: str) -> bool:
    return not name.startswith(".")


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content
