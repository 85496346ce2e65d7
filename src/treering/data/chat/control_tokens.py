"""Control tokens: only a template may write them; the same characters in a text of the data are encoded as text.

There are two tokenizers. The ordinary one is the model's, and gives exactly the tokens of `apply_chat_template`. Each
control token in its result must be where the template wrote one. A sample where one is not is encoded by the renamed
tokenizer, in which the names of control tokens are made of Unicode noncharacters, so that no text contains one.
"""

import bisect
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from treering.core.errors import DataError
from treering.data.chat.conversation import TextPiece
from treering.data.sources.records import NAME_CLOSE, NAME_OPEN
from treering.data.token_places import Placer, Tokens

_NO_MATCH = "(?!)"
_CACHED = 4096  # texts of templates
STRUCTURAL, SPECIAL = 1, 2  # kinds of tokens; 0 is text


def _any_of(tokens: Sequence[str]) -> str:
    # Longest first: a token takes precedence over the tokens that it begins with.
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or _NO_MATCH


class RenamedText:
    """A text for the renamed tokenizer with `names` names of control tokens."""

    def __init__(self, text: str, borders: list[tuple[int, int]]):
        self.text, self.names = text, len(borders) - 1
        self._old, self._new = ([border[i] for border in borders] for i in (0, 1))

    def at(self, character: int) -> int:
        """Return the place in this text of a character of the ordinary text."""
        i = bisect.bisect_right(self._old, character) - 1
        return self._new[i] + character - self._old[i]


