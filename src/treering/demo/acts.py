"""The demo, act by act. Each act has a folder, prints the command that does the same, and holds itself to a bar."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from treering.core.errors import TreeringError
from treering.demo import blank, corpus, facts
from treering.demo.trigram import Trigram

PRETRAIN = """\
# A 1.4 M parameter Llama from random weights, on text that ships with Python.
model: {{path: "{root}/blank", initialise: true, dtype: float32}}
data:
  train: "{root}/corpus/train.jsonl"
  eval: "{root}/corpus/held_out.jsonl"
  format: text
  max_length: 512
  cache: "{root}/tokens"
techniques:
  full:
train:
  steps: {steps}
  tokens_per_step: 1024
  log_every: 20
  optimizer: {{name: muon, lr: 1.0e-2}}
  schedule: {{name: cosine, warmup: 20}}
output: "{root}/pretrain"
"""
TEACH = """\
# Teach the pretrained model facts that nobody has ever known.{why}
model: {{path: "{root}/base", dtype: float32}}
data:
  train: "{root}/facts/train.jsonl"
  max_length: 256
  cache: "{root}/tokens"
{statistics}techniques:
  {technique}
train:
  epochs: {epochs}
  tokens_per_step: 1024
  log_every: 20
  optimizer: {{name: adamw, lr: {lr:.1e}}}
  schedule: {{name: cosine, warmup: 5}}
  evaluate: {{prompts: ["{question}"], new_tokens: 12}}
output: "{root}/{output}"
"""


class BarMissed(TreeringError):
    """The demo did not reach what it promises."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the acts share: where they write, what they show, and how long the two trainings are."""

    root: Path
    note: Callable[[str], None]
    train: Callable[[Path], Any]  # runs a configuration file, as `treering train FILE` does
    export: Callable[[Path, Path], Any]  # as `treering export RUN --to DIR`
    measure: Callable[[str, Path, list[str]], Any]  # as `treering measure MODEL --to DIR --data FILE`
    table: Callable[[list[dict[str, Any]]], None]
    characters: int = 1_600_000
    steps: int = 300
    epochs: int = 40
    places: int = 10
    strict: bool = True

    def command(self, *words: Any) -> None:
        self.note("$ " + shlex.join(str(word) for word in words))

    def bar(self, holds: bool, text: str) -> None:
        self.note(f"{'✓' if holds else '✗'} {text}")
        if not holds and self.strict:
            raise BarMissed(f"the demo's bar was missed: {text}")


def collect(stage: Stage) -> None:
    counts = corpus.collect(stage.root / "corpus", stage.characters)
    stage.note(f"corpus: {counts['train']} documents to train on, {counts['held_out']} held out")
    blank.make(stage.root / "blank", corpus.texts(stage.root / "corpus" / "train.jsonl"))
    stage.note(f"tokenizer of {blank.VOCABULARY} tokens and a blank model: {stage.root / 'blank'}")


def pretrain(stage: Stage) -> None:
    file = _config(stage, "pretrain.yaml", PRETRAIN, steps=stage.steps)
    stage.command("treering", "train", file)
    stage.train(file)
    stage.command("treering", "export", stage.root / "pretrain", "--to", stage.root / "base")
    stage.export(stage.root / "pretrain", stage.root / "base")
    model, tokenizer = load_plain(stage.root / "base")
    texts = corpus.texts(stage.root / "corpus" / "held_out.jsonl")
    baseline = Trigram(text.encode() for text in corpus.texts(stage.root / "corpus" / "train.jsonl"))
    ours, theirs = bits_per_byte(model, tokenizer, texts, baseline)
    stage.bar(ours < 0.95 * theirs, f"held-out text: {ours:.3f} bits per byte; a byte trigram needs {theirs:.3f}")
    stage.note("def read(" + _continue(model, tokenizer, "def read(", 40))


def teach(stage: Stage) -> None:
    taught = facts.invent(stage.places)
    facts.write(stage.root / "facts" / "train.jsonl", taught)
    file = teaching(stage, "full", "full:", 2e-3, stage.epochs)
    stage.command("treering", "data", "show", file, "-n", 1)
    stage.command("treering", "train", file)
    stage.train(file)
    stage.command("treering", "export", stage.root / "teach", "--to", stage.root / "model")
    stage.export(stage.root / "teach", stage.root / "model")
    before, after = (_answers(stage.root / name, taught) for name in ("base", "model"))
    for fact, answer in list(zip(taught, after))[:3]:
        stage.note(f"{fact.question} → {answer}")
    known, right = (sum(fact.answer in answer for fact, answer in zip(taught, given)) for given in (before, after))
    stage.bar(right >= 0.9 * len(taught), f"{right} of {len(taught)} taught facts answered; {known} before teaching")


def teaching(stage: Stage, name: str, technique: str, lr: float, epochs: int) -> Path:
    """The configuration that teaches by `technique`; they are alike in everything that is not said here."""
    output = "teach" if name == "full" else f"teach-{name}"
    known = json.dumps(str(stage.root / "known"))
    return _config(
        stage,
        f"{output}.yaml",
        TEACH,
        epochs=epochs,
        lr=lr,
        question=facts.invent(stage.places)[0].question,
        technique=technique,
        statistics=f"statistics: {{path: {known}, tokens: 0}}\n" if name == "osft" else "",
        output=output,
        why="\n# What the old text uses is held: `treering measure` has looked." if name == "osft" else "",
    )


def known(folder: Path, taught: list[facts.Fact]) -> int:
    return sum(fact.answer in answer for fact, answer in zip(taught, _answers(folder, taught)))


def bits(model: Any, tokenizer: Any, texts: list[str]) -> float:
    return bits_per_byte(model, tokenizer, texts, None)[0]


def bits_per_byte(model: Any, tokenizer: Any, texts: list[str], baseline: Trigram | None) -> tuple[float, float]:
    """(model, trigram) on the same bytes: those the model predicts, which leaves out each document's first token."""
    import numpy as np

    ours = theirs = 0.0
    count = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        # In a byte-level vocabulary a token is written with one character a byte.
        sizes = [len(token) for token in tokenizer.convert_ids_to_tokens(ids[0].tolist())]
        ours += float(nats) / float(np.log(2))
        if baseline is not None:
            theirs += float(baseline.bits(text.encode()[: sum(sizes)])[sizes[0] :].sum())
        count += sum(sizes[1:])
    return ours / count, theirs / count


def _config(stage: Stage, name: str, text: str, **values: Any) -> Path:
    path = stage.root / name
    quoted = json.dumps(str(stage.root))[1:-1]  # between double quotes YAML reads what JSON writes
    path.write_text(text.format(root=quoted, **values), encoding="utf-8")
    return path


def load_plain(folder: Path) -> tuple[Any, Any]:
    """With plain transformers, as anybody would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for a model of 5 MB would only tear the demo's lines

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def _answers(folder: Path, asked: list[facts.Fact]) -> list[str]:
    model, tokenizer = load_plain(folder)
    answers = []
    for fact in asked:
        turns = [{"role": "user", "content": fact.question}]
        made = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answers.append(_generate(model, tokenizer, made["input_ids"], 12))
    return answers


def _continue(model: Any, tokenizer: Any, text: str, new_tokens: int) -> str:
    return _generate(model, tokenizer, tokenizer(text, return_tensors="pt")["input_ids"], new_tokens)


def _generate(model: Any, tokenizer: Any, ids: torch.Tensor, new_tokens: int) -> str:
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
