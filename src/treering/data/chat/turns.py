"""Which characters of a rendered conversation the assistant has to write.

The rendering is traced, so the places of all texts of the data are known and everything between them is the template's.
What the template writes around an assistant's texts is divided by rendering the beginning of the same conversation:

    start of turn k   behind what `messages[:k]` with the generation prompt ends with: that is given to the model
    end of turn k     behind the end-of-turn token that `messages[:k+1]` ends with

Only the template's own text is compared and searched here, never a text of the data. The habits of templates with
earlier turns (Qwen3 leaves out their thoughts, gpt-oss ends them with another token) need no special case.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from treering.data.chat.control_tokens import Control
from treering.data.chat.conversation import Conversation, TextPiece, trace
from treering.data.chat.template import RenderedText
from treering.data.sources.records import SampleError, bad

_REMEMBERED = 4096
_DIGITS = str.maketrans("123456789", "000000000")
_TAGS = "give a template with {% generation %} tags (data.template)"
Render = Callable[[Sequence[dict[str, Any]], bool], RenderedText]  # (messages, with the generation prompt)


class Turn(NamedTuple):
    """What the assistant writes in message `message`: the characters [start, end)."""

    message: int
    start: int
    end: int
    low: int  # where the text of the data before it ends, and
    high: int  # where the one behind it begins
    endless: bool  # without an end-of-turn token
    unprompted: bool  # the generation prompt has more than what stands before it


@dataclass(frozen=True, slots=True)
class _Around:
    """The template's text around an assistant's turn, and what it means."""

    start: int  # characters of the text before it that are given
    repeated: int  # runs behind the turn that only repeat its data (a tool's answer headed by the tool's name)
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
    """Divides the renderings of one template; what stands around a turn is looked into once."""

    def __init__(self, control: Control):
        self._control = control
        self._known: dict[Hashable, _Around] = {}

    def find(self, rendered: RenderedText, conversation: Conversation, render: Render, where: str) -> list[Turn]:
        """The assistant's turns, in order. Raises SampleError where the template does not let them be told apart."""
        by_turn: dict[int, list[tuple[int, TextPiece]]] = {}
        for i, piece in enumerate(rendered.visible):
            by_turn.setdefault(piece.source.turn, []).append((i, piece))
        found: list[Turn] = []
        for index, message in enumerate(conversation.messages):
            if message["role"] == "assistant":
                finder = _Finder(self, rendered, by_turn.get(index, []), conversation, render, where, index)
                found.append(finder.turn())
        for before, turn in itertools.pairwise(found):
            if turn.start < before.end:
                raise _bad(where, turn.message, "the chat template writes the messages in another order")
        return found

    def around(self, key: Hashable, look: Callable[[], _Around]) -> _Around:
        if key not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[key] = look()
        return self._known[key]


