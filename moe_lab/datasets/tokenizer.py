"""Text to token ids and back: bytes, or a byte-level BPE trained on the text itself.

Neither has special tokens, and both are lossless. A document is given to them with its closing newline (added
where it has none), which is all that separates it from the next.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_lab.reading import Damaged

Kind = Literal["byte", "bpe"]
PIECE = 1 << 20
TRAINED_ON = 32 << 20  # bytes; more text hardly changes the merges


class Bytes:
    """Token = byte."""

    vocab_size = 256
    about: dict[str, Any] = {"name": "byte"}

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """A token array per text."""
        return [np.frombuffer(text, np.uint8) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Half characters at the edges become U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")


class BPE:
    """Byte-level byte-pair encoding by Hugging Face's `tokenizers`, kept as one JSON file."""

    def __init__(self, path: Path):
        package = _package()
        try:
            self._tokenizer = package.Tokenizer.from_file(str(path))
        except Exception as error:  # of no class of its own
            raise Damaged(f"{path}: is no tokenizer ({error}); remove its folder, and it is built anew") from None
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.about: dict[str, Any] = {"name": "bpe", "vocab": self.vocab_size}

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int, path: Path) -> "BPE":
        """Learn at most `vocab_size` tokens (256 bytes, then merges) from `texts` and write them to `path`."""
        package = _package()
        level = package.pre_tokenizers.ByteLevel
        tokenizer = package.Tokenizer(package.models.BPE())
        tokenizer.pre_tokenizer = level(add_prefix_space=False)
        tokenizer.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=sorted(level.alphabet()), show_progress=False
        )
        tokenizer.train_from_iterator((text.decode() for text in texts), trainer)
        tokenizer.save(str(path))
        return cls(path)

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """A token array per text."""
        encoded = self._tokenizer.encode_batch_fast([text.decode() for text in texts])
        return [np.asarray(one.ids, np.uint32) for one in encoded]

    def decode(self, ids: list[int]) -> str:
        """Half characters at the edges become U+FFFD."""
        return self._tokenizer.decode(ids)


def check(kind: Kind) -> None:
    """Say what to install before any work is done."""
    if kind == "bpe":
        _package()


def pieces(text: bytes, size: int = PIECE) -> list[bytes]:
    """Cut a long text after newlines (characters where there is none) into pieces of at most `size` bytes."""
    parts, start = [], 0
    while len(text) - start > size:
        end = text.rfind(b"\n", start, start + size) + 1 or character(text, start + size)
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def character(text: bytes, at: int) -> int:
    """The last edge between two UTF-8 characters that is not behind `at`."""
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _package() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "dataset.tokenizer=bpe needs a package that is not installed: pip install 'moe-lab[bpe]', "
            "or use dataset.tokenizer=byte"
        ) from None
    return tokenizers
