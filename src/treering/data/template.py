"""Rendering a chat template in a sandbox like transformers', with a bound on what it may cost."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from treering.data.messages import THOUGHTS
from treering.data.meter import TooExpensiveError
from treering.data.records import bad
from treering.data.sandbox import Rendering
from treering.errors import DataError

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class Template:
    """`variables` are the tokenizer's special tokens, which templates read by name."""

    source: str
    variables: Mapping[str, Any]

    @cached_property
    def tagged(self) -> bool:
        """Whether the template itself says what the assistant generates."""
        return _GENERATION.search(self.source) is not None

    @cached_property
    def thinks(self) -> bool:
        """Whether it has a place for thoughts."""
        return any(field in self.source for field in THOUGHTS)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[Any] | None,
        where: str,
        *,
        prompt: bool = False,
        spans: bool = False,
    ) -> tuple[str, list[Span]]:
        """The text, and with `spans` the character ranges of the template's generation tags."""
        import jinja2

        try:
            given = {"messages": _aliased(messages), "tools": tools, "documents": None}
            text, found = self._rendering.render({**given, "add_generation_prompt": prompt, **self.variables})
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
        except (TooExpensiveError, jinja2.exceptions.SecurityError, RecursionError, MemoryError) as error:
            raise DataError(f"{where}: the chat template {self.source[:60]!r}… is refused: {error}") from None
        except Exception as error:  # a template is a program: what it may raise has no common base
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise bad(where, "template", f"the chat template refused it: {reason}", at="messages") from error
        return text, found if spans else []

    @cached_property
    def _rendering(self) -> Rendering:
        return Rendering(self.source)


def _aliased(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Thoughts under every name that templates read them by, as transformers gives them."""
    aliased = []
    for message in messages:
        thought = next((message[field] for field in THOUGHTS if message.get(field) is not None), None)
        aliased.append(message if thought is None else {"thinking": thought, **message, "reasoning_content": thought})
    return aliased