@dataclass(slots=True)
class _Finder:
    """One assistant's turn of one rendering."""

    turns: Turns
    rendered: RenderedText
    own: list[tuple[int, TextPiece]]  # the pieces of this turn, with their places among all
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
        runs = _runs(self.own)
        if not runs:
            raise self._nothing()
        first = self.own[0][0]
        floor = self.pieces[first - 1].end if first else 0
        before = self.text[floor : runs[0].begin]
        around = self.turns.around(self._key(before, runs), lambda: self._look(before, runs))
        last = runs[len(runs) - 1 - around.repeated]
        start, end = floor + around.start, last.end + around.end
        for piece in self.pieces[first : last.after]:
            if piece.source.turn != self.index:
                raise self._bad("the chat template writes the messages in another order")
        return Turn(self.index, start, end, floor, self._next(last), around.endless, around.unprompted)

    def _nothing(self) -> SampleError:
        said = [s for s in self.conversation.sources if s.turn == self.index and s.required and s.text.strip()]
        name = next((source.text for source in said if source.path[-1] == "name"), "")
        what = f"the tool call {name!r}" if name and said[0].path[0] == "tool_calls" else "all that this turn says"
        return self._bad(f"the chat template leaves out {what}")

    def _key(self, before: str, runs: list[_Run]) -> Hashable:
        """Turns between the same texts of the template are the same, so that long conversations cost no more."""
        messages = self.conversation.messages
        message = messages[self.index]
        between = self.text[runs[-2].end : runs[-1].begin] if len(runs) > 1 else ""
        behind = self.text[runs[-1].end : self._next(runs[-1])]
        follows = messages[self.index + 1]["role"] if self.index + 1 < len(messages) else ""
        shape = (*message, len(message.get("tool_calls") or ()), bool(message.get("content")))
        precedes = messages[self.index - 1]["role"] if self.index else ""
        # Numbers differ from sample to sample and decide nothing; their length does.
        written = tuple(text.translate(_DIGITS) for text in (before, between, behind))
        around = (precedes, follows, messages[0]["role"], self.conversation.tools is None)
        return written, around, shape, runs[0].last.source.field[0], len(runs) > 1

    def _next(self, run: _Run) -> int:
        return self.pieces[run.after].begin if run.after < len(self.pieces) else len(self.text)

    def _look(self, before: str, runs: list[_Run]) -> _Around:
        messages = self.conversation.messages
        ended = self.render(messages[: self.index + 1], False)
        own = [(i, piece) for i, piece in enumerate(ended.visible) if piece.source.turn == self.index]
        ended_runs = _runs(own)
        if not ended_runs:
            raise self._nothing()
        start, unprompted = self._start(before, runs[0])
        last = self._last(runs, ended_runs)
        end, endless = self._end(self._tail(ended, before), runs[last].end, self._next(runs[last]))
        return _Around(start, len(runs) - 1 - last, end, endless, unprompted)

    def _start(self, before: str, run: _Run) -> tuple[int, bool]:
        """How much of the template's text before the turn is given, and whether the prompt would have more."""
        prompted, given, asked = self._prompt(self.index)
        common = self._common(prompted, before)
        if common < len(prompted):  # where they part, no word is divided
            common = self._word_border(before, common)
        if common > _shared(given, before):
            return common, common < len(prompted)
        if not asked:
            return self._start_without_prompt(before, given, run), False
        header = prompted.removeprefix(given) if prompted.startswith(given) else ""
        found = before.rfind(header) if header else -1
        if found < 0:
            if not header and not prompted.strip():
                raise self._bad(f"the chat template writes nothing between this turn and the one before it; {_TAGS}")
            raise self._bad(
                f"the chat template's generation prompt {(header or prompted)[-40:]!r} is not what this turn begins "
                f"with; {_TAGS}"
            )
        return found + len(header), False

    def _prompt(self, index: int) -> tuple[str, str, bool]:
        """What the template writes before a turn, with its generation prompt and without, and whether they differ
        because the prompt was asked for."""
        messages = self.conversation.messages[:index]
        prompted, given = (self.render(messages, prompt) for prompt in (True, False))
        if prompted.tail != given.tail:
            return prompted.tail, given.tail, True
        # The prompt may be written behind every conversation, asked for or not: it is what follows the loop.
        begin = len(given.text) - len(given.tail)
        return prompted.tail, given.text[begin : max(begin, given.after_loops())], False

    def _start_without_prompt(self, before: str, given: str, run: _Run) -> int:
        if before == given:
            return len(before)
        # Where no prompt is needed (the turn goes on behind a tool's answer), what follows is the assistant's.
        if before.startswith(given) and self._needs_no_header():
            return len(given)
        if run.last.source.field != ("content",):
            raise self._bad(
                f"the chat template has no generation prompt, so nobody knows what this turn begins with; {_TAGS}"
            )
        return len(before)  # all that is sure is the text itself

    def _needs_no_header(self) -> bool:
        """Whether the template has a generation prompt elsewhere, or writes an assistant's text without a header."""
        messages = self.conversation.messages
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        _, given, asked = self._prompt(first)
        if asked:
            return True
        probe = trace([{"role": "assistant", "content": "x"}], None).messages
        try:
            rendered = self.render([*messages[:first], *probe], False)
        except SampleError:
            return False
        *before, last = rendered.visible
        return last.source.text == "x" and rendered.text[before[-1].end if before else 0 : last.begin] == given

    def _tail(self, ended: RenderedText, before: str) -> str:
        """What the template writes behind this turn where it is the last: all of it that belongs to the turn."""
        begin = len(ended.text) - len(ended.tail)
        border = ended.loop_end(begin, self.index)
        if border is None:  # a template that does not loop over messages
            return self._tail_without_loop(ended.tail, before)
        own, outside = ended.text[begin:border], ended.text[border:]
        token = self._control.any.search(outside)
        alone = token is not None and token[0] == outside.strip()
        return ended.tail if alone and not self._control.any.search(own) else own

    def _tail_without_loop(self, tail: str, before: str) -> str:
        shared = _shared_end(tail, before)
        if not self._prompt(self.index)[2] and self._control.any.search(shared):
            raise self._bad(
                f"the chat template writes {shared[-40:]!r} behind each conversation, which looks like the beginning "
                f"of a next turn; {_TAGS}"
            )
        return tail

    def _last(self, runs: list[_Run], ended: list[_Run]) -> int:
        """The run that ends the turn: the one that is last where the conversation ends with this turn."""
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
        ):  # written only where the turn is not the last one, as the number of a call
            last += 1
        return last

    def _end(self, tail: str, begin: int, stop: int) -> tuple[int, bool]:
        """How much of the template's text [begin, stop) belongs to the turn, which ends with `tail` when it is last."""
        control, behind = self._control, self.text[begin:stop]
        border = self.rendered.loop_end(begin, self.index)  # what is written later begins another message
        tokens = list(control.any.finditer(tail))
        common = self._common(tail, behind)
        inside = [m.end() for m in tokens if m.end() <= common]
        closing = bool(tokens) and not tail[tokens[-1].end() :].strip()
        closed = [m.end() for m in control.special.finditer(tail, 0, common)]
        complete = bool(inside) and inside[-1] == tokens[-1].end()
        if closed and (not complete or closed[-1] == inside[-1]):
            return closed[-1], False
        if complete:  # by a token that may also stand inside a turn: what is written behind it belongs to it
            return (inside[-1] if not tail[inside[-1] : common].strip() else common), False
        other = control.any.match(behind, common)
        if closing and tokens[-1].start() == common and other and border and begin + other.end() <= border:
            return other.end(), False  # the last turn of a conversation ends with another token than earlier ones
        if closing and border and (found := behind.find(tokens[-1][0], 0, border - begin)) >= 0:
            return found + len(tokens[-1][0]), False
        if tail[common:].strip():
            raise self._bad(f"no end of turn: the chat template ends it with {tail[-40:]!r} only when it is last")
        return common, not behind[:common].strip()

    def _word_border(self, text: str, at: int) -> int:
        """The last place up to `at` that is behind a blank or a control token."""
        ends = [token.end() for token in self._control.any.finditer(text, 0, at) if token.end() <= at]
        blank = max((i + 1 for i in range(at) if text[i].isspace()), default=0)
        return at if at == len(text) else max([blank, *ends], default=0)

    def _bad(self, message: str) -> SampleError:
        return _bad(self.where, self.index, message)

    @property
    def _control(self) -> Control:
        return self.turns._control

    def _common(self, a: str, b: str) -> int:
        """Length of the common beginning, without the first half of a control token."""
        length = _shared(a, b)
        for text in (a, b):
            near = max(0, length - 64)
            for token in self._control.any.finditer(text, near, length + 64):
                if token.start() < length < token.end():
                    length = token.start()
        return length


def _runs(own: Sequence[tuple[int, TextPiece]]) -> list[_Run]:
    """`own` are pieces of one turn, with their places among all."""
    runs: list[_Run] = []
    for i, piece in own:
        last = runs[-1] if runs else None
        if last is not None and last.end == piece.begin and last.last.source.field == piece.source.field:
            runs[-1] = _Run(last.begin, piece.end, piece, i + 1)
        else:
            runs.append(_Run(piece.begin, piece.end, piece, i + 1))
    return runs


def _shared(a: str, b: str) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


def _shared_end(a: str, b: str) -> str:
    length = _shared(a[::-1], b[::-1])
    return a[len(a) - length :]


def _bad(where: str, index: int, message: str) -> SampleError:
    return bad(where, "template", message, at=f"messages[{index}]")
