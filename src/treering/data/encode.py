"""From checked samples to token ids and their training mask."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from treering.data.chat.control_tokens import SPECIAL, ControlTokens, RenamedText
from treering.data.chat.conversation import TOOLS, TextPiece
from treering.data.chat.mask import Chat, Rendered
from treering.data.chat.template import Template
from treering.data.chat.traced_parts import TextSource
from treering.data.encoding_recipe import Recipe
from treering.data.formats import Sample
from treering.data.sources.records import SampleError, bad
from treering.data.token_places import Tokens, behind_cut, check_together, separator


class Encoded(NamedTuple):
    """Tokens of one document. `mask[0]` is never set: nothing predicts the first token."""

    file: int
    row: int
    piece: int  # number of the piece of a text that was cut
    ids: NDArray[np.uint32]
    mask: NDArray[np.bool_]
    truncated: bool
    endless: bool
    unprompted: bool = False  # as in Rendered
    thoughts: int = 0
    without_tools: bool = False


class Text(NamedTuple):
    """A text of a sample. `pieces` are the parts of it that come from the data; a chat also has the template's."""

    sample: int
    text: str
    pieces: Sequence[TextPiece]
    writers: Sequence[bool]
    rendered: Rendered | None = None
    cut: int = 0  # characters of the separator before a completion


@dataclass(frozen=True, kw_only=True)
class PreparedTexts:
    """A batch before the tokenizer. A prompt and its completion are two texts of one sample."""

    samples: Sequence[Sample]
    errors: dict[int, SampleError]
    texts: list[Text]


