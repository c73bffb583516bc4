"""The source text of the installed Python's standard library: real text on every machine, with natural domains."""

import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from moe_lab.config import option
from moe_lab.datasets import files
from moe_lab.datasets.corpus import Corpus, Document
from moe_lab.datasets.tokenizer import Kind

# Large packages that Python 3.11, 3.12 and 3.13 all have and no distribution leaves out.
DOMAINS = (
    "asyncio", "email", "encodings", "html", "http", "importlib", "logging", "multiprocessing", "pydoc_data",
    "unittest", "urllib", "xml",
)  # fmt: skip
LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "__pycache__"}


@option("dataset", "stdlib")
class Stdlib(Corpus):
    """*.py of the standard library without its tests; a dozen packages are domains, the rest is `other`."""

    name = "stdlib"

    def __init__(
        self,
        *,
        tokenizer: Kind = "byte",
        bpe_vocab: Annotated[int, Field(ge=257)] = 2048,
        valid_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.05,
    ):
        self.tokenizer: Kind = tokenizer
        self.bpe_vocab = bpe_vocab
        self.valid_fraction = valid_fraction
        self._root = Path(sysconfig.get_path("stdlib"))

    def identity(self) -> Any:
        return files.content_hash(self._sources())

    def documents(self) -> Iterator[Document]:
        for source in self._sources():
            text = source.path.read_bytes()
            if text and _is_utf8(text):
                yield Document(source.domain, text)

    def domain_names(self, found: set[str]) -> list[str]:
        return [*DOMAINS, "other"]

    def facts(self) -> dict[str, Any]:
        return {"source": str(self._root), "python": platform.python_version()}

    def _sources(self) -> list[files.Source]:
        """Only what belongs to Python: neither site-packages nor files of this machine's build."""
        found = []
        for name in files.walk(self._root, lambda part: part not in LEFT_OUT and part != "site-packages"):
            package = name.split("/")[0].removesuffix(".py")
            if name.endswith(".py") and package in sys.stdlib_module_names:
                domain = package if package in DOMAINS else "other"
                found.append(files.Source(self._root / name, domain, name))
        return found


def _is_utf8(text: bytes) -> bool:
    """Python itself allows other encodings in a source file; the few such files are passed over."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
