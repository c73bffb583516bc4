"""The data's own floor lines: what a model scores that knows only token frequencies, or only the last token.

Counted on the train split, scored on the validation split, in nats per token:

    unigram   P1(w)   = (c(w) + 1) / (n + V)
    bigram    P2(w|v) = (c(v, w) + t(v) P1(w)) / (c(v) + t(v))

with c counts, n tokens, V the vocabulary's size and t(v) the number of different tokens seen after v
(interpolated Witten-Bell smoothing, Computational Linguistics 17(4), 1991): finite for what was never seen.
Both are averaged over all validation tokens but the first. Streams longer than `COUNTED` are counted on 64
pieces of that total length, evenly spaced.
"""

from collections.abc import Mapping

import numpy as np

COUNTED = 1 << 25
DENSE = 1 << 24  # up to V*V of this size, counting in a table is faster than sorting the pairs


def lines(tokens: Mapping[str, np.ndarray], vocab_size: int) -> dict[str, float]:
    """{"unigram": nats/token, "bigram": nats/token} of `tokens["valid"]` under counts of `tokens["train"]`."""
    train, valid = _pieces(tokens["train"]), _pieces(tokens["valid"])
    count_V = np.sum([np.bincount(piece, minlength=vocab_size) for piece in train], axis=0)
    unigram_V = (count_V + 1.0) / (count_V.sum() + vocab_size)
    pairs, pair_count = _count_pairs(train, vocab_size)
    first = pairs // vocab_size
    followed_V = np.bincount(first, weights=pair_count, minlength=vocab_size)
    kinds_V = np.bincount(first, minlength=vocab_size)

    seen, times = _count_pairs(valid, vocab_size)
    v, w = seen // vocab_size, seen % vocab_size
    at = np.minimum(np.searchsorted(pairs, seen), len(pairs) - 1)
    c_vw = np.where(pairs[at] == seen, pair_count[at], 0)
    p2 = np.where(
        followed_V[v] > 0,
        (c_vw + kinds_V[v] * unigram_V[w]) / np.maximum(followed_V[v] + kinds_V[v], 1),
        unigram_V[w],
    )
    total = times.sum()
    return {
        "unigram": float(-(times * np.log(unigram_V[w])).sum() / total),
        "bigram": float(-(times * np.log(p2)).sum() / total),
    }


def _pieces(stream: np.ndarray) -> list[np.ndarray]:
    if len(stream) <= COUNTED:
        return [np.asarray(stream)]
    size = COUNTED // 64
    starts = [(len(stream) - size) * i // 63 for i in range(64)]
    return [np.asarray(stream[start : start + size]) for start in starts]


def _count_pairs(pieces: list[np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs v * V + w that occur, sorted, and how often."""
    codes = [piece[:-1].astype(np.int64) * vocab_size + piece[1:] for piece in pieces]
    if vocab_size**2 <= DENSE:
        table = np.zeros(vocab_size**2, np.int64)
        for code in codes:
            table += np.bincount(code, minlength=vocab_size**2)
        pairs = np.flatnonzero(table)
        return pairs, table[pairs]
    return np.unique(np.concatenate(codes), return_counts=True)
