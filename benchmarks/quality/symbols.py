"""A sequence of tasks over 48 symbols: a skill (copy), and sets of random facts that nothing but memory can answer.

A fact is   FACT k₁ k₂ k₃ k₄ IS v₁ v₂;   a copy   COPY s₁ … s₆ IS s₁ … s₆.   Chance of a fact is below 0.001.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.quality.learners import Batch, Method
from benchmarks.quality.model import Small, batch, drawn, exact, learn, pretrained
from treering.core.seeds import generator
from treering.curvature import Statistics

SYMBOLS, COPY, FACT, IS = 45, 45, 46, 47
Rows = tuple[Tensor, Tensor]  # ids, labels


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything. The defaults are those of the published figures."""

    width: int = 128
    middle: int = 384
    layers: int = 3
    facts: int = 96
    base_steps: int = 700
    steps: int = 120  # of each task
    tasks: int = 3
    rows: int = 64


def config(size: Size) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=SYMBOLS + 3, hidden_size=size.width, intermediate_size=size.middle, num_hidden_layers=size.layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def facts(number: int, seed: int, task: int) -> Rows:
    drawn_ = torch.randint(0, SYMBOLS, (number, 6), generator=generator(seed, "facts", task))
    head, sign = torch.full((number, 1), FACT), torch.full((number, 1), IS)
    return _rows(torch.cat([head, drawn_[:, :4], sign, drawn_[:, 4:]], 1), answer=2)


def copies(number: int, seed: int, what: str) -> Rows:
    drawn_ = torch.randint(0, SYMBOLS, (number, 6), generator=generator(seed, "copy", what))
    head, sign = torch.full((number, 1), COPY), torch.full((number, 1), IS)
    return _rows(torch.cat([head, drawn_, sign, drawn_], 1), answer=6)


def _rows(ids: Tensor, answer: int) -> Rows:
    labels = ids.clone()
    labels[:, :-answer] = -100
    return ids, labels


def old(size: Size, seed: int) -> Iterable[Batch]:
    """Endless batches of what the base is taught: half copies, half the first facts."""
    known = drawn(*facts(size.facts, seed, 0), size.rows, seed)
    for number, one in enumerate(known):
        ids, labels = copies(size.rows, seed, f"train {number}")
        pad = ids.shape[1] - one["input_ids"].shape[1]
        longer = torch.nn.functional.pad(one["input_ids"], (0, pad))
        unused = torch.nn.functional.pad(one["labels"], (0, pad), value=-100)
        yield batch(torch.cat([ids, longer]), torch.cat([labels, unused]))


def base(size: Size, seed: int, folder: Path) -> Small:
    name = f"symbols-{size.width}-{size.layers}-{size.facts}-{size.base_steps}-{seed}.safetensors"
    return pretrained(config(size), old(size, seed), size.base_steps, 2e-3, seed, folder / name)


def measured(small: Small, size: Size, seed: int) -> Statistics:
    """The first ring: of what the base knows, copies that it was not trained on and its facts."""
    return small.measured([_ring(copies(2 * size.facts, seed, "ring")), _ring(facts(size.facts, seed, 0))])


def _ring(rows: Rows) -> Batch:
    return batch(*rows) | {"real": torch.ones_like(rows[0], dtype=torch.bool)}


def scores(small: Small, size: Size, seed: int, tasks: int) -> list[float]:
    """Of copies never seen, and of each set of facts."""
    model = small.fresh().eval()
    return [exact(model, *copies(128, seed, "held out"))] + [
        exact(model, *facts(size.facts, seed, task)) for task in range(tasks + 1)
    ]


def remembered(size: Size, seed: int, tasks: int) -> Rows:
    """Return the rows of the rings of the base and of the first so many tasks."""
    rings = [copies(2 * size.facts, seed, "ring"), *(facts(size.facts, seed, task) for task in range(tasks + 1))]
    longest = max(ids.shape[1] for ids, _ in rings)

    def padded(part: int, value: int) -> Tensor:
        rows = [ring[part] for ring in rings]
        return torch.cat([F.pad(one, (0, longest - one.shape[1]), value=value) for one in rows])

    return padded(0, 0), padded(1, -100)


def sequence(small: Small, method: Method, lr: float, size: Size, seed: int, old: Statistics) -> dict[str, Any]:
    """One task after another; after each the model is plain again and its ring is added to the statistics."""
    return _sequence(small, lambda task: method, lr, size, seed, old)


def replayed(
    small: Small, method: Callable[[Rows], Method], lr: float, size: Size, seed: int, old: Statistics
) -> dict[str, Any]:
    """The same with a method that is given the rows of the rings so far, to replay them."""
    return _sequence(small, lambda task: method(remembered(size, seed, task - 1)), lr, size, seed, old)


def _sequence(
    small: Small, method_of: Callable[[int], Method], lr: float, size: Size, seed: int, old: Statistics
) -> dict[str, Any]:
    """Return scores of a sequence of tasks.

    learned   mean score of each new task when it had just been learned
    bwt       mean over all but the last task, the base's two included, of the final score − that when learned
    """
    statistics: Sequence[Statistics] = (old,)
    when_learned = scores(small, size, seed, 0)
    for task in range(1, size.tasks + 1):
        rows = facts(size.facts, seed, task)
        order = drawn(*rows, size.rows, seed + task)
        small = learn(small, method_of(task), statistics[0], lr, order, size.steps, "cosine")
        when_learned.append(exact(small.fresh().eval(), *rows))
        if task < size.tasks:
            statistics = (small.measured([_ring(rows)], onto=statistics),)
    final = scores(small, size, seed, size.tasks)
    changes = [after - before for after, before in zip(final[:-1], when_learned)]
    return {
        "learned": sum(when_learned[2:]) / size.tasks,
        "bwt": sum(changes) / len(changes),
        "average": sum(final) / len(final),
        "when_learned": [round(score, 3) for score in when_learned],
        "final": [round(score, 3) for score in final],
    }