class Encoder:
    """Encodes samples with one recipe."""

    def __init__(self, plan: Recipe):
        self.plan = plan
        self.control = ControlTokens(plan.backend, plan.template and plan.template + (plan.tools_template or ""))
        self.chat = self.tools_chat = None
        if plan.template is not None:
            self.chat = Chat(Template(source=plan.template, variables=plan.variables), self.control)
        if plan.tools_template is not None:
            self.tools_chat = Chat(Template(source=plan.tools_template, variables=plan.variables), self.control)
        self._separator = separator(self.control.placer(renamed=False))

    def encode(self, samples: Sequence[Sample]) -> list[list[Encoded] | SampleError]:
        """Return for each sample its documents (a text that was cut has several) or its error."""
        prepared = self.prepare(samples)
        return self.finish(prepared, self.tokenise(prepared))

    def prepare(self, samples: Sequence[Sample]) -> PreparedTexts:
        """Return the texts of the samples, and the errors of samples that have none."""
        prepared = PreparedTexts(samples=samples, errors={}, texts=[])
        for i, sample in enumerate(samples):
            try:
                prepared.texts.extend(list(self._texts(i, sample)))
            except SampleError as error:
                prepared.errors[i] = error
        return prepared

    def tokenise(self, prepared: PreparedTexts) -> list[Encoding]:
        """Return the encodings of the texts. Python's lock is released, so this may run in another thread."""
        return self.control.placer(renamed=False).encode([text.text for text in prepared.texts])

    def finish(self, prepared: PreparedTexts, encodings: list[Encoding]) -> list[list[Encoded] | SampleError]:
        """Return for each sample its documents with masks, or its error."""
        texts = prepared.texts
        tokens = self.control.placer(renamed=False).place([text.text for text in texts], encodings)
        imitating = [  # texts in which data was taken for control tokens
            i for i, text in enumerate(texts)
            if not self.control.genuine(tokens[i], text.text, text.pieces, text.writers)
        ]  # fmt: skip
        renamed = dict(zip(imitating, self._encode_renamed([texts[i] for i in imitating])))
        by_sample: dict[int, list[tuple[Text, Tokens, RenamedText | None]]] = {}
        for i, text in enumerate(texts):
            tokens_of_text, renamed_text = renamed.get(i, (tokens[i], None))
            by_sample.setdefault(text.sample, []).append((text, tokens_of_text, renamed_text))
        results: list[list[Encoded] | SampleError] = [prepared.errors.get(i, []) for i in range(len(prepared.samples))]
        for i, parts in by_sample.items():
            try:
                results[i] = self._documents(prepared.samples[i], parts)
            except SampleError as error:
                results[i] = error
        return results

    def _encode_renamed(self, texts: Sequence[Text]) -> list[tuple[Tokens, RenamedText]]:
        """Return the tokens of texts from the tokenizer with renamed control tokens."""
        if not texts:
            return []
        renamed = [self.control.rename(text.text, text.pieces, text.writers) for text in texts]
        placer = self.control.placer(renamed=True)
        renamed_texts = [text.text for text in renamed]
        return list(zip(placer.place(renamed_texts, placer.encode(renamed_texts)), renamed))

    def _texts(self, i: int, sample: Sample) -> Iterator[Text]:
        if sample.kind == "chat":
            chat = self.tools_chat if sample.tools and self.tools_chat is not None else self.chat
            assert chat is not None
            rendered = chat.render(sample)
            yield Text(
                sample=i, text=rendered.text, pieces=rendered.pieces, writers=rendered.writers, rendered=rendered
            )
            return
        if sample.kind == "completion":
            yield _one_text(i, sample.prompt, "")
        yield _one_text(i, sample.text, self._separator if sample.prompt else "")

    def _documents(self, sample: Sample, parts: list[tuple[Text, Tokens, RenamedText | None]]) -> list[Encoded]:
        text, tokens, renamed = parts[-1]
        for _, tokens_of_text, renamed_text in parts:
            if renamed_text is not None and np.count_nonzero(self.control.kinds(tokens_of_text)) != renamed_text.names:
                raise bad(sample.where, "tokenizer", "the tokenizer does not keep control tokens apart from text")
        if text.rendered is not None:
            return self._fit(sample, tokens.ids, self._mask(text.rendered, tokens, renamed), text.rendered)
        start, end = self.plan.start, self.plan.end
        if sample.kind == "text":
            ids = np.array([*start, *tokens.ids, *end], dtype=np.uint32)
            mask = np.ones(len(ids), dtype=np.bool_)
            mask[: max(1, len(start))] = False
            return self._pieces(sample, ids, mask) if self.plan.too_long == "truncate" else self._fit(sample, ids, mask)
        prompt = [*start, *parts[0][1].ids]
        ids = np.array([*prompt, *self._completion(sample, parts), *end], dtype=np.uint32)
        mask = np.ones(len(ids), dtype=np.bool_)
        mask[: max(1, len(prompt))] = False
        return self._fit(sample, ids, mask)

    def _completion(self, sample: Sample, parts: list[tuple[Text, Tokens, RenamedText | None]]) -> NDArray[np.uint32]:
        """Return the tokens of the completion, without those of the separator before it."""
        (_, prompt, renamed_prompt), (text, tokens, renamed) = parts
        if not text.cut:
            return tokens.ids
        written = text.text if renamed is None else renamed.text
        cut = text.cut if renamed is None else renamed.at(text.cut)
        placer = self.control.placer(renamed=(renamed_prompt or renamed) is not None)
        completion = behind_cut(tokens, cut, len(written))
        if completion is None:  # this completion needs another separator
            character = separator(placer, sample.text)
            written, cut = character + sample.text, len(character)
            (tokens,) = placer.place([written], placer.encode([written]))
            completion = behind_cut(tokens, cut, len(written))
        completion = tokens.ids if completion is None else completion
        check_together(placer, sample.prompt, sample.text, prompt.ids, completion, sample.where)
        return completion

    def _mask(self, rendered: Rendered, tokens: Tokens, renamed: RenamedText | None) -> NDArray[np.bool_]:
        spans, limits = rendered.trained, rendered.limits
        if renamed is not None:
            spans, limits = ([(renamed.at(a), renamed.at(b)) for a, b in part] for part in (spans, limits))
        mask = np.zeros(len(tokens.ids), dtype=np.bool_)
        kinds = self.control.kinds(tokens)
        for (start, _), (first, stop) in zip(spans, tokens.ranges(spans, limits), strict=True):
            # A control token that includes the blanks behind it reaches into the turn, but is not trained.
            if first < stop and kinds[first] == SPECIAL:
                begins, _, places = tokens.places(np.array([first]), [start])
                first += int(begins[0] < places[0])
            mask[first:stop] = True
        mask[:1] = False
        return mask

    def _fit(self, sample: Sample, ids: NDArray, mask: NDArray, rendered: Rendered | None = None) -> list[Encoded]:
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
        if not np.count_nonzero(mask):
            after = f" after truncation to {limit} tokens" if too_long else ""
            raise bad(sample.where, "untrained", f"no token is trained{after}; skip_untrained skips such samples")
        document = Encoded(
            file=sample.file,
            row=sample.row,
            piece=0,
            ids=ids,
            mask=mask,
            truncated=too_long,
            endless=rendered.endless if rendered else not self.plan.end,
            unprompted=rendered is not None and rendered.unprompted,
            thoughts=rendered.thoughts if rendered else 0,
            without_tools=rendered is not None and rendered.without_tools,
        )
        return [document]

    def _pieces(self, sample: Sample, ids: NDArray, mask: NDArray) -> list[Encoded]:
        """Return consecutive pieces that overlap by one token, so that each token but the first is predicted once."""
        limit = self.plan.max_length
        pieces = []
        for number, at in enumerate(range(0, max(1, len(ids) - 1), limit - 1)):
            part = mask[at : at + limit].copy()
            part[:1] = False
            if part.any():
                piece = Encoded(
                    file=sample.file,
                    row=sample.row,
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


def _one_text(sample: int, text: str, separator: str) -> Text:
    separated = separator + text
    piece = TextPiece(len(separator), len(separated), TextSource(TOOLS, ("text",), text, True), 0, len(text), False)
    pieces = [piece] if text else []
    return Text(sample=sample, text=separated, pieces=pieces, writers=[False] * len(pieces), cut=len(separator))
