"""Real text that is on any machine with Python: what the base model reads, and domains that are new to it."""

import importlib.util
import random
import sysconfig
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.learners import Batch
from benchmarks.quality.model import Small, batch, drawn, pretrained
from treering.demo.material import KINDS, collect_corpus, invent_facts, make_blank, texts_of

LENGTH, ROWS = 192, 8
PIECE = 12_000  # characters of one file
Tokenizer = Any


def prepared(folder: Path, characters: int) -> tuple[Tokenizer, Any, list[str], list[str]]:
    """Tokenizer and config of the demo's blank model, and texts to train on and held out."""
    from transformers import AutoConfig, AutoTokenizer

    root = folder / f"prose-{characters}"
    if not (root / "blank" / "config.json").exists():
        collect_corpus(root, characters)
        make_blank(root / "blank", texts_of(root / "train.jsonl"))
    tokenizer, config = (kind.from_pretrained(root / "blank") for kind in (AutoTokenizer, AutoConfig))
    return tokenizer, config, texts_of(root / "train.jsonl"), texts_of(root / "held_out.jsonl")


def rows(tokenizer: Tokenizer, texts: Iterable[str], most: int | None = None) -> Tensor:
    """The texts one after the other, cut into rows of equal length."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
        if most is not None and len(ids) >= most * LENGTH:
            break
    number = len(ids) // LENGTH
    return torch.tensor(ids[: number * LENGTH]).view(number, LENGTH)[:most]


def byte_count(tokenizer: Tokenizer, ids: Tensor) -> int:
    """Of the tokens that are predicted. In a byte-level vocabulary a token is written with one character a byte."""
    return sum(len(token) for row in ids for token in tokenizer.convert_ids_to_tokens(row[1:].tolist()))


def base(config: Any, train: Tensor, steps: int, folder: Path) -> Small:
    file = folder / f"prose-base-{config.hidden_size}-{len(train)}-{steps}.safetensors"
    return pretrained(config, drawn(train, None, ROWS, 0), steps, 3e-3, 0, file)


def facts(tokenizer: Tokenizer, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Questions about places that do not exist; only the answers are trained."""
    given = []
    for fact in invent_facts(number // len(KINDS), seed=seed):
        given.append([tokenizer(text)["input_ids"] for text in (f"Q: {fact.question}\nA:", f" {fact.answer}.")])
    longest = max(len(asked) + len(answer) for asked, answer in given)
    ids = torch.zeros(len(given), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (asked, answer) in enumerate(given):
        ids[row, : len(asked) + len(answer)] = torch.tensor(asked + answer)
        labels[row, len(asked) : len(asked) + len(answer)] = torch.tensor(answer)
    return ids, labels


def ring(ids: Tensor) -> list[Batch]:
    return [batch(some) | {"real": torch.ones_like(some, dtype=torch.bool)} for some in ids.split(16)]


def domains() -> dict[str, list[str]]:
    """Perl where there is one, else the C++ headers that come with torch; C; character tables; licences."""
    libraries = [Path("/usr/share/perl"), *Path("/usr/lib").glob("*/perl")]
    perl = [path for root in libraries for path in root.glob("**/*.pm") if "unicore" not in path.parts]
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch_headers = sorted((Path(found.origin).parent / "include").glob("**/*.h"))
    paths = sysconfig.get_paths()
    licences = [
        Path(str(file.locate()))
        for one in distributions()
        for file in one.files or ()
        if any(word in file.name.upper() for word in ("LICENSE", "NOTICE", "COPYING"))
    ]
    return {
        "perl" if perl else "c++ headers": _read(perl or torch_headers),
        "c headers": _read(Path(paths["include"]).glob("**/*.h")),
        "character tables": _read((Path(paths["stdlib"]) / "encodings").glob("*.py")),
        "licences": _read(path for path in licences if path.suffix != ".py"),
    }


def _read(paths: Iterable[Path]) -> list[str]:
    """Pieces in an order of no meaning; paragraphs that were there before are left out (licences repeat themselves)."""
    seen: set[str] = set()
    texts = []
    for path in sorted(paths, key=str):
        try:
            text = path.read_text(encoding="utf-8")[:PIECE]
        except (OSError, UnicodeDecodeError):
            continue
        new = [part for part in text.split("\n\n") if part not in seen]
        seen.update(new)
        if text.isascii() and new:
            texts.append("\n\n".join(new) + "\n\n")
    random.Random(0).shuffle(texts)
    return texts
