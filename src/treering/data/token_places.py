"""Where the tokens of a text are in it, and the tokens of a completion behind its prompt.

With a byte-level tokenizer the bytes of a text's tokens, one after another, are the bytes of the text. So the tokenizer
is asked for ids only, which is cheaper than ids with offsets, and the places are counted from the bytes of the tokens.
Where these are not the bytes of the text (a normalizer changed it, a token includes spaces), the text is encoded again
with offsets, and so are all texts of other tokenizers.

At inference a prompt is tokenised alone, so prompt and completion are tokenised separately. Tokenizers of the
SentencePiece kind put a space before every text, which would be between the two. They get the completion behind a
character that never becomes a part of another token; its tokens are cut off. The text of all tokens is compared with
that of prompt and completion tokenised as one text.
"""

from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from treering.data.sources.records import bad

Span = tuple[int, int]
_NO_TEXT = b"\xff"  # not in any UTF-8 text: a token without a spelling never equals text
_MANY = 32  # spans, from which on a table of the tokens' places is worth its cost
_SEPARATORS = ("\n", "\t", ".", "字")


class Tokens(Protocol):
    """The tokens of a text and where they are in it."""

    @property
    def ids(self) -> NDArray[np.uint32]: ...

    def ranges(self, spans: Sequence[Span], limits: Sequence[Span]) -> list[Span]:
        """Return for each span of characters the tokens [first, stop) that overlap it and lie inside its limits."""
        ...

    def places(self, tokens: NDArray[np.int64], characters: Sequence[int]) -> tuple[NDArray, NDArray, NDArray]:
        """Return where these tokens begin and end, and where these characters (ascending) are, in the same unit."""
        ...


class Spelled(NamedTuple):
    """Tokens that spell `text`; token i ends before byte `ends[i]`. Bytes are counted from `base`."""

    text: str
    ids: NDArray[np.uint32]
    ends: NDArray[np.int64]
    base: int

    def ranges(self, spans: Sequence[Span], limits: Sequence[Span]) -> list[Span]:
        count = len(spans)
        starts, stops, lows, highs = ([pair[i] for pair in pairs] for pairs in (spans, limits) for i in (0, 1))
        places = self._bytes([*starts, *highs, *stops, *lows])
        right = self.ends.searchsorted(places[: 2 * count], "right").tolist()
        left = self.ends.searchsorted(places[2 * count :], "left").tolist()
        ranges = []
        for i in range(count):
            # Token k begins where token k - 1 ends. Overlap: it ends behind the start and begins before the stop.
            first = max(right[i], left[count + i] + 1 if lows[i] else 0)
            stop = min(left[i] + 1 if stops[i] > starts[i] else 0, right[count + i])  # nothing overlaps an empty span
            ranges.append((first, max(first, stop)))
        return ranges

    def places(self, tokens: NDArray[np.int64], characters: Sequence[int]) -> tuple[NDArray, NDArray, NDArray]:
        ends = self.ends[tokens]
        begins = np.where(tokens > 0, self.ends[tokens - 1], self.base)
        return begins, ends, self._bytes(characters)

    def _bytes(self, characters: Sequence[int]) -> NDArray[np.int64]:
        """Return where these characters begin, in bytes as `ends`."""
        places = characters if self.text.isascii() else _bytes_before(self.text, characters)
        return np.array(places, dtype=np.int64) + self.base


def _bytes_before(text: str, characters: Sequence[int]) -> list[int]:
    sizes = {}
    at = size = 0
    for character in sorted(set(characters)):
        size += len(text[at:character].encode())
        sizes[character] = size
        at = character
    return [sizes[character] for character in characters]


