"""Control tokens: only a template may write them; the same characters in somebody's text are encoded as text.

Two backends encode. The ordinary one is the tokenizer as it is. The renamed one calls every control token by a name
made of Unicode noncharacters, so that no text can spell it; it is used for the samples that need it, so that all
others are tokenised exactly as `apply_chat_template` does.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from treering.data.places import Placer
from treering.data.strings import CONTROL_CLOSE, CONTROL_OPEN, NAME_CLOSE, NAME_OPEN
from treering.errors import DataError

_NOTHING = "(?!)"


def _any_of(tokens: Sequence[str]) -> str:
    # Longest first: a token takes precedence over the tokens that it begins with.
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or _NOTHING


class Control:
    """Marks control strings in content before rendering, and encodes what was rendered.

    `special` are tokens that are never text. `structural` are other added tokens that the template itself writes
    (`<think>`, `<tool_call>`): a user cannot write them, an assistant may.
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
        self._ids = {token["content"]: token["id"] for token in added if token["content"] in {*special, *structural}}
        self._names = {token: f"{NAME_OPEN}{i}{NAME_CLOSE}" for i, token in enumerate(self._ids)}
        self.special = re.compile(_any_of(special))
        self.any = re.compile(_any_of(list(self._ids)))
        # What a rendered text consists of: a marked string, a lone mark (a template can cut a marked string in two),
        # or a control token that the template wrote.
        self._rendered = re.compile(
            f"{CONTROL_OPEN}({_any_of(list(self._ids))}){CONTROL_CLOSE}|[{CONTROL_OPEN}{CONTROL_CLOSE}]|({self.any.pattern})"
        )

    def mark(self, text: str, *, structural: bool) -> str:
        """`text` with its control strings marked; `structural` false leaves those that an assistant may write."""
        pattern = self.any if structural else self.special
        return pattern.sub(f"{CONTROL_OPEN}\\g<0>{CONTROL_CLOSE}", text)

    def mark_all(self, value: Any, *, structural: bool) -> Any:
        """The same for every string inside a JSON value."""
        if isinstance(value, str):
            return self.mark(value, structural=structural)
        if isinstance(value, dict):
            return {key: self.mark_all(entry, structural=structural) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.mark_all(entry, structural=structural) for entry in value]
        return value

    def needs_names(self, rendered: str) -> bool:
        return CONTROL_OPEN in rendered or CONTROL_CLOSE in rendered

    def rename(self, rendered: str) -> str:
        """A rendered text for the renamed backend: the template's control tokens by name, marks removed."""

        def name(match: re.Match[str]) -> str:
            return self._names[match[2]] if match[2] else match[1] or ""

        return self._rendered.sub(name, rendered)

    def placer(self, *, renamed: bool) -> Placer:
        return self._named() if renamed else self._ordinary

    def _named(self) -> Placer:
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
    """Without what would change lengths or offsets: a post-processor trims leading spaces from offsets."""
    return {**state, "truncation": None, "padding": None, "post_processor": None}


def _rename(state: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in state["added_tokens"]]
    model = dict(state["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return {**state, "added_tokens": added, "model": model}
