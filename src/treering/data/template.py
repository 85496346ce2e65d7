"""Rendering a chat template in a sandbox like transformers', with a bound on what it may cost."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from treering.data.messages import THOUGHTS
from treering.data.meter import TooExpensiveError
from treering.data.records import bad
from treering.data.sandbox import PythonNotationError, Rendering
from treering.data.traced import MixedTextsError, Part
from treering.errors import DataError

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedText:
    """`parts` are the origins of the characters of `text`, `tags` the ranges of the template's generation tags."""

    text: str
    parts: tuple[Part, ...]
    tags: list[Span]


@dataclass(frozen=True, kw_only=True)
class Template:
    """`variables` are the tokenizer's special tokens, which templates read by name."""

    source: str
    variables: Mapping[str, Any]

    @cached_property
    def tagged(self) -> bool:
        """Whether the template itself says what the assistant generates."""
        return _GENERATION.search(self.source) is not None

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Any, where: str, *, prompt: bool = False
    ) -> RenderedText:
        """The conversation as text. `prompt`: with the generation prompt behind it."""
        import jinja2

        try:
            given = {"messages": _aliased(messages), "tools": tools, "documents": None}
            text, parts, tags = self._rendering.render({**given, "add_generation_prompt": prompt, **self.variables})
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
        except (TooExpensiveError, jinja2.exceptions.SecurityError, RecursionError, MemoryError) as error:
            raise DataError(f"{where}: the chat template {self.source[:60]!r}… is refused: {error}") from None
        except PythonNotationError:
            raise bad(
                where, "template", "the chat template prints a mapping or a list as Python does", at="messages"
            ) from None
        except MixedTextsError:
            message = "the chat template puts texts of two messages through one filter, so nobody can tell them apart"
            raise bad(where, "template", message, at="messages") from None
        except Exception as error:  # a template is a program: what it may raise has no common base
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise bad(where, "template", f"the chat template refused it: {reason}", at="messages") from error
        return RenderedText(text=text, parts=parts, tags=tags)

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
