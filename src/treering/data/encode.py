"""From checked samples to token ids and their training mask."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray
from tokenizers import Encoding

from treering.data.chat import Chat, Rendered
from treering.data.config import Data, Format
from treering.data.control import Control
from treering.data.formats import Sample
from treering.data.places import Tokens
from treering.data.records import SampleError, bad
from treering.data.template import Template
from treering.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What instruction-following data was first published with; used for tokenizers that have no chat template.
ALPACA = """{%- for message in messages %}{% if message.role == 'user' %}\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{{ message.content }}

### Response:
{% else %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides how a sample becomes tokens, as plain values: it is hashed, and sent to workers."""

    backend: str  # the tokenizer as `tokenizers` writes it
    template: str | None
    template_name: str  # for people
    variables: Mapping[str, Any]
    start: tuple[int, ...]  # what the tokenizer puts before plain text
    end: tuple[int, ...]
    max_length: int
    too_long: Literal["truncate", "drop", "error"]

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(asdict(self), sort_keys=True).encode())


def recipe(tokenizer: "PreTrainedTokenizerBase", config: Data, format: Format) -> Recipe:
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} has no tokenizer.json; masks need a fast tokenizer with offsets")
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    template, name = _template(tokenizer, config, format)
    eos = tokenizer.eos_token_id
    return Recipe(
        backend=backend.to_str(),
        template=template,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Tokens of one document. `mask[0]` is never set: nothing predicts the first token."""

    file: int
    row: int
    piece: int  # of a text that was cut
    ids: NDArray[np.uint32]
    mask: NDArray[np.bool_]
    truncated: bool
    endless: bool


Encodings = dict[bool, list[Encoding]]  # as Prepared.texts


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A batch between its two Python parts. A prompt and its completion are two texts of one sample."""

    samples: Sequence[Sample]
    errors: dict[int, SampleError]
    texts: dict[bool, list[str]]  # by whether they are for the renamed backend
    jobs: list[tuple[int, Rendered | None, bool]]  # (sample, how it was rendered, renamed) of each text


class Encoder:
    def __init__(self, plan: Recipe):
        self.plan = plan
        self.control = Control(plan.backend, plan.template)
        self.chat = None
        if plan.template is not None:
            self.chat = Chat(Template(source=plan.template, variables=plan.variables), self.control)

    def encode(self, samples: Sequence[Sample]) -> list[list[Encoded] | SampleError]:
        """For each sample its documents (a cut text has several), or why there is none."""
        prepared = self.prepare(samples)
        return self.finish(prepared, self.tokenise(prepared))

    def prepare(self, samples: Sequence[Sample]) -> "Prepared":
        """Everything before the tokenizer."""
        prepared = Prepared(samples=samples, errors={}, texts={}, jobs=[])
        for i, sample in enumerate(samples):
            try:
                parts = list(self._texts(sample))
            except SampleError as error:
                prepared.errors[i] = error
                continue
            for text, rendered in parts:
                special = self.control.needs_names(text)
                prepared.texts.setdefault(special, []).append(self.control.rename(text) if special else text)
                prepared.jobs.append((i, rendered, special))
        return prepared

    def tokenise(self, prepared: "Prepared") -> Encodings:
        """The tokenizer's part: it runs without Python's lock, so it may run in a thread of its own."""
        return {
            renamed: self.control.placer(renamed=renamed).encode(texts) for renamed, texts in prepared.texts.items()
        }

    def finish(self, prepared: "Prepared", encodings: Encodings) -> list[list[Encoded] | SampleError]:
        """Everything after the tokenizer."""
        placed = {
            renamed: iter(self.control.placer(renamed=renamed).place(texts, encodings[renamed]))
            for renamed, texts in prepared.texts.items()
        }
        results: list[list[Encoded] | SampleError] = [prepared.errors.get(i, []) for i in range(len(prepared.samples))]
        by_sample: dict[int, list[tuple[Rendered | None, Tokens]]] = {}
        for i, rendered, renamed in prepared.jobs:
            by_sample.setdefault(i, []).append((rendered, next(placed[renamed])))
        for i, parts in by_sample.items():
            try:
                results[i] = self._documents(prepared.samples[i], parts)
            except SampleError as error:
                results[i] = error
        return results

    def _texts(self, sample: Sample) -> Iterator[tuple[str, Rendered | None]]:
        if sample.kind == "chat":
            assert self.chat is not None
            rendered = self.chat.render(sample)
            yield rendered.text, rendered
            return
        # Tokenised apart: at inference the prompt is tokenised alone too.
        if sample.kind == "completion":
            yield self.control.mark(sample.prompt, structural=True), None
        yield self.control.mark(sample.text, structural=True), None

    def _documents(self, sample: Sample, parts: list[tuple[Rendered | None, Tokens]]) -> list[Encoded]:
        rendered, tokens = parts[-1]
        if rendered is not None:
            return self._fit(sample, tokens.ids, self._mask(rendered, tokens), endless=rendered.endless)
        start, end = self.plan.start, self.plan.end
        if sample.kind == "text":
            ids = np.array([*start, *tokens.ids, *end], dtype=np.uint32)
            mask = np.ones(len(ids), dtype=np.bool_)
            mask[: max(1, len(start))] = False
            return self._pieces(sample, ids, mask) if self.plan.too_long == "truncate" else self._fit(sample, ids, mask)
        given = [*start, *parts[0][1].ids]
        ids = np.array([*given, *tokens.ids, *end], dtype=np.uint32)
        mask = np.ones(len(ids), dtype=np.bool_)
        mask[: max(1, len(given))] = False
        return self._fit(sample, ids, mask, endless=not end)

    def _mask(self, rendered: Rendered, tokens: Tokens) -> NDArray[np.bool_]:
        spans, limits = rendered.trained, rendered.limits
        if self.control.needs_names(rendered.text):  # positions in the marked text -> in the text that was encoded
            renamed = {at: len(self.control.rename(rendered.text[:at])) for span in (*spans, *limits) for at in span}
            spans, limits = ([(renamed[a], renamed[b]) for a, b in part] for part in (spans, limits))
        mask = np.zeros(len(tokens.ids), dtype=np.bool_)
        for first, stop in tokens.ranges(spans, limits):
            mask[first:stop] = True
        mask[:1] = False
        return mask

    def _fit(self, sample: Sample, ids: NDArray, mask: NDArray, *, endless: bool = False) -> list[Encoded]:
        limit = self.plan.max_length
        too_long = len(ids) > limit
        if too_long and self.plan.too_long == "drop":
            return []
        if too_long and self.plan.too_long == "error":
            raise bad(
                sample.where,
                "too long",
                f"{len(ids)} tokens, max_length is {limit}; raise it, or set too_long to truncate or drop",
            )
        ids, mask = ids[:limit], mask[:limit]
        mask[:1] = False
        if not mask.any():
            after = f" after truncation to {limit} tokens" if too_long else ""
            raise bad(sample.where, "untrained", f"no token is trained{after}; skip_untrained leaves such samples out")
        return [Encoded(**_place(sample), piece=0, ids=ids, mask=mask, truncated=too_long, endless=endless)]

    def _pieces(self, sample: Sample, ids: NDArray, mask: NDArray) -> list[Encoded]:
        """Consecutive pieces that share one token, so that every token but the first is predicted exactly once."""
        limit = self.plan.max_length
        pieces = []
        for number, at in enumerate(range(0, max(1, len(ids) - 1), limit - 1)):
            part = mask[at : at + limit].copy()
            part[:1] = False
            if part.any():
                piece = Encoded(
                    **_place(sample),
                    piece=number,
                    ids=ids[at : at + limit],
                    mask=part,
                    truncated=False,
                    endless=not self.plan.end,
                )
                pieces.append(piece)
        if not pieces:
            raise bad(sample.where, "untrained", "the text is shorter than two tokens, so nothing is predicted")
        return pieces


def _place(sample: Sample) -> dict[str, Any]:
    return {"file": sample.file, "row": sample.row}