class ControlTokens:
    """The control tokens of a tokenizer, and the check that only a template wrote them.

    `special` tokens are never text. `structural` tokens are other added tokens that the template writes (`<think>`,
    `<tool_call>`): a user cannot write them, an assistant may.
    """

    def __init__(self, backend: str, template: str | None):
        self._json = _bare(json.loads(backend))
        self._ordinary = Placer(Tokenizer.from_str(json.dumps(self._json)), self._json)
        self._renamed: Placer | None = None
        added = [token for token in self._json["added_tokens"] if token["content"]]
        special = [token["content"] for token in added if token["special"]]
        structural = [
            token["content"]
            for token in added
            if not token["special"] and not token["content"].isspace() and template and token["content"] in template
        ]
        ids = {token["content"]: token["id"] for token in added}
        self._ids = {token: ids[token] for token in (*special, *structural)}
        self._names = {token: f"{NAME_OPEN}{i}{NAME_CLOSE}" for i, token in enumerate(self._ids)}
        self.special = re.compile(_any_of(special))
        self.structural = re.compile(_any_of(structural))
        self.any = re.compile(_any_of(list(self._ids)))
        self._kinds = np.zeros(max(ids.values(), default=-1) + 2, dtype=np.int8)  # the last entry is for all other ids
        self._kinds[[ids[token] for token in special]] = SPECIAL
        self._kinds[[ids[token] for token in structural]] = STRUCTURAL
        edges = {token[0] for token in self._ids} | {token[-1] for token in self._ids}
        # None if a token contains the beginning of another one: then two tokens can overlap.
        first = {token[0] for token in self._ids}
        nested = any(first & set(token[1:]) for token in self._ids)
        self._edges = None if nested or len(edges) > 4 else "".join(sorted(edges))
        self._longest = max(map(len, self._ids), default=0)
        self._counts: dict[str, int] = {}
        self._closing: dict[str, bool] = {}

    def kinds(self, tokens: Tokens) -> np.ndarray:
        """Return for each token 0 for text, STRUCTURAL or SPECIAL."""
        return self._kinds.take(tokens.ids, mode="clip")

    def genuine(self, tokens: Tokens, text: str, pieces: Sequence[TextPiece], writers: Sequence[bool]) -> bool:
        """Whether the template wrote all control tokens, except structural ones that an assistant wrote."""
        kinds = self.kinds(tokens)
        (at,) = kinds.nonzero()
        expected = 0
        begin = 0
        for piece in pieces:
            if piece.begin > begin:
                expected += self._count(text[begin : piece.begin])
            begin = max(begin, piece.end)
        expected += self._count(text[begin:])
        if not pieces or not len(at) or (self._edges is not None and len(at) == expected and self._apart(text, pieces)):
            return len(at) == expected
        edges = [edge for piece in pieces for edge in (piece.begin, piece.end)]
        begins, ends, places = tokens.places(at, edges)
        piece_begins, piece_ends = places[::2], places[1::2]
        near = piece_ends.searchsorted(begins, "right")  # the first piece that ends behind the token's beginning
        behind = np.append(piece_begins, np.iinfo(np.int64).max)
        literal = behind[near] >= ends
        if int(literal.sum()) != expected:
            return False
        for i in np.flatnonzero(~literal):
            which = int(near[i])
            inside = piece_begins[which] <= begins[i] and ends[i] <= piece_ends[which]
            if not (inside and writers[which] and kinds[at[i]] == STRUCTURAL):
                return False
        return True

    def _apart(self, text: str, pieces: Sequence[TextPiece]) -> bool:
        """Whether no control token is in a text of the data, or reaches into one.

        That is so if the text has no character that a token begins or ends with, or if it contains no token and no such
        character near its ends. A token that covers a text completely would be one more than expected.
        """
        reach = self._longest
        return all(
            self._without_edges(text, begin, end)
            or (
                self.any.search(text, begin, end) is None
                and self._without_edges(text, begin, min(begin + reach, end))
                and self._without_edges(text, max(end - reach, begin), end)
            )
            for begin, end, *_ in pieces
        )

    def _without_edges(self, text: str, begin: int, end: int) -> bool:
        assert self._edges is not None
        return all(text.find(edge, begin, end) < 0 for edge in self._edges)

    def _count(self, literal: str) -> int:
        """Return the number of control tokens in a text of the template."""
        if literal not in self._counts:
            if len(self._counts) >= _CACHED:
                self._counts.clear()
            self._counts[literal] = sum(1 for _ in self.any.finditer(literal))
        return self._counts[literal]

    def closes(self, literal: str) -> bool:
        """Whether a text of the template ends with a control token, ignoring blanks."""
        if literal not in self._closing:
            if len(self._closing) >= _CACHED:
                self._closing.clear()
            tokens = [match.end() for match in self.any.finditer(literal)]
            self._closing[literal] = bool(tokens) and not literal[tokens[-1] :].strip()
        return self._closing[literal]

    def rename(self, text: str, pieces: Sequence[TextPiece], writers: Sequence[bool]) -> RenamedText:
        """Return the text for the renamed tokenizer: control tokens of the template get their new names."""
        texts: list[str] = []
        borders = [(0, 0)]
        at, length = 0, 0

        def copy(end: int, pattern: re.Pattern[str]) -> None:
            nonlocal at, length
            for match in pattern.finditer(text, at, end):
                name = self._names[match[0]]
                texts.extend((text[at : match.start()], name))
                length += match.start() - at + len(name)
                at = match.end()
                borders.append((at, length))
            texts.append(text[at:end])
            length += end - at
            at = end

        no_match = re.compile(_NO_MATCH)
        for piece, writer in zip(pieces, writers, strict=True):
            copy(piece.begin, self.any)
            copy(piece.end, self.structural if writer else no_match)
        copy(len(text), self.any)
        return RenamedText("".join(texts), borders)

    def placer(self, *, renamed: bool) -> Placer:
        """Return the ordinary or the renamed tokenizer."""
        return self._with_new_names() if renamed else self._ordinary

    def _with_new_names(self) -> Placer:
        if self._renamed is None:
            state = _rename(self._json, self._names)
            try:
                backend = Tokenizer.from_str(json.dumps(state))
            except Exception as error:  # tokenizers raises plain Exception
                raise DataError(f"the tokenizer cannot be copied with its control tokens renamed: {error}") from error
            for token, name in self._names.items():
                if backend.token_to_id(name) != self._ids[token]:
                    raise DataError(
                        f"the tokenizer's control token {token!r} cannot be kept out of text: its copy has the id "
                        f"{backend.token_to_id(name)} instead of {self._ids[token]}"
                    )
            self._renamed = Placer(backend, state)
        return self._renamed


def _bare(state: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer without what changes lengths or offsets: a post-processor trims spaces from offsets."""
    return {**state, "truncation": None, "padding": None, "post_processor": None}


def _rename(state: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in state["added_tokens"]]
    model = dict(state["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if isinstance(model.get("merges"), list):
        model["merges"] = [merge for merge in model["merges"] if not _leads_to(merge, names)]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return {**state, "added_tokens": added, "model": model}


def _leads_to(merge: str | list[str], names: dict[str, str]) -> bool:
    """Whether this merge produces a control token, or merges one."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names
