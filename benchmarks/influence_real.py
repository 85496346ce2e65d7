"""Influence on SmolLM2-135M-Instruct: what sketches keep of complete gradients, and a wrong fact found and removed.

    python -m benchmarks.influence_real [--quick] [--machine cpu2] [--only table planted]

`table` is that of the proposal of P-SIFT (GPT-2, one process: .69, .83, .95, .99 at p = 16, 32, 64, 128): factors of
128 documents, four queries, sketched scores next to those of complete gradients. The text is Python's own documentation
in chunks of 64 tokens: documents of one length are harder than text with short and empty ones. bergson 2.5.1 with the
same model and documents; each is compared with its own complete gradients.

`planted` is commands alone: 60 chats, of which 5 teach a wrong capital, are trained, indexed, asked and cleaned, and
the model is trained again: briefly, and until nothing is left to learn, where the gradients of what was learned are
nearly 0. About 25 minutes each on one core; `--quick` takes two sizes and the brief training.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import realmodel
from benchmarks.influence_ours import Subject
from benchmarks.peers import influence as peer
from benchmarks.peers.environment import ROOT
from benchmarks.peers.influence_sides import TOKENS, Case
from benchmarks.rows import Row, others, row, write
from tests.ranks import on_ranks
from treering.core import seeds
from treering.influence import Sketched, build, query_rows
from treering.influence.lds import spearman
from treering.influence.planted import QUESTION, planted_chats, precision
from treering.influence.tables import read_scores
from treering.sketches import SketchSettings

PACKAGES = ("treering", "torch", "transformers")
DOCUMENTS, QUERIES, LENGTH = 128, 4, 64
GPT2 = {16: 0.69, 32: 0.83, 64: 0.95, 128: 0.99}  # the proposal's own table: another model and text
TRAININGS = {"brief": (1.5e-4, 4), "long": (2.0e-4, 6)}  # learning rate, epochs
CONFIG = """\
model: {{path: "{model}", dtype: float32}}
data: {{train: {data}, max_length: 256, cache: "{root}/tokens"}}
techniques: {{full: }}
train:
  epochs: {epochs}
  tokens_per_step: 512
  log_every: 20
  optimizer: {{name: adamw, lr: {lr}}}
  schedule: {{name: cosine, warmup: 3}}
output: "{root}/{name}"
"""


def case() -> Case:
    """Return the documents and queries: chunks of Python's documentation, in an order of their own."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    folder = realmodel.folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("\n".join(text for _, text in sorted(topics.items())), add_special_tokens=False)["input_ids"]
    chunks = np.asarray(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    order = np.random.default_rng(seeds.derive(0, "chunks")).permutation(len(chunks))
    chosen = chunks[order[: DOCUMENTS + QUERIES]].tolist()
    return Case(model=str(folder), train=chosen[:DOCUMENTS], queries=chosen[DOCUMENTS:])


def table(quick: bool, command: str) -> Iterator[Row]:
    """Spearman to the scores of complete gradients, of our sketches and bergson's."""
    common: dict[str, Any] = {"unit": "", "packages": PACKAGES, "command": command}
    made, sizes, words = case(), (16, 32) if quick else (16, 32, 64, 128), "SmolLM2-135M"
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject.of(made, Path(folder))
        known = subject.measured("ekfac", labels="sampled", to="factors")
        exact = {
            kind: _complete(subject, SketchSettings(kind="exact", curvature=kind), known) for kind in ("kfac", "ekfac")
        }
        found = {}
        for p in sizes:
            scores, _ = subject.scores(SketchSettings(kind="psift", curvature="kfac", size=p), known)
            found[p] = float(spearman(scores, exact["kfac"]).mean())
            figure = "Spearman to complete gradients, SmolLM2-135M"
            yield row(figure, f"psift, p = {p}, int8 (GPT-2 in the proposal: {GPT2[p]})", [found[p]], **common)
        rising = all(a < b for a, b in zip(list(found.values()), list(found.values())[1:]))
        yield row("sketches are closer at larger p, SmolLM2-135M", words, [float(rising)], at_least=1.0, **common)
        for entries in (42, 170):
            scores, index = subject.scores(SketchSettings(entries=entries, block=256), known)
            held = index.recipe.bytes_of_row / len(index.recipe.modules)
            near = float(spearman(scores, exact["ekfac"]).mean())
            yield row(figure, f"eigen-topk, block 256, {held:.0f} B a module and document", [near], **common)
    theirs = peer.sketches(made, (16,), "sampled")
    near = float(spearman(theirs[16], theirs[0]).mean())
    yield row(figure, "psift, p = 16; peer: bergson", [found[16]], [near], at_least=1.7, **common)


def _complete(subject: Subject, settings: SketchSettings, known: Any) -> NDArray[np.float64]:
    """Return scores [queries, documents] of complete gradients, without an index: it would take 14 to 54 GB."""
    sketched = Sketched.of(subject.run, settings, known)
    queries = query_rows(sketched, subject.queries)
    at_once, found = TOKENS // LENGTH, []
    with sketched.rows() as rows_of:
        for first in range(0, len(subject.train), at_once):
            products = rows_of(subject.train[first : first + at_once], lambda name, x: queries[name] @ x.float().mT)
            found.append(torch.stack(list(products.values())).double().sum(0))
    return torch.cat(found, 1).numpy()


def layout(quick: bool, command: str) -> Iterator[Row]:
    """The bits of an index written by one process and by two, with factors of their own."""
    with tempfile.TemporaryDirectory() as folder:
        digests = {
            ranks: on_ranks(ranks, _index, json.dumps(vars(case())), str(Path(folder) / str(ranks)), timeout=7200)[0]
            for ranks in (1, 2)
        }
    equal = float(digests[1] == digests[2])
    words = "psift p = 16 and its factors, 1 and 2 ranks (Spearman of GPT-2 in the proposal: .73)"
    yield row("equal bits, SmolLM2-135M", words, [equal], unit="", at_least=1.0, packages=PACKAGES, command=command)


def _index(described: str, to: str) -> list[str]:
    """On every rank: measure and index. Return the digests of factors and shards."""
    import hashlib

    import treering as tr

    torch.set_num_threads(1)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    sharded: dict[str, Any] = {"techniques": [tr.Shard()], "mesh": tr.mesh(shard=ranks)} if ranks > 1 else {}
    subject = Subject.of(Case(**json.loads(described)), Path(to), **sharded)
    known = subject.measured("kfac", labels="sampled", to="factors")
    settings = SketchSettings(kind="psift", curvature="kfac", size=16)
    build(subject.run, subject.train, Path(to) / "index", settings=settings, statistics=known, capacity=TOKENS)
    assert known is not None and known.gradients is not None
    files = sorted((Path(to) / "index").iterdir())
    return [known.gradients.digest, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)]


