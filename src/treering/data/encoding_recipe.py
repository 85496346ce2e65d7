"""How samples are encoded with a tokenizer and the settings of `data`, as one plain value."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xxhash

from treering.core.errors import DataError
from treering.data.config import Data, Format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The prompt that alpaca was published with; used for tokenizers that have no chat template.
ALPACA = """{%- for message in messages %}{% if message.role == 'user' %}\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{{ message.content }}

### Response:
{% else %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All inputs of encoding except the sample, as plain values: they are hashed, and sent to workers."""

    backend: str  # the tokenizer as `tokenizers` writes it
    template: str | None
    tools_template: str | None  # for conversations with tools, if the tokenizer has a separate one
    template_name: str  # for reports
    variables: Mapping[str, Any]
    start: tuple[int, ...]  # tokens that the tokenizer puts before plain text
    end: tuple[int, ...]
    max_length: int
    too_long: Literal["truncate", "drop", "error"]

    @property
    def digest(self) -> str:
        """A digest of all fields."""
        return xxhash.xxh3_128_hexdigest(json.dumps(asdict(self), sort_keys=True).encode())


def recipe(tokenizer: "PreTrainedTokenizerBase", config: Data, format: Format) -> Recipe:
    """Return how samples of `format` are encoded with this tokenizer and these settings."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} has no tokenizer.json; masks need a fast tokenizer with offsets")
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    template, name = _template(tokenizer, config, format)
    by_name = tokenizer.chat_template if name == "the tokenizer's" else None
    eos = tokenizer.eos_token_id
    return Recipe(
        backend=backend.to_str(),
        template=template,
        tools_template=by_name.get("tool_use") if isinstance(by_name, dict) else None,
        template_name=name,
        variables={key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)},
        start=_start(backend),
        end=() if eos is None else (int(eos),),
        max_length=config.max_length,
        too_long=config.too_long,
    )


def _template(tokenizer: "PreTrainedTokenizerBase", config: Data, format: Format) -> tuple[str | None, str]:
    if format in ("prompt", "text"):
        return None, "none"
    if config.template is not None:
        try:
            return Path(config.template).expanduser().read_text("utf-8"), config.template
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.template: {config.template} cannot be read: {error}") from error
    if tokenizer.chat_template:
        return tokenizer.get_chat_template(), "the tokenizer's"
    if format == "alpaca":
        return ALPACA, "alpaca's prompt"
    raise DataError("the tokenizer has no chat template; give the path of one as data.template")


def _start(backend: Any) -> tuple[int, ...]:
    bare, full = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            return tuple(full[:i])
    return ()
