"""Synthetic text with a known source per token: the ground truth for specialisation.

Each of `domains` sources is an order-1 Markov chain over one shared vocabulary of V tokens. Source d has two random
permutations p, q of the vocabulary and goes from v to q[(p[v] + j) mod V] with j uniform in 0 .. branching-1:

- within a source, every token has exactly `branching` equally likely successors: ln(branching) nats per token;
- every source uses every token equally often, so that a token by itself says nothing about its source;
- which source is speaking shows in the pairs of tokens, and lasts: the stream is a sequence of segments of random
  length (uniform in segment/2 .. 3 segment/2), each from one source and beginning at a random token.

So the unigram line is ln V; the bigram line, which mixes the sources, lies between; and a model that infers the
source from the context reaches `about["entropy_given_domain"]`. Everything comes from raw 64-bit integers of
PCG64, whose stream NumPy guarantees: the tokens are the same on every machine.
"""

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from moe_lab.config import Config, option
from moe_lab.datasets.base import Data, Dataset
from moe_lab.datasets.cache import Writer, open_or_build

VALID_FRACTION = 0.1


@option("dataset", "clusters")
class Clusters(Dataset):
    """Segments from `domains` Markov chains over a shared vocabulary."""

    name = "clusters"

    def __init__(
        self,
        *,
        domains: Annotated[int, Field(ge=1, le=256)] = 8,
        vocab_size: Annotated[int, Field(ge=2, le=65536)] = 64,
        branching: Annotated[int, Field(ge=1)] = 2,
        segment: Annotated[int, Field(ge=2, le=1_000_000)] = 64,
        tokens: Annotated[int, Field(ge=2, le=1_000_000_000)] = 1_000_000,
        seed: Annotated[int, Field(ge=0)] = 0,
    ):
        self.options = {
            "domains": domains, "vocab_size": vocab_size, "branching": branching, "segment": segment,
            "tokens": tokens, "seed": seed,
        }  # fmt: skip

    @staticmethod
    def conflicts(node: Config, cfg: Config) -> list[str]:
        """A token cannot have more successors than there are tokens, and a block must fit."""
        if node["branching"] > node["vocab_size"]:
            return [
                f"dataset.branching={node['branching']} is more than dataset.vocab_size={node['vocab_size']}: "
                "make it smaller"
            ]
        if node["tokens"] < cfg["seq_len"] + 1:
            return [
                f"dataset.tokens={node['tokens']}: fewer than one block of seq_len+1 = {cfg['seq_len'] + 1}: "
                f"more of them, or seq_len={node['tokens'] - 1} at most"
            ]
        return []

    def prepare(self, cache_dir: Path, seq_len: int) -> Data:
        for problem in self.conflicts(self.options, {"seq_len": seq_len}):
            raise ValueError(problem)

        def open_data(fraction: float) -> Data:
            identity = [self.options, fraction]
            cache = open_or_build(cache_dir, self.name, identity, lambda to: self._build(to, fraction))
            return Data(self.name, cache, lambda ids: " ".join(map(str, ids)))

        return self._split_or_all(open_data, VALID_FRACTION, seq_len)

    def _build(self, folder: Path, fraction: float) -> None:
        o = self.options
        ids, domain, segments = draw(**o)
        writer = Writer(folder, o["vocab_size"], [f"source {d}" for d in range(o["domains"])])
        edge = len(ids) - int(fraction * len(ids))
        writer.add("train", ids[:edge], domain[:edge])
        writer.add("valid", ids[edge:], domain[edge:])
        inside = (len(ids) - segments) * math.log(o["branching"])
        about: dict[str, Any] = {
            "source": "generated",
            **o,
            "segments": segments,
            "entropy_given_domain": (inside + segments * math.log(o["vocab_size"])) / len(ids),
        }
        writer.finish({"name": "none"}, about)


def draw(
    *, domains: int, vocab_size: int, branching: int, segment: int, tokens: int, seed: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """(tokens [n], domains [n], number of segments)."""
    random = np.random.PCG64(seed)

    def below(limit: int, *shape: int) -> np.ndarray:
        # The remainder of 64 random bits is uniform but for limit / 2^64.
        return (random.random_raw(math.prod(shape)) % np.uint64(limit)).astype(np.int64).reshape(shape)

    def permutations() -> np.ndarray:
        raw = random.random_raw(domains * vocab_size).reshape(domains, vocab_size)
        return np.argsort(raw, axis=1, kind="stable")

    p, q = permutations(), permutations()
    shortest = segment // 2
    count = -(-tokens // shortest)
    length = shortest + below(segment + 1, count)
    count = int(np.searchsorted(np.cumsum(length), tokens)) + 1
    length = length[:count]
    # The first is any source, each next another one than the last.
    step = 1 + below(max(1, domains - 1), count)
    source = np.cumsum(step) % domains

    longest = int(length.max())
    rows = np.empty((count, longest), np.int64)
    rows[:, 0] = below(vocab_size, count)
    branch = below(branching, longest, count)
    for t in range(1, longest):
        rows[:, t] = q[source, (p[source, rows[:, t - 1]] + branch[t]) % vocab_size]
    inside = np.arange(longest) < length[:, None]
    return rows[inside][:tokens], np.repeat(source, length)[:tokens], count
