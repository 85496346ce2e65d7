"""Renders a chat template in a sandbox like transformers', with a limit on its cost."""

import bisect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from treering.core.errors import DataError
from treering.data.chat.conversation import Span, TextPiece, pieces_of
from treering.data.chat.cost import TooExpensiveError
from treering.data.chat.messages import THOUGHTS
from treering.data.chat.sandbox import Environment, MisplacedTagError, PythonNotationError
from treering.data.chat.traced_parts import MixedTextsError
from treering.data.sources.records import bad

REFUSED = "refused by the template"  # a kind of SampleError
_THOUGHTS = frozenset(THOUGHTS)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class WrittenText(NamedTuple):
    """The result of a template: text, pieces of the data's texts in it, ranges of generation tags, and `loops`.

    A loop (i, turn) means that from character i the template's loop was at message `turn`.
    """

    text: str
    pieces: list[TextPiece]
    tags: list[Span]
    loops: list[tuple[int, int | None]]


class RenderedText:
    """A text with the origins of its characters and the ranges of the template's generation tags."""

    def __init__(self, written: WrittenText):
        self.text, self.pieces, self.tags, self._loops = written  # including pieces without characters
        self.visible = [piece for piece in self.pieces if piece.begin < piece.end]

    @cached_property
    def tail(self) -> str:
        """The template's text behind the last text of the data."""
        return self.text[self.visible[-1].end if self.visible else 0 :]

    def loop_end(self, at: int, turn: int) -> int | None:
        """Return where the template's loop leaves message `turn` after `at`; None if it was not at that message."""
        i = bisect.bisect_left(self._loops, at, key=lambda loop: loop[0]) - 1
        if i < 0 or self._loops[i][1] != turn:
            return None
        return self._loops[i + 1][0] if i + 1 < len(self._loops) else len(self.text)

    def after_loops(self) -> int:
        """Return where the template's text behind its loops begins."""
        begin, turn = self._loops[-1]
        return begin if turn is None else len(self.text)


class _CompiledTemplate:
    """A compiled template, for any number of renderings. Not in two threads at once."""

    def __init__(self, source: str):
        self.environment = Environment()
        self.template = self.environment.compiled(source)

    def render(self, values: dict[str, Any]) -> WrittenText:
        """Return what the template writes for these variables."""
        environment = self.environment
        environment.begin(values["messages"], values["tools"])
        context = self.template.new_context(values)
        blocks: list[str] = []
        turn = None
        loops: list[tuple[int, int | None]] = [(0, None)]
        # Not `generate`, which is one more generator around this one.
        for block in self.template.root_render_func(context):
            if environment.turn != turn:
                turn = environment.turn
                loops.append((environment.length, turn))
            blocks.append(block)
            environment.length += len(block)
        text = "".join(blocks)
        environment.check_tags(text)
        return WrittenText(text, pieces_of(blocks), environment.tags, loops)


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template. `variables` are the tokenizer's special tokens, which templates read by name."""

    source: str
    variables: Mapping[str, Any]

    @cached_property
    def knows_thoughts(self) -> bool:
        """Whether the template reads a field of thoughts."""
        return any(field in self.source for field in THOUGHTS)

    @cached_property
    def tagged(self) -> bool:
        """Whether the template marks with tags what the assistant generates."""
        return _GENERATION.search(self.source) is not None

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Any, where: str, *, prompt: bool = False
    ) -> RenderedText:
        """Return the conversation as text, with the generation prompt behind it if `prompt`."""
        import jinja2

        try:
            values = {"messages": _aliased(messages), "tools": tools, "documents": None}
            written = self._compiled.render({**values, "add_generation_prompt": prompt, **self.variables})
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
        except (TooExpensiveError, jinja2.exceptions.SecurityError, RecursionError, MemoryError) as error:
            raise DataError(f"{where}: the chat template {self.source[:60]!r}… is refused: {error}") from None
        except PythonNotationError:
            message = "the chat template prints a mapping, a list or another value as Python does"
            raise bad(where, "template", message, at="messages") from None
        except MisplacedTagError:
            message = (
                "the chat template has a generation tag inside of a macro, a set block or another generation tag, so "
                "its place is unknown"
            )
            raise bad(where, "template", message, at="messages") from None
        except MixedTextsError:
            message = "the chat template puts texts of two messages through one filter, so their origins are unknown"
            raise bad(where, "template", message, at="messages") from None
        except Exception as error:  # a template is a program: its errors have no common base class
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise bad(where, REFUSED, f"the chat template refused it: {reason}", at="messages") from error
        return RenderedText(written)

    @cached_property
    def _compiled(self) -> _CompiledTemplate:
        return _CompiledTemplate(self.source)


def _aliased(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with their thoughts under every name that templates read, as transformers does."""
    aliased = []
    for message in messages:
        if not _THOUGHTS.isdisjoint(message):
            thought = next((message[field] for field in THOUGHTS if message.get(field) is not None), None)
            if thought is not None:
                message = {"thinking": thought, **message, "reasoning_content": thought}
        aliased.append(message)
    return aliased