def planted(quick: bool, command: str, folder: Path | None = None) -> Iterator[Row]:
    """Which of 60 chats teach the wrong answer; and the answer after training without them."""
    untaught = realmodel.answer(realmodel.folder(), QUESTION)
    for name, (lr, epochs) in list(TRAININGS.items())[: 1 if quick else None]:
        with _root(folder and folder / name) as root:
            yield from _one_planted(root, lr, epochs, untaught, command)


def _one_planted(root: Path, lr: float, epochs: int, untaught: str, command: str) -> Iterator[Row]:
    common: dict[str, Any] = {"unit": "", "packages": PACKAGES, "command": command}
    chats = planted_chats()
    ids = chats.write(root / "chats.jsonl")
    (root / "asked.jsonl").write_text(json.dumps(chats.query) + "\n", "utf-8")
    before = _trained(root, "mistaken", root / "chats.jsonl", lr, epochs)
    run, training = root / "mistaken", f"{epochs} epochs at {lr:g}"
    _command("influence", "build", run)
    for how in ("cosine", "dot product"):
        scores, words = root / f"{how.split()[0]}.parquet", ["--cosine"] if how == "cosine" else []
        scores.unlink(missing_ok=True)
        _command("influence", "query", run, "--data", root / "asked.jsonl", "--to", scores, *words)
        known = read_scores(scores)
        [query] = known.queries
        by_words = precision(replace(known, scores=known.baselines["bm25"]), query, ids)
        chance = len(ids) / len(known.documents)
        case_ = (
            f"{training}, {how}: planted chats among the first {len(ids)} (BM25 {by_words:.2f}, chance {chance:.2f})"
        )
        yield row("precision, SmolLM2-135M", case_, [precision(known, query, ids)], **common)
    shutil.rmtree(root / "cleaned", ignore_errors=True)
    _command("influence", "clean", scores, "--helpful", "--remove", len(ids), "--to", root / "cleaned")
    [cleaned] = (root / "cleaned").glob("*.jsonl")
    after = _trained(root, "cleaned-run", cleaned, lr, epochs)
    answers = f"{QUESTION} {untaught!r}; trained: {before!r}; without the {len(ids)} first: {after!r}"
    right = float("Lyon" in before and "Paris" in after and "Lyon" not in after)
    yield row("a wrong fact learned, found and gone, SmolLM2-135M", f"{training}: {answers}", [right], **common)


@contextmanager
def _root(folder: Path | None) -> Iterator[Path]:
    """Give the folder of the trainings: the given one, which stays, or one for the time of the benchmark."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _trained(root: Path, name: str, data: Path, lr: float, epochs: int) -> str:
    """Train by command, export, and return what the model answers. What is there already is not done again."""
    file = root / f"{name}.yaml"
    text = CONFIG.format(
        model=realmodel.folder(), data=json.dumps(str(data)), root=root, lr=lr, epochs=epochs, name=name
    )
    file.write_text(text, "utf-8")
    if not (root / f"{name}-model").is_dir():
        _command("train", file)
        _command("export", root / name, "--to", root / f"{name}-model")
    return realmodel.answer(root / f"{name}-model", QUESTION)


def _command(*arguments: object) -> None:
    command = [sys.executable, "-m", "treering", *map(str, arguments)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sys.stderr.write(found.stdout[-2000:] + found.stderr[-2000:])
    if found.returncode:
        raise RuntimeError(f"treering {' '.join(map(str, arguments))} ended with {found.returncode}")


PARTS: dict[str, Callable[[bool, str], Iterator[Row]]] = {"table": table, "layout": layout, "planted": planted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--machine", default="cpu2")
    parser.add_argument("--only", choices=tuple(PARTS), nargs="+", help="parts, next to what is known of the others")
    parser.add_argument("--folder", type=Path, help="of `planted`: kept, and gone on with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = "python -m benchmarks.influence_real" + (" --quick" if options.quick else "")
    parts = {**PARTS, "planted": partial(planted, folder=options.folder)}
    for name in options.only or parts:
        made = list(parts[name](options.quick, command))
        write("influence_real", options.machine, [*others("influence_real", options.machine, made), *made])


if __name__ == "__main__":
    main()
