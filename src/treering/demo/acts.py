"""The acts of the demo. An act has a folder, prints the command that does the same, and checks its result."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from treering.core.errors import TreeringError
from treering.demo.material import VOCABULARY, collect_corpus, invent_facts, make_blank, texts_of, write_facts
from treering.demo.scores import Trigram, answers, bits, bits_per_byte, continuation, known_facts, load_plain
from treering.train.config import Job
from treering.train.export import reopen

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
class DemoStage:
    """What all acts use: where they write, how they print, and how long the trainings are."""

    root: Path
    note: Callable[[str], None]
    train: Callable[[Path], Any]  # runs a configuration file, as `treering train FILE` does
    export: Callable[[Path, Path], Any]  # as `treering export RUN --to DIR`
    measure: Callable[[str, Path, list[str]], Any]  # as `treering measure MODEL --to DIR --data FILE`
    table: Callable[[list[dict[str, Any]]], None]
    characters: int = 1_600_000
    steps: int = 300
    epochs: int = 40
    mixture_steps: int = 150
    distil_steps: int = 60
    places: int = 10
    strict: bool = True

    def command(self, *words: Any) -> None:
        """Print the command that does what comes next."""
        self.note("$ " + shlex.join(str(word) for word in words))

    def bar(self, holds: bool, text: str) -> None:
        """Print whether a promise of the demo holds; raise `BarMissed` if it does not and the demo is strict."""
        self.note(f"{'✓' if holds else '✗'} {text}")
        if not holds and self.strict:
            raise BarMissed(f"the demo's bar was missed: {text}")


def collect(stage: DemoStage) -> None:
    """Write the corpus, a tokenizer trained on it and a model without weights."""
    counts = collect_corpus(stage.root / "corpus", stage.characters)
    stage.note(f"corpus: {counts['train']} documents to train on, {counts['held_out']} held out")
    make_blank(stage.root / "blank", texts_of(stage.root / "corpus" / "train.jsonl"))
    stage.note(f"tokenizer of {VOCABULARY} tokens and a blank model: {stage.root / 'blank'}")


def pretrain(stage: DemoStage) -> None:
    """Train the blank model on the corpus, export it and compare it with a trigram model."""
    file = write_config(stage, "pretrain.yaml", PRETRAIN, steps=stage.steps)
    stage.command("treering", "train", file)
    stage.train(file)
    stage.command("treering", "export", stage.root / "pretrain", "--to", stage.root / "base")
    stage.export(stage.root / "pretrain", stage.root / "base")
    model, tokenizer = load_plain(stage.root / "base")
    held_out = texts_of(stage.root / "corpus" / "held_out.jsonl")
    baseline = Trigram(text.encode() for text in texts_of(stage.root / "corpus" / "train.jsonl"))
    ours, theirs = bits_per_byte(model, tokenizer, held_out, baseline)
    stage.bar(ours < 0.95 * theirs, f"held-out text: {ours:.3f} bits per byte; a byte trigram needs {theirs:.3f}")
    stage.note("def read(" + continuation(model, tokenizer, "def read(", 40))


def teach(stage: DemoStage) -> None:
    """Train all weights of the pretrained model on made-up facts, export it and ask it for the answers."""
    taught = invent_facts(stage.places)
    write_facts(stage.root / "facts" / "train.jsonl", taught)
    file = teaching(stage, "full", "full:", 2e-3, stage.epochs)
    stage.command("treering", "data", "show", file, "-n", 1)
    stage.command("treering", "train", file)
    stage.train(file)
    stage.command("treering", "export", stage.root / "teach", "--to", stage.root / "model")
    stage.export(stage.root / "teach", stage.root / "model")
    answers_before, answers_after = (answers(stage.root / name, taught) for name in ("base", "model"))
    for fact, answer in list(zip(taught, answers_after))[:3]:
        stage.note(f"{fact.question} → {answer}")
    known, right = (
        sum(fact.answer in answer for fact, answer in zip(taught, given)) for given in (answers_before, answers_after)
    )
    stage.bar(right >= 0.9 * len(taught), f"{right} of {len(taught)} taught facts answered; {known} before teaching")


def teaching(stage: DemoStage, name: str, technique: str, lr: float, epochs: int) -> Path:
    """Write the configuration that teaches the facts by `technique`, and return its path."""
    output = "teach" if name == "full" else f"teach-{name}"
    known = json.dumps(str(stage.root / "known"))
    return write_config(
        stage,
        f"{output}.yaml",
        TEACH,
        epochs=epochs,
        lr=lr,
        question=invent_facts(stage.places)[0].question,
        technique=technique,
        statistics=f"statistics: {{path: {known}, tokens: 0}}\n" if name == "osft" else "",
        output=output,
        why="\n# What the old text uses is protected, as `treering measure` has found it." if name == "osft" else "",
    )


def write_config(stage: DemoStage, name: str, text: str, **values: Any) -> Path:
    """Write a configuration file of the demo and return its path."""
    path = stage.root / name
    quoted = json.dumps(str(stage.root))[1:-1]  # between double quotes YAML reads what JSON writes
    path.write_text(text.format(root=quoted, **values), encoding="utf-8")
    return path


def check(stage: DemoStage, job: Job) -> None:
    """Compare the logits of the exported model, opened by transformers alone, with those of the run."""
    run: Any = reopen(job)
    run.model.eval()
    model, tokenizer = load_plain(stage.root / "model")
    ids = tokenizer("def main():\n    return None", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        same = torch.equal(model(ids).logits, run.model(ids).logits)
    stage.bar(same, "the exported model's logits are bitwise those of the run")


METHODS = {  # technique, learning rate, and factor of the epochs after which it has learned all facts
    "full": ("full:", 2e-3, 1),
    "lora": ("lora: {rank: 64}", 4e-3, 2),
    "osft": ("osft:", 6e-3, 2),
}


def remember(stage: DemoStage) -> None:
    """Teach the facts of the previous act by three techniques, from the same base model, until each has learned them.

    Then compare how many bits per byte of the old text each has lost.
    """
    known, base = stage.root / "known", stage.root / "base"
    text = stage.root / "corpus" / "train.jsonl"
    stage.command("treering", "measure", base, "--data", text, "--max-length", 256, "--to", known)
    stage.measure(str(base), known, [str(text)])
    taught = invent_facts(stage.places)
    held_out = texts_of(stage.root / "corpus" / "held_out.jsonl")
    before = bits(*load_plain(base), held_out)
    rows = [{"": "before", "facts known": f"0 of {len(taught)}", "old text, bits per byte": f"{before:.3f}"}]
    rises, right = {}, {}
    for name, (technique, lr, factor) in METHODS.items():
        folder = stage.root / ("model" if name == "full" else f"model-{name}")
        if name != "full":  # which the previous act has trained
            file = teaching(stage, name, technique, lr, factor * stage.epochs)
            stage.command("treering", "train", file)
            stage.train(file)
            stage.export(stage.root / f"teach-{name}", folder)
        right[name] = known_facts(folder, taught)
        rises[name] = bits(*load_plain(folder), held_out) - before
        score = f"{before + rises[name]:.3f} (+{rises[name]:.3f})"
        rows.append({"": name, "facts known": f"{right[name]} of {len(taught)}", "old text, bits per byte": score})
    stage.table(rows)
    stage.bar(
        right["osft"] >= 0.9 * len(taught) and rises["osft"] <= 0.25 * rises["full"],
        f"osft learned {right['osft']} of {len(taught)} facts and forgot {rises['osft']:.3f} bits per byte of the old "
        f"text, full fine-tuning {rises['full']:.3f}",
    )
