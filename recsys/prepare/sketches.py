"""Summaries of streams in a fixed amount of memory, which can be merged: of parts read by several threads, of files."""

from typing import Self

import numpy as np
from numpy.typing import NDArray

_INDEX_BITS = 14
_RANK_BITS = 64 - _INDEX_BITS


class HyperLogLog:
    """How many distinct values there are, by their hashes: 16 KiB, whatever their number.

    HyperLogLog (Flajolet, Fusy, Gandouet and Meunier, 2007) with the estimator of Ertl ("New cardinality estimation
    algorithms for HyperLogLog sketches", arXiv 1702.01284, algorithm 6), which is unbiased from none to beyond 2^50
    without tables.
    """

    STANDARD_ERROR = 1.04 / 2 ** (_INDEX_BITS / 2)
    """Of the estimate, as a share of it: 0.8 %."""

    def __init__(self) -> None:
        self._registers = np.zeros(1 << _INDEX_BITS, np.uint8)

    def add(self, hashes: NDArray[np.uint64]) -> None:
        """Take (N,) hashes of 64 uniform bits in; those that were there change nothing."""
        # Rank: the place of the lowest 1 among the bits that are no index; the one set above them ends the search.
        low = (hashes & np.uint64((1 << _RANK_BITS) - 1)) | np.uint64(1 << _RANK_BITS)
        low &= ~low + np.uint64(1)
        exponent = (low.astype(np.float64).view(np.uint64) >> np.uint64(52)) - np.uint64(1022)
        np.maximum.at(self._registers, (hashes >> np.uint64(_RANK_BITS)).astype(np.intp), exponent.astype(np.uint8))

    def merge(self, other: Self) -> None:
        """Count what either has seen."""
        np.maximum(self._registers, other._registers, out=self._registers)

    def estimate(self) -> float:
        """Distinct hashes that were added, within `STANDARD_ERROR`."""
        size = len(self._registers)
        counts = np.bincount(self._registers, minlength=_RANK_BITS + 2)
        z = size * _tau(1 - counts[_RANK_BITS + 1] / size)
        for count in counts[_RANK_BITS:0:-1]:
            z = 0.5 * (z + count)
        z += size * _sigma(counts[0] / size)
        return float(size**2 / (2 * np.log(2) * z))


class RowSample:
    """Those of a stream's hashes that are least: the same rows of any two streams, however long.

    A bottom-k sketch (Broder, "On the resemblance and containment of documents", 1997), which keeps repeats: below the
    least threshold of two sketches, both hold all there is, so that shares among these estimate the shares of all.
    """

    SIZE = 1 << 15

    def __init__(self) -> None:
        self._hashes = np.empty(0, np.uint64)
        self._below = np.uint64(2**64 - 1)

    def add(self, hashes: NDArray[np.uint64]) -> None:
        """Take (N,) hashes of 64 uniform bits in."""
        self._hashes = np.sort(np.concatenate([self._hashes, hashes[hashes < self._below]]))
        if len(self._hashes) > self.SIZE:
            self._below = self._hashes[self.SIZE]
            self._hashes = self._hashes[self._hashes < self._below]

    def merge(self, other: Self) -> None:
        """Sample what either has seen."""
        self._below = min(self._below, other._below)
        self.add(other._hashes)
        self._hashes = self._hashes[self._hashes < self._below]

    def shared(self, other: Self) -> tuple[int, int]:
        """How many of this stream's sampled hashes the other has too, and how many there are."""
        below = min(self._below, other._below)
        ours, theirs = (one._hashes[one._hashes < below] for one in (self, other))
        return int(np.isin(ours, theirs).sum()), len(ours)

    def repeated(self) -> tuple[int, int]:
        """How many of the sampled hashes there are more than once, and how many there are."""
        times = np.unique(self._hashes, return_counts=True)[1]
        return int(times[times > 1].sum()), len(self._hashes)


def _sigma(x: float) -> float:
    """Sum of x^(2^k) 2^(k-1), k from 1, and x: what the registers that are still 0 tell."""
    if x == 1:
        return float("inf")
    total, power = x, 1.0
    while True:
        x, before = x * x, total
        total += x * power
        power *= 2
        if total == before:
            return total


def _tau(x: float) -> float:
    """A third of 1 - x - sum of (1 - x^(2^-k))^2 2^-k, k from 1: what the registers that are full tell."""
    if x in (0.0, 1.0):
        return 0.0
    total, power = 1 - x, 1.0
    while True:
        x, before = x**0.5, total
        power *= 0.5
        total -= (1 - x) ** 2 * power
        if total == before:
            return total / 3
