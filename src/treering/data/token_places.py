"""Where the tokens of a text lie in it.

In a byte-level tokenizer the tokens of a text, spelled one after another, are the bytes of the text. So the tokenizer
is asked for ids alone, which is cheaper than with offsets, and each sample's places are proved by spelling it. A text
that its tokens do not spell (a normalizer changed it, a token swallowed spaces) is encoded once more with offsets, as
are all texts of other tokenizers.
"""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from treering.data.sources.records import bad

Span = tuple[int, int]
_NO_TEXT = b"\xff"  # what no UTF-8 text holds: a token that cannot be spelled never proves anything
_SEPARATORS = ("\n", "\t", ".", "字")


class Tokens(Protocol):
    @property
    def ids(self) -> NDArray[np.uint32]: ...

    def ranges(self, spans: Sequence[Span], limits: Sequence[Span]) -> list[Span]:
        """For each span of characters the tokens [first, stop) that overlap it and lie inside its limits."""
        ...

    def places(self, tokens: NDArray[np.int64], characters: Sequence[int]) -> tuple[NDArray, NDArray, NDArray]:
        """Where these tokens begin and end, and where these characters (ascending) are, all in the same unit."""
        ...


class Spelled(NamedTuple):
    """Tokens that spell `text`; token i ends before byte `ends[i]`. Bytes are counted from `base` on."""

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
            # Token k begins where token k - 1 ends. Overlapping: ends behind the start and begins before the stop.
            first = max(right[i], left[count + i] + 1 if lows[i] else 0)
            stop = min(left[i] + 1 if stops[i] > starts[i] else 0, right[count + i])  # nothing overlaps an empty span
            ranges.append((first, max(first, stop)))
        return ranges

    def places(self, tokens: NDArray[np.int64], characters: Sequence[int]) -> tuple[NDArray, NDArray, NDArray]:
        ends = self.ends[tokens]
        begins = np.where(tokens > 0, self.ends[tokens - 1], self.base)
        return begins, ends, self._bytes(characters)

    def _bytes(self, characters: Sequence[int]) -> NDArray[np.int64]:
        """Where these characters begin, counted as `ends` are."""
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
        found = []
        for (start, end), (low, high) in zip(spans, limits, strict=True):
            first, stop = self._overlapping(start, end)
            while first < stop and self._chars(first)[0] < low:
                first += 1
            while first < stop and self._chars(stop - 1)[1] > high:
                stop -= 1
            found.append((first, stop))
        return found

    def places(self, tokens: NDArray[np.int64], characters: Sequence[int]) -> tuple[NDArray, NDArray, NDArray]:
        found = np.array([self._chars(int(token)) for token in tokens], dtype=np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1], np.asarray(characters, dtype=np.int64)

    def _overlapping(self, start: int, end: int) -> Span:
        """Characters that the tokenizer drops belong to no token."""
        encoding = self._encoding
        first = last = None
        while start < end and (first := encoding.char_to_token(start)) is None:
            start += 1
        if first is None:
            return 0, 0
        while (last := encoding.char_to_token(end - 1)) is None:
            end -= 1
        # A character of several bytes can be several tokens, of which the first was found.
        while last + 1 < len(encoding) and self._chars(last + 1)[0] < end:
            last += 1
        return first, last + 1

    def _chars(self, token: int) -> Span:
        chars = self._encoding.token_to_chars(token)
        assert chars is not None, "only tokens that a post-processor added have no place, and there is none"
        return chars


class Placer:
    """Encodes texts with one backend. `state` is the backend as JSON."""

    def __init__(self, backend: Tokenizer, state: Mapping[str, Any]):
        self._backend = backend
        self._spelling = _spelling(state)
        self._sizes = np.array([len(piece) for piece in self._spelling or ()], dtype=np.int64)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """The part without Python's lock."""
        if self._spelling is None:
            return self._backend.encode_batch(list(texts), add_special_tokens=False)
        return self._backend.encode_batch_fast(list(texts), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def place(self, texts: Sequence[str], encodings: Sequence[Encoding]) -> list[Tokens]:
        """What `encode` gave for `texts`, with places."""
        if self._spelling is None:
            return [Offsets(encoding) for encoding in encodings]
        spelling = self._spelling.__getitem__
        together = array("I")  # of all texts: a call of numpy costs more than what it does for one of them
        proved: list[bool] = []
        borders = [0]
        for text, encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            proved.append(b"".join(map(spelling, ids)) == text.encode())
            together.fromlist(ids)
            borders.append(len(together))
        values = np.array(together, dtype=np.uint32)
        ends = self._sizes.take(values).cumsum()
        bases = np.concatenate((np.zeros(1, dtype=np.int64), ends)).take(borders).tolist()
        rest = [text for text, spelled in zip(texts, proved, strict=True) if not spelled]
        again = iter(self._backend.encode_batch(rest, add_special_tokens=False))
        placed: list[Tokens] = []
        for i, text in enumerate(texts):
            own = slice(borders[i], borders[i + 1])
            placed.append(Spelled(text, values[own], ends[own], bases[i]) if proved[i] else Offsets(next(again)))
        return placed


def _spelling(state: Mapping[str, Any]) -> list[bytes] | None:
    """The bytes of each token of a byte-level tokenizer, by id; None for other kinds."""
    model, vocab = state["model"], state["model"].get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocab, dict) or not _byte_level(state.get("decoder")):
        return None
    if _byte_level(state.get("pre_tokenizer"), add_prefix_space=True):
        return None  # every text would get a space that it does not hold
    added = {token["id"]: token["content"].encode() for token in state["added_tokens"]}
    spelling = [_NO_TEXT] * (max([*vocab.values(), *added]) + 1)
    alphabet = _alphabet()
    for piece, id in vocab.items():
        try:
            spelling[id] = piece.translate(alphabet).encode("latin-1")
        except UnicodeEncodeError:
            continue  # not made of the alphabet, so the pre-tokenizer never leads to it
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
    """Characters that stand for bytes -> the bytes: printable ones for themselves, the others from U+0100 on.

    A character below U+0100 that stands for no byte is sent out of Latin-1, so that encoding it fails.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return dict.fromkeys(others, 0xFFFF) | {0x100 + i: byte for i, byte in enumerate(others)}


def separator(placer: Placer, completion: str = "x") -> str:
    """A character to put before a completion; none for a tokenizer that adds nothing to the beginning of a text."""
    (alone,) = placer.encode([completion])
    for character in _SEPARATORS:
        text = character + completion
        (tokens,) = placer.place([text], placer.encode([text]))
        if (behind := behind_cut(tokens, 1, len(text))) is not None:
            return "" if behind.tolist() == alone.ids else character
    return ""


def behind_cut(tokens: Tokens, cut: int, length: int) -> NDArray[np.uint32] | None:
    """The tokens behind the first `cut` characters; None if a token lies on both sides."""
    ((first, _),) = tokens.ranges([(cut, length)], [(cut, length)])
    if first > 0:
        _, ends, places = tokens.places(np.array([first - 1]), [cut])
        if ends[0] > places[0]:
            return None
    return tokens.ids[first:]


def check_together(placer: Placer, prompt: str, completion: str, given: NDArray, behind: NDArray, where: str) -> None:
    """Raise SampleError unless the tokens of the two spell both, as the tokens of one text do."""
    (whole,) = placer.encode([prompt + completion])
    if placer.decode([*given.tolist(), *behind.tolist()]) != placer.decode(whole.ids):
        raise bad(
            where,
            "tokenizer",
            "the tokens of the prompt and of the completion do not spell the two one after the other; move the border "
            "between them to a place between two words",
            at="completion",
        )
