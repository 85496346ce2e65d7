"""BM25 as its formula reads, one document, query and token at a time."""

from collections import Counter
from collections.abc import Sequence
from math import log


def bm25(
    documents: Sequence[Sequence[int]], queries: Sequence[Sequence[int]], k1: float = 1.2, b: float = 0.75
) -> list[list[float]]:
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        occurrences = Counter(document)
        row = []
        for query in queries:
            score = 0.0
            for token in query:
                containing = sum(token in other for other in documents)
                idf = log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
                f = occurrences[token]
                if f:
                    score += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(document) / mean))
            row.append(score)
        scores.append(row)
    return scores
