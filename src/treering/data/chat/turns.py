"""Finds the characters of a rendered conversation that the assistant has to write.

The rendering is traced, so the places of all texts of the data are known, and all text between them is the template's.
The template's text around an assistant's turn is divided by rendering the beginning of the same conversation:

    start of turn k   behind the end of `messages[:k]` with the generation prompt, which the model is given
    end of turn k     behind the end-of-turn token at the end of `messages[:k+1]`

Only the template's text is compared and searched here, not a text of the data. What templates do with earlier turns
(Qwen3 leaves out their thoughts, gpt-oss ends them with another token) needs no special case.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from treering.data.chat.control_tokens import ControlTokens
from treering.data.chat.conversation import Conversation, TextPiece, trace
from treering.data.chat.template import RenderedText
from treering.data.sources.records import SampleError, bad

_CACHED = 4096
_DIGITS = str.maketrans("123456789", "000000000")
_TAGS = "give a template with {% generation %} tags (data.template)"
Render = Callable[[Sequence[dict[str, Any]], bool], RenderedText]  # (messages, with the generation prompt)


class Turn(NamedTuple):
    """The characters [start, end) that the assistant writes in message `message`."""

    message: int
    start: int
    end: int
    low: int  # where the previous text of the data ends
    high: int  # where the next text of the data begins
    endless: bool  # without an end-of-turn token
    unprompted: bool  # the generation prompt is longer than the text before the turn


@dataclass(frozen=True, slots=True)
class _Around:
    """How the template's text around an assistant's turn is divided."""

    start: int  # characters of the text before it that are not trained
    repeated: int  # runs behind the turn that repeat its data (as the name of a tool before its answer)
    end: int  # characters of the text behind it that belong to the turn
    endless: bool
    unprompted: bool


class _Run(NamedTuple):
    """Pieces of one field of one message with nothing between them."""

    begin: int
    end: int
    last: TextPiece
    after: int  # index of the first piece behind it


class Turns:
    """Divides the renderings of one template. Equal texts around a turn are divided once."""

    def __init__(self, control: ControlTokens):
        self._control = control
        self._cache: dict[Hashable, _Around] = {}

    def find(self, rendered: RenderedText, conversation: Conversation, render: Render, where: str) -> list[Turn]:
        """Return the assistant's turns, in order. Raise SampleError if the template's text cannot be divided."""
        by_turn: dict[int, list[tuple[int, TextPiece]]] = {}
        for i, piece in enumerate(rendered.visible):
            by_turn.setdefault(piece.source.turn, []).append((i, piece))
        turns: list[Turn] = []
        for index, message in enumerate(conversation.messages):
            if message["role"] == "assistant":
                finder = _Finder(self, rendered, by_turn.get(index, []), conversation, render, where, index)
                turns.append(finder.turn())
        for before, turn in itertools.pairwise(turns):
            if turn.start < before.end:
                raise _bad(where, turn.message, "the chat template writes the messages in another order")
        return turns

    def around(self, key: Hashable, compute: Callable[[], _Around]) -> _Around:
        """Return the division for a key, computed once."""
        if key not in self._cache:
            if len(self._cache) >= _CACHED:
                self._cache.clear()
            self._cache[key] = compute()
        return self._cache[key]


@dataclass(slots=True)
class _Finder:
    """One assistant's turn of one rendering."""

    turns: Turns
    rendered: RenderedText
    own_pieces: list[tuple[int, TextPiece]]  # the pieces of this turn, with their indices among all
    conversation: Conversation
    render: Render
    where: str
    index: int

    @property
    def text(self) -> str:
        return self.rendered.text

    @property
    def pieces(self) -> list[TextPiece]:
        return self.rendered.visible

    def turn(self) -> Turn:
        """Return the turn, or raise SampleError."""
        runs = _runs(self.own_pieces)
        if not runs:
            raise self._not_written()
        first = self.own_pieces[0][0]
        low = self.pieces[first - 1].end if first else 0
        before = self.text[low : runs[0].begin]
        around = self.turns.around(self._key(before, runs), lambda: self._divide(before, runs))
        last = runs[len(runs) - 1 - around.repeated]
        start, end = low + around.start, last.end + around.end
        for piece in self.pieces[first : last.after]:
            if piece.source.turn != self.index:
                raise self._bad("the chat template writes the messages in another order")
        return Turn(self.index, start, end, low, self._next(last), around.endless, around.unprompted)

    def _not_written(self) -> SampleError:
        sources = [s for s in self.conversation.sources if s.turn == self.index and s.required and s.text.strip()]
        name = next((source.text for source in sources if source.path[-1] == "name"), "")
        missing = f"the tool call {name!r}" if name and sources[0].path[0] == "tool_calls" else "all texts of this turn"
        return self._bad(f"the chat template leaves out {missing}")

    def _key(self, before: str, runs: list[_Run]) -> Hashable:
        """Return a key that is equal for turns with equal texts around them, so that each is divided once."""
        messages = self.conversation.messages
        message = messages[self.index]
        between = self.text[runs[-2].end : runs[-1].begin] if len(runs) > 1 else ""
        behind = self.text[runs[-1].end : self._next(runs[-1])]
        follows = messages[self.index + 1]["role"] if self.index + 1 < len(messages) else ""
        shape = (*message, len(message.get("tool_calls") or ()), bool(message.get("content")))
        precedes = messages[self.index - 1]["role"] if self.index else ""
        # Digits differ between samples and do not matter; their number does.
        texts = tuple(text.translate(_DIGITS) for text in (before, between, behind))
        around = (precedes, follows, messages[0]["role"], self.conversation.tools is None)
        return texts, around, shape, runs[0].last.source.field[0], len(runs) > 1

    def _next(self, run: _Run) -> int:
        return self.pieces[run.after].begin if run.after < len(self.pieces) else len(self.text)

    def _divide(self, before: str, runs: list[_Run]) -> _Around:
        messages = self.conversation.messages
        ended = self.render(messages[: self.index + 1], False)
        pieces = [(i, piece) for i, piece in enumerate(ended.visible) if piece.source.turn == self.index]
        ended_runs = _runs(pieces)
        if not ended_runs:
            raise self._not_written()
        start, unprompted = self._start(before, runs[0])
        last = self._last(runs, ended_runs)
        end, endless = self._end(self._tail(ended, before), runs[last].end, self._next(runs[last]))
        return _Around(start, len(runs) - 1 - last, end, endless, unprompted)

    def _start(self, before: str, run: _Run) -> tuple[int, bool]:
        """Return the length of the text before the turn that is not trained, and whether the prompt is longer."""
        prompted, plain, has_prompt = self._prompt(self.index)
        common = self._common(prompted, before)
        if common < len(prompted):  # where they differ, no word is divided
            common = self._word_border(before, common)
        if common > _shared(plain, before):
            return common, common < len(prompted)
        if not has_prompt:
            return self._start_without_prompt(before, plain, run), False
        header = prompted.removeprefix(plain) if prompted.startswith(plain) else ""
        begin = before.rfind(header) if header else -1
        if begin < 0:
            if not header and not prompted.strip():
                raise self._bad(f"the chat template writes nothing between this turn and the one before it; {_TAGS}")
            raise self._bad(
                f"the chat template's generation prompt {(header or prompted)[-40:]!r} is not what this turn begins "
                f"with; {_TAGS}"
            )
        return begin + len(header), False

    def _prompt(self, index: int) -> tuple[str, str, bool]:
        """Return the template's text before a turn with the generation prompt and without it, and whether both differ
        because the prompt was asked for.
        """
        messages = self.conversation.messages[:index]
        prompted, plain = (self.render(messages, prompt) for prompt in (True, False))
        if prompted.tail != plain.tail:
            return prompted.tail, plain.tail, True
        # The prompt may be written behind every conversation: then it is what follows the loop.
        begin = len(plain.text) - len(plain.tail)
        return prompted.tail, plain.text[begin : max(begin, plain.after_loops())], False

    def _start_without_prompt(self, before: str, plain: str, run: _Run) -> int:
        if before == plain:
            return len(before)
        # Where no prompt is needed (the turn continues behind a tool's answer), what follows is the assistant's.
        if before.startswith(plain) and self._needs_no_header():
            return len(plain)
        if run.last.source.field != ("content",):
            raise self._bad(
                f"the chat template has no generation prompt, so the beginning of this turn is unknown; {_TAGS}"
            )
        return len(before)  # only the text itself is certain

    def _needs_no_header(self) -> bool:
        """Whether the template has a generation prompt elsewhere, or writes an assistant's text without a header."""
        messages = self.conversation.messages
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        _, plain, has_prompt = self._prompt(first)
        if has_prompt:
            return True
        probe = trace([{"role": "assistant", "content": "x"}], None).messages
        try:
            rendered = self.render([*messages[:first], *probe], False)
        except SampleError:
            return False
        *before, last = rendered.visible
        return last.source.text == "x" and rendered.text[before[-1].end if before else 0 : last.begin] == plain

    def _tail(self, ended: RenderedText, before: str) -> str:
        """Return the part of the template's text behind this turn, as the last one, that belongs to the turn."""
        begin = len(ended.text) - len(ended.tail)
        border = ended.loop_end(begin, self.index)
        if border is None:  # the template does not loop over messages
            return self._tail_without_loop(ended.tail, before)
        inside, outside = ended.text[begin:border], ended.text[border:]
        token = self._control.any.search(outside)
        alone = token is not None and token[0] == outside.strip()
        return ended.tail if alone and not self._control.any.search(inside) else inside

    def _tail_without_loop(self, tail: str, before: str) -> str:
        shared = _shared_end(tail, before)
        if not self._prompt(self.index)[2] and self._control.any.search(shared):
            raise self._bad(
                f"the chat template writes {shared[-40:]!r} behind each conversation, which looks like the beginning "
                f"of a next turn; {_TAGS}"
            )
        return tail

    def _last(self, runs: list[_Run], ended: list[_Run]) -> int:
        """Return the index of the run that ends the turn: the last one if the conversation ends with this turn."""
        wanted = ended[-1].last
        same = [run for run in ended if run.last.source is wanted.source and run.last.stop == wanted.stop]
        stops = [run.last.stop for run in runs if run.last.source is wanted.source]
        most = max(stops, default=-1)
        ends = [i for i, run in enumerate(runs) if run.last.source is wanted.source and run.last.stop == most]
        if len(ends) < len(same):
            raise self._bad("the chat template leaves out what this turn ends with")
        last = ends[len(same) - 1]
        seen = [run.last.source for run in runs[: last + 1]]
        while (
            last + 1 < len(runs)
            and runs[last + 1].last.source not in seen
            and runs[last + 1].after == (runs[last].after + 1)
        ):  # written only if the turn is not the last one, as the number of a call
            last += 1
        return last

    def _end(self, tail: str, begin: int, stop: int) -> tuple[int, bool]:
        """Return the length of the text [begin, stop) that belongs to the turn, and whether the turn is endless.

        `tail` is the text that ends the turn when it is the last one.
        """
        control, behind = self._control, self.text[begin:stop]
        border = self.rendered.loop_end(begin, self.index)  # text behind it belongs to another message
        tokens = list(control.any.finditer(tail))
        common = self._common(tail, behind)
        inside = [m.end() for m in tokens if m.end() <= common]
        closing = bool(tokens) and not tail[tokens[-1].end() :].strip()
        closed = [m.end() for m in control.special.finditer(tail, 0, common)]
        complete = bool(inside) and inside[-1] == tokens[-1].end()
        if closed and (not complete or closed[-1] == inside[-1]):
            return closed[-1], False
        if complete:  # by a token that may also be inside a turn: the text behind it belongs to the turn
            return (inside[-1] if not tail[inside[-1] : common].strip() else common), False
        other = control.any.match(behind, common)
        if closing and tokens[-1].start() == common and other and border and begin + other.end() <= border:
            return other.end(), False  # the last turn of a conversation ends with another token than earlier ones
        if closing and border and (at := behind.find(tokens[-1][0], 0, border - begin)) >= 0:
            return at + len(tokens[-1][0]), False
        if tail[common:].strip():
            raise self._bad(f"no end of turn: the chat template ends it with {tail[-40:]!r} only when it is last")
        return common, not behind[:common].strip()

    def _word_border(self, text: str, at: int) -> int:
        """Return the last place up to `at` that is behind a blank or a control token."""
        ends = [token.end() for token in self._control.any.finditer(text, 0, at) if token.end() <= at]
        blank = max((i + 1 for i in range(at) if text[i].isspace()), default=0)
        return at if at == len(text) else max([blank, *ends], default=0)

    def _bad(self, message: str) -> SampleError:
        return _bad(self.where, self.index, message)

    @property
    def _control(self) -> ControlTokens:
        return self.turns._control

    def _common(self, a: str, b: str) -> int:
        """Return the length of the common beginning, without the first half of a control token."""
        length = _shared(a, b)
        for text in (a, b):
            near = max(0, length - 64)
            for token in self._control.any.finditer(text, near, length + 64):
                if token.start() < length < token.end():
                    length = token.start()
        return length


def _runs(turn_pieces: Sequence[tuple[int, TextPiece]]) -> list[_Run]:
    """Return the runs of a turn. `turn_pieces` are its pieces, with their indices among all."""
    runs: list[_Run] = []
    for i, piece in turn_pieces:
        last = runs[-1] if runs else None
        if last is not None and last.end == piece.begin and last.last.source.field == piece.source.field:
            runs[-1] = _Run(last.begin, piece.end, piece, i + 1)
        else:
            runs.append(_Run(piece.begin, piece.end, piece, i + 1))
    return runs


def _shared(a: str, b: str) -> int:
    """Return the length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


def _shared_end(a: str, b: str) -> str:
    length = _shared(a[::-1], b[::-1])
    return a[len(a) - length :]


def _bad(where: str, index: int, message: str) -> SampleError:
    return bad(where, "template", message, at=f"messages[{index}]")
