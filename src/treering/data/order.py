"""The documents of a step: a pure function of (seed, epoch, step) and a global token budget, not of the ranks.

A bin is the documents of one micro-batch: at most `capacity` tokens (packed), or rows of similar length whose
padded area is at most `capacity`. Each step has the same number of bins; the last step of an epoch may have fewer.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from treering.core.errors import ConfigError, DataError
from treering.core.seeds import derive

_POOL = 8192  # documents from which bins are filled
_FULL = 0.99  # documents of bins below this share of the capacity wait for the next pool


class Order:
    """Steps of an epoch and their bins. The last epoch's plan is kept: it takes a few seconds for 10^6 documents."""

    def __init__(
        self,
        lengths: NDArray[np.int32],
        *,
        seed: int,
        tokens_per_step: int,
        capacity: int,
        shuffle: bool = True,
        packing: Literal["on", "off"] = "on",
    ):
        if not len(lengths):
            raise DataError("there is no document to order")
        self._lengths = np.asarray(lengths)
        self._seed, self._shuffle, self._packing = seed, shuffle, packing
        self._capacity = min(capacity, tokens_per_step)
        longest = int(self._lengths.max())
        if longest > self._capacity:
            field = "capacity" if capacity < longest else "tokens_per_step"
            raise ConfigError(
                f"{field} is {self._capacity} but the longest document has {longest} tokens; "
                f"set it to at least {longest}, or max_length to at most {self._capacity}",
                field=field,
            )
        self.bins_per_step = max(1, tokens_per_step // self._capacity)
        self._planned: tuple[int, list[list[int]]] | None = None
        self._steps: dict[int, int] = {}

    def steps_in_epoch(self, epoch: int) -> int:
        """Return the number of steps of an epoch."""
        if epoch not in self._steps:
            self._steps[epoch] = -(-len(self._plan(epoch)) // self.bins_per_step)
        return self._steps[epoch]

    def bins(self, epoch: int, step: int) -> list[list[int]]:
        """Return the bins of a step, as indices of documents."""
        if not 0 <= step < self.steps_in_epoch(epoch):
            raise IndexError(f"step {step} of epoch {epoch}, which has {self.steps_in_epoch(epoch)}")
        first = step * self.bins_per_step
        return self._plan(epoch)[first : first + self.bins_per_step]

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step that is counted from the start of training, and its index in the epoch."""
        epoch = 0
        while step >= (steps := self.steps_in_epoch(epoch)):
            step -= steps
            epoch += 1
        return epoch, step

    def fill(self, epoch: int) -> float:
        """Return the share of the capacity of all bins that is filled with tokens."""
        return int(self._lengths.sum()) / (len(self._plan(epoch)) * self._capacity)

    def _plan(self, epoch: int) -> list[list[int]]:
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._bins_of(epoch))
        return self._planned[1]

    def _bins_of(self, epoch: int) -> list[list[int]]:
        count = len(self._lengths)
        documents = np.arange(count)
        if self._shuffle:
            documents = np.argsort(scrambled(count, derive(self._seed, "order", epoch)), kind="stable")
        pool = max(_POOL, 64 * self._capacity * count // max(1, int(self._lengths.sum())))
        bins: list[list[int]] = []
        waiting: list[int] = []
        at = 0
        while at < count:
            take = pool - len(waiting)
            window = waiting + documents[at : at + take].tolist()
            at += take
            packed = self._pack(window)
            waiting = []
            if at < count:
                packed, waiting = self._hold_back(packed, pool // 2)
            bins.extend(self._arrange(packed, epoch, len(bins)))
        return bins

    def _pack(self, window: list[int]) -> list[list[int]]:
        lengths = self._lengths[window]
        descending = np.argsort(-lengths, kind="stable").tolist()
        documents = [window[i] for i in descending]
        sizes = [int(lengths[i]) for i in descending]
        if self._packing == "on":
            return best_fit(documents, sizes, self._capacity)
        bins: list[list[int]] = []
        at = 0
        while at < len(documents):
            rows = max(1, self._capacity // sizes[at])
            bins.append(documents[at : at + rows])
            at += rows
        return bins

    def _hold_back(self, bins: list[list[int]], most: int) -> tuple[list[list[int]], list[int]]:
        """Return bins, and at most `most` documents that wait for the next pool: those of the emptiest bins."""
        if self._packing == "off":
            return bins, []
        tokens = [int(self._lengths[documents].sum()) for documents in bins]
        waiting: list[int] = []
        emptied = set()
        for i in sorted(range(len(bins)), key=lambda i: (tokens[i], i)):
            if tokens[i] >= _FULL * self._capacity or len(waiting) + len(bins[i]) > most:
                break
            emptied.add(i)
            waiting.extend(bins[i])
        return [documents for i, documents in enumerate(bins) if i not in emptied], waiting

    def _arrange(self, bins: list[list[int]], epoch: int, before: int) -> list[list[int]]:
        """Return the bins shuffled, because packing puts the longest documents first; or in the order of the data."""
        if not self._shuffle:
            return sorted((sorted(documents) for documents in bins), key=lambda documents: documents[0])
        keys = scrambled(len(bins), derive(self._seed, "bins", epoch, before))
        return [bins[i] for i in np.argsort(keys, kind="stable").tolist()]


def best_fit(documents: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    """Pack documents, given in descending size, into bins: each into the bin with the least free capacity that fits."""
    open_bins = _OpenBins(capacity)
    bins: list[list[int]] = []
    for document, size in zip(documents, sizes, strict=True):
        fit = open_bins.take(size)
        if fit is None:
            free, chosen = capacity, len(bins)
            bins.append([])
        else:
            free, chosen = fit
        bins[chosen].append(document)
        if free > size:
            open_bins.put(free - size, chosen)
    return bins


class _OpenBins:
    """Bins by their free capacity. Each free capacity is a bit in a block and each block a bit in `_blocks`, so the bin
    that fits best is found by two shifts of short integers, for any capacity."""

    def __init__(self, capacity: int):
        self._bins: list[list[int]] = [[] for _ in range(capacity + 1)]
        self._bits = [0] * ((capacity >> 8) + 1)
        self._blocks = 0

    def put(self, free: int, bin: int) -> None:
        self._bins[free].append(bin)
        self._bits[free >> 8] |= 1 << (free & 255)
        self._blocks |= 1 << (free >> 8)

    def take(self, size: int) -> tuple[int, int] | None:
        """Remove and return (free capacity, bin) of the bin with the least free capacity that is at least `size`."""
        block = size >> 8
        if above := self._bits[block] >> (size & 255):
            free = size + _lowest(above)
        elif blocks := self._blocks >> (block + 1):
            block += 1 + _lowest(blocks)
            free = (block << 8) + _lowest(self._bits[block])
        else:
            return None
        bins = self._bins[free]
        bin = bins.pop()
        if not bins:
            self._bits[block] ^= 1 << (free & 255)
            if not self._bits[block]:
                self._blocks ^= 1 << block
        return free, bin


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def scrambled(count: int, seed: int) -> NDArray[np.uint64]:
    """Return keys whose sorted order is a permutation: splitmix64 of seed + i.

    Not a numpy generator: another version of numpy may give other numbers, and a run resumed after an upgrade would
    then train on other data.
    """
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
