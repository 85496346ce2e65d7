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
from treering.data.chat.turn_borders import (
    FieldRun,
    common_length,
    end_of_turn,
    field_runs,
    last_run,
    shared_end,
    shared_length,
    word_border,
)
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
        runs = field_runs(self.own_pieces)
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

    def _key(self, before: str, runs: list[FieldRun]) -> Hashable:
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

    def _next(self, run: FieldRun) -> int:
        return self.pieces[run.after].begin if run.after < len(self.pieces) else len(self.text)

    def _divide(self, before: str, runs: list[FieldRun]) -> _Around:
        messages = self.conversation.messages
        ended = self.render(messages[: self.index + 1], False)
        pieces = [(i, piece) for i, piece in enumerate(ended.visible) if piece.source.turn == self.index]
        ended_runs = field_runs(pieces)
        if not ended_runs:
            raise self._not_written()
        start, unprompted = self._start(before, runs[0])
        last = last_run(runs, ended_runs)
        if last is None:
            raise self._bad("the chat template leaves out what this turn ends with")
        begin, tail = runs[last].end, self._tail(ended, before)
        border = self.rendered.loop_end(begin, self.index)  # text behind it belongs to another message
        behind = self.text[begin : self._next(runs[last])]
        ending = end_of_turn(self._control, tail, behind, border - begin if border else None)
        if ending is None:
            raise self._bad(f"no end of turn: the chat template ends it with {tail[-40:]!r} only when it is last")
        end, endless = ending
        return _Around(start, len(runs) - 1 - last, end, endless, unprompted)

    def _start(self, before: str, run: FieldRun) -> tuple[int, bool]:
        """Return the length of the text before the turn that is not trained, and whether the prompt is longer."""
        prompted, plain, has_prompt = self._prompt(self.index)
        common = common_length(self._control, prompted, before)
        if common < len(prompted):  # where they differ, no word is divided
            common = word_border(self._control, before, common)
        if common > shared_length(plain, before):
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

    def _start_without_prompt(self, before: str, plain: str, run: FieldRun) -> int:
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
        shared = shared_end(tail, before)
        if not self._prompt(self.index)[2] and self._control.any.search(shared):
            raise self._bad(
                f"the chat template writes {shared[-40:]!r} behind each conversation, which looks like the beginning "
                f"of a next turn; {_TAGS}"
            )
        return tail

    def _bad(self, message: str) -> SampleError:
        return _bad(self.where, self.index, message)

    @property
    def _control(self) -> ControlTokens:
        return self.turns._control


def _bad(where: str, index: int, message: str) -> SampleError:
    return bad(where, "template", message, at=f"messages[{index}]")
