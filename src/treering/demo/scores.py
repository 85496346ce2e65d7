"""How the demo measures a model: bits per byte of a text, next to a byte trigram's, and the facts it answers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treering.demo.material import Fact


class Trigram:
    """An interpolated byte trigram (Witten–Bell): the baseline that the small model has to improve on.

    p_n(c | h) = (count(h c) + distinct(h) · p_{n−1}(c | h')) / (count(h) + distinct(h))
    """

    def __init__(self, texts: Iterable[bytes]):
        texts = list(texts)
        self.counts = [
            np.bincount(np.concatenate([_keys(text, n) for text in texts]), minlength=256**n) for n in (1, 2, 3)
        ]

    def bits(self, text: bytes) -> NDArray[np.float64]:
        """Return −log₂ p of each byte, given the bytes before it."""
        codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
        probability = np.full(len(codes), 1 / 256)
        for n, counts in enumerate(self.counts, 1):
            table = counts.reshape(-1, 256)
            keys = _keys(text, n)
            history = keys // 256
            total, distinct = table.sum(1)[history], (table > 0).sum(1)[history]
            lower = probability[n - 1 :]
            seen = total + distinct
            interpolated = (counts[keys] + distinct * lower) / np.maximum(seen, 1)
            probability[n - 1 :] = np.where(seen > 0, interpolated, lower)
        return -np.log2(probability)


def _keys(text: bytes, n: int) -> NDArray[np.int64]:
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    length = max(0, len(codes) - n + 1)
    keys = np.zeros(length, dtype=np.int64)
    for i in range(n):
        keys = keys * 256 + codes[i : i + length]
    return keys


def load_plain(folder: Path) -> tuple[Any, Any]:
    """Return the model and tokenizer of a folder, opened by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a progress bar for a model of 5 MB would break the demo's lines
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def bits(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Return the bits per byte that the model needs for the texts."""
    return bits_per_byte(model, tokenizer, texts, None)[0]


def bits_per_byte(model: Any, tokenizer: Any, texts: list[str], baseline: Trigram | None) -> tuple[float, float]:
    """Return the bits per byte of the model and of the trigram on the same bytes: all but each text's first token."""
    model_bits = trigram_bits = 0.0
    count = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        # In a byte-level vocabulary a token is written with one character a byte.
        sizes = [len(token) for token in tokenizer.convert_ids_to_tokens(ids[0].tolist())]
        model_bits += float(nats) / float(np.log(2))
        if baseline is not None:
            trigram_bits += float(baseline.bits(text.encode()[: sum(sizes)])[sizes[0] :].sum())
        count += sum(sizes[1:])
    return model_bits / count, trigram_bits / count


def known_facts(folder: Path, taught: list[Fact]) -> int:
    """Return how many of the facts the model of a folder answers."""
    return sum(fact.answer in answer for fact, answer in zip(taught, answers(folder, taught)))


def answers(folder: Path, facts: list[Fact]) -> list[str]:
    """Return the model's answer to the question of each fact."""
    model, tokenizer = load_plain(folder)
    texts = []
    for fact in facts:
        turns = [{"role": "user", "content": fact.question}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        texts.append(_generate(model, tokenizer, inputs["input_ids"], 12))
    return texts


def continuation(model: Any, tokenizer: Any, text: str, new_tokens: int) -> str:
    """Return what the model writes after `text`."""
    return _generate(model, tokenizer, tokenizer(text, return_tensors="pt")["input_ids"], new_tokens)


def _generate(model: Any, tokenizer: Any, ids: torch.Tensor, new_tokens: int) -> str:
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
