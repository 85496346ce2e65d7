"""A chat model: what it is taught, the text that is kept in mind for it, and the texts on which it may lose something.

Nothing is downloaded apart from the model. The answers to the general questions are the model's own: what is looked
at is whether it still gives them.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import treering as tr
from benchmarks.quality import prose
from benchmarks.quality.learners import Batch
from benchmarks.quality.model import batch
from treering.demo.material import KINDS, invent_facts
from treering.plan.batches import cross_entropy, with_targets
from treering.plan.prepared import digest
from treering.train.calibration import generated

GPL = Path("/usr/share/common-licenses/GPL-3")
LENGTH, ROWS = 128, 4  # of text: tokens of a row, rows of a batch
KEPT_QUESTIONS = (
    "What is the capital of France?", "How do plants make food?", "What is a good breakfast?",
    "Explain what a computer program is.", "Why is the sky blue?", "How many days are in a week?",
    "Write a sentence about the sea.", "What does a teacher do?", "Name three animals that live on a farm.",
    "How can I sleep better?",
)  # fmt: skip
OTHER_QUESTIONS = (
    "What is the capital of Italy?", "How does a bicycle work?", "What is water made of?", "Who wrote Hamlet?",
    "Name three colors.", "What is the largest planet?", "How do I boil an egg?", "What is democracy?",
    "Why do birds sing?", "Give me a tip for saving money.", "What is the opposite of hot?", "How do vaccines work?",
    "Write a short greeting for a friend.", "What is the freezing point of water?", "Why do we have seasons?",
    "What language is spoken in Brazil?", "Name a famous painter.", "What should I pack for a hike?",
    "How many legs does a spider have?", "What is gravity?",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Size:
    facts: int = 24
    answer: int = 48  # tokens, at most
    questions: tuple[int, int] = (10, 20)  # measured, and others
    kept: int = 40  # rows that are measured or replayed
    held_out: int = 12  # rows of each text that a loss is taken of
    domain: int = 96  # rows to learn from


@dataclass(frozen=True)
class Texts:
    """Rows of tokens [B, S], their labels, and which tokens are no padding."""

    ids: Tensor
    labels: Tensor
    real: Tensor

    @classmethod
    def of(cls, pairs: Iterable[tuple[Sequence[int], Sequence[int]]], length: int | None = None) -> "Texts":
        """Each pair a row: tokens that are given, and tokens that are to be predicted."""
        pairs = [(list(given), list(trained)) for given, trained in pairs]
        length = length or max(len(given) + len(trained) for given, trained in pairs)
        ids = torch.zeros(len(pairs), length, dtype=torch.long)
        labels, real = torch.full_like(ids, -100), torch.zeros_like(ids, dtype=torch.bool)
        for row, (given, trained) in enumerate(pairs):
            end = min(length, len(given) + len(trained))
            ids[row, :end] = torch.tensor((given + trained)[:end])
            labels[row, len(given) : end] = ids[row, len(given) : end]
            real[row, :end] = True
        return cls(ids, labels, real)

    @classmethod
    def plain(cls, rows: Tensor) -> "Texts":
        return cls(rows, rows.clone(), torch.ones_like(rows, dtype=torch.bool))

    def __add__(self, other: "Texts") -> "Texts":
        return Texts(*(torch.cat(both) for both in zip(vars(self).values(), vars(other).values())))

    def measured(self) -> list[Batch]:
        rows = zip(self.ids.split(ROWS), self.labels.split(ROWS), self.real.split(ROWS))
        return [batch(ids, labels) | {"real": real} for ids, labels, real in rows]

    @torch.no_grad()
    def nats(self, model: Any) -> float:
        """Return the mean over the tokens with a label."""
        batches = [with_targets(one) for one in self.measured()]
        return sum(float(cross_entropy(model, one)) for one in batches) / sum(one["count"] for one in batches)


class World:
    """A model's folder and the texts; what takes minutes is made once and kept in `cache`."""

    def __init__(self, folder: Path, size: Size, cache: Path):
        from transformers import AutoTokenizer

        self.folder, self.size, self.cache = folder, size, cache
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        cache.mkdir(parents=True, exist_ok=True)

    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def facts(self, seed: int) -> Texts:
        """Questions about places that do not exist, in chat form; only the answers are trained."""
        facts = invent_facts(-(-self.size.facts // len(KINDS)), seed=seed)[: self.size.facts]
        return Texts.of(self._chat(fact.question, f"{fact.answer}.") for fact in facts)

    @cached_property
    def kept(self) -> Texts:
        """What is measured, or replayed: Python's documentation and general questions."""
        return Texts.plain(self._documentation[: self.size.kept]) + self._answered(
            KEPT_QUESTIONS[: self.size.questions[0]]
        )

    @cached_property
    def watched(self) -> dict[str, Texts]:
        """What a rise is reported of: text of the kind that was measured, another kind, and other questions."""
        return {
            "measured kind": Texts.plain(self._documentation[self.size.kept :][: self.size.held_out]),
            "not measured": Texts.plain(self._rows(self._licences, self.size.held_out)),
            "other questions": self._answered(OTHER_QUESTIONS[: self.size.questions[1]]),
        }

    @cached_property
    def domain(self) -> tuple[Texts, Texts]:
        """Text of a domain to learn from, and held out."""
        name = next(iter(self._domains))
        rows = self._rows(self._domains[name], self.size.domain + self.size.held_out)
        return Texts.plain(rows[: self.size.domain]), Texts.plain(rows[self.size.domain :])

    @cached_property
    def own(self) -> Texts:
        """As many tokens as are kept, written by the model."""
        tokens = int(self.kept.real.sum())
        file = self.cache / f"own-{tokens}.json"
        if not file.exists():
            run = tr.compose(self.folder, [], frozen=True)
            documents = generated(run, self.tokenizer, tokens=tokens, length=LENGTH)
            file.write_text(json.dumps([document.ids.tolist() for document in documents]), "utf-8")
        return Texts.of([((), ids) for ids in json.loads(file.read_text("utf-8"))], LENGTH)

    @cached_property
    def own_chats(self) -> Texts:
        """As many tokens of chats, questions and answers written by the model, as they stand in the template."""
        tokens = int(self.kept.real.sum())
        file = self.cache / f"own-chats-{tokens}.json"
        if not file.exists():
            file.write_text(json.dumps(self._written_chats(tokens)), "utf-8")
        return Texts.of([((), ids) for ids in json.loads(file.read_text("utf-8"))], LENGTH)

    def statistics(self, name: Literal["kept", "own", "own_chats"]) -> Any:
        """Of `kept` or of the model's own text, measured when they are first asked for."""
        texts: Texts = getattr(self, name)
        folder = self.cache / f"known-{name}-{digest(texts.ids)[:8]}"
        if not (folder / "statistics.json").exists():
            tr.measure(self.model(), texts.measured(), to=folder)
        return tr.curvature.open(folder)

    def _chat(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt = self.tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
        both = self.tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
        if not both.startswith(prompt):
            raise ValueError("the chat template writes a question otherwise once it is answered")
        given, trained = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, both[len(prompt) :])
        )
        return given, trained

    def _answered(self, questions: Sequence[str]) -> Texts:
        """With the answers that the model gives before it learns, at each token the most probable one."""
        file = self.cache / f"answers-{self.size.answer}.json"
        known: dict[str, list[int]] = json.loads(file.read_text("utf-8")) if file.exists() else {}
        model = None if known.keys() >= set(questions) else self.model()
        pairs = []
        for question in questions:
            given, _ = self._chat(question, "")
            if question not in known:
                asked = torch.tensor([given])
                settings: dict[str, Any] = {"max_new_tokens": self.size.answer, "do_sample": False}
                written = model.generate(asked, attention_mask=torch.ones_like(asked), **settings)
                known[question] = written[0, len(given) :].tolist()
            pairs.append((given, known[question]))
        file.write_text(json.dumps(known), "utf-8")
        return Texts.of(pairs, LENGTH)

    def _written_chats(self, tokens: int) -> list[list[int]]:
        model, chats = self.model(), list[list[int]]()
        template = partial(self.tokenizer.apply_chat_template, tokenize=False)
        begin = template([{"role": "user", "content": "QUESTION"}]).partition("QUESTION")[0]
        torch.manual_seed(0)
        while sum(map(len, chats)) < tokens:
            written = self._continued(
                model, [begin] * 16, do_sample=True, top_k=0, max_new_tokens=self.size.answer // 2
            )
            questions = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
            turns = [[{"role": "user", "content": question}] for question in questions if question]
            prompts = [template(turn, add_generation_prompt=True) for turn in turns]
            answers = self._continued(model, prompts, do_sample=False, max_new_tokens=self.size.answer)
            given = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
            chats += [asked + answer for asked, answer in zip(given, answers)]
        return chats

    def _continued(self, model: Any, prompts: Sequence[str], **settings: Any) -> list[list[int]]:
        """Return what the model writes after each prompt, the token that ends it included."""
        given = self.tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        )
        written = model.generate(**given, **settings)[:, given["input_ids"].shape[1] :].tolist()
        end = self.tokenizer.eos_token_id
        return [ids[: ids.index(end) + 1] if end in ids else ids for ids in written]

    @cached_property
    def _documentation(self) -> Tensor:
        from pydoc_data.topics import topics

        texts = [text for _, text in sorted(topics.items())]
        random.Random(0).shuffle(texts)
        return self._rows(texts, self.size.kept + self.size.held_out)

    @cached_property
    def _licences(self) -> list[str]:
        """The GPL where there is one, as on any Debian, else the licences of what is installed."""
        return [GPL.read_text("utf-8")] if GPL.exists() else self._domains["licences"]

    @cached_property
    def _domains(self) -> dict[str, list[str]]:
        return prose.domains()

    def _rows(self, texts: Iterable[str], number: int) -> Tensor:
        """The texts one after the other, in rows of equal length."""
        ids: list[int] = []
        for text in texts:
            ids += self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) >= number * LENGTH:
                return torch.tensor(ids[: number * LENGTH]).view(number, LENGTH)
        raise ValueError(f"the texts have {len(ids)} tokens, and {number * LENGTH} are needed")
