"""Rendering a chat template through transformers' sandboxed Jinja."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from treering.data.messages import THOUGHTS
from treering.data.records import bad
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
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(  # its own annotation says one string
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=spans,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
        except Exception as error:  # a template is a program: what it may raise has no common base
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise bad(where, "template", f"the chat template refused it: {reason}", at="messages") from error
        texts, found = rendered
        return texts[0], found[0] if spans else []