class Offsets:
    """Tokens with the offsets that the tokenizer reports, in characters."""

    def __init__(self, encoding: Encoding):
        self._encoding = encoding
        self.ids: NDArray[np.uint32] = np.array(encoding.ids, dtype=np.uint32)

    def ranges(self, spans: Sequence[Span], limits: Sequence[Span]) -> list[Span]:
        ranges = []
        overlapping = self._overlapping if len(spans) < _MANY or not self._in_order else self._searched
        for (start, end), (low, high) in zip(spans, limits, strict=True):
            first, stop = overlapping(start, end)
            while first < stop and self._chars(first)[0] < low:
                first += 1
            while first < stop and self._chars(stop - 1)[1] > high:
                stop -= 1
            ranges.append((first, stop))
        return ranges

    def places(self, tokens: NDArray[np.int64], characters: Sequence[int]) -> tuple[NDArray, NDArray, NDArray]:
        borders = np.array([self._chars(int(token)) for token in tokens], dtype=np.int64).reshape(-1, 2)
        return borders[:, 0], borders[:, 1], np.asarray(characters, dtype=np.int64)

    def _overlapping(self, start: int, end: int) -> Span:
        """Return the tokens [first, stop) of these characters. Characters that the tokenizer drops have no token."""
        encoding = self._encoding
        first = last = None
        while start < end and (first := encoding.char_to_token(start)) is None:
            start += 1
        if first is None:
            return 0, 0
        while (last := encoding.char_to_token(end - 1)) is None:
            end -= 1
        # A character of several bytes can be several tokens; `char_to_token` returns the first.
        while last + 1 < len(encoding) and self._chars(last + 1)[0] < end:
            last += 1
        return first, last + 1

    @cached_property
    def _borders(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        offsets = np.array(self._encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.ascontiguousarray(offsets[:, 0]), np.ascontiguousarray(offsets[:, 1])

    @cached_property
    def _in_order(self) -> bool:
        return all(bool((np.diff(borders) >= 0).all()) for borders in self._borders)

    def _searched(self, start: int, end: int) -> Span:
        """Return what `_overlapping` returns. Each of its look-ups reads the tokens from the first one."""
        starts, ends = self._borders
        first = int(ends.searchsorted(start, "right"))
        while first < len(starts) and starts[first] == ends[first]:
            first += 1
        if start >= end or first == len(starts) or starts[first] >= end:
            return 0, 0
        return first, int(starts.searchsorted(end, "left"))

    def _chars(self, token: int) -> Span:
        chars = self._encoding.token_to_chars(token)
        assert chars is not None, "only tokens of a post-processor have no place, and there is no post-processor"
        return chars


class Placer:
    """Encodes texts with one backend. `state` is the backend as JSON."""

    def __init__(self, backend: Tokenizer, state: Mapping[str, Any]):
        self._backend = backend
        self._spelling = _spelling(state)
        self._sizes = np.array([len(piece) for piece in self._spelling or ()], dtype=np.int64)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the encodings of texts. Python's lock is released meanwhile."""
        if self._spelling is None:
            return self._backend.encode_batch(list(texts), add_special_tokens=False)
        return self._backend.encode_batch_fast(list(texts), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def place(self, texts: Sequence[str], encodings: Sequence[Encoding]) -> list[Tokens]:
        """Return the tokens of `encodings`, which `encode` returned for `texts`, with places."""
        if self._spelling is None:
            return [Offsets(encoding) for encoding in encodings]
        spelling = self._spelling.__getitem__
        all_ids = array("I")  # of all texts: numpy's overhead for a call is more than its work for one text
        spelled: list[bool] = []
        borders = [0]
        for text, encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            spelled.append(b"".join(map(spelling, ids)) == text.encode())
            all_ids.fromlist(ids)
            borders.append(len(all_ids))
        values = np.array(all_ids, dtype=np.uint32)
        ends = self._sizes.take(values).cumsum()
        bases = np.concatenate((np.zeros(1, dtype=np.int64), ends)).take(borders).tolist()
        others = [text for text, is_spelled in zip(texts, spelled, strict=True) if not is_spelled]
        with_offsets = iter(self._backend.encode_batch(others, add_special_tokens=False))
        placed: list[Tokens] = []
        for i, text in enumerate(texts):
            part = slice(borders[i], borders[i + 1])
            placed.append(
                Spelled(text, values[part], ends[part], bases[i]) if spelled[i] else Offsets(next(with_offsets))
            )
        return placed


def _spelling(state: Mapping[str, Any]) -> list[bytes] | None:
    """Return the bytes of each token of a byte-level tokenizer, by id; None for other kinds."""
    model, vocab = state["model"], state["model"].get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocab, dict) or not _byte_level(state.get("decoder")):
        return None
    if _byte_level(state.get("pre_tokenizer"), add_prefix_space=True):
        return None  # every text would get a space at its beginning
    added = {token["id"]: token["content"].encode() for token in state["added_tokens"]}
    spelling = [_NO_TEXT] * (max([*vocab.values(), *added]) + 1)
    alphabet = _alphabet()
    for piece, id in vocab.items():
        try:
            spelling[id] = piece.translate(alphabet).encode("latin-1")
        except UnicodeEncodeError:
            continue  # has other characters, so the pre-tokenizer never produces it
    for id, content in added.items():
        spelling[id] = content
    return spelling


def _byte_level(part: Any, **settings: Any) -> bool:
    if not isinstance(part, dict):
        return False
    if part.get("type") == "Sequence":
        return any(_byte_level(inner, **settings) for inner in part.get("pretokenizers") or part.get("decoders") or ())
    return part.get("type") == "ByteLevel" and all(part.get(key) == value for key, value in settings.items())


def _alphabet() -> dict[int, int]:
    """Return the byte of each character that represents one: printable bytes are themselves, the others from U+0100.

    A character below U+0100 that represents no byte is mapped to one outside of Latin-1, so that encoding it fails.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return dict.fromkeys(others, 0xFFFF) | {0x100 + i: byte for i, byte in enumerate(others)}


def separator(placer: Placer, completion: str = "x") -> str:
    """Return a character to put before a completion, or "" for a tokenizer that puts nothing before a text."""
    (alone,) = placer.encode([completion])
    for character in _SEPARATORS:
        text = character + completion
        (tokens,) = placer.place([text], placer.encode([text]))
        if (ids := behind_cut(tokens, 1, len(text))) is not None:
            return "" if ids.tolist() == alone.ids else character
    return ""


def behind_cut(tokens: Tokens, cut: int, length: int) -> NDArray[np.uint32] | None:
    """Return the tokens behind the first `cut` characters, or None if a token has characters on both sides."""
    ((first, _),) = tokens.ranges([(cut, length)], [(cut, length)])
    if first > 0:
        _, ends, places = tokens.places(np.array([first - 1]), [cut])
        if ends[0] > places[0]:
            return None
    return tokens.ids[first:]


def check_together(
    placer: Placer, prompt: str, completion: str, prompt_ids: NDArray, completion_ids: NDArray, where: str
) -> None:
    """Raise SampleError unless the tokens of the two spell both, as the tokens of one text do."""
    (together,) = placer.encode([prompt + completion])
    if placer.decode([*prompt_ids.tolist(), *completion_ids.tolist()]) != placer.decode(together.ids):
        raise bad(
            where,
            "tokenizer",
            "the tokens of the prompt and of the completion do not spell the two one after the other; move the border "
            "between them to a place between two words",
            at="completion",
        )
