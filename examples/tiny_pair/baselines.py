"""What a compressor and a 5-gram model make of the held-out books, in bits per byte.

The 5-gram model works on the same tokens as the language models, so that its loss is comparable to theirs. It is
interpolated Kneser-Ney with three discounts (Chen and Goodman 1999): with counts c at the highest order, and below it
the number of different tokens seen to the left,

    p_n(w | h) = max(c(h w) − D(c(h w)), 0) / c(h ·) + (D1 N1(h) + D2 N2(h) + D3 N3+(h)) / c(h ·) · p_{n−1}(w | h')
    Y = n1 / (n1 + 2 n2),  D1 = 1 − 2 Y n2/n1,  D2 = 2 − 3 Y n3/n2,  D3 = 3 − 4 Y n4/n3

down to p_0 = 1 / vocabulary. An unseen context passes the question on whole.
"""

from __future__ import annotations

import lzma
import math
from dataclasses import dataclass

import numpy as np

ORDER = 5
BITS = 12  # a token id; five of them fit into 64 bits


def xz_bits_per_byte(data: bytes) -> float:
    """Bits per byte of `xz -9e` on the text alone."""
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


@dataclass(frozen=True)
class Table:
    """One order: the sorted n-grams with their counts; for each context its total and the weight it passes on."""

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    passed_on: np.ndarray
    discounts: np.ndarray


def grams_of(tokens: np.ndarray, order: int) -> np.ndarray:
    """Every run of `order` tokens as one integer, the last token in the lowest bits."""
    length = len(tokens) - order + 1
    keys = np.zeros(max(length, 0), dtype=np.uint64)
    for i in range(order):
        keys = (keys << np.uint64(BITS)) | tokens[i : i + length].astype(np.uint64)
    return keys


def discounts(counts: np.ndarray) -> np.ndarray:
    """D(0) = 0, D1, D2, D3 from how many n-grams were seen once to four times."""
    n1, n2, n3, n4 = (max(1, int((counts == i).sum())) for i in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    return np.clip([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0.0, None)


def tabulate(grams: np.ndarray, counts: np.ndarray) -> Table:
    """Totals and passed-on weight of each context; `grams` is sorted, so that contexts lie together."""
    found = discounts(counts)
    prefixes = grams >> np.uint64(BITS)
    starts = np.flatnonzero(np.r_[True, prefixes[1:] != prefixes[:-1]])
    totals = np.add.reduceat(counts.astype(np.float64), starts)
    taken = np.add.reduceat(found[np.minimum(counts, 3)], starts)
    return Table(grams, counts, prefixes[starts], totals, taken / totals, found)


def fit(tokens: np.ndarray) -> list[Table]:
    """The tables of orders 1 to 5."""
    grams, counts = np.unique(grams_of(tokens, ORDER), return_counts=True)
    tables = [tabulate(grams, counts)]
    for order in range(ORDER - 1, 0, -1):
        suffixes = grams & np.uint64((1 << (BITS * order)) - 1)
        grams, counts = np.unique(suffixes, return_counts=True)
        tables.insert(0, tabulate(grams, counts))
    return tables


def looked_up(keys: np.ndarray, wanted: np.ndarray, values: np.ndarray, *, missing: float) -> np.ndarray:
    """`values` at the places of `wanted` among the sorted `keys`, `missing` where it is not there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], missing)


def probabilities(tables: list[Table], tokens: np.ndarray, *, vocab_size: int) -> np.ndarray:
    """p(token | the up to four before it) of every token."""
    p = np.full(len(tokens), 1.0 / vocab_size)
    for order, table in enumerate(tables, 1):
        wanted = grams_of(tokens, order)
        counts = looked_up(table.grams, wanted, table.counts, missing=0).astype(np.int64)
        contexts = wanted >> np.uint64(BITS)
        totals = looked_up(table.contexts, contexts, table.totals, missing=np.inf)
        passed_on = looked_up(table.contexts, contexts, table.passed_on, missing=1.0)
        kept = np.maximum(counts - table.discounts[np.minimum(counts, 3)], 0.0) / totals
        p[order - 1 :] = kept + passed_on * p[order - 1 :]
    return p


def ngram_bits_per_byte(training: np.ndarray, held_out: np.ndarray, *, num_bytes: int, vocab_size: int) -> float:
    """Bits per byte of the 5-gram model on the held-out tokens."""
    if vocab_size > 1 << BITS:
        raise ValueError(f"token ids must fit into {BITS} bits; the vocabulary has {vocab_size}")
    p = probabilities(fit(training), held_out, vocab_size=vocab_size)
    return float(-np.log(p).sum()) / math.log(2) / num_bytes
