"""What must hold of every conversation that is encoded: checked with transformers and the tokenizer alone."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from treering.core.errors import DataError
from treering.data.chat.conversation import forms
from treering.data.chat.mask import Chat
from treering.data.chat.messages import check_messages
from treering.data.chat.template import Template, _aliased
from treering.data.config import Data
from treering.data.encode import Encoded, Encoder
from treering.data.encoding_recipe import recipe
from treering.data.formats import Sample
from treering.data.sources.records import SampleError

from .conversations import Maker

# transformers 5.16, for one, gives a template thoughts under the one name that they have in the message.
READS_THOUGHTS = hasattr(chat_template_utils, "_REASONING_FIELDS")


class Difference(AssertionError):
    """Something that was trained, or encoded, in another way than it has to be."""


class Oracle:
    """Encodes conversations with one tokenizer and template, and checks what comes out."""

    def __init__(self, tokenizer: Any, *, strict: bool):
        """`strict`: every turn has to end with a control token, unless it is reported that one does not."""
        self.tokenizer, self.strict = tokenizer, strict
        self.encoder = Encoder(recipe(tokenizer, Data(train="t.jsonl", max_length=1_000_000), "messages"))
        added_tokens = tokenizer.added_tokens_decoder  # computed again at each access
        added = added_tokens.items()
        template = tokenizer.chat_template
        self.special = {i for i, token in added if token.special}
        self.control = self.special | {i for i, token in added if not token.special and token.content in template}
        self.control -= {i for i, token in added if token.content.isspace()}
        self.harmful = tuple(added_tokens[i].content for i in self.control)
        self.strings = tuple(sorted(added_tokens[i].content for i in self.special if i in self.control)[:40])

    def check(self, seed: int) -> str:
        """`ok`, or why the conversation of this seed is refused. Raises Difference."""
        maker = Maker(seed, self.strings)
        messages, tools = maker.conversation()
        try:
            checked = check_messages(json.loads(json.dumps(messages)), "t.jsonl:1", columnar=False)
        except SampleError as error:
            return str(error).partition(": ")[2]
        sample = Sample(kind="chat", where="t.jsonl:1", file=0, row=1, messages=checked, tools=tools)
        try:
            (result,) = self.encoder.encode([sample])
        except DataError as error:  # the template itself is refused
            return str(error)
        if isinstance(result, SampleError):
            return str(result).removeprefix("t.jsonl:1: ")
        (document,) = result
        if seed % 4 == 0:
            self._check_alone(sample)
        known = self._check_ids(document, checked, tools)
        self._check_mask(document, maker, checked)
        return "ok" if known else "encoded, though transformers cannot render it"

    def _check_alone(self, sample: Sample) -> None:
        """What was learned of earlier conversations must not show."""
        assert self.encoder.chat is not None and self.encoder.plan.template is not None
        template = Template(source=self.encoder.plan.template, variables=self.encoder.plan.variables)
        together, alone = (chat.render(sample) for chat in (self.encoder.chat, Chat(template, self.encoder.control)))
        if (together.text, together.trained, together.limits) != (alone.text, alone.trained, alone.limits):
            raise Difference("what was encoded before changes the result")

    def _rendered(self, messages: Sequence[dict[str, Any]], tools: Any) -> list[str]:
        """What transformers makes of the conversation, in each form that tool calls may have."""
        texts = []
        messages = list(messages) if READS_THOUGHTS else _aliased(messages)
        for form in forms(list(messages)):
            try:
                # Not `apply_chat_template`, which takes out what is null before the template can test for it.
                rendered, _ = render_jinja_template(
                    [form], tools=tools, chat_template=self.tokenizer.chat_template, **self.encoder.plan.variables
                )
            except Exception:  # the template wants another form
                continue
            texts += rendered
        return texts

    def _check_ids(self, document: Encoded, messages: Sequence[dict[str, Any]], tools: Any) -> bool:
        """Whether transformers renders this conversation too, so that there is something to compare with."""
        ids = document.ids.tolist()
        read = _read(json.loads(json.dumps([messages, tools])))  # JSON may spell a control string in other letters
        dump = json.dumps(read, ensure_ascii=False)
        if not any(text in dump.replace('\\"', '"') for text in self.harmful):
            texts = self._rendered(messages, tools)
            if ids not in [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts]:
                if texts:
                    raise Difference("the ids are not those of apply_chat_template")
            return bool(texts)
        # The same conversation with every control string spelled in another way has the control tokens that count.
        twin = _spelled(read, self.harmful)
        wanted = [
            [i for i in self.tokenizer(text, add_special_tokens=False).input_ids if i in self.special]
            for text in self._rendered(*twin)
        ]
        if wanted and [i for i in ids if i in self.special] not in wanted:
            raise Difference("the control tokens are not the template's")
        return bool(wanted)

    def _check_mask(self, document: Encoded, maker: Maker, messages: Sequence[dict[str, Any]]) -> None:
        pairs = list(zip(document.ids.tolist(), document.mask.tolist(), strict=True))
        groups = [[i for i, _ in g] for trained, g in itertools.groupby(pairs, key=lambda p: p[1]) if trained]
        texts = [self.tokenizer.decode(group) for group in groups]
        trained = {mark for text in texts for mark in re.findall(r"k\d+q", text)}
        all_text = self.tokenizer.decode(document.ids.tolist())
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for mark, (turn, what) in maker.marks.items():
            if turn not in assistants:
                if mark in trained:
                    raise Difference(f"somebody else's {what} of message {turn} is trained")
                if turn < len(messages) and mark not in all_text:
                    raise Difference(f"{what} of message {turn} is left out")
            elif mark not in trained:
                thought = what == "thought" or "</think>" in (messages[turn].get("content") or "")
                if thought and turn != assistants[-1] and document.thoughts:
                    continue  # left out by the template, and counted
                raise Difference(f"{what} of message {turn} is not trained")
        if len(groups) > len(assistants):
            raise Difference(f"{len(groups)} ranges are trained for {len(assistants)} turns")
        ends = [any(i in self.control for i in group[-3:]) for group in groups]
        if self.strict and not document.endless and not all(ends):
            raise Difference(f"a turn ends with {texts[ends.index(False)][-20:]!r}")


def _read(value: Any) -> Any:
    """With arguments of tool calls as objects."""
    if isinstance(value, dict):
        read = {key: _read(entry) for key, entry in value.items()}
        if isinstance(read.get("arguments"), str):
            read["arguments"] = json.loads(read["arguments"] or "{}")
        return read
    return [_read(entry) for entry in value] if isinstance(value, list) else value


def _spelled(value: Any, strings: Sequence[str]) -> Any:
    if isinstance(value, str):
        for text in strings:
            value = value.replace(text, "x" + text[1:-1] + "x") if len(text) > 1 else value
        return value
    if isinstance(value, dict):
        return {
            key: entry if key in ("role", "id", "type") else _spelled(entry, strings) for key, entry in value.items()
        }
    return [_spelled(entry, strings) for entry in value] if isinstance(value, list) else value
