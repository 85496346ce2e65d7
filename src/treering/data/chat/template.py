"""Renders a chat template in a sandbox like transformers', with a limit on its cost."""

import bisect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from treering.core.errors import DataError
from treering.data.chat.cost import TooExpensiveError
from treering.data.chat.messages import THOUGHTS
from treering.data.chat.sandbox import MisplacedTagError, PythonNotationError, Rendering, Written
from treering.data.chat.traced import MixedTextsError
from treering.data.sources.records import bad

REFUSED = "refused by the template"  # a kind of SampleError
_THOUGHTS = frozenset(THOUGHTS)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class RenderedText:
    """A text with the origins of its characters and the ranges of the template's generation tags."""

    def __init__(self, written: Written):
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
            written = self._rendering.render({**values, "add_generation_prompt": prompt, **self.variables})
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
    def _rendering(self) -> Rendering:
        return Rendering(self.source)


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
