"""Indexes of drawn documents, for the tests of folders and scores."""

from pathlib import Path

import torch
from torch import Tensor

from tests.sketches.toy import normal
from treering.sketches import IndexModule, IndexRecipe, SketchSettings, writing

MODULES = {"a": (6, 10), "b": (7, 9), "c": (3, 5)}
KINDS = {
    "psift": SketchSettings(kind="psift", curvature="kfac", size=16),
    "psift float16": SketchSettings(kind="psift", curvature="kfac", storage="float16"),
    "psift float32": SketchSettings(kind="psift", curvature="kfac", storage="float32"),
    "eigen-topk": SketchSettings(entries=12),
    "exact int4": SketchSettings(kind="exact", storage="int4"),
    "gradients": SketchSettings(kind="exact", curvature="identity"),
}


def recipe(kind: str = "psift", shapes: dict[str, tuple[int, int]] = MODULES, **digests) -> IndexRecipe:
    modules = tuple(IndexModule(name=n, outputs=2 * r, inputs=2 * c, rows=r, columns=c) for n, (r, c) in shapes.items())
    given = {"model": "m1", "statistics": "s1", "basis": "b1"} | digests
    return IndexRecipe(settings=KINDS[kind], modules=modules, **given)


def rows(of: IndexRecipe, first: int, last: int, tag: str = "d") -> dict[str, Tensor]:
    """Rows of documents `first` to `last`, each drawn by its number; document 3 has none in module c."""
    made = {}
    for module in of.modules:
        x = torch.stack([normal(module.numbers, name=f"{tag}{module.name}{i}") for i in range(first, last)])
        x *= torch.logspace(0, -2, module.numbers) * 10.0 ** (torch.arange(first, last)[:, None] % 3)
        if module.name == "c" and first <= 3 < last:
            x[3 - first] = 0
        made[module.name] = x
    return made


def ids(first: int, last: int) -> list[str]:
    return [f"übung.jsonl:{i}#0" for i in range(first, last)]


def write_shard(writer, number: int, per_shard: int = 5, pieces: int = 2, total: int = 10**6) -> None:
    start, stop = number * per_shard, min(total, (number + 1) * per_shard)
    with writer.shard(number) as shard:
        middle = start + (stop - start) // pieces
        for first, last in ((start, middle), (middle, stop)) if pieces > 1 else ((start, stop),):
            if last > first:
                shard.add(ids(first, last), range(first + 1, last + 1), rows(writer.recipe, first, last))


def build(folder: Path, kind: str = "psift", shards: int = 3, order=None, **how) -> IndexRecipe:
    of = recipe(kind)
    with writing(folder, of) as writer:
        for number in order or range(shards):
            write_shard(writer, number, **how)
        writer.publish(shards)
    return of


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
