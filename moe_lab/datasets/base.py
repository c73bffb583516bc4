"""What the rest of the program knows of a dataset: batches that are read by position.

Legend: B batch, S sequence.
"""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lab.datasets import ngram
from moe_lab.datasets.cache import TokenCache
from moe_lab.seeding import generator

log = logging.getLogger(__name__)


class DatasetUnavailable(OSError):
    """The data is out of reach (no network, a missing package): the environment's fault, not the config's."""


@dataclass(frozen=True)
class Batch:
    """ids [B, S+1] int64: inputs are [:, :-1], next-token targets [:, 1:]; domain [B, S] int64 of each input."""

    ids: Tensor
    domain: Tensor


class Data:
    """A prepared dataset: two token streams on disk (train, valid), read by position.

    `domains` names the values of `Batch.domain`; `fingerprint` is a sha256 over tokens, domains and tokenizer;
    `num_train` and `num_valid` count tokens; `about` holds facts for env.json.
    """

    def __init__(self, name: str, cache: TokenCache, decode, about: dict[str, Any] | None = None):
        meta = cache.meta
        self.name = name
        self.vocab_size: int = meta["vocab_size"]
        self.domains: list[str] = meta["domains"]
        self.num_train = len(cache.tokens["train"])
        self.num_valid = len(cache.tokens["valid"])
        identity = {key: meta[key] for key in ("files", "vocab_size", "domains", "tokenizer")}
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.about: dict[str, Any] = {**meta["about"], **(about or {})}
        self._cache = cache
        self._decode = decode

    def train_batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> Batch:
        """Batch number `step` (from 0) of the endless sequence of shuffled epochs; a pure function.

        Every epoch cuts the train stream into blocks of `seq_len` inputs from a random phase, so that block
        edges move, and visits each block once in random order. A batch may span epochs.
        """
        blocks = _num_blocks(self.num_train, seq_len)
        place_B = np.arange(step * batch_size, (step + 1) * batch_size)
        epoch_B, index_B = place_B // blocks, place_B % blocks
        start_B = np.empty_like(place_B)
        for epoch in np.unique(epoch_B):
            here = epoch_B == epoch
            starts = _draw_epoch(seed, int(epoch), self.num_train, seq_len)
            start_B[here] = starts[index_B[here]]
        return self._read("train", start_B, seq_len)

    def valid_batches(self, batch_size: int, seq_len: int, min_tokens: int) -> Iterator[Batch]:
        """The same batches every time: blocks spread evenly over the validation split.

        They cover at least `min_tokens` tokens, or the whole split (but for a tail shorter than a block), and
        each domain with a block of its own. The last batch may be smaller.
        """
        blocks = max(0, (self.num_valid - 1) // seq_len)
        if blocks == 0:
            return
        wanted = min(blocks, max(1, -(-min_tokens // seq_len)))
        chosen = np.arange(wanted) * blocks // wanted
        domain_of_block = self._domain("valid", np.arange(blocks) * seq_len)
        for domain in np.setdiff1d(domain_of_block, domain_of_block[chosen]):
            own = np.flatnonzero(domain_of_block == domain)
            chosen = np.append(chosen, own[len(own) // 2])
        starts = np.sort(chosen) * seq_len
        for at in range(0, len(starts), batch_size):
            yield self._read("valid", starts[at : at + batch_size], seq_len)

    def ngram(self) -> dict[str, float]:
        """`unigram` and `bigram` cross-entropy of the validation split, nats/token (see ngram.py); {} without one.

        Counted once, then kept beside the tokens.
        """
        if self.num_valid < 2:
            return {}
        counted = {"unigram", "bigram"}
        return self._cache.derived("ngram.json", counted, lambda: ngram.lines(self._cache.tokens, self.vocab_size))

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Token ids as text."""
        return self._decode(ids.tolist() if isinstance(ids, Tensor) else list(ids))

    def _domain(self, split: str, positions: np.ndarray) -> np.ndarray:
        domains = self._cache.domains[split]
        return np.zeros(positions.shape, np.int64) if domains is None else domains[positions].astype(np.int64)

    def _read(self, split: str, start_B: np.ndarray, seq_len: int) -> Batch:
        at = start_B[:, None] + np.arange(seq_len + 1)
        ids = self._cache.tokens[split][at].astype(np.int64)
        return Batch(torch.from_numpy(ids), torch.from_numpy(self._domain(split, at[:, :-1])))


def _num_blocks(tokens: int, seq_len: int) -> int:
    """Blocks of an epoch: as many as fit at every phase, so that all epochs are equally long."""
    return max(1, (tokens - seq_len) // seq_len)


class Dataset(ABC):
    """A config option of the group `dataset`: keyword-only options in `__init__`, then `prepare`."""

    name: str

    @abstractmethod
    def prepare(self, cache_dir: Path, seq_len: int) -> Data:
        """Open the token cache under `cache_dir`, building it first if need be.

        ValueError for what the user can put right in the config, DatasetUnavailable for the environment.
        """

    def _split_or_all(self, open_data, fraction: float, seq_len: int) -> Data:
        """`open_data(fraction)`; where a part would be shorter than one block, all tokens train instead."""
        data: Data = open_data(fraction)
        block = seq_len + 1
        if fraction and min(data.num_train, data.num_valid) < block:
            total, copied = data.num_train + data.num_valid, data.about.get("valid_copies_dropped")
            data = open_data(0.0)
            if data.num_train >= block and copied:
                log.warning(
                    "dataset %s: validation is off, %d documents of its validation split stand in train as well and "
                    "less than one block of seq_len+1 = %d tokens is left of it", self.name, copied, block,
                )  # fmt: skip
            elif data.num_train >= block:
                log.warning(
                    "dataset %s: validation is off, a part of the split of %d tokens would be shorter than one "
                    "block of seq_len+1 = %d; more of it or a smaller seq_len turns it on", self.name, total, block,
                )  # fmt: skip
        self._must_hold(data.num_train, block)
        return data

    def _must_hold(self, tokens: int, block: int) -> None:
        """ValueError where all tokens together are fewer than a block."""
        if tokens < block:
            raise ValueError(
                f"dataset {self.name}: {tokens} tokens are fewer than one block of seq_len+1 = {block}: "
                f"give it more text or set seq_len to at most {max(tokens - 1, 1)}"
            )


@lru_cache(maxsize=4)
def _draw_epoch(seed: int, epoch: int, num_tokens: int, seq_len: int) -> np.ndarray:
    """Where the blocks of an epoch start: from a random phase, in random order."""
    blocks, g = _num_blocks(num_tokens, seq_len), generator(seed, "data", epoch)
    slack = min(seq_len - 1, num_tokens - 1 - blocks * seq_len)
    phase = int(torch.randint(slack + 1, (), generator=g))
    return torch.randperm(blocks, generator=g).numpy() * seq_len + phase
