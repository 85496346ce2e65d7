"""The results of `data show` and `data check`, as plain values."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from treering.data.examples import Examples, Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BARS = 20
_SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class ShownToken:
    """A token of a document, as `data show` prints it."""

    id: int
    text: str  # as the tokenizer decodes it: pass it through `printable` before printing it
    trained: bool


@dataclass(frozen=True, kw_only=True)
class ShownDocument:
    """A document with its tokens and the number of trained ones."""

    sample_id: str
    tokens: tuple[ShownToken, ...]
    trained: int


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a histogram of lengths."""

    low: int  # inclusive
    high: int  # inclusive
    count: int


@dataclass(frozen=True, kw_only=True)
class Check:
    """Lengths, trained tokens and duplicates of a data set."""

    report: Report
    documents: int
    tokens: int
    trained: int
    untrained_documents: int
    shortest: int
    longest: int
    quantiles: tuple[tuple[float, int], ...]
    histogram: tuple[Bar, ...]
    duplicates: tuple[tuple[str, str], ...]  # (first, repeated): the same tokens and mask
    duplicate_count: int

    @property
    def trained_share(self) -> float:
        """The share of tokens that are trained."""
        return self.trained / self.tokens


def show(examples: Examples, tokenizer: "PreTrainedTokenizerBase", indices: Iterable[int]) -> list[ShownDocument]:
    """Return documents token by token."""
    shown = []
    for i in indices:
        document = examples.document(i)
        ids, mask = document.ids.tolist(), document.mask.tolist()
        texts = tokenizer.batch_decode([[id] for id in ids], clean_up_tokenization_spaces=False)
        tokens = tuple(
            ShownToken(id=id, text=text, trained=trained) for id, text, trained in zip(ids, texts, mask, strict=True)
        )
        shown.append(ShownDocument(sample_id=document.sample_id, tokens=tokens, trained=sum(mask)))
    return shown


def check(examples: Examples, *, named: int = 20) -> Check:
    """Return lengths, trained share and exact duplicates; the first `named` duplicates are listed."""
    lengths = examples.lengths
    first: dict[bytes, int] = {}
    duplicates: list[tuple[str, str]] = []
    count = 0
    for i in range(len(examples)):
        document = examples.document(i)
        state = xxhash.xxh3_128(document.ids.tobytes())
        state.update(document.mask.tobytes())
        earlier = first.setdefault(state.digest(), i)
        if earlier != i:
            count += 1
            if len(duplicates) < named:
                duplicates.append((examples.sample_id(earlier), document.sample_id))
    return Check(
        report=examples.report,
        documents=len(examples),
        tokens=int(lengths.sum(dtype=np.int64)),
        trained=int(examples.trained.sum(dtype=np.int64)),
        untrained_documents=int((examples.trained == 0).sum()),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        quantiles=tuple((share, int(np.quantile(lengths, share, method="higher"))) for share in _SHARES),
        histogram=histogram(lengths),
        duplicates=tuple(duplicates),
        duplicate_count=count,
    )


def histogram(lengths: np.ndarray) -> tuple[Bar, ...]:
    """Return bars of equal width in tokens."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // _BARS)
    counts = np.bincount((lengths - low) // width)
    return tuple(
        Bar(low=low + i * width, high=min(high, low + (i + 1) * width - 1), count=int(count))
        for i, count in enumerate(counts)
    )


def printable(text: str) -> str:
    """Return text of the data with all characters escaped that move the cursor, reorder a line or are invisible."""
    return "".join(c if _is_visible(c) else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _is_visible(character: str) -> bool:
    # Cc: controls, ANSI escapes among them; Cf: bidirectional overrides, zero-width marks; Cs, Co, Cn: not text;
    # Zl, Zp: line breaks that terminals treat differently.
    return unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
