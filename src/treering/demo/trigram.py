"""The baseline the small model has to beat: an interpolated byte trigram fitted on the same text (Witten–Bell).

p_n(c | h) = (count(h c) + distinct(h) · p_{n−1}(c | h')) / (count(h) + distinct(h))
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class Trigram:
    def __init__(self, texts: Iterable[bytes]):
        texts = list(texts)
        self.counts = [
            np.bincount(np.concatenate([_keys(text, n) for text in texts]), minlength=256**n) for n in (1, 2, 3)
        ]

    def bits(self, text: bytes) -> NDArray[np.float64]:
        """−log₂ p of each byte after those before it."""
        codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
        probability = np.full(len(codes), 1 / 256)
        for n, counts in enumerate(self.counts, 1):
            table = counts.reshape(-1, 256)
            keys = _keys(text, n)
            history = keys // 256
            total, distinct = table.sum(1)[history], (table > 0).sum(1)[history]
            lower = probability[n - 1 :]
            seen = total + distinct
            better = (counts[keys] + distinct * lower) / np.maximum(seen, 1)
            probability[n - 1 :] = np.where(seen > 0, better, lower)
        return -np.log2(probability)


def _keys(text: bytes, n: int) -> NDArray[np.int64]:
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    length = max(0, len(codes) - n + 1)
    keys = np.zeros(length, dtype=np.int64)
    for i in range(n):
        keys = keys * 256 + codes[i : i + length]
    return keys
