"""How fast an index is scored, written and filled, on one thread.

OMP_NUM_THREADS=1 python -m benchmarks.sketches [--quick]

Documents per second of one core that are scored against 8 queries, the best 100 of each kept. Rows are drawn: 14
modules with 256 numbers each (psift, p = 16), or with 42 entries each (eigen-topk). Seconds are those of the process.
The peer is one product of all rows with all queries, as float32 matrices in memory, where they fit. `first`: right
after opening, where each shard is also compared with its digest; files are in the page cache. The cost of a row's sums
is next to the product of the same tokens with the weight, of which a training step has three.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rows import Row, row, write
from treering import sketches
from treering.core.seeds import generator
from treering.sketches import IndexModule, IndexRecipe, RowSums, SideBasis, SketchSettings, TokenSpans, module_map, topk
from treering.sketches.encoding import encode_module

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.sketches"
PACKAGES = ("torch",)
MODULES, QUERIES, TOP, PER_SHARD = 14, 8, 100, 10_000
SETTINGS = {
    "psift, int8": SketchSettings(kind="psift", curvature="kfac", size=16),
    "psift, float16": SketchSettings(kind="psift", curvature="kfac", size=16, storage="float16"),
    "psift, float32": SketchSettings(kind="psift", curvature="kfac", size=16, storage="float32"),
    "eigen-topk, 256 × 384": SketchSettings(entries=42),
    "eigen-topk, 576 × 1,536": SketchSettings(entries=42),
}
GRIDS = {"eigen-topk, 256 × 384": (256, 384), "eigen-topk, 576 × 1,536": (576, 1536)}
BARS = {"psift, int8": 200_000.0, "eigen-topk, 256 × 384": 80_000.0}


def normal(*shape: int, name: str) -> Tensor:
    return torch.randn(*shape, generator=generator(0, "sketches", name))


def recipe(case: str) -> IndexRecipe:
    rows, columns = GRIDS.get(case, (16, 16))
    modules = tuple(
        IndexModule(name=f"m{i:02d}", outputs=rows, inputs=columns, rows=rows, columns=columns) for i in range(MODULES)
    )
    return IndexRecipe(settings=SETTINGS[case], modules=modules, model="m", statistics="s", basis="b")


def entries(documents: int, width: int, numbers: int, name: str) -> dict[str, Tensor]:
    """Stored tensors of a module with coordinates that are evenly distributed: real ones are closer together."""
    draw = generator(0, "sketches", name)
    places = torch.randint(numbers, (documents, width), generator=draw)
    codes = torch.randint(1, 128, (documents, width), generator=draw)
    gaps, values = topk.pack(places, codes, numbers)
    return {"gaps": gaps, "values": values, "scales": torch.rand(documents, generator=draw).bfloat16()}


def build(folder: Path, case: str, documents: int) -> None:
    of = recipe(case)
    with sketches.writing(folder, of) as writer:
        for number in range(documents // PER_SHARD):
            ids = [f"data.jsonl:{number * PER_SHARD + i}#0" for i in range(PER_SHARD)]
            with writer.shard(number) as shard:
                if case in GRIDS:
                    of_module = {m.name: entries(PER_SHARD, 42, m.numbers, f"{number} {m.name}") for m in of.modules}
                    shard.add_encoded(ids, [100] * PER_SHARD, of_module)
                else:
                    drawn = {m.name: normal(PER_SHARD, m.numbers, name=f"{number} {m.name}") for m in of.modules}
                    shard.add(ids, [100] * PER_SHARD, drawn)
        writer.publish(documents // PER_SHARD)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()  # of this process alone: the machine may have other work
    work()
    return time.process_time() - start


def scoring(case: str, documents: int, runs: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "index"
        build(folder, case, documents)
        index = sketches.open(folder)
        queries = {m.name: normal(QUERIES, m.numbers, name=f"query {m.name}") for m in index.recipe.modules}
        first = documents / seconds(lambda: index.score(queries, top=TOP))
        whole = index.dense(0, documents) if case not in GRIDS else None
        flat = torch.cat(list(queries.values()), 1).mT.contiguous()
        ours, peer = [], []
        for _ in range(runs):
            ours.append(documents / seconds(lambda: index.score(queries, top=TOP)))
            if whole is not None:
                peer.append(documents / seconds(lambda: (whole @ flat).mT.topk(TOP, 1)))
        yield row(
            "documents/s scored, 8 queries", case, ours, unit="documents/s", at_least=BARS.get(case),
            packages=PACKAGES, command=COMMAND,
        )  # fmt: skip
        yield row(
            "documents/s scored, 8 queries", f"{case}, first", [first], unit="documents/s",
            packages=PACKAGES, command=COMMAND,
        )  # fmt: skip
        if peer:
            yield row(
                "documents/s scored, index / float32 in memory", case, ours, peer, unit="documents/s",
                packages=PACKAGES, command=COMMAND,
            )  # fmt: skip
        yield row("bytes of a document", case, [index.bytes / documents], unit="B", packages=PACKAGES, command=COMMAND)


def encoding(runs: int) -> Iterator[Row]:
    for case, count in (("psift, int8", 4096), ("eigen-topk, 256 × 384", 64), ("eigen-topk, 576 × 1,536", 8)):
        of = recipe(case)
        module = of.modules[0]
        x = normal(count, module.numbers, name=case)
        work = partial(encode_module, of, module, x)
        work()
        found = [count / seconds(work) for _ in range(runs)]
        yield row("documents and modules/s encoded", case, found, unit="1/s", packages=PACKAGES, command=COMMAND)


def summing(runs: int) -> Iterator[Row]:
    """The sums of rows of 8 documents of 128 tokens, next to one product of their inputs with the weight."""
    N, M, T = 1536, 576, 1024
    a, g, W = normal(T, M, name="a"), normal(T, N, name="g"), normal(N, M, name="W")
    spans = TokenSpans.of_lengths([128] * 8)
    sides = {}
    for side, x in (("input_basis", a), ("gradient_basis", g)):
        values, vectors = torch.linalg.eigh(x.mT @ x / T)
        sides[side] = SideBasis(values=values, vectors=vectors)
    for case, settings in (
        ("psift, p = 16", SketchSettings(kind="psift", curvature="kfac", size=16)),
        ("psift, p = 64", SketchSettings(kind="psift", curvature="kfac", size=64)),
        ("eigen-topk, all coordinates", SketchSettings(curvature="kfac")),
        ("eigen-topk, block 256", SketchSettings(curvature="kfac", block=256)),
    ):
        mapped = module_map(settings, "m", N, M, **sides)

        def sums(mapped: sketches.ModuleMap = mapped) -> None:
            group = RowSums({"m": mapped}, 8)
            group.add("m", a, g, spans)

        sums()
        ours, peer = [], []
        for _ in range(runs):
            ours.append(seconds(sums))
            peer.append(seconds(lambda: a @ W.mT))
        yield row(
            "time of the sums of rows / one product with the weight", f"{case}, 1,536 × 576, 8 documents of 128 tokens",
            ours, peer, unit="s", packages=PACKAGES, command=COMMAND,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="20,000 documents in place of 60,000")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    runs = 3 if quick else 7
    rows: list[Row] = []
    for case in SETTINGS:
        rows += scoring(case, 20_000 if quick else 60_000, runs)
    rows += encoding(runs)
    rows += summing(runs)
    write("sketches", "cpu2", rows)


if __name__ == "__main__":
    main()
